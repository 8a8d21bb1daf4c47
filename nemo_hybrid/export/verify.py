"""`verify-export`: is a directory what its configuration says, and the model that it was made of?

Names, shapes and dtypes come from a schema that knows nothing of the writer; values are
dequantized twice, by us and by another library, and compared with the source; then the model runs
on the dequantized weights.

Shapes: S tokens of one piece, T compared tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_hybrid.checkpoint.files import MANIFEST
from nemo_hybrid.checkpoint.files import verify as verify_files
from nemo_hybrid.checkpoint.load import load_model, tensors_by_name
from nemo_hybrid.checkpoint.names import from_hub
from nemo_hybrid.checkpoint.weights import Stored, read_headers
from nemo_hybrid.command_options import VerifyOptions
from nemo_hybrid.config import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import read_pieces
from nemo_hybrid.export.decode import Opened, Parts, decode, other_decoder
from nemo_hybrid.export.schema import Format, Schema, Slot, read_schema
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.terminal import print_table, progress_bar

KV_SCALES = (".k_scale", ".v_scale")
PIECE = 512
"""Tokens that the models see at once."""
MOST_ERROR: dict[Format, float] = {"fp8": 0.07, "nvfp4": 0.3, "nvfp4_w4a16": 0.3}
"""Largest root mean square error of a weight, over its own root mean square. Rounding stays below:
neighbours in E4M3 and E2M1 are at most 1/8 and 1/2 of a value apart. Wrong scales do not."""
_CHUNK_BYTES = 64 << 20  # of one model's log-probabilities
_SHOWN = 20


class Check(NamedTuple):
    """One line of the result. ``passed`` None: not made, for the reason in ``note``."""

    name: str
    passed: bool | None
    note: str


class Measured(NamedTuple):
    """Two models on the same tokens, in fp32; means in nats per token.

    ``kl`` is KL(source || exported), None without a source, and so is ``source_loss``.
    """

    kl: float | None
    source_loss: float | None
    loss: float
    tokens: int
    text: str
    """Where the tokens come from, in words."""


class States(NamedTuple):
    """What one model's log-probabilities of T tokens are made of."""

    h_TD: Tensor
    head_VD: Tensor


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
        self.checks.append(Check(name, not problems, "\n".join(lines) or found))
        return not problems

    def skip(self, name: str, why: str) -> None:
        self.checks.append(Check(name, None, why))


def verify_command(options: VerifyOptions) -> int:
    """``nemo-hybrid verify-export``: print the checks; 2 where one failed, 3 where the divergence
    exceeds ``max_kl``. Raises UserError for options and data that cannot be used."""
    if options.max_kl is not None and options.base is None:
        raise UserError("--max_kl needs --base: name the checkpoint to compare with")
    directory = Path(options.paths[0]).expanduser()
    result = verify_directory(
        directory, base=options.base, data=options.data, tokens=options.tokens, show=True
    )
    words = {True: "passed", False: "FAILED", None: "not made"}
    rows = [
        (check.name, words[check.passed], "see below" if check.passed is False else check.note)
        for check in result.checks
    ]
    print_table(("check", "", "what was found"), rows, title=str(directory))
    for check in result.checks:
        for line in check.note.splitlines() if check.passed is False else ():
            print(f"{check.name}: {line}")
    if not result.passed:
        return 2
    kl = result.measured.kl if result.measured else None
    # Not a number compares as false.
    return 0 if options.max_kl is None or (kl is not None and kl <= options.max_kl) else 3


