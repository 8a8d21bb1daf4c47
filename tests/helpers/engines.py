"""Exported directories as serving engines read them, by the rules of vLLM's loaders (0.32,
``modelopt.py`` and ``compressed_tensors``).

Nothing of the writer is used, so that both must be right. Engines have many rules for what stands
in the configuration: names, parts of names, wildcards, fields that replace others. Here only what
all of them take alike is sound; for all else `read_as_engines` raises AssertionError.

A module is the name of a weight on disk without ``.weight``, one per routed expert.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.model.hybrid import HybridLM

Json = dict[str, Any]
FP32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")
ALGOS = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4_w4a16"}
EMBEDDINGS = "backbone.embeddings"
EXPERT = re.compile(r"(.+\.mixer\.experts)\.\d+\.(up|down)_proj")
QKV = re.compile(r"(.+\.mixer)\.[qkv]_proj")
# Names, escaped dots, ".*", groups of alternatives that hold no others, "$", and "not in the MTP
# block": engines read these alike.
PATTERN = re.compile(r"re:(?:\.\*|\(\?!mtp\\\.\)|\((?:\\\.|[\w$|])*\)|\\\.|[\w$])*")
# Engines read more fields than these, and some of them in place of what is looked at here.
FIELDS = {
    "modelopt": "quant_method quant_algo producer config_groups ignore group_size quantized_layers"
    " kv_cache_scheme",
    "compressed-tensors": "quant_method format quantization_status config_groups ignore"
    " kv_cache_scheme",
    "group": "targets weights input_activations output_activations format",
    "twin": "quant_algo kv_cache_quant_algo group_size exclude_modules quantized_layers",
    "layer": "quant_algo group_size",
}


class Seen(NamedTuple):
    """``formats`` of the quantized modules; ``tensors``: all that must be there, as "F32 [4, 2]";
    ``optional``: names of F32 [] that may be there as well."""

    formats: dict[str, str]
    tensors: dict[str, str]
    optional: set[str]


def read_as_engines(directory: Path) -> Seen:
    raw = json.loads((directory / "config.json").read_text())
    quantization = raw.pop("quantization_config", None)
    twin = directory / "hf_quant_config.json"
    config = read_config(raw)
    plain = _plain(config)
    # Engines keep routers and convolutions as linear layers, too.
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in plain.items()
        if name.endswith(".weight") and len(shape) > 1 and name != f"{EMBEDDINGS}.weight"
    }
    formats: dict[str, str] = {}
    kv_cache, compressed = False, False
    if quantization is not None:
        layout = quantization["quant_method"]
        _known(quantization, layout)
        compressed = layout == "compressed-tensors"
        kv_cache = quantization.get("kv_cache_scheme") is not None
        if kv_cache:
            assert not compressed
            assert quantization["kv_cache_scheme"] == _numbers("fp8", compressed)
        read = _compressed if compressed else _modelopt
        formats = read(quantization, list(shapes))
        assert formats
        if not compressed:
            _check_twin(json.loads(twin.read_text()), quantization, formats, kv_cache)
    assert twin.exists() == (quantization is not None and not compressed)
    _check_fused(formats, shapes)
    tensors = {name: _slot(name, shape) for name, shape in plain.items()}
    for module, format in formats.items():
        del tensors[f"{module}.weight"]
        for part, slot in _slots(format, shapes[module], compressed).items():
            tensors[f"{module}.{part}"] = slot
    scales = {f"{m}.{p}_scale" for m in shapes for p in "kv" if m.endswith(f".mixer.{p}_proj")}
    scales = scales if kv_cache else set()
    optional = {name for name in scales if name.startswith("mtp.")}
    return Seen(formats, tensors | dict.fromkeys(scales - optional, "F32 []"), optional)


def _plain(config: HybridConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = HybridLM(config)
    named = [(n, p) for own, t in tensors_by_name(model).items() for n, p in to_hub(own, t)]
    return {name: list(part.shape) for name, part in named}


def _slot(name: str, shape: list[int]) -> str:
    return f"{'F32' if name.rpartition('.')[2] in FP32 else 'BF16'} {shape}"


def _slots(format: str, shape: list[int], compressed: bool) -> dict[str, str]:
    """Last name part -> tensor, for a quantized weight [out, in]."""
    out, width = shape
    scalar, given = "F32 [1]" if compressed else "F32 []", "input_scale"
    packed, second = "weight", "weight_scale_2"
    if compressed:
        packed, second, given = "weight_packed", "weight_global_scale", "input_global_scale"
    if format == "fp8":
        return {"weight": f"F8_E4M3 {shape}", "weight_scale": scalar, given: scalar}
    block = f"F8_E4M3 {[out, width // 16]}"
    slots = {packed: f"U8 {[out, width // 2]}", "weight_scale": block, second: scalar}
    return slots if format == "nvfp4_w4a16" else {**slots, given: scalar}


def in_engines(module: str) -> str:
    """The name under which vLLM has a module: q, k and v are one, and so are a layer's experts."""
    expert, qkv = EXPERT.fullmatch(module), QKV.fullmatch(module)
    return expert[1] if expert else f"{qkv[1]}.qkv_proj" if qkv else module


def _known(found: Json, kind: str) -> None:
    assert set(found) <= set(FIELDS[kind].split()), kind


def _numbers(format: str, compressed: bool) -> Json:
    """Of weights or inputs."""
    if format == "fp8":
        return {"dynamic": False, "num_bits": 8, "type": "float"}
    numbers: Json = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    if compressed:
        e4m3 = dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
        numbers |= {"strategy": "tensor_group", "symmetric": True, **e4m3}
    return numbers


