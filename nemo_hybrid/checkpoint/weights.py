"""Weights from Hugging Face directories.

Reading happens in two passes. The first opens headers only and makes a `Plan`, which accounts for
every tensor: mapped, skipped with a reason, or an error. The second copies, and runs only when
there was no error.

A file may be a symbolic link, also to elsewhere: the Hugging Face cache consists of such links.
What the index says may not leave the directory.

Shapes: E experts.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nemo_hybrid.checkpoint.names import expert_name, from_hub, is_stacked, is_training_state
from nemo_hybrid.checkpoint.steps import saying_if_removed
from nemo_hybrid.checkpoint.tensors import DTYPES, Entry, TensorFile, check_finite
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json, side_by_side
from nemo_hybrid.model.fp32 import keeps_fp32

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 20  # errors that a message lists
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

    ``files``: entries by file name; ``weight_map``: the file of every tensor, as the index says;
    ``strays`` are safetensors files beside those.
    """

    directory: Path
    files: dict[str, dict[str, Entry]]
    weight_map: dict[str, str]
    strays: list[str]

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Of all files, by the tensors' names."""
        return chain.from_iterable(entries.items() for entries in self.files.values())

    def misplaced(self, file: str, name: str) -> str:
        """What is wrong with a tensor's standing in a file, by the index; empty: nothing."""
        listed = self.weight_map.get(name)
        if listed == file:
            return ""
        where = f"places it in {listed}" if listed else "does not list it"
        return f"{file} holds it, but the index {where}"

    def open(self, file: str) -> TensorFile:
        """Open one of the files again. Raises UserError when it changed."""
        opened = TensorFile(self.directory / file)
        if list(opened.entries.items()) != list(self.files[file].items()):
            raise UserError(f"{opened.path} changed while it was being read; try again")
        return opened


@dataclass(frozen=True)
class Finding:
    """What became of one tensor: its name on disk (for a missing one, the name it should have),
    its dtype there, and why."""

    name: str
    status: Literal["mapped", "skipped", "error"]
    dtype: str
    note: str


class Read(NamedTuple):
    """One tensor to read from a file, and where it goes: into our tensor ``own``, of a stack into
    the matrix of ``expert``; it is to have ``dtype``.

    ``row``: which matrix it is of one that holds those of all experts.
    """

    file: str
    name: str
    own: str
    dtype: torch.dtype
    expert: int | None = None
    row: int | None = None

    @property
    def hub_name(self) -> str:
        """The name on disk that it is written under."""
        return _place(self.own, self.expert)