def verify_directory(
    directory: Path,
    *,
    base: str | None = None,
    data: str | None = None,
    tokens: int = 8192,
    show: bool = False,
) -> Result:
    """Make all checks of an exported directory; options as in `VerifyOptions`.

    What is wrong with the directory stands in the result; UserError is raised for data, or a base,
    that cannot be used.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    result = Result()
    _check_files(directory, result)
    try:
        schema, stored = _check_tensors(directory, result)
    except UserError as error:
        result.add("configuration", [str(error)], "")
        return result
    if not result.passed and any(c.passed is False for c in result.checks if c.name != "checksums"):
        result.skip("values", "the tensors are not the expected ones")
        return result
    pieces = _pieces(directory, schema.config, data, tokens)
    source = None if base is None else load_model(base, torch.float32)
    if source is not None and source.config != schema.config:
        result.add("source", [f"config.json describes another model than that of {base}"], "")
        return result
    with Opened(schema, stored) as opened:
        sound = _check_values(opened, source, result, show)
    if not sound:
        result.skip("model", "its weights are wrong")
        return result
    text = data or "random token ids"
    before = None if source is None else states(source, pieces, "source", show)
    del source  # one model at a time
    after = states(load_exported(directory), pieces, "export", show)
    result.measured = compare(before, after, pieces, text)
    _add_model(result, result.measured)
    return result


def load_exported(directory: str | Path, dtype: torch.dtype = torch.float32) -> HybridLM:
    """The model of an exported directory, its weights dequantized, rounded to dtype but for the
    fp32 list, on the CPU.

    Activations and the KV cache are not quantized. Raises UserError unless the directory holds
    exactly what its configuration says; values are not checked.
    """
    path, result = Path(directory).expanduser(), Result()
    schema, stored = _check_tensors(path, result)
    if not result.passed:
        faults = "\n  ".join(check.note for check in result.checks if not check.passed)
        raise UserError(f"{path} is not a sound export:\n  {faults}")
    with torch.device("meta"):
        model = HybridLM(schema.config).to(dtype)
    model = model.to_empty(device="cpu")
    targets = tensors_by_name(model)
    with Opened(schema, stored) as opened, torch.no_grad():
        for name in opened.names - schema.of_modules():
            if name.endswith(KV_SCALES):
                continue
            _part(targets, name).copy_(opened.read(name))
        for module, format in schema.formats.items():
            weight = decode(opened.parts(module), format)
            _part(targets, f"{module}.weight").copy_(weight)
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


def _check_tensors(directory: Path, result: Result) -> tuple[Schema, Stored]:
    stored = read_headers(directory)
    found = {
        name: (Slot(entry.dtype, entry.shape), file)
        for file, header in stored.headers.items()
        for name, entry in header.entries.items()
    }
    schema, problems = read_schema(directory, len(found))
    formats = ", ".join(sorted(set(schema.formats.values()))) or "nothing quantized"
    result.add("configuration", problems, f"{schema.layout} layout: {formats}")
    wanted = {**schema.optional, **schema.tensors}
    problems = [f"{name}: missing" for name in schema.tensors if name not in found]
    for name, (slot, file) in found.items():
        if name not in wanted:
            problems.append(f"{name}: unexpected, {slot}")
        elif slot != wanted[name]:
            problems.append(f"{name}: is {slot}, should be {wanted[name]}")
        try:
            stored.check_listed(name, file)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    for name in (stored.weight_map or {}).keys() - found.keys():
        problems.append(f"{name}: the index lists it, but no file holds it")
    if sum(len(header.entries) for header in stored.headers.values()) > len(found):
        problems.append("a tensor stands in two files")
    problems += [f"{file}: not in the index, but engines may load it" for file in stored.strays]
    result.add("names, shapes, dtypes", problems, f"{len(found)} tensors")
    return schema, stored


def _check_values(opened: Opened, source: HybridLM | None, result: Result, show: bool) -> bool:
    """Whether all numbers are finite, scales positive and shared where engines share them, both
    decoders agree, and the weights are those of the source."""
    schema, other = opened.schema, other_decoder()
    own = None if source is None else tensors_by_name(source)
    faults: defaultdict[str, list[str]] = defaultdict(list)
    errors: defaultdict[Format, list[float]] = defaultdict(list)
    done, total = 0, len(opened.names)
    with progress_bar("checking values", total, show) as progress:
        for module, format in schema.formats.items():
            parts = opened.parts(module)
            faults["values"] += _bad_scales(module, parts)
            weight = decode(parts, format)
            if other is not None:
                theirs = other[1](parts, format)
                if not torch.allclose(weight, theirs, rtol=1e-6, atol=0, equal_nan=True):
                    faults["second"].append(f"{module}: {other[0]} decodes other values")
            if own is not None:
                error = relative_error(weight, _part(own, f"{module}.weight"))
                errors[format].append(error)
                if not error <= MOST_ERROR[format]:
                    faults["source"].append(
                        f"{module}: {format} differs from the source by {error:.1%}"
                    )
            progress(done := done + len(parts))
        for name in sorted(opened.names - schema.of_modules()):
            tensor, scale = opened.read(name), name.endswith(KV_SCALES)
            if not tensor.isfinite().all() or (scale and not (tensor > 0).all()):
                faults["values"].append(f"{name}: {'not positive' if scale else 'not finite'}")
            if own is not None and not scale:
                wanted = _part(own, name)
                if not torch.equal(tensor, wanted.to(tensor.dtype)):
                    faults["source"].append(f"{name}: not the source's, rounded to {tensor.dtype}")
            progress(done := done + 1)
        for what, names in schema.shared().items():
            if len({float(opened.read(name)) for name in names}) > 1:
                faults["values"].append(f"{what}: differ, but engines take one for all")
    sound = result.add("values", faults["values"], "finite; scales positive, shared as engines do")
    if not schema.formats:
        result.skip("second decoder", "nothing is quantized")
    elif other is None:
        result.skip("second decoder", "neither compressed-tensors nor nvidia-modelopt is installed")
    else:
        sound &= result.add(
            "second decoder", faults["second"], f"{other[0]} decodes the same values"
        )
    if own is None:
        result.skip("source", "give --base to compare weights with")
        return sound
    found = [
        f"{format}: relative error {sum(many) / len(many):.4f}, at most {max(many):.4f}"
        for format, many in errors.items()
    ]
    return sound & result.add(
        "source", faults["source"], "\n".join([*found, "all other tensors equal"])
    )


def _bad_scales(module: str, parts: Parts) -> list[str]:
    problems = []
    for part, tensor in parts.items():
        if tensor.dtype == torch.uint8:
            continue
        values = tensor.float()
        if not values.isfinite().all():
            problems.append(f"{module}.{part}: not finite")
        elif part.startswith("weight_") and (values < 0).any():
            problems.append(f"{module}.{part}: a scale is negative")
        elif tensor.numel() == 1 and not (values > 0).all():
            problems.append(f"{module}.{part}: a scale is not positive")
        elif tensor.numel() == 1 and not values.reciprocal().isfinite().all():
            problems.append(f"{module}.{part}: a scale is too small to divide by")
    return problems


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of ``wanted``; 0 where both are zeros."""
    size = float(wanted.double().norm())
    error = float((found.double() - wanted.double()).norm())
    return error / size if size else (0.0 if error == 0 else math.inf)


