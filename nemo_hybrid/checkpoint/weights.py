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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch

from nemo_hybrid.checkpoint.names import expert_name, from_hub, is_stacked
from nemo_hybrid.checkpoint.tensors import DTYPES, Entry, Header, TensorFile
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming
from nemo_hybrid.hf_config import parse_json

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 8  # problems that an error message lists


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

    def raise_errors(self) -> None:
        """Raise one UserError that names the tensors which could be neither mapped nor skipped."""
        errors = self.having("error")
        if not errors:
            return
        lines = [f"  {f.name}: {f.note}" for f in errors[:_SHOWN]]
        if len(errors) > _SHOWN:
            lines.append(f"  and {len(errors) - _SHOWN} more")
        if all(f.note == _MISSING and f.name.startswith("mtp.") for f in errors):
            lines.append(
                "Some programs drop the MTP block when they save. To go on without it, set "
                "num_nextn_predict_layers to 0 in config.json and remove mtp_num_depths"
            )
        raise UserError(f"{self.directory} does not fit the model:\n" + "\n".join(lines))


_MISSING = "missing"
_ROUNDED = "rounded"


@dataclass(frozen=True)
class Stored:
    """What the weight files of a directory hold, from their headers alone.

    ``headers`` by file name; ``index`` as it stands in its file, and what it says (None: there is
    one file and no index).
    """

    directory: Path
    headers: dict[str, Header]
    index: bytes | None
    weight_map: dict[str, str] | None


@dataclass(frozen=True)
class Read:
    """One read: ``rows`` (None: all) of the tensor ``name`` on disk into the tensor ``own`` of
    ours, or where ``expert`` is given into that matrix of it."""

    file: str
    name: str
    own: str
    expert: int | None = None
    rows: range | None = None


