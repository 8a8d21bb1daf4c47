"""What an exported directory must hold, derived from its configuration files as engines read them.

Nothing of the writer is used, so that both must be right: names and shapes come from the model that
config.json describes, formats from the rules by which vLLM's loaders (0.32, ``modelopt.py`` and
``compressed_tensors``) look up a module in ``quantization_config``.

A module here is the name of a weight on disk without ``.weight``, one per routed expert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.config import FP32_NAMES, HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.hf_config import config_from_hf, read_json
from nemo_hybrid.model.hybrid import HybridLM

Layout = Literal["plain", "modelopt", "compressed-tensors"]
Format = Literal["fp8", "nvfp4", "nvfp4_w4a16"]
HF_QUANT = "hf_quant_config.json"
GROUP = 16
_EMBEDDINGS = "backbone.embeddings.weight"
_ALGOS: dict[str, Format] = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4_w4a16"}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NEEDED = ("architectures", "hybrid_override_pattern", "num_hidden_layers", "mamba_ssm_cache_dtype")
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.\d+\.(up|down)_proj")
_QKV = re.compile(r"(.+\.mixer)\.[qkv]_proj")
_FP4 = {"num_bits": 4, "type": "float", "group_size": GROUP}


class Slot(NamedTuple):
    """One tensor: its safetensors dtype and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Schema:
    """``formats``: of the quantized modules; ``tensors``: everything the files must hold, by name
    on disk; ``optional``: what they may hold beside that."""

    config: HybridConfig
    layout: Layout
    formats: dict[str, Format]
    tensors: dict[str, Slot]
    optional: dict[str, Slot]

    def parts(self, module: str) -> list[str]:
        """Last name parts of the tensors of a quantized module."""
        return list(_slots(self.layout, self.formats[module], (0, 0)))

    def of_modules(self) -> set[str]:
        """Names of all those tensors."""
        return {f"{module}.{part}" for module in self.formats for part in self.parts(module)}

    def shared(self) -> dict[str, list[str]]:
        """What engines hold one number of for several modules -> names of those scalars."""
        out: defaultdict[str, list[str]] = defaultdict(list)
        for module in self.formats:
            qkv, expert = _QKV.fullmatch(module), _EXPERT.fullmatch(module)
            if not qkv and not expert:
                continue
            for part, slot in _slots(self.layout, self.formats[module], (0, 0)).items():
                if slot.dtype == "F32" and qkv:
                    out[f"{qkv[1]}.{{q,k,v}}_proj.{part}"].append(f"{module}.{part}")
                elif slot.dtype == "F32" and expert and part.startswith("input"):
                    out[f"{expert[1]}.*.{expert[2]}_proj.{part}"].append(f"{module}.{part}")
        return dict(out)


def read_schema(directory: Path, entries: int) -> tuple[Schema, list[str]]:
    """The schema of a directory whose weight files hold so many tensors, and what is wrong with its
    configuration files, in words.

    Raises UserError where they cannot be read, or describe no model of the family.
    """
    path = directory / "config.json"
    raw = read_json(path)
    quantization = raw.pop("quantization_config", None)
    config = config_from_hf(raw, str(path))
    experts = 2 * config.n_routed_experts * config.pattern.count("E")
    if experts > entries:
        raise UserError(f"{path} describes {experts} expert weights; the files hold {entries}")
    problems = [f"config.json: {name} is missing" for name in _NEEDED if raw.get(name) is None]
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    if dtype not in _DTYPES:
        problems.append(f"config.json: dtype is {dtype!r}, must be one of {', '.join(_DTYPES)}")
    plain = _plain(config, _DTYPES.get(str(dtype), "BF16"))
    # Engines keep routers and convolutions as linear layers, too.
    modules = {
        name.removesuffix(".weight"): slot.shape
        for name, slot in plain.items()
        if name.endswith(".weight") and len(slot.shape) > 1 and name != _EMBEDDINGS
    }
    layout: Layout = "plain"
    formats: dict[str, Format] = {}
    kv_cache = False
    if quantization is None:
        if (directory / HF_QUANT).exists():
            problems.append(f"{HF_QUANT} is there, but config.json has no quantization_config")
    elif not isinstance(quantization, dict):
        raise UserError(f"{path}: quantization_config is not an object")
    elif quantization.get("quant_method") == "modelopt":
        layout = "modelopt"
        formats, kv_cache = _modelopt(directory, quantization, list(modules), problems)
    elif quantization.get("quant_method") == "compressed-tensors":
        layout = "compressed-tensors"
        formats, kv_cache = _compressed(quantization, list(modules), problems)
    else:
        method = quantization.get("quant_method")
        raise UserError(f"{path}: quant_method is {method!r}; known: modelopt, compressed-tensors")
    problems += _misfits(formats, modules)
    tensors = dict(plain)
    for module, format in formats.items():
        del tensors[f"{module}.weight"]
        for part, slot in _slots(layout, format, modules[module]).items():
            tensors[f"{module}.{part}"] = slot
    optional = {
        f"{module}.{part}_scale": Slot("F32", ())
        for module in modules
        for part in "kv"
        if kv_cache and module.endswith(f".mixer.{part}_proj")
    }
    for name in [name for name in optional if not name.startswith("mtp.")]:
        tensors[name] = optional.pop(name)
    return Schema(config, layout, formats, tensors, optional), problems


