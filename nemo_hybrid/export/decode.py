"""An exported directory read back: what stands in it, and what `export` would write instead.

The formats are those that the tensors have; everything else, configuration and tensors, follows
from them and from the model by the writer's own rules (`export.layout`).

A module is the name of a weight on disk without ``.weight``, one per routed expert; weights are
[out, in].
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.names import from_hub
from nemo_hybrid.checkpoint.tensors import DTYPES, Entry, TensorFile
from nemo_hybrid.checkpoint.weights import Stored, read_headers
from nemo_hybrid.config.hf import HybridConfig, config_json, read_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.layout import (
    HF_QUANT,
    INPUT_SCALES,
    LARGEST,
    Target,
    layout_of,
    modules_of,
    quantization_configs,
    stored_tensors,
)
from nemo_hybrid.files import read_json
from nemo_hybrid.precision.assign import (
    Assignment,
    Format,
    check,
    fitted,
    groups,
    places,
    with_inputs,
)
from nemo_hybrid.precision.groups import in_mtp, is_stacked

KV_SCALES = (".k_scale", ".v_scale")
# At most 1/3 comes of rounding scales to the nearest: the smallest one, for one 1.5 times as large.
_CLIPPED = 0.4
_ROWS = 4096
_ABSENT = object()
_LONGEST = 200
Parts = Mapping[str, Tensor]
"""A module's tensors by the last part of their names."""


