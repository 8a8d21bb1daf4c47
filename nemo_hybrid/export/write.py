"""`export`: a checkpoint into a directory for serving engines, tensor by tensor."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemo_hybrid.checkpoint import files
from nemo_hybrid.checkpoint.adapter import is_adapter, locate
from nemo_hybrid.checkpoint.convert import split_experts
from nemo_hybrid.checkpoint.directory import OneProcess, Writer, new_directory, write_directory
from nemo_hybrid.checkpoint.load import Source, load_model, read_source
from nemo_hybrid.checkpoint.names import is_stacked
from nemo_hybrid.checkpoint.publish import CARD
from nemo_hybrid.checkpoint.tensors import TensorFile, safetensors_parts
from nemo_hybrid.checkpoint.weights import INDEX, Read, log_report, reopen
from nemo_hybrid.checkpoint.writing import MAX_SHARD_BYTES, describe_model
from nemo_hybrid.command_options import ExportOptions
from nemo_hybrid.config import FP32_NAMES, HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.assign import (
    Assignment,
    Format,
    check,
    family,
    fitted,
    groups,
    places,
    planned,
)
from nemo_hybrid.export.calibrate import Calibration, calibrate, read_pieces
from nemo_hybrid.export.layout import (
    HF_QUANT,
    INPUT_SCALES,
    ExportFacts,
    Target,
    layout_of,
    quantization_configs,
    stored_like,
)
from nemo_hybrid.export.quantize import Layout, Search, decoded, weight_tensors
from nemo_hybrid.export.sensitivity import SPENT_ON, assign_within, measure, sensitivity_report
from nemo_hybrid.export.simulate import WITH_INPUTS
from nemo_hybrid.files import naming
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.terminal import progress_bar

_LARGEST = {"fp8": 448.0, "nvfp4": 2688.0}
_MEASURED_TOKENS = 8192  # of the calibration text, for sensitivity
_SHOWN = 8  # experts
_BESIDE_WEIGHTS = 64 << 20  # bytes kept free for everything else


def export_command(options: ExportOptions) -> None:
    """``nemo-hybrid export``. Raises UserError."""
    from nemo_hybrid.export.card import card

    source = _source(options.from_)
    new_directory(options.out)
    _check_options(options)
    shape = HybridConfig.from_hf(str(source))
    calibrated, budget = options.calibration is not None, options.budget_bits
    reports: dict[str, bytes] = {}
    if budget is None:
        assignment = planned(shape, options.format, options.preset, options.formats, calibrated)
    else:
        assignment = {p: "fp8" if family(p) in SPENT_ON else "bf16" for p in places(shape)}
    calibration = None
    if options.calibration is not None:
        pieces = read_pieces(options.calibration, source, shape, options.calibration_tokens)
        model = load_model(source)
        inputs = [place for place, format in assignment.items() if format in WITH_INPUTS]
        calibration = calibrate(model, pieces, options.percentile, inputs, show=True)
        if budget is not None:
            assignment, reports = _within(budget, model, pieces, calibration, options)
        del model
    facts = export_directory(
        source,
        Path(options.out),
        assignment,
        target=options.format,
        search=options.scales,
        calibration=calibration,
        kv_cache=options.kv_cache,
        card=card,
        preset=options.preset if budget is None else None,
        budget_bits=budget,
        calibration_data=options.calibration,
        percentile=options.percentile,
        reports=reports,
    )
    for kind, errors in facts.errors.items():
        listed = ", ".join(f"{error:.4f} with {scales}" for scales, error in errors.items())
        print(f"relative error of {kind}: {listed}")
    for place, experts in (calibration.unseen if calibration else {}).items():
        shown = ", ".join(map(str, experts[:_SHOWN])) + (", ..." if len(experts) > _SHOWN else "")
        print(
            f"{place}: no token reached {len(experts)} experts ({shown}); input scales are those "
            "of the others"
        )
    ratio = facts.bytes_after / facts.bytes_before
    print(
        f"{facts.bytes_after / 1e9:.3g} GB of weights ({ratio:.2f} of the source's) written to "
        f"{options.out}; check them with\n"
        f"  nemo-hybrid verify-export {options.out} --base {options.from_}"
    )


def _check_options(options: ExportOptions) -> None:
    if options.calibration is None:
        for name in ("percentile", "budget_bits"):
            if getattr(options, name) is not None:
                raise UserError(f"{name} needs calibration: name a text file or a token store")
    elif options.format == "bf16":
        raise UserError("calibration is for quantized formats: leave it out with bf16")
    if options.budget_bits is not None and options.formats:
        raise UserError("budget_bits assigns formats itself: leave formats out")
    default = {f.name: f.default for f in fields(ExportOptions)}
    idle = {
        "preset": options.format == "bf16" or options.budget_bits is not None,
        "scales": options.format in ("bf16", "fp8"),
        "calibration_tokens": options.calibration is None,
    }
    for name, without_effect in idle.items():
        if without_effect and getattr(options, name) != default[name]:
            raise UserError(f"{name} has no effect with these options: leave it out")


def _within(
    budget: float,
    model: HybridLM,
    pieces: list[Tensor],
    calibration: Calibration,
    options: ExportOptions,
) -> tuple[Assignment, dict[str, bytes]]:
    before = accumulate((piece.numel() for piece in pieces), initial=0)
    few = [p for p, so_far in zip(pieces, before, strict=False) if so_far < _MEASURED_TOKENS]
    tried: dict[str, tuple[Format, ...]] = {"mixed": ("nvfp4", "fp8"), "fp8": ("fp8",)}
    formats = tried.get(options.format, ("nvfp4",))
    measured = measure(model, few, formats, options.scales, calibration.amax, show=True)
    chosen = assign_within(budget, measured, model.config)
    assignment = fitted(chosen, options.format, calibrated=True)
    return assignment, sensitivity_report(measured, assignment, budget)


def _source(path: str | Path) -> Path:
    directory = locate(path)
    if is_adapter(directory):
        raise UserError(f"{path} is an adapter: add it to its weights first (nemo-hybrid merge)")
    if (directory / HF_QUANT).exists():
        raise UserError(f"{directory} is quantized already; export the checkpoint it was made of")
    return directory


@dataclass
class _Item:
    """What becomes of one matrix or other tensor of the source. ``like``: names on disk -> tensors
    without storage; ``format`` and ``place`` of what is quantized."""

    read: Read
    like: dict[str, Tensor]
    place: str | None = None
    format: Format = "bf16"
    given: dict[str, Tensor] = field(default_factory=dict)
    """Of ``like``, what the weight does not say: scales of inputs, keys and values."""


@dataclass
class _Shard:
    """An output file: tensors of one source file."""

    file: str
    items: list[_Item] = field(default_factory=list)
    size: int = 0


def export_directory(
    source: Path,
    out: Path,
    assignment: Mapping[str, Format],
    *,
    target: Target,
    search: Search = "amax",
    calibration: Calibration | None = None,
    kv_cache: Literal["none", "fp8"] = "none",
    card: Callable[[ExportFacts], str] | None = None,
    preset: str | None = None,
    budget_bits: float | None = None,
    calibration_data: str | None = None,
    percentile: float | None = None,
    reports: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    show_progress: bool = True,
) -> ExportFacts:
    """Write a checkpoint of the family, ours or Hugging Face's, in the formats of ``assignment``
    (`assign.planned`); everything else in bf16, the fp32 list in fp32.

    Every tensor is read once (q, k and v twice, for their common scale). In memory are the
    quantized tensors of one output file, which has ``max_shard_bytes`` at most, and one tensor of
    the source.
    ``out`` is whole or absent; its manifest has a checksum of every file. ``reports``: further
    files; ``preset`` to ``percentile`` are for the card.

    Raises UserError before anything is written for a source that is quantized or does not fit its
    config.json, for what `assign.check` refuses, for missing calibration, for too little disk and
    an ``out`` that exists; and, nothing staying behind, for NaN.
    """
    out = new_directory(out)
    read, _ = read_source(_source(source), as_stored=True)
    read.report.raise_errors()
    sizes = places(read.config)
    check(assignment, sizes)
    layout = layout_of(target)
    plan = _plan(read, assignment, layout, _scales(assignment, layout, calibration, kv_cache))
    shards = list(_shards(plan, max_shard_bytes))
    facts = ExportFacts(
        source=str(source),
        shape=read.config,
        target=target,
        assignment=dict(assignment),
        search=search,
        preset=preset,
        budget_bits=budget_bits,
        calibration=calibration,
        calibration_data=calibration_data,
        percentile=percentile,
        kv_cache=kv_cache,
        parameters=sum(_elements(read, item.read) for item in plan),
        bytes_before=sum(_bytes(read, item.read) for item in plan),
        bytes_after=sum(shard.size for shard in shards),
    )
    _check_disk(out, facts.bytes_after + _BESIDE_WEIGHTS)
    in_config, hf_quant = quantization_configs(read.config, assignment, target, kv_cache == "fp8")
    shared = _shared_amax(read, plan, assignment)
    exporter = _Exporter(read, layout, search, shared)

    def write(writer: Writer) -> None:
        weight_map: dict[str, str] = {}
        with progress_bar("exporting", facts.bytes_before, show_progress) as done:
            for i, shard in enumerate(shards):
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                exporter.write(writer, name, shard, done)
                weight_map |= {tensor: name for item in shard.items for tensor in item.like}
        facts.errors.update(exporter.errors())
        index = {"metadata": {"total_size": facts.bytes_after}, "weight_map": weight_map}
        writer.write_text(INDEX, files.to_json(index))
        more = {} if in_config is None else {"quantization_config": in_config}
        describe_model(writer, read.config, torch.bfloat16, read.companions, more)
        if hf_quant is not None:
            writer.write_text(HF_QUANT, files.to_json(hf_quant))
        for name, content in (reports or {}).items():
            writer.write(name, [content])
        if card is not None:
            writer.write_text(CARD, card(facts))

    write_directory(out, OneProcess(), write, lambda writer, parts: None)
    log_report(read.report)
    return facts


def _scales(
    assignment: Mapping[str, Format],
    layout: Layout,
    calibration: Calibration | None,
    kv_cache: str,
) -> dict[str, dict[str, Tensor]]:
    """Place -> last name part -> scale, of inputs, and of keys and values."""
    out: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for group in groups(assignment):
        format = assignment[group[0]]
        if format not in WITH_INPUTS:
            continue
        if calibration is None or any(place not in calibration.amax for place in group):
            raise UserError(f"{group[0]} is {format}, whose input scale needs calibration")
        # One scale for what engines fuse: q, k and v, and all experts of a layer.
        amax = torch.stack([calibration.amax[place].max().float() for place in group]).max()
        scale = torch.where(amax == 0, 1.0, amax) / _LARGEST[format]
        if scale < torch.finfo(torch.float32).tiny or not scale.reciprocal().isfinite():
            raise UserError(
                f"the inputs of {group[0]} are at most {float(amax):.3g}, too small for a scale: "
                "calibrate on other data, or with a higher percentile"
            )
        if layout == "compressed-tensors":
            scale = scale.reciprocal().reshape(1)
        for place in group:
            out[place][INPUT_SCALES[layout]] = scale
    if kv_cache == "fp8":
        if layout == "compressed-tensors" or all(f == "bf16" for f in assignment.values()):
            raise UserError("kv_cache fp8 is written with --format nvfp4, mixed and fp8 only")
        if calibration is None:
            raise UserError("kv_cache fp8 needs calibration: name a text file or a token store")
        for place, largest in calibration.kv.items():
            part = f"{place.rpartition('.')[2][0]}_scale"
            out[place][part] = torch.tensor((largest or 1.0) / 448.0)
    return dict(out)


def _plan(
    source: Source,
    assignment: Mapping[str, Format],
    layout: Layout,
    scales: Mapping[str, dict[str, Tensor]],
) -> list[_Item]:
    """Everything to write, in the order in which it is read."""
    plan = []
    for read in source.reads:
        place = read.own.removesuffix(".weight")
        format = assignment.get(place, "bf16")
        for name, part in split_experts(read):
            shape = source.stored.headers[part.file].entries[part.name].shape[-2:]
            if place not in assignment:
                kept = name.rpartition(".")[2] in FP32_NAMES
                shape = source.stored.headers[part.file].entries[part.name].shape
                dtype = torch.float32 if kept else torch.bfloat16
                plan.append(_Item(part, {name: torch.empty(shape, dtype=dtype, device="meta")}))
                continue
            module = name.removesuffix(".weight")
            given = scales.get(place, {})
            like = stored_like(shape, format, layout) | given
            item = _Item(
                part, {f"{module}.{p}": tensor for p, tensor in like.items()}, place, format
            )
            item.given = {f"{module}.{p}": tensor for p, tensor in given.items()}
            plan.append(item)
    return plan


def _shards(plan: list[_Item], max_bytes: int) -> Iterator[_Shard]:
    for file, items in groupby(plan, key=lambda item: item.read.file):
        shard = _Shard(file)
        for item in items:
            size = sum(tensor.nbytes for tensor in item.like.values())
            if shard.items and shard.size + size > max_bytes:
                yield shard
                shard = _Shard(file)
            shard.items.append(item)
            shard.size += size
        yield shard


def _elements(source: Source, read: Read) -> int:
    shape = source.stored.headers[read.file].entries[read.name].shape
    return math.prod(shape) if read.rows is None else math.prod(shape[1:]) * len(read.rows)


def _bytes(source: Source, read: Read) -> int:
    entry = source.stored.headers[read.file].entries[read.name]
    return (entry.stop - entry.start) // (1 if read.rows is None else entry.shape[0])


def _check_disk(out: Path, needed: int) -> None:
    above = next(path for path in out.parents if path.exists())
    with naming("write", out):
        free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.2f} GB, but {above} has {free / 1e9:.2f} GB free: make "
            "room, or name another directory"
        )


def _shared_amax(
    source: Source, plan: list[_Item], assignment: Mapping[str, Format]
) -> dict[str, Tensor]:
    """Place -> the largest magnitude among the weights that an engine fuses with it."""
    items = {item.place: item for item in plan if item.place and not is_stacked(item.place)}
    out: dict[str, Tensor] = {}
    for group in groups(assignment):
        if len(group) > 1:
            largest = []
            for place in group:
                with reopen(source.stored, items[place].read.file) as file:
                    largest.append(_read(file, items[place].read).abs().amax().float())
            out |= dict.fromkeys(group, torch.stack(largest).amax())
    return out


def _read(file: TensorFile, read: Read) -> Tensor:
    tensor = file.read(read.name, read.rows)
    return tensor if read.rows is None else tensor[0]


class _Exporter:
    """Reads, quantizes and writes; and measures errors of NVFP4 scales other than amax."""

    def __init__(
        self, source: Source, layout: Layout, search: Search, shared: Mapping[str, Tensor]
    ) -> None:
        self.source, self.layout, self.search, self.shared = source, layout, search, shared
        self._read = 0
        # family -> kind of scales -> sum of squared errors; "" of squared weights
        self._squares: dict[str, dict[str, float]] = {}

    def write(
        self, writer: Writer, name: str, shard: _Shard, done: Callable[[float], None]
    ) -> None:
        made: dict[str, Tensor] = {}
        reads: dict[str, Read] = {}
        with reopen(self.source.stored, shard.file) as file:

            def load(read: Read) -> Tensor:
                tensor = _read(file, read)
                # A sum is quick, but may overflow.
                if not tensor.sum().isfinite() and not tensor.isfinite().all():
                    raise UserError(f"{read.name} holds NaN or infinity: the checkpoint is broken")
                self._read += tensor.nbytes
                done(self._read)
                return tensor

            for item in shard.items:
                made |= item.given
                if item.format == "bf16":
                    reads |= {part: item.read for part in item.like if part not in item.given}
                else:
                    assert item.place is not None
                    weight = load(item.read)
                    try:
                        stored = self._quantized(weight, item.place, item.format)
                    except UserError as error:
                        raise UserError(f"{item.read.name}: {error}") from None
                    module = next(iter(item.like)).rpartition(".")[0]
                    made |= {f"{module}.{part}": tensor for part, tensor in stored.items()}
            like = {part: tensor for item in shard.items for part, tensor in item.like.items()}

            def fetch(part: str) -> Tensor:
                if part in made:
                    return made.pop(part)
                return load(reads[part]).to(like[part].dtype)

            writer.write(name, safetensors_parts(like, {"format": "pt"}, fetch))

    def _quantized(self, weight: Tensor, place: str, format: Format) -> dict[str, Tensor]:
        shared = self.shared.get(place)
        stored = weight_tensors(weight, format, self.layout, shared, self.search)
        if format != "fp8" and self.search != "amax":
            plain = weight_tensors(weight, format, self.layout, shared)
            sums = self._squares.setdefault(family(place), defaultdict(float))
            weight = weight.float()
            sums[""] += float(weight.square().sum())
            for scales, values in ((self.search, stored), ("amax", plain)):
                sums[scales] += float(decoded(values).sub_(weight).square_().sum())
        return stored

    def errors(self) -> dict[str, dict[str, float]]:
        """See `ExportFacts.errors`."""
        return {
            kind: {scales: math.sqrt(s / (sums[""] or 1.0)) for scales, s in sums.items() if scales}
            for kind, sums in self._squares.items()
        }
