"""`export`: a checkpoint into a directory for serving engines, tensor by tensor."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from nemo_hybrid.checkpoint import manifest
from nemo_hybrid.checkpoint.adapter import is_adapter, locate
from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.checkpoint.directory import Writer, new_directory, writing
from nemo_hybrid.checkpoint.load import plan_model
from nemo_hybrid.checkpoint.tensors import check_finite, safetensors_parts
from nemo_hybrid.checkpoint.weights import INDEX, Plan, Read
from nemo_hybrid.checkpoint.writing import MAX_SHARD_BYTES, describe_model
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.export.layout import (
    HF_QUANT,
    ExportFacts,
    Target,
    layout_of,
    quantization_configs,
    stored_scales,
    stored_tensors,
)
from nemo_hybrid.files import naming, side_by_side
from nemo_hybrid.precision.assign import (
    BLOCK,
    Format,
    check,
    groups,
    places,
)
from nemo_hybrid.precision.groups import family
from nemo_hybrid.precision.quantize import Layout, Search, amax_of, decoded, weight_tensors
from nemo_hybrid.terminal import progress_bar

_BESIDE_WEIGHTS = 64 << 20  # bytes kept free for everything else
_AT_ONCE = 1 << 20, 1 << 17
"""Numbers that are quantized, as their copies in fp32 are small; and those of them of which errors
of chosen scales are measured, which takes longer than choosing."""
Squares = defaultdict[str, float]
"""Sums of squared errors by kind of scales, and under "" that of squared weights."""


@dataclass
class _Item:
    """What becomes of one matrix or other tensor of the source. ``like``: names on disk -> tensors
    without storage, or scales of inputs, keys and values; ``place``: our name, without
    ``.weight``."""

    read: Read
    like: dict[str, Tensor]
    place: str
    format: Format

    @property
    def size(self) -> int:
        """Bytes of what is written."""
        return sum(tensor.nbytes for tensor in self.like.values())


def export_directory(
    source: Path,
    out: Path,
    assignment: Mapping[str, Format],
    *,
    target: Target,
    search: Search = "amax",
    calibration: Calibration | None = None,
    kv_cache: Literal["none", "fp8"] = "none",
    describe: Callable[[Path, ExportFacts], Mapping[str, bytes]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show_progress: bool = True,
) -> ExportFacts:
    """Write a checkpoint of the family, ours or Hugging Face's, in the formats of ``assignment``
    (`assign.planned`); everything else in bf16, the fp32 list in fp32.

    Every tensor is read once (q, k and v twice, for their common scale). In memory are the
    quantized tensors of one output file, which has ``max_shard_bytes`` at most, and one tensor of
    the source for each core, eight at most.
    ``out`` is whole or absent; its manifest has a checksum of every file. ``describe`` gives
    further files, by name, of the directory, in which then everything else is.

    Raises UserError before anything is written for a source that is quantized or does not fit its
    config.json, for what `assign.check` refuses, for missing calibration, for too little disk and
    an ``out`` that exists; and, nothing staying behind, for NaN.
    """
    out, layout = new_directory(out), layout_of(target)
    scales = stored_scales(assignment, layout, calibration, kv_cache)
    shape, plan, items = prepared(source, out, assignment, target, search, scales)
    companions = read_companions(plan.stored.directory)
    check_cache(kv_cache, target, shape, calibration is not None)
    shards = list(_shards(items, max_shard_bytes))
    facts = ExportFacts(
        source=plan.stored.directory,
        shape=shape,
        assignment=dict(assignment),
        calibration=calibration,
        parameters=sum(math.prod(plan.entry(item.read).shape) for item in items),
        bytes_before=sum(plan.entry(item.read).nbytes for item in items),
        bytes_after=sum(item.size for item in items),
    )
    in_config, hf_quant = quantization_configs(shape, assignment, target, kv_cache == "fp8")
    exporter = _Exporter(plan, layout, search, _shared_amax(plan, items, assignment))

    with writing(out) as writer:
        weight_map: dict[str, str] = {}
        with progress_bar("exporting", facts.bytes_before, show_progress) as done:
            for i, shard in enumerate(shards):
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                exporter.write(writer, name, shard, done)
                weight_map |= {tensor: name for item in shard for tensor in item.like}
        facts.errors.update(exporter.errors())
        index = {"metadata": {"total_size": facts.bytes_after}, "weight_map": weight_map}
        writer.write_text(INDEX, manifest.to_json(index))
        more = {} if in_config is None else {"quantization_config": in_config}
        describe_model(writer, shape, torch.bfloat16, companions, more)
        if hf_quant is not None:
            writer.write_text(HF_QUANT, manifest.to_json(hf_quant))
        if describe is not None:
            for name, content in describe(writer.directory, facts).items():
                writer.write(name, [content])
    plan.log()
    return facts


def prepared(
    source: Path,
    out: Path,
    assignment: Mapping[str, Format],
    target: Target,
    search: Search,
    scales: Mapping[str, dict[str, Tensor]] = MappingProxyType({}),
) -> tuple[HybridConfig, Plan, list[_Item]]:
    """The source's shape and plan, and everything to write, in the order in which it is read.
    Raises UserError for all that headers and free space tell to be impossible."""
    model, plan = plan_model(unquantized(source), as_stored=True)
    plan.raise_errors()
    sizes = places(model.config)
    check(assignment, sizes)
    for place, format in assignment.items():
        if search == "training" and format.startswith("nvfp4") and sizes[place][-2] % BLOCK:
            raise UserError(
                f"{place} has {sizes[place][-2]} rows, which the 16x16 blocks of training do not "
                "divide: take other scales"
            )
    stored = stored_tensors(model.config, assignment, layout_of(target))
    items = []
    for read in plan.reads:
        place, module = (name.removesuffix(".weight") for name in (read.own, read.hub_name))
        given = {f"{module}.{last}": t for last, t in scales.get(place, {}).items()}
        like = stored[read.hub_name] | given
        items.append(_Item(read, like, place, assignment.get(place, "bf16")))
    _check_disk(out, sum(item.size for item in items) + _BESIDE_WEIGHTS)
    return model.config, plan, items


def check_cache(kv_cache: str, target: str, shape: HybridConfig, calibrated: bool) -> None:
    """Raise UserError where scales of keys and values cannot be had, or not be written."""
    if kv_cache == "none":
        return
    if target in ("bf16", "compressed-tensors"):
        raise UserError("kv_cache fp8 is written with --format nvfp4, mixed and fp8 only")
    if not calibrated:
        raise UserError("kv_cache fp8 needs calibration: name a text file or a token store")
    if "*" not in shape.pattern:
        raise UserError("kv_cache: the model has no attention, thus no keys and values")


def unquantized(path: str | Path) -> Path:
    """The directory of a checkpoint. Raises UserError where it is no whole unquantized model."""
    directory = locate(path)
    if is_adapter(directory):
        raise UserError(f"{path} is an adapter: add it to its weights first (nemo-hybrid merge)")
    if (directory / HF_QUANT).exists():
        raise UserError(f"{directory} is quantized already; export the checkpoint it was made of")
    return directory


def _shards(items: list[_Item], max_bytes: int) -> Iterator[list[_Item]]:
    """What stands in each output file: of one source file, one item at least."""
    for _, group in groupby(items, key=lambda item: item.read.file):
        shard: list[_Item] = []
        size = 0
        for item in group:
            if shard and size + item.size > max_bytes:
                yield shard
                shard, size = [], 0
            shard.append(item)
            size += item.size
        yield shard


def _check_disk(out: Path, needed: int) -> None:
    above = next(path for path in out.parents if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"cannot write {out}: {above} is no directory to write into")
    with naming("write", out):
        free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.2f} GB, but {above} has {free / 1e9:.2f} GB free: make "
            "room, or name another directory"
        )


def _shared_amax(
    plan: Plan, items: Iterable[_Item], assignment: Mapping[str, Format]
) -> dict[str, Tensor]:
    """Place -> the largest magnitude among the weights that an engine fuses with it."""
    reads = {item.place: item.read for item in items}
    out: dict[str, Tensor] = {}
    for group in groups(assignment):
        if len(group) > 1:
            largest = []
            for place in group:
                with plan.stored.open(reads[place].file) as file:
                    largest.append(amax_of(file.read(reads[place].name)))
            out |= dict.fromkeys(group, amax_of(*largest))
    return out


class _Exporter:
    """Reads, quantizes and writes; and measures errors of NVFP4 scales other than amax."""

    def __init__(
        self, plan: Plan, layout: Layout, search: Search, shared: Mapping[str, Tensor]
    ) -> None:
        self.plan, self.layout, self.search, self.shared = plan, layout, search, shared
        self._read = 0
        self._reading = Lock()
        self._squares: defaultdict[str, Squares] = defaultdict(lambda: defaultdict(float))
        """By family."""

    def write(
        self, writer: Writer, name: str, shard: list[_Item], done: Callable[[float], None]
    ) -> None:
        made: dict[str, Tensor] = {}
        reads: dict[str, Read] = {}
        with self.plan.stored.open(shard[0].read.file) as file:

            def load(read: Read, dtype: torch.dtype | None = None) -> Tensor:
                tensor = file.read(read.name, read.row)
                with self._reading:
                    self._read += tensor.nbytes
                    done(self._read)
                tensor = tensor.to(dtype or tensor.dtype)
                check_finite(tensor, read.name, file.path)
                return tensor

            def quantize(item: _Item) -> tuple[dict[str, Tensor], Squares]:
                weight = load(item.read)
                try:
                    return self._quantized(weight, item)
                except UserError as error:
                    raise UserError(f"{item.read.name}: {error}") from None

            for item in shard:
                made |= {part: t for part, t in item.like.items() if not t.is_meta}
                if item.format == "bf16":
                    reads |= dict.fromkeys(item.like.keys() - made.keys(), item.read)
            quantized = [item for item in shard if item.format != "bf16"]
            results = side_by_side(quantize, quantized)
            for item, (parts, squares) in zip(quantized, results, strict=True):
                made |= parts
                for scales, s in squares.items():
                    self._squares[family(item.place)][scales] += s
            like = {part: tensor for item in shard for part, tensor in item.like.items()}

            def fetch(part: str) -> Tensor:
                if part in made:
                    return made.pop(part)
                return load(reads[part], like[part].dtype)

            writer.write(name, safetensors_parts(like, {"format": "pt"}, fetch))

    def _quantized(self, weight: Tensor, item: _Item) -> tuple[dict[str, Tensor], Squares]:
        """The item's tensors that are made of its weight, a few rows at a time; and errors of the
        first of these rows."""
        amax = self.shared.get(item.place)
        amax = amax_of(weight) if amax is None else amax
        made = {
            # Not empty_like, which imports torch's compiler for tensors without storage.
            part: torch.empty(t.shape, dtype=t.dtype)
            for part, t in item.like.items()
            if t.is_meta
        }
        module = next(iter(item.like)).rpartition(".")[0]
        step, few = (max(BLOCK, n // weight.shape[1] // BLOCK * BLOCK) for n in _AT_ONCE)
        squares: Squares = defaultdict(float)
        for i in range(0, len(weight), step):
            w = weight[i : i + step]
            stored = weight_tensors(w, item.format, self.layout, amax, self.search)
            for part, tensor in stored.items():
                whole = made[f"{module}.{part}"]
                (whole[i : i + step] if tensor.dim() > 1 else whole).copy_(tensor)
            if item.format != "fp8" and self.search != "amax":
                w = w[:few]
                chosen = {part: t[:few] if t.dim() > 1 else t for part, t in stored.items()}
                plain = weight_tensors(w, item.format, self.layout, amax)
                squares[""] += float(w.float().square().sum())
                for scales, values in ((self.search, chosen), ("amax", plain)):
                    squares[scales] += float(decoded(values).sub_(w).square_().sum())
        return made, squares

    def errors(self) -> dict[str, dict[str, float]]:
        """See `ExportFacts.errors`."""
        return {
            kind: {scales: math.sqrt(s / (sums[""] or 1.0)) for scales, s in sums.items() if scales}
            for kind, sums in self._squares.items()
        }