@dataclass
class Plan:
    """What becomes of every tensor of a directory, and of every one it should have had; and the
    reads to make, file by file. ``first_expert``: of those that the targets' stacks hold."""

    stored: Stored
    findings: list[Finding]
    reads: list[Read]
    first_expert: int = 0

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
        return f"{self.stored.directory}: " + "; ".join(lines)

    def log(self) -> None:
        """Log the summary: a warning where values were rounded, or files left out."""
        warn = self.rounded or self.stored.strays
        log.log(logging.WARNING if warn else logging.INFO, "%s", self.summary())

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
            lines = [f"{self.stored.directory} does not fit the model:", *self.problems()]
            raise UserError("\n  ".join(lines))

    def entry(self, read: Read) -> Entry:
        """Dtype and shape of what is read, as it is stored."""
        dtype, shape = self.stored.files[read.file][read.name]
        return Entry(dtype, shape if read.row is None else shape[1:])

    def not_finite(self) -> list[Finding]:
        """The weights that hold NaN or infinity, as errors. Reads all of them."""
        found = []
        for name, group in groupby(self.reads, lambda read: read.file):
            with self.stored.open(name) as file:
                for read in group:
                    try:
                        check_finite(file.read(read.name, read.row), read.hub_name, file.path)
                    except UserError:
                        kind = self.entry(read).dtype
                        found.append(Finding(read.hub_name, "error", kind, "holds NaN or infinity"))
        return found

    def copy_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Make the reads. Raises UserError when a file is not the one whose header was read, and
        for a weight that is not finite."""

        def copy(group: list[Read]) -> None:
            with self.stored.open(group[0].file) as file:
                for read in group:
                    target = targets[read.own]
                    if read.expert is not None:
                        target = target[read.expert - self.first_expert]
                    file.read_into(target, read.name, read.row)
                    check_finite(target, read.hub_name, file.path)

        side_by_side(copy, [list(group) for _, group in groupby(self.reads, lambda r: r.file)])


def load_weights(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned_experts: range | None = None,
    *,
    n_experts: int | None = None,
) -> Plan:
    """Copy a directory's weights into ``targets`` (our name -> tensor), shard by shard.

    Stacked targets [len(owned_experts), ...] receive the owned experts only (None: all of them),
    and only these are read; ``n_experts`` is the model's number of experts, so that missing ones
    are noticed on every rank alike. BF16 values are widened where the target is fp32, and fp32 ones
    rounded where it is BF16.

    Raises UserError, before anything is copied, unless every tensor is mapped or skipped.
    """
    with saying_if_removed(directory):
        plan = account(read_headers(directory), targets, owned_experts, n_experts)
        plan.raise_errors()
        plan.copy_into(targets)
    plan.log()
    return plan


def read_headers(directory: Path) -> Stored:
    """Read index and headers. Raises UserError for the first file that is not what it should be."""
    names, weight_map = _read_index(directory)
    files = {}
    for name in names:
        with TensorFile(directory / name) as file:
            files[name] = file.entries
    beside = {path.name for path in directory.glob("*.safetensors")} - files.keys()
    strays = sorted(name for name in beside if not is_training_state(name))
    return Stored(directory, files, weight_map or dict.fromkeys(files[SINGLE], SINGLE), strays)


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
) -> Plan:
    """Account for every tensor from headers alone.

    Parameters as in `load_weights`; targets may be on the meta device. With ``as_stored`` only the
    fp32 list is to have the dtype of its target, the others that of the file.
    """
    if owned is None:
        owned = range(max((len(t) for name, t in targets.items() if is_stacked(name)), default=0))
    total = n_experts or owned.stop
    plan = Plan(stored, [], [], owned.start)
    found: dict[str, str] = {}  # name on disk, one per expert -> name of the tensor that holds it

    def take(file: str, name: str, entry: Entry) -> Finding:
        def error(note: str) -> Finding:
            return Finding(name, "error", entry.dtype, note)

        if wrong := stored.misplaced(file, name):
            return error(wrong)
        own, expert = from_hub(name)
        stack = expert is None and is_stacked(own)  # as some writers keep the experts
        places = _places(own, total) if stack else [_place(own, expert)]
        twin = next((found[place] for place in places if place in found), None)
        found.update(dict.fromkeys(places, name))
        if twin is not None:
            return error(f"is the same tensor as {twin}")
        target = targets.get(own)
        if target is None or (expert is not None and expert >= total):
            return error(_UNEXPECTED)
        shape = tuple(target.shape)[is_stacked(own) :]
        if wrong := _misfit(entry, (total, *shape) if stack else shape):
            return error(wrong)
        if expert is not None and expert not in owned:
            return Finding(name, "skipped", entry.dtype, "expert of another rank")
        dtype = READABLE[entry.dtype] if as_stored and not keeps_fp32(own) else target.dtype
        if stack:
            plan.reads += [Read(file, name, own, dtype, e, row=e) for e in owned]
        else:
            plan.reads.append(Read(file, name, own, dtype, expert))
        return Finding(name, "mapped", entry.dtype, _conversion(entry.dtype, dtype))

    for file, entries in stored.files.items():
        plan.findings += [take(file, name, entry) for name, entry in entries.items()]
    held = {finding.name for finding in plan.findings}
    for name, file in stored.weight_map.items():
        if name not in held:
            note = f"the index places it in {file}, which does not hold it"
            plan.findings.append(Finding(name, "error", "", note))
    for own in targets:
        missing = (place for place in _places(own, total) if place not in found)
        plan.findings += [Finding(place, "error", "", _MISSING) for place in missing]
    plan.findings += [Finding(file, "skipped", "", _STRAY) for file in stored.strays]
    return plan


def _place(own: str, expert: int | None) -> str:
    """Name on disk of one of our tensors, or of one expert of it."""
    return own if expert is None else expert_name(own, expert)


def _places(own: str, n_experts: int) -> list[str]:
    """All names on disk of one of our tensors."""
    return [_place(own, e) for e in range(n_experts)] if is_stacked(own) else [own]


def _misfit(entry: Entry, expected: tuple[int, ...]) -> str:
    """What is wrong with shape or dtype of a tensor; empty: nothing."""
    if entry.shape != expected:
        return f"has shape {list(entry.shape)}, the model expects {list(expected)}"
    if entry.dtype not in READABLE:
        return f"has dtype {entry.dtype}; only {', '.join(READABLE)} weights can be read"
    return ""


def _conversion(dtype: str, target: torch.dtype) -> str:
    source = READABLE[dtype]
    if source == target:
        return ""
    word = "widened" if target == torch.float32 else _ROUNDED
    return f"{word} from {dtype} to {DTYPES[target]}"
