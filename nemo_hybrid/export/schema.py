"""What an exported directory must hold, derived from its configuration files as engines read them.

Nothing of the writer is used, so that both must be right: names and shapes come from the model that
config.json describes, formats from the rules by which vLLM's loaders (0.32, ``modelopt.py`` and
``compressed_tensors``) look up a module in ``quantization_config``.

A module here is the name of a weight on disk without ``.weight``, one per routed expert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
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
_NEEDED = ("architectures", "hybrid_override_pattern", "num_hidden_layers")
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.\d+\.(up|down)_proj")
_QKV = re.compile(r"(.+\.mixer)\.[qkv]_proj")
_FP8_CACHE = {"type": "float", "num_bits": 8, "dynamic": False}


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
        for module, format in self.formats.items():
            owner = _in_engines(module)
            experts = owner.endswith(".experts")
            what = f"{owner}.*.{module.rpartition('.')[2]}" if experts else owner
            for part, slot in _slots(self.layout, format, (0, 0)).items():
                if slot.dtype == "F32" and (part.startswith("input") or not experts):
                    out[f"{what}.{part}"].append(f"{module}.{part}")
        return {what: names for what, names in out.items() if len(names) > 1}


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
    state = raw.get("mamba_ssm_cache_dtype")
    for name, value in (("dtype", dtype), ("mamba_ssm_cache_dtype", state)):
        if value not in tuple(_DTYPES):
            problems.append(
                f"config.json: {name} is {value!r}, must be one of {', '.join(_DTYPES)}"
            )
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
    else:
        method, known = quantization.get("quant_method"), "modelopt, compressed-tensors"
        kv_cache = _has_scales(quantization.get("kv_cache_scheme"), problems)
        if method == "modelopt":
            layout = "modelopt"
            _check_twin(directory, quantization, kv_cache, problems)
            formats = _modelopt(quantization, list(modules), problems)
        elif method == "compressed-tensors":
            layout = "compressed-tensors"
            formats = _compressed(quantization, list(modules), problems)
        else:
            raise UserError(f"{path}: quant_method is {method!r}; known: {known}")
        if not formats:
            problems.append("config.json: quantization_config is there, but no module is quantized")
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
        fused[_in_engines(module)].add(formats.get(module, "unquantized"))
    return problems + [
        f"{owner}, one module in engines, has several formats: {', '.join(sorted(found))}"
        for owner, found in fused.items()
        if len(found) > 1
    ]


def _in_engines(module: str) -> str:
    """The name under which vLLM has a module: q, k and v are one, and so are a layer's experts."""
    expert, qkv = _EXPERT.fullmatch(module), _QKV.fullmatch(module)
    return expert[1] if expert else f"{qkv[1]}.qkv_proj" if qkv else module


def _texts(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where} is not a list of names")
    return value


def _has_scales(scheme: Any, problems: list[str]) -> bool:
    """Whether keys and values have scales, by kv_cache_scheme."""
    if scheme is None:
        return False
    found = {"dynamic": False, **scheme} if isinstance(scheme, dict) else {}
    wrong = [key for key, must in _FP8_CACHE.items() if found.get(key) != must]
    problems += [f"config.json: kv_cache_scheme.{k} must be {_FP8_CACHE[k]!r}" for k in wrong]
    return not wrong