def _plain(config: HybridConfig, dtype: str) -> dict[str, Slot]:
    with torch.device("meta"):
        model = HybridLM(config)
    return {
        name: Slot("F32" if name.rpartition(".")[2] in FP32_NAMES else dtype, tuple(part.shape))
        for own, tensor in tensors_by_name(model).items()
        for name, part in to_hub(own, tensor)
    }


def _slots(layout: Layout, format: Format, shape: tuple[int, ...]) -> dict[str, Slot]:
    """Last name part -> tensor, for a quantized weight [out, in]."""
    given = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[layout]
    scalar = Slot("F32", (1,) if layout == "compressed-tensors" else ())
    if format == "fp8":
        return {"weight": Slot("F8_E4M3", shape), "weight_scale": scalar, given: scalar}
    out, width = shape[0], shape[-1]
    packed, tensor_scale = (
        ("weight", "weight_scale_2")
        if layout == "modelopt"
        else ("weight_packed", "weight_global_scale")
    )
    slots = {
        packed: Slot("U8", (out, width // 2)),
        "weight_scale": Slot("F8_E4M3", (out, width // GROUP)),
        tensor_scale: scalar,
    }
    return slots if format == "nvfp4_w4a16" else {**slots, given: scalar}


def _misfits(formats: Mapping[str, Format], modules: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Formats that a module cannot have, or that engines cannot have beside each other."""
    problems = [
        f"{module} counts as {format}, which shape {list(modules[module])} cannot be: exclude it"
        for module, format in formats.items()
        if len(modules[module]) != 2 or (format != "fp8" and modules[module][1] % GROUP)
    ]
    fused: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        match = _QKV.fullmatch(module) or _EXPERT.fullmatch(module)
        if match:
            fused[match[1]].add(formats.get(module, "unquantized"))
    for owner, found in fused.items():
        if len(found) > 1:
            what = "experts" if owner.endswith("experts") else "q_proj, k_proj and v_proj"
            problems.append(
                f"{what} of {owner} have several formats, which engines fuse: "
                f"{', '.join(sorted(found))}"
            )
    return problems


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where} is not a list of names")
    return value


def _is_fp8(scheme: Any) -> bool:
    return isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)


def _modelopt(
    directory: Path, quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> tuple[dict[str, Format], bool]:
    """Formats by module, and whether keys and values have scales; problems are added."""
    algo, kv_cache = quantization.get("quant_algo"), _is_fp8(quantization.get("kv_cache_scheme"))
    ignore = _texts(quantization.get("ignore"), "config.json: quantization_config.ignore")
    layers = quantization.get("quantized_layers")
    _check_twin(directory, quantization, kv_cache, problems)
    formats: dict[str, Format] = {}
    if algo == "MIXED_PRECISION":
        if not isinstance(layers, dict) or not layers:
            raise UserError("config.json: quantized_layers is missing or empty")
        formats = _listed(layers, modules, problems)
        for module in formats:
            if _excluded(module, ignore):
                problems.append(f"{module} is in quantized_layers, but ignore hits it as well")
    elif isinstance(algo, str) and algo in _ALGOS:
        formats = {m: _ALGOS[algo] for m in modules if not _excluded(m, ignore)}
    else:
        known = ", ".join([*_ALGOS, "MIXED_PRECISION"])
        raise UserError(f"config.json: quant_algo is {algo!r}; known: {known}")
    if not formats:
        problems.append(f"config.json: quant_algo is {algo}, but no module is quantized")
    return formats, kv_cache


def _check_twin(
    directory: Path, quantization: dict[str, Any], kv_cache: bool, problems: list[str]
) -> None:
    """hf_quant_config.json must be complete, and say what config.json says."""
    path = directory / HF_QUANT
    twin = read_json(path).get("quantization") if path.is_file() else None
    if not isinstance(twin, dict):
        problems.append(f"{HF_QUANT}: the file, or `quantization` in it, is missing")
        return
    algo = quantization.get("quant_algo")
    needed = ["quant_algo", "kv_cache_quant_algo", "exclude_modules"]
    if algo != "FP8":
        needed.append("quantized_layers" if algo == "MIXED_PRECISION" else "group_size")
    problems += [f"{HF_QUANT}: {name} is missing" for name in needed if name not in twin]
    pairs = {
        "quant_algo": (algo, twin.get("quant_algo")),
        "ignore and exclude_modules": (quantization.get("ignore"), twin.get("exclude_modules")),
        "quantized_layers": (quantization.get("quantized_layers"), twin.get("quantized_layers")),
        "the KV cache": ("FP8" if kv_cache else None, twin.get("kv_cache_quant_algo")),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs and not (name.split()[-1] in needed and name.split()[-1] not in twin):
            problems.append(f"config.json and {HF_QUANT} disagree about {name}")
    for file, said in ((HF_QUANT, twin), ("config.json", quantization)):
        if algo != "FP8" and said.get("group_size", GROUP) not in (GROUP, None):
            problems.append(f"{file}: group_size is {said['group_size']!r}, must be {GROUP}")


def _listed(layers: dict[str, Any], modules: list[str], problems: list[str]) -> dict[str, Format]:
    """Formats by quantized_layers: of a layer's experts, one entry speaks for all."""
    said: dict[str, Format] = {}
    for name, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(algo, str) or algo not in _ALGOS:
            problems.append(f"quantized_layers: quant_algo of {name} is {algo!r}")
        elif algo != "FP8" and entry.get("group_size") != GROUP:
            problems.append(f"quantized_layers: group_size of {name} is missing or not {GROUP}")
        else:
            said[name] = _ALGOS[algo]
    of_experts: defaultdict[str, set[Format]] = defaultdict(set)
    known = set(modules)
    for name, format in said.items():
        match = _EXPERT.fullmatch(name)
        if match:
            of_experts[match[1]].add(format)
        elif name.endswith(".mixer.experts"):
            of_experts[name].add(format)
        if name not in known and not (name.endswith(".experts") and f"{name}.0.up_proj" in known):
            problems.append(f"quantized_layers names {name}, which is no module of the model")
    formats: dict[str, Format] = {}
    for module in modules:
        match = _EXPERT.fullmatch(module)
        found = of_experts[match[1]] if match else {said[module]} if module in said else set()
        if len(found) > 1:
            problems.append(f"quantized_layers gives {module} several formats")
        if found:
            formats[module] = min(found)
    return formats


def _excluded(module: str, patterns: list[str]) -> bool:
    """Whether vLLM takes a module for excluded: by name, by a part of it, or by a wildcard. Experts
    of a layer are one module there."""
    match = _EXPERT.fullmatch(module)
    seen = match[1] if match else module
    for pattern in patterns:
        split = pattern.endswith("*") and not pattern.endswith(".*")
        for part in (pattern[:-1], f"{pattern[:-1]}.*") if split else (pattern,):
            if part in seen or fnmatchcase(seen, part):
                return True
    return False


def _compressed(
    quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> tuple[dict[str, Format], bool]:
    """As `_modelopt`, of compressed-tensors."""
    where = "config.json: quantization_config"
    fixed = {"format": "nvfp4-pack-quantized", "quantization_status": "compressed"}
    for key, value in fixed.items():
        if quantization.get(key) != value:
            problems.append(f"{where}.{key} is {quantization.get(key)!r}, must be {value!r}")
    ignore = _texts(quantization.get("ignore"), f"{where}.ignore")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}.config_groups is missing or empty")
    schemes: list[tuple[list[str], Format]] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{where}.config_groups.{name} is not an object")
        targets = _texts(group.get("targets"), f"{where}.config_groups.{name}.targets")
        given = group.get("input_activations")
        wanted: dict[str, dict[str, object]] = {
            "weights": {**_FP4, "strategy": "tensor_group", "symmetric": True}
        }
        if given is not None:
            wanted["input_activations"] = {**wanted["weights"], "dynamic": "local"}
        for part, values in wanted.items():
            found = group.get(part)
            for key, must in values.items():
                if not isinstance(found, dict) or found.get(key) != must:
                    problems.append(f"config_groups.{name}.{part}.{key} must be {must!r}")
        schemes.append((targets, "nvfp4" if given is not None else "nvfp4_w4a16"))
    formats: dict[str, Format] = {}
    for module in modules:
        by_prefix = set()
        for prefix in ("backbone.", "model."):  # of the hub, and of transformers and vLLM
            name = prefix + module.removeprefix("backbone.") if "backbone." in module else module
            by_prefix.add(_of_group(name, ignore, schemes))
        if len(by_prefix) > 1:
            problems.append(
                f"{module} is matched with the prefix backbone or model alone: entries of ignore "
                "and targets must hold for both"
            )
        format = next((f for f in by_prefix if f), None)
        if format:
            formats[module] = format
    return formats, _is_fp8(quantization.get("kv_cache_scheme"))


def _of_group(
    name: str, ignore: list[str], schemes: list[tuple[list[str], Format]]
) -> Format | None:
    """The format that the lists give a module of this name: a name counts before its class."""
    if _matches(name, ignore):
        return None
    for targets, format in schemes:
        if _matches(name, targets):
            return format
    return next((format for targets, format in schemes if "Linear" in targets), None)


def _matches(name: str, patterns: list[str]) -> bool:
    for pattern in patterns:
        try:
            if name == pattern or (
                pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), name)
            ):
                return True
        except re.error as error:
            raise UserError(f"config.json: {pattern!r} is no regular expression: {error}") from None
    return False