def _pieces(directory: Path, config: HybridConfig, data: str | None, tokens: int) -> list[Tensor]:
    """ids [1, S] to compare on. Raises UserError where there is nothing to predict."""
    if data is None:
        generator = torch.Generator().manual_seed(1234)
        ids = torch.randint(0, config.vocab_size, (1, tokens + 1), generator=generator)
        pieces = list(ids.split(PIECE, 1))
    else:
        pieces = read_pieces(data, directory, config, tokens, "heldout", PIECE)
    pieces = [piece for piece in pieces if piece.shape[1] > 1]
    if not pieces:
        raise UserError(f"{data or '--tokens'}: fewer than two tokens; there is nothing to predict")
    return pieces


@torch.no_grad()
def states(model: HybridLM, pieces: list[Tensor], name: str, show: bool = False) -> States:
    """Final hidden states of every token that has a next one in its piece."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, parts, done = model.to(device).eval(), [], 0
    with progress_bar(f"running the {name}", sum(p.shape[1] for p in pieces), show) as progress:
        for ids_1S in pieces:
            parts.append(model.forward_hidden(ids_1S.to(device))[0][0, :-1].cpu())
            progress(done := done + ids_1S.shape[1])
    return States(torch.cat(parts), model.lm_head.weight.detach())


@torch.no_grad()
def compare(before: States | None, after: States, pieces: list[Tensor], text: str) -> Measured:
    """Means over all tokens, in chunks of them."""
    labels_T = torch.cat([ids_1S[0, 1:] for ids_1S in pieces])
    tokens = len(labels_T)
    chunk = max(1, _CHUNK_BYTES // (8 * len(after.head_VD)))
    kl, losses = 0.0, [0.0, 0.0]
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        q_CV = _log_probs(after, rows)
        losses[1] -= float(q_CV.gather(1, labels_T[rows, None]).sum())
        if before is not None:
            p_CV = _log_probs(before, rows)
            losses[0] -= float(p_CV.gather(1, labels_T[rows, None]).sum())
            kl += float((p_CV.exp() * (p_CV - q_CV)).sum())
    alone = before is None
    return Measured(
        None if alone else kl / tokens,
        None if alone else losses[0] / tokens,
        losses[1] / tokens,
        tokens,
        text,
    )


def _log_probs(states: States, rows: slice) -> Tensor:
    h_CD = states.h_TD[rows].to(states.head_VD.device)
    return F.linear(h_CD.float(), states.head_VD.float()).cpu().double().log_softmax(-1)


def _add_model(result: Result, found: Measured) -> None:
    lines = [f"{found.tokens} tokens of {found.text}, weights dequantized, activations as they are"]
    if found.kl is not None:
        lines.append(f"KL(source || export) {found.kl:.3e} nats per token")
    losses = {"source": found.source_loss, "export": found.loss}
    lines += [
        f"{name}: loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
        for name, loss in losses.items()
        if loss is not None
    ]
    problems = [] if math.isfinite(found.loss) else ["the logits are not finite"]
    result.add("model", problems, "\n".join(lines))
