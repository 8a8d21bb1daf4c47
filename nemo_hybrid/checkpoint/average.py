"""`average`: one model out of several checkpoints of a run.

The weighted mean of checkpoints stands in for the decay of the learning rate (WSM, arXiv
2507.17634): with theta_0 the oldest of n checkpoints and w_1 >= w_2 ... the weights that the later
updates are to keep, c_i = w_i - w_(i+1) are the coefficients of the checkpoints themselves, with
w_0 = 1 and w_n = 0. Of NVIDIA's schedules "minus_sqrt" is w_i = 1 - sqrt(i / n), with which the
oldest counts most, and "linear" w_i = 1 - i / n, the plain mean (Megatron-LM,
tools/checkpoint/weighted_merge.py).

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint import manifest
from nemo_hybrid.checkpoint.adapter import is_adapter
from nemo_hybrid.checkpoint.companions import GENERATION, Companions, read_companions
from nemo_hybrid.checkpoint.convert import write_as_stored
from nemo_hybrid.checkpoint.directory import STEP, new_directory, verify, writing
from nemo_hybrid.checkpoint.load import plan_model
from nemo_hybrid.checkpoint.names import OPTIMIZER_INDEX
from nemo_hybrid.checkpoint.publish import CARD, short_card
from nemo_hybrid.checkpoint.state import FREE, Masters
from nemo_hybrid.checkpoint.steps import list_steps, saying_if_removed, step_of
from nemo_hybrid.checkpoint.tensors import TensorFile, check_finite
from nemo_hybrid.checkpoint.weights import Read
from nemo_hybrid.checkpoint.writing import write_model_files
from nemo_hybrid.config.read import CHECKPOINTS
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json

REPORT = "average.json"
_AT_ONCE = 1 << 14
"""Numbers that stay in a core's cache. Torch does not divide so few between threads, which wait for
each other on busy cores."""
SCHEDULES = {"minus_sqrt": lambda x: 1 - math.sqrt(x), "linear": lambda x: 1 - x}


def coefficients(weights: str, n: int) -> list[float]:
    """Those of n checkpoints, the oldest first, which sum to 1: by a schedule's name, or of n
    numbers with commas between them, divided by their sum. Raises UserError."""
    if weights in SCHEDULES:
        kept = [SCHEDULES[weights](i / n) for i in range(n)]
        return [now - later for now, later in pairwise([*kept, 0.0])]
    try:
        given = [float(word) for word in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights: expected {', '.join(SCHEDULES)} or numbers such as 1,2,1, got {weights}"
        ) from None
    if len(given) != n:
        raise UserError(f"--weights gives {len(given)} numbers for {n} checkpoints")
    if not (all(0 <= w < math.inf for w in given) and 0 < sum(given) < math.inf):
        raise UserError(f"--weights must be 0 or more, and not all 0, got {weights}")
    return [w / sum(given) for w in given]


def checkpoints_of(run: Path, first: int | None, last: int | None, every: int | None) -> list[Path]:
    """Checkpoints of a run from one step to another, the oldest first; the newest of these, and
    before it those that lie at least ``every`` steps apart. Raises UserError."""
    there = list_steps(run / CHECKPOINTS) or list_steps(run)
    if not there:
        raise UserError(f"{run} is not a run with checkpoints")
    chosen: list[Path] = []
    for directory in there:
        step = step_of(directory)
        if not (first or 0) <= step <= (math.inf if last is None else last):
            continue
        if not chosen or step_of(chosen[-1]) - step >= (every or 1):
            chosen.append(directory)
    if len(chosen) < 2:
        steps = ", ".join(str(step_of(directory)) for directory in reversed(there))
        raise UserError(
            f"{len(chosen)} checkpoints of {run} lie in that range, an average takes two or more; "
            f"it has those of the steps {steps}"
        )
    return chosen[::-1]


class Source:
    """The tensors of one checkpoint: fp32 masters where it holds them, else its weights."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """``stack``: closes the files in the end. Raises UserError."""
        if is_adapter(directory):
            raise UserError(f"{directory} holds an adapter: merge it with its weights first")
        if (directory / manifest.MANIFEST).is_file():
            verify(directory, deep=False)
        self.directory, self._stack = directory, stack
        model, self.plan = plan_model(directory, as_stored=True)
        self.plan.raise_errors()
        self.config, self.companions = model.config, read_companions(directory)
        self._reads = {read.hub_name: read for read in self.plan.reads}
        self._files: dict[str, TensorFile] = {}
        trained = (directory / OPTIMIZER_INDEX).is_file()
        self.masters = Masters(directory, stack) if trained else None

    def read(self, name: str) -> Tensor:
        """A tensor, of any shape, by its name on disk: an fp32 master, or as it is stored. Not to
        be written to."""
        read = self._reads[name]
        master = self.masters.read(read.own, read.expert) if self.masters else None
        if master is not None:
            return master
        if read.file not in self._files:
            opened = self.plan.stored.open(read.file)
            self._files[read.file] = self._stack.enter_context(opened)
        return self._files[read.file].view(read.name, read.row)


def average(
    directories: Sequence[Path], weights: str, out: Path, show_progress: bool = True
) -> list[tuple[Path, float]]:
    """Write the weighted mean of checkpoints, the oldest of which comes first, as a Hugging Face
    directory: summed in fp32, rounded once to the dtypes of the last, whose generation settings go
    with it. Returns the checkpoints and their coefficients.

    Whole tensors are in memory one per checkpoint at most, beside the sum. Raises UserError for
    checkpoints that are no versions of one model, and when out exists and is not empty.
    """
    out = new_directory(out)
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise UserError("a checkpoint is named twice: give it a larger weight instead")
    parts = list(zip(directories, coefficients(weights, len(directories)), strict=True))
    with ExitStack() as stack:
        for directory in directories:
            stack.enter_context(saying_if_removed(directory))
        sources = [Source(directory, stack) for directory in directories]
        last = sources[-1]
        for source in sources[:-1]:
            _check_alike(source, last)

        def mean(file: TensorFile, read: Read) -> Tensor:
            result = torch.empty(last.plan.entry(read).shape, dtype=read.dtype)
            tensors = [source.read(read.hub_name) for source in sources]
            finite = True
            for target, *pieces in zip(*_in_pieces(result, *tensors), strict=True):
                total = torch.zeros(target.shape)
                for piece, (_, coefficient) in zip(pieces, parts, strict=True):
                    total.add_(piece, alpha=coefficient)
                finite = finite and bool(total.sum().isfinite())  # of many at once: quick
                target.copy_(total)
            for tensor, place in zip((*tensors, result), (*directories, out), strict=True):
                if not finite:
                    check_finite(tensor, read.hub_name, place)
            return result

        writer = stack.enter_context(writing(out))
        label = f"averaging {len(sources)} checkpoints"
        shards = write_as_stored(writer, last.plan, mean, label, show_progress)
        write_model_files(writer, last.config, [shards], last.companions)
        writer.write_text(REPORT, manifest.to_json(_report(sources, parts, weights)))
        if CARD not in last.companions.files:
            writer.write_text(CARD, _card(sources, parts, weights))
    return parts


def _in_pieces(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Of each tensor pieces of a few numbers."""
    return (tensor.view(-1).split(_AT_ONCE) for tensor in tensors)