def _modelopt(
    quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> dict[str, Format]:
    """Formats by module; problems are added."""
    algo = quantization.get("quant_algo")
    ignore = _texts(quantization.get("ignore"), "config.json: quantization_config.ignore")
    if algo == "MIXED_PRECISION":
        layers = quantization.get("quantized_layers")
        if not isinstance(layers, dict) or not layers:
            raise UserError("config.json: quantized_layers is missing or empty")
        said = _said(layers, problems)
        formats = _listed(said, ignore, modules, problems)
    elif isinstance(algo, str) and algo in _ALGOS:
        said = {"Linear": _ALGOS[algo]}
        formats = {m: _ALGOS[algo] for m in modules if not _excluded(m, ignore)}
    else:
        known = ", ".join([*_ALGOS, "MIXED_PRECISION"])
        raise UserError(f"config.json: quant_algo is {algo!r}; known: {known}")
    # The groups repeat what is said above, for readers that know compressed-tensors alone.
    held: list[str] = []
    for name, group, targets in _groups(quantization):
        held += targets
        found = {said.get(target) for target in targets}
        format = found.pop() if len(found) == 1 else None
        if format is not None:
            _check_numbers(name, group, "modelopt", format, problems)
            continue
        stray = next((target for target in targets if target not in said), None)
        what = f"names {stray}, which is not quantized" if stray else "is not of one format"
        problems.append(f"config_groups.{name}.targets {what}")
    problems += [f"config_groups: {name} is in no targets" for name in said.keys() - set(held)]
    if len(held) > len(set(held)):
        problems.append("config_groups: a module is in targets twice")
    return formats


def _groups(quantization: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Name, contents and targets of every group. Raises UserError for what is none."""
    where = "config.json: quantization_config.config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where} is missing or empty")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{where}.{name} is not an object")
        yield name, group, _texts(group.get("targets"), f"{where}.{name}.targets")


def _check_numbers(
    name: str, group: dict[str, Any], layout: Layout, format: Format, problems: list[str]
) -> None:
    """What a group must say of its weights and inputs."""
    weights: dict[str, object] = {"type": "float", "dynamic": False, "num_bits": 8}
    weights |= {"group_size": None} if format == "fp8" else {"num_bits": 4, "group_size": GROUP}
    inputs: dict[str, object] | None = weights
    if layout == "compressed-tensors":
        weights |= {"strategy": "tensor_group", "symmetric": True}
        inputs = {**weights, "dynamic": "local"}
    if format == "nvfp4_w4a16":
        inputs = None
    wanted = {"weights": weights, "input_activations": inputs, "output_activations": None}
    for part, numbers in wanted.items():
        where, found = f"config_groups.{name}.{part}", group.get(part)
        if numbers is None or not isinstance(found, dict):
            if numbers is not found:
                must = "null or absent" if numbers is None else "an object"
                problems.append(f"{where} must be {must}: its modules are {format}")
            continue
        wrong = [key for key, must in numbers.items() if found.get(key) != must]
        problems += [f"{where}.{key} must be {numbers[key]!r}" for key in wrong]


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
    problems += [
        f"config.json and {HF_QUANT} disagree about {name}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    for file, said in ((HF_QUANT, twin), ("config.json", quantization)):
        if algo != "FP8" and said.get("group_size", GROUP) not in (GROUP, None):
            problems.append(f"{file}: group_size is {said['group_size']!r}, must be {GROUP}")


def _said(layers: dict[str, Any], problems: list[str]) -> dict[str, Format]:
    """Formats by entry of quantized_layers."""
    said: dict[str, Format] = {}
    for name, entry in layers.items():
        algo = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(algo, str) or algo not in _ALGOS:
            problems.append(f"quantized_layers: quant_algo of {name} is {algo!r}")
        elif algo != "FP8" and entry.get("group_size") != GROUP:
            problems.append(f"quantized_layers: group_size of {name} is missing or not {GROUP}")
        else:
            said[name] = _ALGOS[algo]
    return said


def _listed(
    said: dict[str, Format], ignore: list[str], modules: list[str], problems: list[str]
) -> dict[str, Format]:
    """Formats by quantized_layers.

    vLLM's rule (0.32, ModelOptMixedPrecisionConfig): what ignore hits is unquantized. Otherwise the
    module's own entry counts, or that of a part of it (one expert's; one of q, k and v); and for
    experts without any, the first entry of another module of their layer. The last is never meant,
    so it is a problem; and so is an entry for a part of q, k and v (see `_misfits`).
    """
    of_experts: defaultdict[str, set[Format]] = defaultdict(set)
    beside: dict[str, str] = {}  # first entry of each layer
    known = set(modules)
    for name, format in said.items():
        of_experts[_in_engines(name)].add(format)
        beside.setdefault(name.partition(".mixer.")[0], name)
        if name not in known and f"{name}.0.up_proj" not in known:
            problems.append(f"quantized_layers names {name}, which is no module of the model")
    formats: dict[str, Format] = {}
    for module in modules:
        owner = _in_engines(module)
        experts = owner.endswith(".experts")
        found = of_experts[owner] if experts else {said[module]} if module in said else set()
        if len(found) > 1:
            problems.append(f"quantized_layers gives {module} several formats")
        if found and _excluded(module, ignore):
            problems.append(f"{module} is in quantized_layers, but ignore hits it as well")
        if found:
            formats[module] = min(found)
        elif module == f"{owner}.0.up_proj" and not _excluded(module, ignore):
            other = beside.get(module.partition(".mixer.")[0])
            if other is not None:
                problems.append(
                    f"{owner} is neither in quantized_layers nor in ignore: vLLM takes it for "
                    f"{said[other]}, because {other} is"
                )
    return formats


def _excluded(module: str, entries: list[str]) -> bool:
    """Whether vLLM takes a module for excluded: by an entry that is its name, or of experts one
    that holds theirs; and by one that is a part of its name there or matches that as a glob,
    "name*" standing for name and all below it."""
    seen = _in_engines(module)
    for entry in entries:
        if entry == module or (seen.endswith(".experts") and seen in entry):
            return True
        split = entry.endswith("*") and not entry.endswith(".*")
        for part in (entry[:-1], f"{entry[:-1]}.*") if split else (entry,):
            if part in seen or fnmatchcase(seen, part):
                return True
    return False


def _compressed(
    quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> dict[str, Format]:
    """As `_modelopt`, of compressed-tensors."""
    where, packed = "config.json: quantization_config", "nvfp4-pack-quantized"
    for key, value in {"format": packed, "quantization_status": "compressed"}.items():
        if quantization.get(key) != value:
            problems.append(f"{where}.{key} is {quantization.get(key)!r}, must be {value!r}")
    ignore = _texts(quantization.get("ignore"), f"{where}.ignore")
    schemes: list[tuple[list[str], Format]] = []
    for name, group, targets in _groups(quantization):
        # Engines tell the formats apart by the inputs' numbers alone.
        format: Format = "nvfp4" if group.get("input_activations") is not None else "nvfp4_w4a16"
        _check_numbers(name, group, "compressed-tensors", format, problems)
        if group.get("format") not in (None, packed):
            problems.append(f"config_groups.{name}.format must be {packed!r}")
        schemes.append((targets, format))
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
        found = next((f for f in by_prefix if f), None)
        if found:
            formats[module] = found
    return formats


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
