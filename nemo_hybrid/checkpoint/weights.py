"""Weights from Hugging Face directories.

Reading happens in two passes. The first opens headers only and accounts for every tensor: mapped,
skipped with a reason, or an error. The second copies, and runs only when there was no error.

A file may be a symbolic link, also to elsewhere: the Hugging Face cache consists of such links.
What the index says may not leave the directory.

Shapes: E experts.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from nemo_hybrid.checkpoint.names import expert_name, from_hub, is_stacked
from nemo_hybrid.checkpoint.tensors import DTYPES, Entry, TensorFile
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json, side_by_side

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 20  # errors that a message lists
# Training state beside the weights of our own checkpoints (see state.py).
_STATE = re.compile(r"(optimizer-r\d+-\w+|rank-\d+)\.safetensors")


@dataclass(frozen=True)
class Finding:
    """What became of one tensor: its name on disk (for a missing one, the name it should have),
    its dtype there, and why."""

    name: str
    status: Literal["mapped", "skipped", "error"]
    dtype: str
    note: str


@dataclass
class Report:
    """Every tensor of a directory, and every one it should have had."""

    directory: Path
    findings: list[Finding] = field(default_factory=list)

    def having(self, status: str) -> list[Finding]:
        return [f for f in self.findings if f.status == status]

    @property
    def rounded(self) -> list[Finding]:
        """The tensors that lost precision on their way into the model."""
        return [f for f in self.having("mapped") if f.note.startswith(_ROUNDED)]

    def summary(self) -> str:
        """One line per kind of outcome, with counts."""
        kinds = Counter((f.status, f.note) for f in self.findings)
        lines = [
            f"{count} {status}{f' ({note})' if note else ''}"
            for (status, note), count in sorted(kinds.items())
        ]
        return f"{self.directory}: " + "; ".join(lines)

    def problems(self) -> list[str]:
        """The errors, one line each, or the first of them; and what may help."""
        errors = self.having("error")
        lines = [f"{f.name}: {f.note}" for f in errors[:_SHOWN]]
        if len(errors) > _SHOWN:
            lines.append(f"and {len(errors) - _SHOWN} more errors")
        kinds = {f.note if f.name.startswith("mtp.") else "" for f in errors}
        if len(kinds) == 1:
            lines += filter(None, [_MTP_HINTS.get(kinds.pop())])
        return lines

    def raise_errors(self) -> None:
        """Raise one UserError that names the tensors which could be neither mapped nor skipped."""
        if self.having("error"):
            lines = [f"{self.directory} does not fit the model:", *self.problems()]
            raise UserError("\n  ".join(lines))


_MISSING = "missing"
_UNEXPECTED = "unexpected: the model has no such tensor"
_ROUNDED = "rounded"
_STRAY = "a whole file, which the index does not list"
_MTP_HINTS = {
    _MISSING: "Some programs drop the MTP block when they save. To go on without it, set "
    "num_nextn_predict_layers to 0 in config.json and remove its mtp_ fields",
    _UNEXPECTED: "The files hold an MTP block, which config.json does not announce: set "
    "num_nextn_predict_layers to 1 there, or remove these tensors",
}


@dataclass(frozen=True)
class Stored:
    """What the weight files of a directory hold, from their headers alone.

    ``headers`` by file name; ``weight_map``: what the index says (None: there is one file and no
    index); ``strays`` are safetensors files beside those.
    """

    directory: Path
    headers: dict[str, dict[str, Entry]]
    weight_map: dict[str, str] | None
    strays: list[str]

    def check_listed(self, name: str, file: str) -> None:
        """Raise ValueError unless the index, if there is one, places the tensor in the file."""
        listed = file if self.weight_map is None else self.weight_map.get(name)
        if listed != file:
            where = f"places it in {listed}" if listed else "does not list it"
            raise ValueError(f"{file} holds it, but the index {where}")


@dataclass(frozen=True)
class Read:
    """One read: ``rows`` (None: all) of the tensor ``name`` on disk into the tensor ``own`` of
    ours, or where ``expert`` is given into that matrix of it, which is to have ``dtype``."""

    file: str
    name: str
    own: str
    dtype: torch.dtype
    expert: int | None = None
    rows: range | None = None


def load_weights(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned_experts: range | None = None,
    *,
    n_experts: int | None = None,
) -> Report:
    """Copy a directory's weights into ``targets`` (our name -> tensor), shard by shard.

    Stacked targets [len(owned_experts), ...] receive the owned experts only (None: all of them),
    and only these are read; ``n_experts`` is the model's number of experts, so that missing ones
    are noticed on every rank alike. BF16 values are widened where the target is fp32, and fp32 ones
    rounded where it is BF16.

    Raises UserError, before anything is copied, unless every tensor is mapped or skipped.
    """
    stored = read_headers(directory)
    report, reads = account(stored, targets, owned_experts, n_experts)
    report.raise_errors()
    copy_weights(stored, reads, targets)
    log_report(report)
    return report


def log_report(report: Report) -> None:
    """Log how many tensors became what; a warning where values were rounded, or files left out."""
    warn = report.rounded or any(f.note == _STRAY for f in report.findings)
    log.log(logging.WARNING if warn else logging.INFO, "%s", report.summary())


def read_headers(directory: Path) -> Stored:
    """Read index and headers. Raises UserError for the first file that is not what it should be."""
    names, weight_map = _read_index(directory)
    headers = {}
    for name in names:
        with TensorFile(directory / name) as file:
            headers[name] = file.entries
    beside = {path.name for path in directory.glob("*.safetensors")} - headers.keys()
    strays = sorted(name for name in beside if not _STATE.fullmatch(name))
    return Stored(directory, headers, weight_map, strays)


def pickles(directory: Path) -> list[str]:
    """Files of weights in the format before safetensors, which cannot be read."""
    return sorted(path.name for path in directory.glob("pytorch_model*"))


def _read_index(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    path = directory / INDEX
    if not path.is_file():
        if not (directory / SINGLE).is_file():
            old = pickles(directory)
            hint = f"; convert {old[0]} to safetensors first" if old else ""
            raise UserError(f"{directory} holds neither {INDEX} nor {SINGLE}{hint}")
        return [SINGLE], None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is missing or empty")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or re.fullmatch(r"[^/\\\0]+\.safetensors", name) is None:
            raise UserError(
                f"{path}: {tensor} is in {name!r}, which is not a .safetensors file of this "
                "directory"
            )
        names.add(name)
    if SINGLE not in names and (directory / SINGLE).exists():
        raise UserError(
            f"{directory} holds {SINGLE}, and {INDEX}, which does not name it: other programs may "
            "read the one where this one reads the other. Remove one of the two"
        )
    for name in sorted(names):
        # Unlike Path.is_file, this is False for names that cannot exist, too.
        if not os.path.isfile(directory / name):
            raise UserError(f"{path} names {name!r}, which is not there")
    return sorted(names), weight_map


def account(
    stored: Stored,
    targets: Mapping[str, torch.Tensor],
    owned: range | None,
    n_experts: int | None,
    *,
    as_stored: bool = False,
) -> tuple[Report, list[Read]]:
    """Account for every tensor from headers alone; and the reads to make, file by file.

    Parameters as in `load_weights`; targets may be on the meta device. With ``as_stored`` only the
    fp32 list is to have the dtype of its target, the others that of the file.
    """
    if owned is None:
        owned = range(max((len(t) for name, t in targets.items() if is_stacked(name)), default=0))
    places = _Places(targets, owned, n_experts or owned.stop, as_stored)
    report = Report(stored.directory)
    add = report.findings.append
    reads: list[Read] = []
    for file, entries in stored.headers.items():
        for name, entry in entries.items():
            try:
                stored.check_listed(name, file)
                found = places.take(file, name, entry)
            except ValueError as error:
                add(Finding(name, "error", entry.dtype, str(error)))
                continue
            if isinstance(found, str):
                add(Finding(name, "skipped", entry.dtype, found))
            else:
                add(Finding(name, "mapped", entry.dtype, _conversion(entry.dtype, found.dtype)))
                reads.append(found)
    names = {finding.name for finding in report.findings}
    for name, file in (stored.weight_map or {}).items():
        if name not in names:
            add(
                Finding(name, "error", "", f"the index places it in {file}, which does not hold it")
            )
    for name in places.missing():
        add(Finding(name, "error", "", _MISSING))
    for file in stored.strays:
        add(Finding(file, "skipped", "", _STRAY))
    return report, reads


@dataclass
class _Places:
    """Where a model has places for tensors, and which of them have been found."""

    targets: Mapping[str, torch.Tensor]
    owned: range
    n_experts: int
    as_stored: bool
    found: dict[str, dict[int | None, str]] = field(default_factory=lambda: defaultdict(dict))
    """Our name -> expert -> name on disk; expert None stands for the whole tensor."""

    def __post_init__(self) -> None:
        for name, target in self.targets.items():
            if is_stacked(name) and len(self.owned) != len(target):
                held = f"{len(target)} experts, but {len(self.owned)} are owned"
                raise ValueError(f"{name} holds {held}")

    def take(self, file: str, name: str, entry: Entry) -> Read | str:
        """How to read a tensor, or why to skip it. Raises ValueError saying what is wrong."""
        own, expert = from_hub(name)
        self._refuse_twin(name, own, expert)
        target = self.targets.get(own)
        if target is None or (expert is not None and expert >= self.n_experts):
            raise ValueError(_UNEXPECTED)
        shape, stacked = tuple(target.shape), expert is None and is_stacked(own)
        if expert is not None:
            shape = shape[1:]
        elif stacked:
            shape = (self.n_experts, *shape[1:])
        _check(entry, shape)
        if expert is not None and expert not in self.owned:
            return "expert of another rank"
        keep = self.as_stored and own.rpartition(".")[2] not in FP32_NAMES
        return Read(
            file,
            name,
            own,
            READABLE[entry.dtype] if keep else target.dtype,
            expert=None if expert is None else expert - self.owned.start,
            rows=self.owned if stacked else None,
        )

    def missing(self) -> Iterator[str]:
        """Names on disk of what has not been found."""
        for own in self.targets:
            found = self.found[own]
            if None in found:
                continue
            if is_stacked(own):
                yield from (expert_name(own, e) for e in range(self.n_experts) if e not in found)
            else:
                yield own

    def _refuse_twin(self, name: str, own: str, expert: int | None) -> None:
        found = self.found[own]
        # Some writers keep the experts stacked: one tensor in the place of all.
        twin = found.get(expert) or found.get(None)
        if twin is None and expert is None:
            twin = next(iter(found.values()), None)
        if twin is not None:
            raise ValueError(f"is the same tensor as {twin}")
        found[expert] = name


def copy_weights(stored: Stored, reads: list[Read], targets: Mapping[str, torch.Tensor]) -> None:
    """Make the reads. Raises UserError when a file is not the one whose header was read."""

    def copy(group: list[Read]) -> None:
        with reopen(stored, group[0].file) as file:
            for read in group:
                target = targets[read.own]
                target = target if read.expert is None else target[read.expert]
                file.read_into(target, read.name, read.rows)

    side_by_side(copy, [list(group) for _, group in groupby(reads, key=lambda read: read.file)])


def reopen(stored: Stored, name: str) -> TensorFile:
    """Open one of the files again. Raises UserError when it changed."""
    file = TensorFile(stored.directory / name)
    if list(file.entries.items()) != list(stored.headers[name].items()):
        raise UserError(f"{file.path} changed while it was being read; try again")
    return file


def _check(entry: Entry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise ValueError(f"has shape {list(entry.shape)}, the model expects {list(expected)}")
    if entry.dtype not in READABLE:
        raise ValueError(f"has dtype {entry.dtype}; only {', '.join(READABLE)} weights can be read")


def _conversion(dtype: str, target: torch.dtype) -> str:
    source = READABLE[dtype]
    if source == target:
        return ""
    word = "widened" if target == torch.float32 else _ROUNDED
    return f"{word} from {dtype} to {DTYPES[target]}"
