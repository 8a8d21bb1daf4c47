"""`verify-export`: is a directory what its configuration says, and the model that it was made of?

Configuration, names, shapes and dtypes are compared with what `export` would write in the formats
that the tensors have; dequantized values with the source; then the model runs on them, and with its
inputs rounded too.

Shapes: S tokens of one piece, T compared tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.adapter import locate
from nemo_hybrid.checkpoint.companions import GENERATION, Companions, read_companions
from nemo_hybrid.checkpoint.directory import verify as verify_files
from nemo_hybrid.checkpoint.load import load_model, tensors_by_name
from nemo_hybrid.checkpoint.manifest import MANIFEST
from nemo_hybrid.checkpoint.names import from_hub
from nemo_hybrid.checkpoint.publish import CARD
from nemo_hybrid.checkpoint.steps import reading
from nemo_hybrid.checkpoint.weights import INDEX
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export import divergence
from nemo_hybrid.export.calibrate import calibrate, read_pieces
from nemo_hybrid.export.decode import (
    KV_SCALES,
    Export,
    Opened,
    Scales,
    misrounded,
    read_export,
    read_scales,
)
from nemo_hybrid.export.divergence import PerToken, States
from nemo_hybrid.export.layout import HF_QUANT
from nemo_hybrid.export.sensitivity import PLOT_FILE, TABLE_FILE
from nemo_hybrid.files import read_json
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.init import with_memory
from nemo_hybrid.precision.assign import WITH_INPUTS, Format
from nemo_hybrid.precision.quantize import decoded
from nemo_hybrid.precision.simulate import quantized_inputs, rounded_input
from nemo_hybrid.terminal import progress_bar

PIECE = 512
"""Tokens that the models see at once."""
MOST_ERROR: dict[Format, float] = {"fp8": 0.07, "nvfp4": 0.3, "nvfp4_w4a16": 0.3}
"""Largest root mean square error of a weight, over its own root mean square. Rounding stays below:
neighbours in E4M3 and E2M1 are at most 1/8 and 1/2 of a value apart. Wrong scales do not."""
PLAUSIBLE = 32.0
"""What a scale of inputs, keys or values covers is at most so many times the largest magnitude seen
here, and at least its reciprocal. Calibration on other data, or a percentile of 90 or more, stays
within: on the quick start's model 0.3 to 3.3 times was found with text of another kind, random ids
or 512 tokens, and 0.1 to 0.24 with the percentile 99. Lost factors (448, 2688, powers of 10 and 2
from 100 and 64 on) and inversions do not, but of scales so near to 1 that they change little."""
_SHOWN = 20
_FILES = {MANIFEST, CARD, INDEX, "config.json", HF_QUANT, TABLE_FILE, PLOT_FILE}


class Check(NamedTuple):
    """One line of the result. ``passed`` None: not made, for the reason in ``note``."""

    name: str
    passed: bool | None
    note: str


class Run(NamedTuple):
    """What a model gives on some tokens, in fp32; means in nats per token."""

    rounded: str
    """What of the model is rounded, in words."""
    kl: float | None
    """KL(source || it). None: it is the source, or there is none."""
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


class Measured(NamedTuple):
    """The source, if there is one, the export with its weights dequantized, and, if it has scales
    of inputs, the export whose inputs are rounded by them too: on the same tokens."""

    tokens: int
    text: str
    """Where the tokens come from, in words."""
    runs: list[Run]


@dataclass
class Result:
    """All checks that were made, and what the model gave if they came so far."""

    checks: list[Check] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def add(self, name: str, problems: list[str], found: str) -> bool:
        """Note a check and what it found, or the first of the problems."""
        lines = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            lines.append(f"and {len(problems) - _SHOWN} more")
        # Names in files may hold what cannot be printed.
        note = ("\n".join(lines) or found).encode(errors="backslashreplace").decode()
        self.checks.append(Check(name, not problems, note))
        return not problems

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name, None, why))


def verify_directory(
    directory: Path,
    *,
    base: str | None = None,
    data: str | None = None,
    tokens: int = 8192,
    show: bool = False,
) -> Result:
    """Make all checks of an exported directory; options as of `verify-export`.

    What is wrong with the directory stands in the result; UserError is raised for data, or a base,
    that cannot be used.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    if (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} is a run: name a directory that `nemo-hybrid export` wrote")
    result = Result()
    _check_files(directory, result)
    _check_companions(directory, base, result)
    try:
        export = read_export(directory)
    except UserError as error:
        result.add("configuration", [str(error)], "")
        return result
    # Files that are damaged or missing may be looked into.
    if not _check_tensors(export, result):
        result.skip("values", "the tensors are not the expected ones")
        return result
    pieces = _pieces(directory, export.config, data, tokens)
    source = None if base is None else load_model(base, torch.float32)
    if source is not None and source.config != export.config:
        result.add("source", [f"config.json describes another model than that of {base}"], "")
        return result
    total = len(export.entries) * (1 if source is None else 2)
    with progress_bar("checking values", total, show) as done, Opened(export, done) as opened:
        if not _check_values(opened, source, result):
            result.skip("model", "its weights are wrong")
            return result
        scales = read_scales(opened)
    before = None if source is None else states(source, pieces, "source", show)
    del source  # one model at a time
    model = _dequantized(export)
    found = measure(before, model, scales, pieces, data or "random token ids", show)
    result.measured = found
    _check_scales(model, scales, pieces, result, show)
    problems = [
        f"the loss is not finite: rounded is {run.rounded}"
        for run in found.runs
        if not math.isfinite(run.loss)
    ]
    lines = [f"{found.tokens} tokens of {found.text}, in fp32; rounded:"]
    for run in found.runs:
        kl = "" if run.kl is None else f", KL(source || export) {run.kl:.3e} nats per token"
        lines.append(f"{run.rounded}: loss {run.loss:.4f}, perplexity {run.perplexity:.2f}{kl}")
    result.add("model", problems, "\n".join(lines))
    return result


