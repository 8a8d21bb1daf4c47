"""What quantization_config, and its twin hf_quant_config.json, say of each module.

Engines have many rules for what stands there: names, parts of names, wildcards, classes, fields
that replace others. Here only what all of them take alike is sound, fields and entries of the kinds
that docs/export.md names, looked up as vLLM's loaders do (0.32, ``modelopt.py`` and
``compressed_tensors``). Nothing of the writer is used, so that both must be right.

A module is the name of a weight on disk without ``.weight``, one per routed expert.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json

Layout = Literal["plain", "modelopt", "compressed-tensors"]
Format = Literal["fp8", "nvfp4", "nvfp4_w4a16"]
HF_QUANT = "hf_quant_config.json"
GROUP = 16
_EMBEDDINGS = "backbone.embeddings"
_ALGOS: dict[str, Format] = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4_w4a16"}
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.\d+\.(up|down)_proj")
_QKV = re.compile(r"(.+\.mixer)\.[qkv]_proj")
_FP8_CACHE = {"type": "float", "num_bits": 8, "dynamic": False}
_DTYPES, _E4M3 = {"scale_dtype", "zp_dtype"}, "torch.float8_e4m3fn"
_TWIN = {"producer", "quantization"}
_MTP = "mtp*"  # all of the MTP block
# Names, escaped dots, ".*", groups of alternatives that hold no others, "$", and "not in the MTP
# block": engines read these alike, in little time.
_PATTERN = re.compile(r"re:(?:\.\*|\(\?!mtp\\\.\)|\((?:\\\.|[\w$|])*\)|\\\.|[\w$])*")
_MOST_STARS = 4
# Everything that quantization_config, or a part of it, may hold: engines read more than this, and
# some of it (``quantization``, ``transform_config``, ...) in place of what is looked at here.
_FIELDS = {
    "modelopt": "quant_method quant_algo producer config_groups ignore group_size quantized_layers"
    " kv_cache_scheme",
    "compressed-tensors": "quant_method format quantization_status config_groups ignore"
    " kv_cache_scheme",
    "group": "targets weights input_activations output_activations format",
    "twin": "quant_algo kv_cache_quant_algo group_size exclude_modules quantized_layers",
    "layer": "quant_algo group_size",
}


def declared(
    directory: Path, quantization: Any, modules: list[str], problems: list[str]
) -> tuple[Layout, dict[str, Format], bool]:
    """Layout, formats by module, and whether keys and values have scales; problems are added."""
    layout: Layout = "plain"
    formats: dict[str, Format] = {}
    kv_cache = False
    if quantization is not None:
        if not isinstance(quantization, dict):
            raise UserError("config.json: quantization_config is not an object")
        method = quantization.get("quant_method")
        kv_cache = _has_scales(quantization.get("kv_cache_scheme"), problems)
        if method == "modelopt":
            layout = "modelopt"
            formats = _modelopt(quantization, modules, problems)
            _check_twin(directory, quantization, formats, kv_cache, problems)
        elif method == "compressed-tensors":
            layout = "compressed-tensors"
            formats = _compressed(quantization, modules, problems)
            if kv_cache:
                problems.append(f"config.json: kv_cache_scheme must be null in {method}'s layout")
        else:
            raise UserError(
                f"config.json: quant_method is {method!r}; known: modelopt, compressed-tensors"
            )
        if not formats:
            problems.append("config.json: quantization_config is there, but no module is quantized")
        problems += _unknown("quantization_config", quantization, layout)
    if layout != "modelopt" and (directory / HF_QUANT).exists():
        what = "has no quantization_config" if quantization is None else "is of the other layout"
        problems.append(f"{HF_QUANT} is there, but config.json {what}")
    return layout, formats, kv_cache


def _unknown(where: str, found: Collection[str], kind: str) -> list[str]:
    """Fields that no such part of the configuration has."""
    stray = sorted(set(found) - set(_FIELDS[kind].split()))
    return [f"{where}: {name} is unknown, engines may read it" for name in stray]


def in_engines(module: str) -> str:
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
    problems += [f"kv_cache_scheme: {k} is unknown" for k in sorted(found.keys() - _FP8_CACHE)]
    return not wrong


def _modelopt(
    quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> dict[str, Format]:
    """Formats by module; problems are added."""
    algo = quantization.get("quant_algo")
    ignore = _texts(quantization.get("ignore"), "config.json: quantization_config.ignore")
    # A layer's experts are one module in engines: by no name below it.
    names = {m for m in modules if not _EXPERT.fullmatch(m)} | {
        in_engines(m) for m in modules if _EXPERT.fullmatch(m)
    }
    problems += [
        f"ignore: {entry} is neither a module, nor a layer's experts, nor {_MTP}: engines "
        "differ on what it hits"
        for entry in ignore
        if entry not in names | {_MTP, _EMBEDDINGS}
    ]
    listed: defaultdict[str, set[bool]] = defaultdict(set)
    for module in modules:
        if not _EXPERT.fullmatch(module):
            listed[in_engines(module)].add(module in ignore)
    problems += [
        f"ignore names a part of {o} alone" for o, found in listed.items() if len(found) > 1
    ]
    if algo == "MIXED_PRECISION":
        layers = quantization.get("quantized_layers")
        if not isinstance(layers, dict) or not layers:
            raise UserError("config.json: quantized_layers is missing or empty")
        said = _said(layers, problems)
        formats = _listed(said, ignore, modules, problems)
    elif isinstance(algo, str) and algo in _ALGOS:
        said = {"Linear": _ALGOS[algo]}
        formats = {m: _ALGOS[algo] for m in modules if not _excluded(m, ignore)}
        if "quantized_layers" in quantization:
            problems.append(f"config.json: quantized_layers must not be there with {algo}")
    else:
        known = ", ".join([*_ALGOS, "MIXED_PRECISION"])
        raise UserError(f"config.json: quant_algo is {algo!r}; known: {known}")
    # The groups repeat what is said above, for readers that know compressed-tensors alone.
    held: list[str] = []
    for name, group, targets in _groups(quantization, problems):
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


def _groups(
    quantization: dict[str, Any], problems: list[str]
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Name, contents and targets of every group. Raises UserError for what is none."""
    where = "config.json: quantization_config.config_groups"
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where} is missing or empty")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise UserError(f"{where}.{name} is not an object")
        problems += _unknown(f"config_groups.{name}", group, "group")
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
        stray = found.keys() - numbers.keys() - (_DTYPES if layout != "modelopt" else set())
        problems += [f"{where}.{key} is unknown" for key in sorted(stray)]
        problems += [
            f"{where}.{key} must be {_E4M3!r}" for key in _DTYPES if found.get(key, _E4M3) != _E4M3
        ]