def _check_alike(one: Source, other: Source) -> None:
    """Raise UserError for two checkpoints that do not belong together."""
    for name, value in vars(other.config).items():
        if name not in FREE and getattr(one.config, name) != value:
            raise UserError(
                f"{one.directory} has {name} {getattr(one.config, name)!r}, {other.directory} has "
                f"{value!r}: these are not versions of one model"
            )
    if _tokenizer(one.companions) != _tokenizer(other.companions):
        raise UserError(
            f"{one.directory} and {other.directory} do not have the same tokenizer files"
        )


def _tokenizer(companions: Companions) -> dict[str, bytes]:
    return {name: text for name, text in companions.files.items() if name != GENERATION}


def _report(
    sources: Sequence[Source], parts: Sequence[tuple[Path, float]], weights: str
) -> dict[str, object]:
    """What the mean is of, for programs."""
    return {
        "nemo_hybrid": __version__,
        "weights": weights,
        "checkpoints": [
            {
                "path": str(directory.resolve()),
                "sha256": _seal(directory),
                "coefficient": coefficient,
                "read": "fp32 masters" if source.masters else "weights",
            }
            for source, (directory, coefficient) in zip(sources, parts, strict=True)
        ],
    }


def _seal(directory: Path) -> str | None:
    """What a checkpoint's manifest says that it holds."""
    path = directory / manifest.MANIFEST
    return read_json(path)["sha256"] if path.is_file() else None


def _card(sources: Sequence[Source], parts: Sequence[tuple[Path, float]], weights: str) -> str:
    """README.md, in the form that the Hugging Face hub reads. Paths stand in average.json alone:
    what they hold could be Markdown."""
    rows = [
        f"| {directory.name if STEP.fullmatch(directory.name) else number} "
        f"| {'fp32 masters' if source.masters else 'weights'} | {coefficient:.4f} |"
        for number, (source, (directory, coefficient)) in enumerate(
            zip(sources, parts, strict=True), 1
        )
    ]
    how, last = weights if weights in SCHEDULES else "given numbers", sources[-1]
    told = [
        f"Made by nemo_hybrid {__version__} (`average`, weights: {how}), summed in fp32 and "
        f"rounded once; where they lay stands in {REPORT}. The training state was not averaged: a "
        "run cannot resume from this. Licence and limits of the sources apply.\n",
        "| checkpoint | read from | coefficient |\n| --- | --- | --- |",
        *rows,
    ]
    title = f"Weighted mean of {len(rows)} checkpoints"
    return short_card(
        ["merge"], last.directory, title, "\n".join(told), last.config, last.directory
    )