def load_weights(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned_experts: range | None = None,
    *,
    n_experts: int | None = None,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Copy a directory's weights into ``targets`` (our name -> tensor), shard by shard.

    Stacked targets [len(owned_experts), ...] receive the owned experts only (None: all of them),
    and only these are read; ``n_experts`` is the model's number of experts, so that missing ones
    are noticed on every rank alike. ``skip`` maps prefixes of our names to the reason why such
    tensors stay in the file. BF16 values are widened where the target is fp32, and fp32 ones
    rounded where it is BF16.

    Raises UserError, before anything is copied, unless every tensor is mapped or skipped.
    """
    stored = read_headers(directory)
    report, reads = account(stored, targets, owned_experts, n_experts, skip or {})
    report.raise_errors()
    copy_weights(stored, reads, targets)
    log_report(report)
    return report


def audit(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned_experts: range | None = None,
    *,
    n_experts: int | None = None,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """What `load_weights` would do, errors included; the targets may be on the meta device.

    Raises UserError only for files that cannot be read at all.
    """
    return account(read_headers(directory), targets, owned_experts, n_experts, skip or {})[0]


def log_report(report: Report) -> None:
    """Log what was done with the tensors; a warning where values were rounded."""
    log.log(logging.WARNING if report.rounded else logging.INFO, "%s", report.summary())


def read_headers(directory: Path) -> Stored:
    """Read index and headers. Raises UserError for the first file that is not what it should be."""
    index, names, weight_map = _read_index(directory)
    headers = {}
    for name in names:
        with TensorFile(directory / name) as file:
            headers[name] = file.header
    return Stored(directory, headers, index, weight_map)


def shard_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of a directory's weight files, and the index's weight map (None without index).

    Raises UserError for an index that names an absent file or one outside the directory.
    """
    return _read_index(directory)[1:]


def _read_index(directory: Path) -> tuple[bytes | None, list[str], dict[str, str] | None]:
    path = directory / INDEX
    if not path.is_file():
        if not (directory / SINGLE).is_file():
            raise UserError(f"{directory} holds neither {INDEX} nor {SINGLE}")
        return None, [SINGLE], None
    with naming("read", path):
        content = path.read_bytes()
    weight_map = parse_json(content, path).get("weight_map")
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
    for name in sorted(names):
        # Unlike Path.is_file, this is False for names that cannot exist, too.
        if not os.path.isfile(directory / name):
            raise UserError(f"{path} names {name!r}, which is not there")
    return content, sorted(names), weight_map


def account(
    stored: Stored,
    targets: Mapping[str, torch.Tensor],
    owned: range | None,
    n_experts: int | None,
    skip: Mapping[str, str],
) -> tuple[Report, list[Read]]:
    """Account for every tensor from headers alone; and the reads to make, file by file."""
    if owned is None:
        owned = range(max((len(t) for name, t in targets.items() if is_stacked(name)), default=0))
    n_experts = n_experts or owned.stop
    expected = _expected(targets, owned, n_experts)
    report = Report(stored.directory)
    reads: list[Read] = []
    seen: dict[tuple[str, int | None], str] = {}

    def judge(file: str, name: str, entry: Entry) -> tuple[Literal["mapped", "skipped"], str]:
        """Status and note of a tensor; raises ValueError saying what is wrong with it."""
        own, expert = from_hub(name)
        if stored.weight_map is not None and stored.weight_map.get(name) != file:
            listed = stored.weight_map.get(name)
            where = f"places it in {listed}" if listed else "does not list it"
            raise ValueError(f"{file} holds it, but the index {where}")
        # Some writers keep the experts stacked: one tensor in the place of E.
        stacked = expert is None and is_stacked(own)
        places = [(own, e) for e in range(n_experts)] if stacked else [(own, expert)]
        twin = next((seen[place] for place in places if place in seen), None)
        if twin is not None:
            raise ValueError(f"is the same tensor as {twin}")
        seen.update(dict.fromkeys(places, name))
        reason = _skip_reason(own, skip)
        if reason is not None:
            return "skipped", reason
        if not places or places[0] not in expected:
            raise ValueError("unexpected: the model has no such tensor")
        shape = expected[places[0]]
        _check(entry, (n_experts, *shape) if stacked else shape)
        if expert is not None and expert not in owned:
            return "skipped", "expert of another rank"
        local = None if expert is None else expert - owned.start
        reads.append(Read(file, name, own, local, owned if stacked else None))
        return "mapped", _conversion(entry.dtype, targets[own].dtype)

    for file, header in stored.headers.items():
        for name, entry in header.entries.items():
            try:
                status, why = judge(file, name, entry)
            except ValueError as error:
                report.findings.append(Finding(name, "error", entry.dtype, str(error)))
            else:
                report.findings.append(Finding(name, status, entry.dtype, why))
    found = {finding.name for finding in report.findings}
    for name, file in (stored.weight_map or {}).items():
        if name not in found:
            why = f"the index places it in {file}, which does not hold it"
            report.findings.append(Finding(name, "error", "", why))
    for own, expert in expected:
        if (own, expert) not in seen and _skip_reason(own, skip) is None:
            name = own if expert is None else expert_name(own, expert)
            report.findings.append(Finding(name, "error", "", _MISSING))
    return report, reads


def copy_weights(stored: Stored, reads: list[Read], targets: Mapping[str, torch.Tensor]) -> None:
    """Make the reads. Raises UserError when a file is not the one whose header was read."""
    with torch.no_grad():
        for name, group in groupby(reads, key=lambda read: read.file):
            with reopen(stored, name) as file:
                for read in group:
                    target = targets[read.own]
                    target = target if read.expert is None else target[read.expert]
                    target.copy_(file.read(read.name, read.rows))


def reopen(stored: Stored, name: str) -> TensorFile:
    """Open one of the files again. Raises UserError when it changed."""
    file = TensorFile(stored.directory / name)
    if file.header.raw != stored.headers[name].raw:
        file.close()
        raise UserError(f"{file.path} changed while it was being read; try again")
    return file


def _expected(
    targets: Mapping[str, torch.Tensor], owned: range, n_experts: int
) -> dict[tuple[str, int | None], tuple[int, ...]]:
    """(our name, expert) -> the shape it has where every expert stands by itself."""
    expected: dict[tuple[str, int | None], tuple[int, ...]] = {}
    for name, target in targets.items():
        if not is_stacked(name):
            expected[name, None] = tuple(target.shape)
            continue
        if len(owned) != len(target):
            raise ValueError(f"{name} holds {len(target)} experts, but {len(owned)} are owned")
        for expert in range(n_experts):
            expected[name, expert] = tuple(target.shape[1:])
    return expected


def _skip_reason(own_name: str, skip: Mapping[str, str]) -> str | None:
    return next((why for prefix, why in skip.items() if own_name.startswith(prefix)), None)


def _check(entry: Entry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise ValueError(f"has shape {list(entry.shape)}, the model expects {list(expected)}")
    if entry.dtype not in _READABLE:
        raise ValueError(
            f"has dtype {entry.dtype}; only {', '.join(_READABLE)} weights can be read"
        )


def _conversion(dtype: str, target: torch.dtype) -> str:
    source = _READABLE[dtype]
    if source == target:
        return ""
    word = "widened" if target == torch.float32 else _ROUNDED
    return f"{word} from {dtype} to {DTYPES[target]}"