def _groups(quantization: Json, said: dict[str, str], compressed: bool) -> Iterator[str]:
    """The targets of all groups, whose numbers must be those of the formats that are said."""
    for group in quantization["config_groups"].values():
        _known(group, "group")
        (format,) = {said[target] for target in group["targets"]}
        numbers = _numbers(format, compressed)
        assert group["weights"] == numbers
        inputs = {**numbers, "dynamic": "local"} if compressed else numbers
        assert group.get("input_activations") == (None if format == "nvfp4_w4a16" else inputs)
        assert group.get("output_activations") is None
        assert group.get("format", "nvfp4-pack-quantized") == "nvfp4-pack-quantized"
        yield from group["targets"]


def _modelopt(quantization: Json, modules: list[str]) -> dict[str, str]:
    """Formats by module. Of mixed precision vLLM's _resolve_quant_algo: what ignore hits is
    unquantized; otherwise a module's own entry counts, or that of one expert for all; experts
    without any would get the first entry of another module of their layer."""
    ignore, algo = quantization["ignore"], quantization["quant_algo"]
    # A layer's experts are one module in engines: by no name below it.
    names = {in_engines(m) if EXPERT.fullmatch(m) else m for m in modules}
    assert set(ignore) <= names | {"mtp*", EMBEDDINGS}
    hit = {
        m for m in modules
        if m in ignore or in_engines(m) in ignore or (m.startswith("mtp.") and "mtp*" in ignore)
    }  # fmt: skip
    formats: dict[str, str] = {}
    if algo == "MIXED_PRECISION":
        layers = quantization["quantized_layers"]
        for layer in layers.values():
            _known(layer, "layer")
            assert layer.get("group_size") == (None if layer["quant_algo"] == "FP8" else 16)
        said = {name: ALGOS[layer["quant_algo"]] for name, layer in layers.items()}
        assert said.keys() <= set(modules)
        assert not hit & said.keys()
        formats = said
        mixers = {name.partition(".mixer.")[0] for name in said}
        for module in set(modules) - hit - said.keys():
            assert not EXPERT.fullmatch(module) or module.partition(".mixer.")[0] not in mixers
    else:
        said = {"Linear": ALGOS[algo]}
        formats = {module: ALGOS[algo] for module in modules if module not in hit}
        assert "quantized_layers" not in quantization
    # The groups repeat that, for readers that know compressed-tensors alone.
    assert sorted(_groups(quantization, said, compressed=False)) == sorted(said)
    return formats


def _check_twin(whole: Json, quantization: Json, formats: dict[str, str], kv_cache: bool) -> None:
    """hf_quant_config.json must be complete, and say what config.json says."""
    twin, producer = whole["quantization"], whole["producer"]
    assert set(whole) == {"producer", "quantization"}
    _known(twin, "twin")
    assert producer["name"] == "modelopt"
    assert producer == quantization["producer"]
    assert twin["quant_algo"] == quantization["quant_algo"]
    assert twin["exclude_modules"] == quantization["ignore"]
    assert twin.get("quantized_layers") == quantization.get("quantized_layers")
    assert twin["kv_cache_quant_algo"] == ("FP8" if kv_cache else None)
    size = 16 if set(formats.values()) - {"fp8"} else None
    assert twin.get("group_size") == quantization.get("group_size") == size


def _compressed(quantization: Json, modules: list[str]) -> dict[str, str]:
    assert quantization["format"] == "nvfp4-pack-quantized"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["kv_cache_scheme"] is None
    ignore = quantization["ignore"]
    for entry in ignore:
        assert entry in modules or (PATTERN.fullmatch(entry) and entry.count(".*") <= 4), entry
    (group,) = quantization["config_groups"].values()
    # Engines tell the formats apart by the inputs' numbers alone.
    format = "nvfp4" if group["input_activations"] is not None else "nvfp4_w4a16"
    assert list(_groups(quantization, {"Linear": format}, compressed=True)) == ["Linear"]
    formats = {}
    for module in modules:
        owner = in_engines(module)
        # For experts without a gate vLLM makes one up, which must be hit as well.
        gate = [f"{owner}.0.None"] if owner.endswith(".experts") else []
        hits = {_ignored(n, ignore) for name in (module, *gate) for n in _prefixed(name)}
        # vLLM looks for qkv_proj first, and where it is not hit, for its parts.
        hits |= {_ignored(n, ignore) for n in _prefixed(owner)} - {False}
        assert len(hits) == 1, f"ignore hits {module} under some of its names alone"
        if hits == {False}:
            formats[module] = format
    return formats


def _prefixed(name: str) -> list[str]:
    """With the prefix of the hub, and that of transformers and vLLM."""
    return [name, re.sub(r"^backbone\b", "model", name)]


def _ignored(name: str, entries: list[str]) -> bool:
    return any(
        re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else name == entry
        for entry in entries
    )


def _check_fused(formats: dict[str, str], shapes: dict[str, list[int]]) -> None:
    """No format that a module cannot have, or that engines cannot have beside each other."""
    fused: defaultdict[str, set[str]] = defaultdict(set)
    for module, shape in shapes.items():
        format = formats.get(module, "bf16")
        fused[in_engines(module)].add(format)
        assert format == "bf16" or len(shape) == 2
        assert not format.startswith("nvfp4") or shape[1] % 16 == 0
    assert {owner: found for owner, found in fused.items() if len(found) > 1} == {}
