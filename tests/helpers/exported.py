"""Exported directories made by hand, from the description of the formats alone.

Quantization is a naive loop over no more than arithmetic, and files are written by the safetensors
library, so that neither our writer nor our quantizer judges itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.nvfp4_formula import E2M1
from nemo_hybrid.checkpoint.files import manifest_text
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.config.hf import HybridConfig, config_json
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.export.verify import verify_directory
from nemo_hybrid.files import FileRecord
from nemo_hybrid.model.hybrid import HybridLM

from .tiny_models import loud_model, tiny_config

WEIGHTS = "model.safetensors"
ALGOS = {"fp8": "FP8", "nvfp4": "NVFP4", "nvfp4_w4a16": "W4A16_NVFP4"}
QKV = ("q_proj", "k_proj", "v_proj")


MIXED = {
    "backbone*.experts.*": "nvfp4",
    "*.shared_experts.*": "fp8",
    "*.mixer.in_proj": "fp8",
    "backbone.layers.2.mixer.[qkv]_proj": "nvfp4_w4a16",
}
KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"formats": MIXED, "kv_cache": True},
    "nvfp4": {"formats": {"backbone*.experts.*": "nvfp4"}, "algo": "NVFP4"},
    "w4a16": {"formats": {"backbone*.experts.*": "nvfp4_w4a16"}, "algo": "W4A16_NVFP4"},
    "fp8": {"formats": {"*.mixer.in_proj": "fp8", "*.shared_experts.*": "fp8"}, "algo": "FP8"},
    "compressed": {
        "formats": {"backbone*.experts.*": "nvfp4", "*.mixer.[qkv]_proj": "nvfp4"},
        "layout": "compressed-tensors",
    },
    "compressed_w4a16": {
        "formats": {"backbone*.experts.*": "nvfp4_w4a16"},
        "layout": "compressed-tensors",
    },
}
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
ANY = "backbone.layers.1.mixer.shared_experts.up_proj"
Made = Callable[..., Path]


def export_config(pattern: str = "ME*-", **changes: object) -> HybridConfig:
    """A tiny model whose widths are all divisible by 16."""
    sizes: dict[str, object] = dict(
        mamba_head_dim=16, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48,
        mtp_num_depths=1, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return tiny_config(pattern, **(sizes | changes))


def nearest_e2m1(x: Tensor) -> Tensor:
    """Codes of values within [-6, 6]."""
    grid = torch.from_numpy(E2M1).float()
    return (x.abs()[..., None] - grid).abs().argmin(-1).to(torch.uint8) | (x < 0).byte() << 3


def nvfp4(w: Tensor, amax: Tensor, compressed: bool) -> dict[str, Tensor]:
    w, t = w.float(), amax / 2688
    blocks = w.view(len(w), -1, 16)
    scale = (blocks.abs().amax(-1) / (6 * t)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    codes = nearest_e2m1((blocks / (scale.float() * t)[..., None]).clamp(-6, 6)).view(w.shape)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    if compressed:
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return dict(zip(names, (packed, scale, (1 / t).view(1)), strict=True))
    return dict(zip(("weight", "weight_scale", "weight_scale_2"), (packed, scale, t), strict=True))


def fp8(w: Tensor, amax: Tensor) -> dict[str, Tensor]:
    scale = amax / 448
    return {"weight": (w.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def build(
    directory: Path,
    formats: dict[str, str],
    layout: str = "modelopt",
    algo: str = "MIXED_PRECISION",
    kv_cache: bool = False,
    config: HybridConfig | None = None,
) -> tuple[HybridLM, HybridLM]:
    """Write a directory; the source, in bf16, and what should be read of it, dequantized to fp32.

    ``formats``: glob over module names -> format, of several the last counts.
    """
    model = loud_model(config or export_config()).bfloat16()
    read = HybridLM(model.config).float()
    values = dict(tensors_by_name(read))
    modules: dict[str, str] = {}
    files: dict[str, Tensor] = {}
    weights = {
        name: part for own, t in tensors_by_name(model).items() for name, part in to_hub(own, t)
    }
    targets = {name: part for own, t in values.items() for name, part in to_hub(own, t)}
    with torch.no_grad():
        for name, w in weights.items():
            targets[name].copy_(w)
            module = name.removesuffix(".weight")
            format = ([f for glob, f in formats.items() if fnmatch(module, glob)] or [None])[-1]
            if format is None:
                keep = name.rpartition(".")[2] in FP32_NAMES
                files[name] = (w.float() if keep else w).contiguous().clone()
                continue
            modules[module] = format
            head, _, last = module.rpartition(".")
            fused = [f"{head}.{p}.weight" for p in QKV] if last in QKV else [name]
            amax = torch.stack([weights[n].abs().max().float() for n in fused]).max()
            compressed = layout == "compressed-tensors"
            parts = fp8(w, amax) if format == "fp8" else nvfp4(w, amax, compressed)
            if format != "nvfp4_w4a16":
                # For inputs of up to 4, which are those of a loud model by their size.
                given = torch.tensor(4.0) / (448 if format == "fp8" else 2688)
                parts |= (
                    {"input_global_scale": (1 / given).view(1)}
                    if compressed
                    else {"input_scale": given}
                )
            files |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            targets[name].copy_(naive_decode(parts))
            if kv_cache and last in QKV[1:]:
                files[f"{module}.{last[0]}_scale"] = torch.tensor(0.02)
        if kv_cache:
            for name in weights:
                match = re.fullmatch(r"(backbone.*\.([kv])_proj)\.weight", name)
                if match:
                    files[f"{match[1]}.{match[2]}_scale"] = torch.tensor(0.02)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(files, directory / WEIGHTS, {"format": "pt"})
    linear = [n.removesuffix(".weight") for n, w in weights.items() if w.dim() > 1]
    rest = [m for m in linear if m not in modules and "embeddings" not in m]
    rest = sorted({re.sub(r"(.*\.experts)\..*", r"\1", m) for m in rest})
    described: dict[str, Any] = config_json(model.config)
    described["quantization_config"], twin = quantization(modules, rest, layout, algo, kv_cache)
    write_json(directory / "config.json", described)
    if twin is not None:
        write_json(directory / "hf_quant_config.json", twin)
    (directory / "README.md").write_text("# Made by hand")
    seal(directory)
    return model, read


def quantization(
    modules: dict[str, str], rest: list[str], layout: str, algo: str, kv_cache: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """quantization_config, and of ModelOpt the contents of hf_quant_config.json."""
    if layout == "compressed-tensors":
        weights = {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "symmetric": True, "dynamic": False,
        }  # fmt: skip
        given = None if "nvfp4_w4a16" in modules.values() else {**weights, "dynamic": "local"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": given}
        ignore = [
            m if m == "lm_head" else "re:.*" + re.escape(m.removeprefix("backbone.")) + "(\\.|$)"
            for m in rest
        ]
        return {
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
            "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ignore, "kv_cache_scheme": None,
        }, None  # fmt: skip
    producer = {"name": "modelopt", "version": "by hand"}
    layers = {
        m: {"quant_algo": ALGOS[f]} | ({} if f == "fp8" else {"group_size": 16})
        for m, f in modules.items()
    }
    mixed = {"quantized_layers": layers} if algo == "MIXED_PRECISION" else {}
    size = {"group_size": 16} if set(modules.values()) - {"fp8"} else {}
    twin = {
        "quant_algo": algo, "kv_cache_quant_algo": "FP8" if kv_cache else None, **size,
        "exclude_modules": rest, **mixed,
    }  # fmt: skip
    scheme = {"type": "float", "num_bits": 8} if kv_cache else None
    groups = {}
    for format in sorted(set(modules.values())):
        numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
        if format != "fp8":
            numbers |= {"num_bits": 4, "group_size": 16}
        inputs = {} if format == "nvfp4_w4a16" else {"input_activations": numbers}
        targets = [m for m, f in modules.items() if f == format] if mixed else ["Linear"]
        groups[f"group_{format}"] = {"targets": targets, "weights": numbers, **inputs}
    config = {
        "quant_method": "modelopt", "quant_algo": algo, "ignore": rest, "producer": producer,
        "kv_cache_scheme": scheme, "config_groups": groups, **size, **mixed,
    }  # fmt: skip
    return config, {"producer": producer, "quantization": twin}


def naive_decode(parts: dict[str, Tensor]) -> Tensor:
    """fp32 values, element by element as the formats say."""
    packed = parts["weight_packed" if "weight_packed" in parts else "weight"]
    if packed.dtype != torch.uint8:
        return packed.float() * parts["weight_scale"]
    grid = torch.from_numpy(E2M1).float()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    values = grid[codes & 7] * (1 - 2 * (codes >> 3))
    factor = (
        parts["weight_scale_2"] if "weight_scale_2" in parts else 1 / parts["weight_global_scale"]
    )
    scale = parts["weight_scale"].float().repeat_interleave(16, 1)
    return values * scale * factor


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def edit_json(directory: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, and the manifest with it."""
    value = json.loads((directory / name).read_text())
    change(value)
    write_json(directory / name, value)
    seal(directory)


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the only file, and the manifest with it."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    seal(directory)


def seal(directory: Path) -> None:
    """Write the manifest of what is there."""
    records = {}
    for path in sorted(directory.iterdir()):
        if path.name != "manifest.json":
            content = path.read_bytes()
            records[path.name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    (directory / "manifest.json").write_text(manifest_text(records))


def save_base(source: HybridLM, place: Path) -> None:
    """Beside the export, whose generation settings are then the base's."""
    source.save_hf(str(place / "base"))
    shutil.copy(place / "base" / "generation_config.json", place / "export")
    seal(place / "export")


def failed(directory: Path, base: bool = True) -> dict[str, str]:
    """Name of a check that failed -> what it says."""
    result = verify_directory(
        directory, base=str(directory.parent / "base") if base else None, tokens=40
    )
    return {check.name: check.note for check in result.checks if check.passed is False}