@dataclass(frozen=True)
class Export:
    """What stands in a directory, by its headers and its configuration files."""

    stored: Stored
    entries: Mapping[str, Entry]
    """Tensors by name."""
    said: dict[str, Any]
    """config.json."""
    twin: dict[str, Any] | None
    """hf_quant_config.json; None: there is none."""
    config: HybridConfig
    sizes: dict[str, tuple[int, ...]]
    """See `places`."""
    assignment: Assignment
    target: Target

    @cached_property
    def kv_cache(self) -> bool:
        """Whether keys and values have scales, which not every target has."""
        return layout_of(self.target) == "modelopt" and any(
            name.endswith(KV_SCALES) for name in self.entries
        )

    @cached_property
    def wanted(self) -> dict[str, dict[str, Tensor]]:
        """See `stored_tensors`."""
        return stored_tensors(self.config, self.assignment, layout_of(self.target))

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Of the quantized modules."""
        return {
            module: format
            for place, format in self.assignment.items()
            if format != "bf16"
            for module in modules_of(place, self.sizes[place])
        }

    def faults_of_configuration(self) -> Iterator[str]:
        """Where the files say other things than `export` would, which engines may read."""
        wanted = config_json(self.config)
        if isinstance(self.said.get("eos_token_id"), list):  # of which ours is the first
            wanted["eos_token_id"] = self.said["eos_token_id"]
        # Another release may have written the directory.
        version = inside(self.said, "quantization_config", "producer", "version")
        quantization, twin = quantization_configs(
            self.config, self.assignment, self.target, self.kv_cache, str(version)
        )
        if quantization is not None:
            wanted["quantization_config"] = quantization
        yield from (f"config.json: {line}" for line in differences(self.said, wanted))
        if self.twin is None or twin is None:
            if self.twin is not twin:
                yield f"{HF_QUANT} is {'there' if twin is None else 'missing'}, unlike in an export"
        else:
            yield from (f"{HF_QUANT}: {line}" for line in differences(self.twin, twin))

    def faults_of_tensors(self) -> Iterator[str]:
        """Names, shapes and dtypes that are not those that `export` would write."""
        wanted = {n: t for tensors in self.wanted.values() for n, t in tensors.items()}
        slots = {n: f"{DTYPES[t.dtype]} {list(t.shape)}" for n, t in wanted.items()}
        optional: dict[str, str] = {}
        if self.kv_cache:
            for place in self.sizes:
                if place.endswith((".k_proj", ".v_proj")):
                    # Of the MTP block there are some if it ran when scales were made.
                    scales = optional if in_mtp(place) else slots
                    scales[f"{place}.{place.rpartition('.')[2][0]}_scale"] = "F32 []"
        yield from (f"{name}: missing" for name in slots if name not in self.entries)
        slots |= optional
        for name, entry in self.entries.items():
            found = f"{entry.dtype} {list(entry.shape)}"
            if name not in slots:
                yield f"{name}: unexpected, {found}"
            elif found != slots[name]:
                yield f"{name}: is {found}, should be {slots[name]}"
        for file, entries in self.stored.files.items():
            problems = ((name, self.stored.misplaced(file, name)) for name in entries)
            yield from (f"{name}: {problem}" for name, problem in problems if problem)
        for name in self.stored.weight_map.keys() - self.entries.keys():
            yield f"{name}: the index lists it, but no file holds it"
        yield from (f"{f}: not in the index, but engines may load it" for f in self.stored.strays)

    def shared(self) -> Iterator[list[str]]:
        """Scalars that engines have one for: those of q, k and v; of a layer's experts, whose
        products are one, that of their inputs."""
        for group in groups(self.assignment):
            modules = [m for place in group for m in modules_of(place, self.sizes[place])]
            for name, tensor in self.wanted[f"{modules[0]}.weight"].items():
                part = name.rpartition(".")[2]
                if tensor.numel() == 1 and (part.startswith("input") or not is_stacked(group[0])):
                    yield [f"{module}.{part}" for module in modules]


def is_quantized(directory: Path) -> bool:
    """Whether the weights need `read_export`."""
    return read_json(directory / "config.json").get("quantization_config") is not None


def read_export(directory: Path) -> Export:
    """Read headers and configuration files. Raises UserError where they cannot be read, describe no
    model of the family, or the tensors have formats that no export gives them."""
    path, twin = directory / "config.json", directory / HF_QUANT
    said = read_json(path)
    plain = {name: value for name, value in said.items() if name != "quantization_config"}
    config = read_config(plain, str(path))
    stored = read_headers(directory)
    entries = dict(stored.entries())
    experts = 2 * config.n_routed_experts * config.pattern.count("E")
    if experts > len(entries):  # before they are all listed
        raise UserError(f"{path} describes {experts} expert weights; files hold {len(entries)}")
    sizes = places(config)
    assignment = _formats_of(sizes, entries)
    check(assignment, sizes)
    target = _target(said, assignment)
    if target != "bf16":
        fitted(assignment, target, calibrated=True)
    beside = read_json(twin) if twin.exists() else None
    return Export(stored, entries, said, beside, config, sizes, assignment, target)


def _formats_of(sizes: Iterable[str], entries: Mapping[str, Entry]) -> Assignment:
    """What the tensors of every place look like, or most of those of its experts."""
    parts: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        parts[module][part] = entry.dtype
    seen: defaultdict[str, Counter[Format]] = defaultdict(Counter)
    for module, found in parts.items():
        weight = found.get("weight", found.get("weight_packed"))
        if weight is not None:
            place = from_hub(f"{module}.weight")[0].removesuffix(".weight")
            inputs = any(part in found for part in INPUT_SCALES.values())
            nvfp4: Format = "nvfp4" if inputs else "nvfp4_w4a16"
            formats: dict[str, Format] = {"F8_E4M3": "fp8", "U8": nvfp4}
            seen[place][formats.get(weight, "bf16")] += 1
    return {place: seen[place].most_common(1)[0][0] if seen[place] else "bf16" for place in sizes}


def _target(said: Mapping[str, Any], assignment: Assignment) -> Target:
    """As configured, as far as that leaves the formats a choice."""
    formats = set(assignment.values()) - {"bf16"}
    if not formats:
        return "bf16"
    if inside(said, "quantization_config", "quant_method") == "compressed-tensors":
        return "compressed-tensors"
    mixed = inside(said, "quantization_config", "quant_algo") == "MIXED_PRECISION"
    if mixed or len(formats) > 1:
        return "mixed"
    return "fp8" if formats == {"fp8"} else "nvfp4"


def inside(value: object, *names: str) -> object:
    """What stands in a JSON object under a name, and so on within; None: nothing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def differences(found: object, wanted: object, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, and both."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            inside = f"{where}.{name}".lstrip(".")
            yield from differences(found.get(name, _ABSENT), wanted.get(name, _ABSENT), inside)
    elif isinstance(found, list) and isinstance(wanted, list):  # of names, and often long
        has, should = (Counter(map(_shown, value)) for value in (found, wanted))
        yield from (f"{where}: has {name}, which export would not write" for name in has - should)
        yield from (f"{where}: lacks {name}, which export would write" for name in should - has)
        if has == should and found != wanted:
            yield f"{where}: is in another order than export would write it"
    elif _shown(found) != _shown(wanted):
        yield f"{where}: is {_shown(found)[:_LONGEST]}, should be {_shown(wanted)[:_LONGEST]}"


def _shown(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True)


class Opened:
    """The weight files of an export; a context manager. ``show`` is called with how many tensors
    have been read."""

    def __init__(self, export: Export, show: Callable[[float], None] = lambda read: None) -> None:
        self.export = export
        self._show, self._read = show, 0
        self._stack, self._files = ExitStack(), dict[str, TensorFile]()  # by tensors' names

    def __enter__(self) -> Opened:
        for file, entries in self.export.stored.files.items():
            opened = self._stack.enter_context(self.export.stored.open(file))
            self._files |= dict.fromkeys(entries, opened)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        self._read += 1
        self._show(self._read)
        return self._files[name].read(name)

    def modules(self) -> Iterator[tuple[str, Parts]]:
        """The quantized modules with their tensors."""
        for module in self.export.formats:
            names = self.export.wanted[f"{module}.weight"]
            yield module, {name.rpartition(".")[2]: self.read(name) for name in names}

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """All other tensors, by name."""
        names = (self.export.wanted[f"{module}.weight"] for module in self.export.formats)
        for name in sorted(self._files.keys() - {n for some in names for n in some}):
            yield name, self.read(name)


def misrounded(parts: Parts, format: Format, weight: Tensor, source: Tensor) -> Tensor:
    """Where a decoded weight is not the source, rounded by the stored scales: bool [out, in].

    Rounding errs by half a step at most, and clipping by the excess. Blocks that lose more than
    _CLIPPED of their size by clipping are wrong as a whole, unless the smallest scale covers them.
    """
    if len(source) > _ROWS:  # so that little memory is needed
        found = []
        for start in range(0, len(source), _ROWS):
            rows = slice(start, start + _ROWS)
            few = {name: t[rows] if t.dim() > 1 else t for name, t in parts.items()}
            found.append(misrounded(few, format, weight[rows], source[rows]))
        return torch.cat(found)
    size, error = source.abs(), (weight - source).abs()
    slack = size / 256  # half a step of bf16, to which some round first
    if format == "fp8":
        step = parts["weight_scale"]
        octave = torch.frexp((size / step).clamp_min(2.0**-6)).exponent
        return ~(error <= step * torch.exp2(octave - 5.0) + slack)
    second = parts.get("weight_scale_2")
    tensor_scale = 1 / parts["weight_global_scale"].view(()) if second is None else second
    scale = (parts["weight_scale"].float() * tensor_scale).repeat_interleave(16, 1)
    octave = torch.frexp((size / scale).nan_to_num(0.0).clamp(1, 4)).exponent
    bound = torch.maximum(scale * torch.exp2(octave - 3.0), size - 6 * scale)
    most = 6 * scale.clamp_min(2.0**-9 * tensor_scale) * (1 + 1 / 64)
    blocks = (len(source), -1, 16)
    lost = error.view(blocks).norm(dim=-1) > _CLIPPED * source.view(blocks).norm(dim=-1)
    clipped = lost & (size > most).view(blocks).any(-1)
    return ~(error <= bound + slack) | clipped.repeat_interleave(16, 1)


@dataclass(frozen=True)
class Scales:
    """Formats, and largest magnitudes that scales cover, by our name without ``.weight``: of
    inputs, for all experts of a layer together; and of keys and values."""

    formats: Mapping[str, Format]
    amax: Mapping[str, Tensor]
    kv: Mapping[str, float] = field(default_factory=dict)


def read_scales(opened: Opened) -> Scales:
    """Scales are magnitudes over 448 in FP8, which keys and values are in, too, over 2688 in NVFP4;
    compressed-tensors has the reciprocals."""
    export, amax = opened.export, dict[str, Tensor]()
    layout = layout_of(export.target)
    for place in with_inputs(export.assignment):
        module = modules_of(place, export.sizes[place])[0]  # the others' are the same
        scale = opened.read(f"{module}.{INPUT_SCALES[layout]}").view(())
        factor = 1 / scale if layout == "compressed-tensors" else scale
        amax[place] = LARGEST[export.assignment[place]] * factor
    caches = (name for name in export.entries if name.endswith(KV_SCALES))
    kv = {name.rpartition(".")[0]: 448.0 * float(opened.read(name)) for name in caches}
    return Scales(export.assignment, amax, kv)
