"""Weights in Hugging Face directories: shards and one index, written by all ranks, read by any.

Reading happens in two passes. The first opens headers only and accounts for every tensor: mapped,
skipped with a reason, or an error. The second copies, and runs only when there was no error.

Shapes: E experts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nemo_hybrid.checkpoint import files
from nemo_hybrid.checkpoint.directory import (
    OneProcess,
    World,
    Writer,
    on_rank_0,
    require_absent_or_empty,
    write_directory,
)
from nemo_hybrid.checkpoint.names import expert_name, from_hub, is_stacked, to_hub
from nemo_hybrid.checkpoint.tensors import DTYPES, open_tensors, safetensors_parts
from nemo_hybrid.config import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming
from nemo_hybrid.hf_config import config_to_hf, read_json

Weights = Iterable[tuple[str, torch.Tensor, int]]
"""(our name, tensor, first expert). The last counts for stacked experts only: the global index
of the tensor's first one."""

MAX_SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHOWN = 8  # problems that an error message lists


# ---- writing ----------------------------------------------------------------------------------


@dataclass
class Shards:
    """What one rank wrote: file and size in bytes of every tensor, by name on disk."""

    file_of: dict[str, str] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)


def write_shards(
    writer: Writer, weights: Weights, rank: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Shards:
    """Write this rank's tensors as ``model-rRRRRR-NNNNN.safetensors`` files.

    Every tensor must come from exactly one rank. A shard holds at least one tensor.
    """
    shards = Shards()
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0
    count = 0

    def flush() -> None:
        nonlocal pending, pending_bytes, count
        if not pending:
            return
        count += 1
        name = f"model-r{rank:05d}-{count:05d}.safetensors"
        writer.write(name, safetensors_parts(pending, {"format": "pt"}))
        for key, tensor in pending.items():
            shards.file_of[key] = name
            shards.bytes_of[key] = tensor.numel() * tensor.element_size()
            shards.dtypes.add(DTYPES[tensor.dtype])
        pending, pending_bytes = {}, 0

    for own_name, tensor, first_expert in weights:
        for name, part in to_hub(own_name, tensor, first_expert):
            size = part.numel() * part.element_size()
            if pending_bytes + size > max_shard_bytes:
                flush()
            if name in pending or name in shards.file_of:
                raise ValueError(f"{name} was given twice")
            pending[name] = part
            pending_bytes += size
    flush()
    return shards


def write_model_files(
    writer: Writer, config: HybridConfig, parts: list[Shards], tokenizer_files: Path | None
) -> None:
    """Write, on rank 0, what describes all shards: index, config.json, generation config, and
    copies of the tokenizer's files. Raises UserError when a tensor came from two ranks, or from
    none as far as experts go."""
    file_of: dict[str, str] = {}
    for part in parts:
        for name, file in part.file_of.items():
            if name in file_of:
                raise UserError(f"{name} was written by two ranks: {file_of[name]} and {file}")
            file_of[name] = file
    _check_experts(file_of, config.n_routed_experts)
    total = sum(sum(part.bytes_of.values()) for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    writer.write_text(INDEX, files.to_json(index))
    dtype = "bfloat16" if any("BF16" in part.dtypes for part in parts) else "float32"
    writer.write_text("config.json", files.to_json(config_to_hf(config, dtype)))
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    writer.write_text("generation_config.json", files.to_json(generation))
    if tokenizer_files is not None:
        _copy_tokenizer(writer, tokenizer_files)


def _check_experts(written: Iterable[str], n_experts: int) -> None:
    counts = Counter(own for own, expert in map(from_hub, written) if expert is not None)
    for name, count in counts.items():
        if count != n_experts:
            raise UserError(f"{name}: {count} of {n_experts} experts were written")


def _copy_tokenizer(writer: Writer, directory: Path) -> None:
    found = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        raise UserError(f"{directory} holds no tokenizer.json")
    for path in found:
        with naming("read", path):
            content = path.read_bytes()
        writer.write(path.name, [content])


def save_weights(
    final: Path,
    config: HybridConfig,
    weights: Weights,
    *,
    world: World | None = None,
    tokenizer_files: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory (no training state): whole, or not at all.

    Raises UserError when final exists and is not empty, or cannot be written.
    """
    world = world or OneProcess()
    on_rank_0(world, lambda: require_absent_or_empty(final))
    write_directory(
        final,
        world,
        lambda writer: write_shards(writer, weights, world.rank, max_shard_bytes),
        lambda writer, parts: write_model_files(writer, config, parts, tokenizer_files),
    )


# ---- reading ----------------------------------------------------------------------------------


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
        raise UserError(f"{self.directory} does not fit the model:\n" + "\n".join(lines))


def load_weights(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned_experts: range | None = None,
    *,
    n_experts: int | None = None,
    skip: Mapping[str, str] | None = None,
) -> Report:
    """Copy a directory's weights into ``targets`` (our name -> tensor), shard by shard.

    Stacked targets [len(owned_experts), ...] receive the owned experts only (None: all of them);
    ``n_experts`` is the model's number of experts, so that missing ones are noticed on every rank
    alike. ``skip`` maps prefixes of our names to the reason why such tensors stay in the file.
    BF16 values are widened where the target is fp32, and fp32 ones rounded where it is BF16.

    Raises UserError, before anything is copied, unless every tensor is mapped or skipped.
    """
    report, plan = _audit(directory, targets, owned_experts, n_experts, skip or {})
    report.raise_errors()
    with torch.no_grad():
        for file, copies in plan.items():
            with open_tensors(directory / file) as opened:
                for name, target in copies:
                    target.copy_(opened.get_tensor(name))
    return report


def shard_files(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of a directory's weight files, and the index's weight map (None without index).

    Raises UserError for an index that names an absent file or one outside the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise UserError(f"{directory} holds neither {INDEX} nor {SINGLE}")
        return [SINGLE], None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or re.fullmatch(r"[^/\\\0]+\.safetensors", name) is None:
            raise UserError(
                f"{index}: {tensor} is in {name!r}, which is not a .safetensors file of this "
                "directory"
            )
        names.add(name)
    for name in sorted(names):
        if not (directory / name).is_file():
            raise UserError(f"{index} names {name}, which is not there")
    return sorted(names), weight_map


def _audit(
    directory: Path,
    targets: Mapping[str, torch.Tensor],
    owned: range | None,
    n_experts: int | None,
    skip: Mapping[str, str],
) -> tuple[Report, dict[str, list[tuple[str, torch.Tensor]]]]:
    """Account for every tensor from headers alone; and the copies to make, by file."""
    expected = _expected(targets, owned, n_experts)
    names, weight_map = shard_files(directory)
    report = Report(directory)
    plan: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    seen: dict[tuple[str, int | None], str] = {}

    def note(
        name: str, status: Literal["mapped", "skipped", "error"], dtype: str, why: str
    ) -> None:
        report.findings.append(Finding(name, status, dtype, why))

    for file in names:
        with open_tensors(directory / file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                header = opened.get_slice(name)
                dtype, shape = header.get_dtype(), tuple(header.get_shape())
                address = from_hub(name)
                indexed = file if weight_map is None else weight_map.get(name)
                if indexed != file:
                    where = "does not list it" if indexed is None else f"places it in {indexed}"
                    note(name, "error", dtype, f"{file} holds it, but the index {where}")
                    continue
                if address in seen:
                    note(name, "error", dtype, f"is the same tensor as {seen[address]}")
                    continue
                seen[address] = name
                reason = _skip_reason(address[0], skip)
                if reason is not None:
                    note(name, "skipped", dtype, reason)
                elif address not in expected:
                    note(name, "error", dtype, "unexpected: the model has no such tensor")
                else:
                    like, target = expected[address]
                    wrong = _mismatch(dtype, shape, tuple(like.shape))
                    if wrong:
                        note(name, "error", dtype, wrong)
                    elif target is None:
                        note(name, "skipped", dtype, "expert of another rank")
                    else:
                        note(name, "mapped", dtype, _conversion(dtype, target.dtype))
                        plan[file].append((name, target))
    found = {finding.name for finding in report.findings}
    for name, file in (weight_map or {}).items():
        if name not in found:
            note(name, "error", "", f"the index places it in {file}, which does not hold it")
    for own, expert in expected:
        if (own, expert) not in seen and _skip_reason(own, skip) is None:
            name = own if expert is None else expert_name(own, expert)
            note(name, "error", "", "missing")
    return report, plan


def _expected(
    targets: Mapping[str, torch.Tensor], owned: range | None, n_experts: int | None
) -> dict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor | None]]:
    """(our name, expert) -> a tensor of its shape, and where to copy it (None: another rank's)."""
    expected: dict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, target in targets.items():
        if not is_stacked(name):
            expected[name, None] = (target, target)
            continue
        mine = range(len(target)) if owned is None else owned
        if len(mine) != len(target):
            raise ValueError(f"{name} holds {len(target)} experts, but {len(mine)} are owned")
        for expert in range(n_experts or mine.stop):
            here = target[expert - mine.start] if expert in mine else None
            expected[name, expert] = (target[0], here)
    return expected


def _skip_reason(own_name: str, skip: Mapping[str, str]) -> str | None:
    return next((why for prefix, why in skip.items() if own_name.startswith(prefix)), None)


def _mismatch(dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if shape != expected:
        return f"has shape {list(shape)}, the model expects {list(expected)}"
    if dtype not in _READABLE:
        return f"has dtype {dtype}; only {', '.join(_READABLE)} weights can be read"
    return ""


def _conversion(dtype: str, target: torch.dtype) -> str:
    source = _READABLE[dtype]
    if source == target:
        return ""
    word = "widened" if target == torch.float32 else "rounded"
    return f"{word} from {dtype} to {DTYPES[target]}"


def audit(
    directory: Path, targets: Mapping[str, torch.Tensor], *, n_experts: int | None = None
) -> Report:
    """Account for every tensor of a directory from headers alone.

    ``targets`` are those of ``load_weights``, which may be on the meta device. Tensors that do not
    fit are in the report; raises UserError where a header or the index itself cannot be read.
    """
    report, _ = _audit(directory, targets, None, n_experts, {})
    return report
