"""Names on disk, and what config.json and hf_quant_config.json say, in nvidia-modelopt's layout and
in that of compressed-tensors.

What engines do with the lists: vLLM takes a module for unquantized that ModelOpt's list names, that
holds an entry of it as a part, or that matches an entry as a glob; in mixed precision a layer's
experts have the format of any module below them. compressed-tensors' entries are names, or after
``re:`` regular expressions from the beginning of the name, and each engine has its own prefix
(``backbone.``, ``model.``), so they hold none.

Shapes: E experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.names import expert_name, to_hub
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.model.fp32 import keeps_fp32
from nemo_hybrid.precision.assign import (
    BLOCK,
    WITH_INPUTS,
    Assignment,
    Format,
    groups,
    places,
    unquantizable,
    weights,
)
from nemo_hybrid.precision.groups import is_stacked
from nemo_hybrid.precision.quantize import Layout

Target = Literal["bf16", "nvfp4", "mixed", "fp8", "compressed-tensors"]
HF_QUANT = "hf_quant_config.json"
ALGOS: dict[Format, str] = {"fp8": "FP8", "nvfp4": "NVFP4", "nvfp4_w4a16": "W4A16_NVFP4"}
INPUT_SCALES: dict[Layout, str] = {
    "modelopt": "input_scale", "compressed-tensors": "input_global_scale",
}  # fmt: skip
LARGEST = {"fp8": 448.0, "nvfp4": 2688.0}
"""What a scale of inputs stands for, over the scale."""


@dataclass(frozen=True)
class ExportFacts:
    """What came of an export."""

    source: Path
    shape: HybridConfig
    assignment: Assignment
    calibration: Calibration | None
    parameters: int
    bytes_before: int
    """Of all weights, as of bytes_after."""
    bytes_after: int
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    """Family -> kind of NVFP4 scales -> relative error of the weights, ||stored - w|| / ||w||: for
    the chosen scales and for amax. Of large matrices an eighth is looked at."""

    @property
    def share(self) -> float:
        """Bytes of all weights, over those that they take in BF16."""
        return self.bytes_after / (2 * self.parameters)


def layout_of(target: Target) -> Layout:
    return "compressed-tensors" if target == "compressed-tensors" else "modelopt"


def modules_of(place: str, shape: tuple[int, ...]) -> list[str]:
    """Names on disk, without ``.weight``, of a place whose weight has this shape."""
    if not is_stacked(place):
        return [place]
    return [expert_name(place, e).removesuffix(".weight") for e in range(shape[0])]


def stored_like(shape: tuple[int, ...], format: Format, layout: Layout) -> dict[str, Tensor]:
    """Last name part -> tensor without storage, of all that is stored for a quantized weight [out,
    in]."""
    rows, width = shape
    scalar = (1,) if layout == "compressed-tensors" else ()
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    if format == "fp8":
        sizes = {"weight": (shape, torch.float8_e4m3fn), "weight_scale": ((), torch.float32)}
    else:
        packed, second = ("weight", "weight_scale_2")
        if layout == "compressed-tensors":
            packed, second = ("weight_packed", "weight_global_scale")
        sizes = {
            packed: ((rows, width // 2), torch.uint8),
            "weight_scale": ((rows, width // BLOCK), torch.float8_e4m3fn),
            second: (scalar, torch.float32),
        }
    if format in WITH_INPUTS:
        sizes[INPUT_SCALES[layout]] = (scalar, torch.float32)
    return {
        part: torch.empty(size, dtype=dtype, device="meta") for part, (size, dtype) in sizes.items()
    }


def stored_tensors(
    shape: HybridConfig, assignment: Mapping[str, Format], layout: Layout
) -> dict[str, dict[str, Tensor]]:
    """Weight's name on disk -> names on disk -> tensors without storage: everything that is stored
    for it, but scales of keys and values."""
    out: dict[str, dict[str, Tensor]] = {}
    for own, tensor in weights(shape).items():
        format = assignment.get(own.removesuffix(".weight"), "bf16")
        dtype = torch.float32 if keeps_fp32(own) else torch.bfloat16
        for name, matrix in to_hub(own, tensor):
            if format == "bf16":
                out[name] = {name: matrix.to(dtype)}
                continue
            module, parts = name.removesuffix(".weight"), stored_like(matrix.shape, format, layout)
            out[name] = {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return out


def stored_scales(
    assignment: Mapping[str, Format],
    layout: Layout,
    calibration: Calibration | None,
    kv_cache: str,
) -> dict[str, dict[str, Tensor]]:
    """Place -> last name part -> scale, of inputs, and of keys and values. Raises UserError where
    the calibration lacks a place, or saw too little for a scale."""
    out: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for group in groups(assignment):
        format = assignment[group[0]]
        if format not in WITH_INPUTS:
            continue
        if calibration is None or any(place not in calibration.amax for place in group):
            raise UserError(f"{group[0]} is {format}, whose input scale needs calibration")
        # One scale for what engines fuse: q, k and v, and all experts of a layer.
        amax = torch.stack([calibration.amax[place].max().float() for place in group]).max()
        scale = torch.where(amax == 0, 1.0, amax) / LARGEST[format]
        if scale < torch.finfo(torch.float32).tiny or not scale.reciprocal().isfinite():
            raise UserError(
                f"the inputs of {group[0]} are at most {float(amax):.3g}, too small for a scale: "
                "calibrate on other data, or with a higher percentile"
            )
        if layout == "compressed-tensors":
            scale = scale.reciprocal().reshape(1)
        for place in group:
            out[place][INPUT_SCALES[layout]] = scale
    if kv_cache == "fp8" and calibration is not None:
        for place, largest in calibration.kv.items():
            part = f"{place.rpartition('.')[2][0]}_scale"
            out[place][part] = torch.tensor((largest or 1.0) / 448.0)
    return dict(out)


def quantization_configs(
    shape: HybridConfig,
    assignment: Mapping[str, Format],
    target: Target,
    kv_cache: bool,
    version: str = f"nemo_hybrid {__version__}",
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """quantization_config of config.json, and hf_quant_config.json; None: there is none.

    ``assignment`` fits the target (`assign.fitted`). ``kv_cache``: keys and values have scales.
    ``version``: of the program that writes.
    """
    if target == "bf16":
        return None, None
    if target == "compressed-tensors":
        return _compressed_tensors(shape, assignment), None
    sizes, excluded = places(shape), _excluded(shape, assignment)
    modules: defaultdict[Format, list[str]] = defaultdict(list)
    for place, format in assignment.items():
        if format != "bf16":
            modules[format] += modules_of(place, sizes[place])
    mixed = target == "mixed"
    common: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION" if mixed else ALGOS[next(iter(modules))]
    }
    if modules.keys() - {"fp8"}:
        common["group_size"] = BLOCK
    if mixed:
        common["quantized_layers"] = {
            name: {"quant_algo": ALGOS[format]} | ({} if format == "fp8" else {"group_size": BLOCK})
            for format, names in modules.items()
            for name in names
        }
    # TensorRT-LLM and older vLLM and SGLang read these files only under this name of a producer.
    producer = {"name": "modelopt", "version": version}
    in_config = {
        **common,
        "quant_method": "modelopt",
        "producer": producer,
        "config_groups": {
            f"group_{i}": {
                **({"input_activations": _numbers(format)} if format in WITH_INPUTS else {}),
                "weights": _numbers(format),
                "targets": sorted(names) if mixed else ["Linear"],
            }
            for i, (format, names) in enumerate(modules.items())
        },
        "ignore": excluded,
    }
    if kv_cache:
        in_config["kv_cache_scheme"] = _numbers("fp8")
    algo = "FP8" if kv_cache else None
    twin = {**common, "kv_cache_quant_algo": algo, "exclude_modules": excluded}
    return in_config, {"producer": producer, "quantization": twin}


def _excluded(shape: HybridConfig, assignment: Mapping[str, Format]) -> list[str]:
    """All that stays as it is, as far as engines have a linear layer, or experts, in its place."""
    names = [place for place, format in assignment.items() if format == "bf16"]
    # A layer's experts are one module in engines: no name below it excludes it.
    names = [name.rpartition(".")[0] if is_stacked(name) else name for name in names]
    names += [n for n in unquantizable(shape) if n.endswith((".gate", ".conv1d", ".embeddings"))]
    if not _quantizes_mtp(assignment):
        names = [name for name in names if not name.startswith("mtp.")]
        names += ["mtp*"] if shape.mtp_num_depths else []
    return sorted(set(names))


def _quantizes_mtp(assignment: Mapping[str, Format]) -> bool:
    return any(f != "bf16" for place, f in assignment.items() if place.startswith("mtp."))


def _numbers(format: Format) -> dict[str, Any]:
    if format == "fp8":
        return {"dynamic": False, "num_bits": 8, "type": "float"}
    return {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}


def _compressed_tensors(shape: HybridConfig, assignment: Mapping[str, Format]) -> dict[str, Any]:
    e4m3 = dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
    weights = {**_numbers("nvfp4"), "strategy": "tensor_group", "symmetric": True, **e4m3}
    name = "nvfp4-pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        # "local": scales of blocks are found anew, the tensor's scale is the stored one.
        "input_activations": {**weights, "dynamic": "local"}
        if "nvfp4" in assignment.values()
        else None,
        "output_activations": None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": _ignored(shape, assignment),
        "kv_cache_scheme": None,
    }


def _ignored(shape: HybridConfig, assignment: Mapping[str, Format]) -> list[str]:
    names = [place for place, format in assignment.items() if format == "bf16"]
    names += [name for name in unquantizable(shape) if name.endswith((".gate", ".conv1d"))]
    quantized = [place for place, format in assignment.items() if format != "bf16"]
    out = ["lm_head"] if assignment["lm_head"] == "bf16" else []
    mtp = _quantizes_mtp(assignment)
    for root in ("backbone", "mtp"):
        if root == "mtp" and not mtp:
            out += [r"re:mtp\..*"] if shape.mtp_num_depths else []
            continue
        beginning = r"mtp" if root == "mtp" else r"(?!mtp\.).*" if mtp else ".*"
        partly = _by_part(root, quantized)
        for part, layers in sorted(_by_part(root, names).items()):
            which = rf"layers\.({'|'.join(map(str, sorted(layers)))})\." if part in partly else ""
            within = "" if which or root == "backbone" else r".*\."
            out.append(rf"re:{beginning}\.{within}{which}{part}$")
    return out


def _by_part(root: str, names: Iterable[str]) -> dict[str, set[int]]:
    """Regular expression for what follows "layers.N." -> the numbers N."""
    out: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        match = re.fullmatch(rf"{root}\.layers\.(\d+)\.(.+)", name)
        if match:
            experts = is_stacked(name)
            out[r"mixer\.experts\..*" if experts else re.escape(match[2])].add(int(match[1]))
    return dict(out)