def load_exported(directory: str | Path) -> HybridLM:
    """The model of an exported directory, its weights dequantized to fp32, on the CPU.

    Where keys and values have scales its caches keep them in FP8; other activations are not
    quantized, nor keys and values of a forward pass over the whole text. Raises UserError unless
    the directory holds exactly what its configuration says; values are not checked.
    """
    export, result = read_export(Path(directory).expanduser()), Result()
    if not _check_tensors(export, result):
        faults = "\n  ".join(check.note for check in result.checks if not check.passed)
        raise UserError(f"{directory} is not a sound export:\n  {faults}")
    return _dequantized(export)


def _dequantized(export: Export) -> HybridLM:
    with torch.device("meta"):
        model = HybridLM(export.config)
    model = with_memory(model)
    targets = tensors_by_name(model)
    with Opened(export) as opened, torch.no_grad():
        for name, tensor in opened.others():
            if name.endswith(KV_SCALES):
                projection, _, scale = from_hub(name)[0].rpartition(".")
                layer = model.get_submodule(projection.rpartition(".")[0])
                setattr(layer, scale, float(tensor))
            else:
                _part(targets, name).copy_(tensor)
        for module, parts in opened.modules():
            _part(targets, f"{module}.weight").copy_(decoded(parts))
    return model


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Our tensor, or that matrix of a stack, which has this name on disk."""
    own, expert = from_hub(name)
    return tensors[own].detach() if expert is None else tensors[own][expert].detach()


def _check_files(directory: Path, result: Result) -> None:
    try:
        records = verify_files(directory)
    except UserError as error:
        result.add("checksums", [str(error)], "")
        return
    extra = sorted({path.name for path in directory.iterdir()} - records.keys() - {MANIFEST})
    problems = [f"{name}: {MANIFEST} does not list it" for name in extra]
    result.add("checksums", problems, f"{len(records)} files")


def _check_companions(directory: Path, base: str | None, result: Result) -> None:
    """A model card must be there, and the tokenizer and settings of the base, unchanged; and
    nothing else, such as code or weights of other kinds."""
    problems = [] if (directory / CARD).is_file() else [f"{CARD}, the model card, is missing"]
    wanted = None if base is None else reading(base, read_companions, locate)
    try:
        found = read_companions(directory)
        problems += [] if wanted is None else _unlike_base(directory, found, wanted)
    except UserError as error:
        result.add("companions", [*problems, str(error)], "")
        return
    problems += [
        f"{path.name}: no export has such a file, and engines may read it"
        for path in sorted(directory.iterdir())
        if path.name not in _FILES | found.files.keys() and path.suffix != ".safetensors"
    ]
    result.add("companions", problems, ", ".join([CARD, *found.files]))


def _unlike_base(directory: Path, found: Companions, wanted: Companions) -> list[str]:
    problems = [f"{name} is missing; the base has it" for name in wanted.files.keys() - found.files]
    for name, content in found.files.items():
        if content != wanted.files.get(name, content):
            problems.append(f"{name} is not that of the base")
        elif name not in (*wanted.files, GENERATION):
            problems.append(f"{name} is there, but the base has none")
    if found.eos_token_ids != wanted.eos_token_ids:
        problems.append("config.json: eos_token_id is not that of the base")
    if GENERATION not in wanted.files:  # it is made of config.json then
        ids = read_json(directory / "config.json").get("eos_token_id")
        if found.stop_ids != (ids if isinstance(ids, list) else [ids]):
            problems.append(f"{GENERATION} and config.json disagree about eos_token_id")
    return problems


def _check_tensors(export: Export, result: Result) -> bool:
    """Whether configuration files, names, shapes and dtypes are those of an export."""
    formats = ", ".join(sorted(set(export.formats.values()))) or "nothing quantized"
    found = f"what --format {export.target} writes: {formats}"
    configured = result.add("configuration", list(export.faults_of_configuration()), found)
    problems = list(export.faults_of_tensors())
    return configured & result.add(
        "names, shapes, dtypes", problems, f"{len(export.entries)} tensors"
    )


def _check_values(opened: Opened, source: HybridLM | None, result: Result) -> bool:
    """Whether numbers are sound in themselves, and those of the source."""
    problems = [*_bad_numbers(opened), *_unshared(opened)]
    sound = result.add("values", problems, "finite; scales positive, shared as engines do")
    if source is None:
        result.skip("source", "give --base to compare weights with")
        return sound
    errors: defaultdict[Format, list[float]] = defaultdict(list)
    unlike = list(_unlike_source(opened, tensors_by_name(source), errors))
    if len(unlike) > _SHOWN:
        unlike.insert(0, f"{len(unlike)} tensors: is --base the checkpoint that it was made of?")
    found = [
        f"{format}: relative error {sum(many) / len(many):.4f}, at most {max(many):.4f}"
        for format, many in errors.items()
    ]
    return sound & result.add("source", unlike, "\n".join([*found, "all other tensors equal"]))


def _bad_numbers(opened: Opened) -> Iterator[str]:
    """Numbers that are not finite, and scales that are not positive."""
    for module, parts in opened.modules():
        for part, tensor in parts.items():
            x = tensor.float()
            faults = {
                "not finite": not x.isfinite().all(),
                "a scale is negative": part.startswith("weight_") and (x < 0).any(),
                "a scale is not positive": x.numel() == 1 and not x > 0,
                "a scale is too small to divide by": x.numel() == 1 and x.reciprocal().isinf(),
            }
            yield from (f"{module}.{part}: {fault}" for fault, found in faults.items() if found)
    for name, tensor in opened.others():
        scale = name.endswith(KV_SCALES)
        if not tensor.isfinite().all() or (scale and not (tensor > 0).all()):
            yield f"{name}: {'not positive' if scale else 'not finite'}"


def _unshared(opened: Opened) -> Iterator[str]:
    for names in opened.export.shared():
        if len({float(opened.read(name)) for name in names}) > 1:
            yield f"{names[0]} and {len(names) - 1} more differ, but engines take one for all"


def _unlike_source(
    opened: Opened, source: Mapping[str, Tensor], errors: Mapping[Format, list[float]]
) -> Iterator[str]:
    """Weights that have other errors than those of rounding, and other tensors that are not the
    source's; relative errors are added to ``errors``."""
    for module, parts in opened.modules():
        format, weight = opened.export.formats[module], decoded(parts)
        wanted = _part(source, f"{module}.weight").float()
        error = relative_error(weight, wanted)
        errors[format].append(error)
        if not error <= MOST_ERROR[format]:
            yield f"{module}: {format} differs from the source by {error:.1%}"
        elif (wrong := misrounded(parts, format, weight, wanted)).any():
            row, column = wrong.nonzero()[0].tolist()
            yield (
                f"{module}: {int(wrong.sum())} values of {format} are not the source's, rounded; "
                f"the first is in row {row}, column {column}"
            )
    for name, tensor in opened.others():
        scale = name.endswith(KV_SCALES)
        if not scale and not torch.equal(tensor, _part(source, name).to(tensor.dtype)):
            yield f"{name}: not the source's, rounded to {tensor.dtype}"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of ``wanted``; 0 where both are zeros."""
    size = float(wanted.double().norm())
    error = float((found.double() - wanted.double()).norm())
    return error / size if size else (0.0 if error == 0 else math.inf)


def _pieces(directory: Path, config: HybridConfig, data: str | None, tokens: int) -> list[Tensor]:
    """ids [1, S] to compare on. Raises UserError for data that cannot be used."""
    if data is not None:
        return read_pieces(data, directory, config, tokens, "heldout", PIECE)
    generator = torch.Generator().manual_seed(1234)
    ids = torch.randint(0, config.vocab_size, (1, tokens + 1), generator=generator)
    return [piece for piece in ids.split(PIECE, 1) if piece.shape[1] > 1]


def _check_scales(
    model: HybridLM, scales: Scales, pieces: list[Tensor], result: Result, show: bool
) -> None:
    """Compare them with the largest inputs, keys and values of the model."""
    if not scales.amax and not scales.kv:
        result.skip("scales", "the formats have none for inputs, keys and values")
        return
    try:
        run = calibrate(model, pieces, None, {*scales.amax, *scales.kv}, show=show)
    except UserError as error:
        result.add("scales", [str(error)], "")
        return
    pairs = [(f"inputs of {p}", float(a), float(run.amax[p].max())) for p, a in scales.amax.items()]
    pairs += [(f"outputs of {p}", largest, run.kv[p]) for p, largest in scales.kv.items()]
    problems = [
        f"{what}: the scale covers magnitudes up to {covered:.3g}; the largest seen is {seen:.3g}"
        for what, covered, seen in pairs
        if not 1 / PLAUSIBLE <= covered / seen <= PLAUSIBLE
    ]
    ratios = [covered / seen for _, covered, seen in pairs]
    span = f"{min(ratios):.2g} to {max(ratios):.2g}"
    result.add("scales", problems, f"{len(pairs)} cover {span} times the largest magnitude seen")


def measure(
    before: States | None,
    model: HybridLM,
    scales: Scales,
    pieces: list[Tensor],
    text: str,
    show: bool,
) -> Measured:
    """A dequantized model against its source: as it is, and, where there are scales of inputs, with
    inputs rounded by them as engines do."""
    after = {"weights": states(model, pieces, "export", show)}
    if scales.amax:
        with quantized_inputs(model, scales.formats, scales.amax):
            rounded = states(model, pieces, "export with rounded inputs", show)
        head = scales.formats.get("lm_head", "bf16")
        if head in WITH_INPUTS:  # in front of which states end
            h_TD = rounded_input(rounded.h_TD, head, scales.amax["lm_head"])
            rounded = rounded._replace(h_TD=h_TD)
        after["weights, and inputs of products"] = rounded
    runs = []
    for name, export in after.items():
        found = compare(before or export, export, pieces)
        kl = None if before is None else float(found.kl_T.mean())
        runs.append(Run(name, kl, -float(found.b_T.mean())))
    if before is not None:
        runs.insert(0, Run("nothing: the source", None, -float(found.a_T.mean())))
    return Measured(len(found.a_T), text, runs)


def states(model: HybridLM, pieces: list[Tensor], name: str, show: bool = False) -> States:
    """Final hidden states of every token that has a next one in its piece."""
    read = [ids_1S[:, :-1] for ids_1S in pieces]
    return divergence.states(model, read, f"running the {name}", show)


def compare(a: States, b: States, pieces: list[Tensor]) -> PerToken:
    """By the tokens that follow those of `states`."""
    return divergence.per_token(a, b, torch.cat([ids_1S[0, 1:] for ids_1S in pieces]))