def _check_twin(
    directory: Path,
    quantization: dict[str, Any],
    formats: Mapping[str, Format],
    kv_cache: bool,
    problems: list[str],
) -> None:
    """hf_quant_config.json must be complete, and say what config.json says."""
    path = directory / HF_QUANT
    whole = read_json(path) if path.is_file() else {}
    twin, producer = whole.get("quantization"), whole.get("producer")
    if not isinstance(twin, dict):
        problems.append(f"{HF_QUANT}: the file, or `quantization` in it, is missing")
        return
    problems += [f"{HF_QUANT}: {k} is unknown" for k in sorted(whole.keys() - _TWIN)]
    problems += _unknown(HF_QUANT, twin, "twin")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        problems.append(f"{HF_QUANT}: producer.name must be 'modelopt', by which engines know it")
    algo = quantization.get("quant_algo")
    needed = ["quant_algo", "kv_cache_quant_algo", "exclude_modules"]
    if algo == "MIXED_PRECISION":
        needed.append("quantized_layers")
    problems += [f"{HF_QUANT}: {name} is missing" for name in needed if name not in twin]
    pairs = {
        "quant_algo": (algo, twin.get("quant_algo")),
        "ignore and exclude_modules": (quantization.get("ignore"), twin.get("exclude_modules")),
        "quantized_layers": (quantization.get("quantized_layers"), twin.get("quantized_layers")),
        "the KV cache": ("FP8" if kv_cache else None, twin.get("kv_cache_quant_algo")),
        "the producer": (quantization.get("producer"), producer),
    }
    problems += [
        f"config.json and {HF_QUANT} disagree about {name}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    must = GROUP if set(formats.values()) - {"fp8"} else None
    for file, said in ((HF_QUANT, twin), ("config.json", quantization)):
        if said.get("group_size") != must:
            problems.append(f"{file}: group_size is {said.get('group_size')!r}, must be {must}")


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
        if isinstance(entry, dict):
            problems += _unknown(f"quantized_layers: {name}", entry, "layer")
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
        of_experts[in_engines(name)].add(format)
        beside.setdefault(name.partition(".mixer.")[0], name)
        if name not in known and f"{name}.0.up_proj" not in known:
            problems.append(f"quantized_layers names {name}, which is no module of the model")
    formats: dict[str, Format] = {}
    for module in modules:
        owner = in_engines(module)
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
    """Whether ModelOpt's list names a module, or its layer's experts, or all of the MTP block."""
    whole_block = module.startswith("mtp.") and _MTP in entries
    return whole_block or module in entries or in_engines(module) in entries


def _compressed(
    quantization: dict[str, Any], modules: list[str], problems: list[str]
) -> dict[str, Format]:
    """As `_modelopt`, of compressed-tensors."""
    where, packed = "config.json: quantization_config", "nvfp4-pack-quantized"
    for key, value in {"format": packed, "quantization_status": "compressed"}.items():
        if quantization.get(key) != value:
            problems.append(f"{where}.{key} is {quantization.get(key)!r}, must be {value!r}")
    ignore = _texts(quantization.get("ignore"), f"{where}.ignore")
    for entry in ignore:
        sound = _PATTERN.fullmatch(entry) and entry.count(".*") <= _MOST_STARS
        if entry not in modules and not sound:
            raise UserError(
                f"{where}.ignore: {entry[:80]!r} is neither a module nor re: with names, \\., $, "
                f"(a|b), (?!mtp\\.) and up to {_MOST_STARS} .*"
            )
    groups = list(_groups(quantization, problems))
    name, group, _ = groups[0]
    if [targets for *_, targets in groups] != [["Linear"]]:
        problems.append("config_groups: there must be one group, whose targets is ['Linear']")
    # Engines tell the formats apart by the inputs' numbers alone.
    format: Format = "nvfp4" if group.get("input_activations") is not None else "nvfp4_w4a16"
    _check_numbers(name, group, "compressed-tensors", format, problems)
    if group.get("format") not in (None, packed):
        problems.append(f"config_groups.{name}.format must be {packed!r}")
    formats: dict[str, Format] = {}
    for module in modules:
        ignored = {_ignored(name, ignore) for name in _seen_as(module)}
        # vLLM looks for qkv_proj first, and where it is not hit, for its parts.
        ignored |= {True for name in _prefixed(in_engines(module)) if _ignored(name, ignore)}
        if len(ignored) > 1:
            problems.append(
                f"ignore hits {module} under some of its names in engines alone: entries must hold "
                "for the prefixes backbone and model, for q, k, v and qkv_proj, and for all experts"
            )
        if False in ignored:
            formats[module] = format
    return formats


def _prefixed(name: str) -> list[str]:
    """With the prefix of the hub, and that of transformers and vLLM."""
    return [name, re.sub(r"^backbone\b", "model", name)]


def _seen_as(module: str) -> list[str]:
    """The names under which engines look for a module; for experts without a gate vLLM makes one
    up, which must be hit as well."""
    owner = in_engines(module)
    gate = [f"{owner}.0.None"] if owner.endswith(".experts") else []
    return [name for seen in (module, *gate) for name in _prefixed(seen)]


def _ignored(name: str, entries: list[str]) -> bool:
    return any(
        re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else name == entry
        for entry in entries
    )
