"""Training state: everything a run needs to go on, addressed so that any layout can read it.

A step directory holds, beside the Hugging Face files of `weights.py`::

    optimizer-rRRRRR-KIND.safetensors  fp32 masters or moments: one flat tensor per fragment
    optimizer.index.json               parameter -> global shape and its fragments, over all ranks
    rank-RRRRR.safetensors             RNG states and the like of one rank
    data-rRRRRR.safetensors            what one rank holds of the data to come; of `rl` alone
    run_state.json, run.yaml           counters and identity of the run; its resolved configuration
    manifest.json                      size and checksum of every file

A file per kind, so that they are hashed side by side.

Shapes: E experts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_hybrid.agreement import Agreement
from nemo_hybrid.checkpoint import manifest, steps
from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.directory import Writer, write_directory
from nemo_hybrid.checkpoint.manifest import CheckpointError
from nemo_hybrid.checkpoint.names import (
    DATA,
    OPTIMIZER_INDEX,
    RESOLVED,
    ROUTER_BIAS,
    RUN_STATE,
    from_hub,
)
from nemo_hybrid.checkpoint.tensors import TensorFile, safetensors_parts
from nemo_hybrid.checkpoint.writing import (
    MAX_SHARD_BYTES,
    Shards,
    Weights,
    write_model_files,
    write_shards,
)
from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, read_json, side_by_side

FORMAT_VERSION = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
FROZEN = "frozen"  # key of the run state: parameters that are not trained
_JSON = "json"  # metadata key of a rank file
# Fields that may differ on resume: they do not change what the stored tensors mean.
FREE = (
    "chunk_size",
    "max_position_embeddings",
    "initializer_range",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
)


@dataclass
class Fragment:
    """A run of consecutive elements of one parameter, with its optimizer state.

    ``start`` counts in the flattened global parameter of shape ``shape``; a stacked expert
    parameter counts as the whole [E, ...] tensor. ``tensors`` holds flat fp32 tensors of
    ``numel`` elements for each of ``KINDS``.
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + self.numel


class _Saved(NamedTuple):
    """Where a stored fragment is."""

    start: int
    numel: int
    rank: int

    @property
    def stop(self) -> int:
        return self.start + self.numel


# ---- writing ----------------------------------------------------------------------------------


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    world: Agreement,
    *,
    config: HybridConfig,
    weights: Weights,
    fragments: Iterable[Fragment],
    run_state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    data: Mapping[str, torch.Tensor] | None = None,
    companions: Companions,
    resolved_config: str,
    keep: int,
    frozen: Collection[str] = (),
    adapter: Callable[[Writer, HybridConfig, Companions], Collection[str]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write ``checkpoints_dir/step_NNNNNNNN``, move ``latest`` to it, delete old checkpoints.

    Called by all ranks. Each gives only the weights (parameters, and router biases in fp32) and
    fragments it owns; together the fragments must cover every parameter with both moments, but
    for ``frozen`` ones, which are not trained. ``adapter`` writes, on rank 0, the model files of a
    checkpoint that holds no weights, and gives the names of the parameters in them.
    ``run_state`` (JSON, the same on every rank) and ``rank_state`` (tensors and JSON values by
    name) come back from `load_state` and `load_rank_state`, tuples as lists. ``data``: see `DATA`.

    Raises UserError on every rank when one of them cannot write, or when the state is
    incomplete; the checkpoints that were there stay valid.
    """
    final = checkpoints_dir / steps.step_name(step)

    def write(writer: Writer) -> tuple[Shards, dict[str, Any]]:
        # Side by side: hashing and syncing keep more than one core and one file busy.
        with ThreadPoolExecutor(1) as beside:
            listing = beside.submit(_write_fragments, writer, fragments, world.rank)
            shards = write_shards(writer, weights, world.rank, max_shard_bytes)
            _write_rank_state(writer, rank_state, world.rank)
            if data:
                writer.write(DATA.format(f"{world.rank:05d}"), safetensors_parts(data, {}))
            return shards, listing.result()

    def finish(writer: Writer, parts: list[tuple[Shards, dict[str, Any]]]) -> None:
        shards = [part for part, _ in parts]
        index = _merge(listing for _, listing in parts)
        if adapter is None:
            _check_complete(index, _parameters(shards) - set(frozen))
            write_model_files(writer, config, shards, companions)
        else:
            _check_complete(index, adapter(writer, config, companions))
        writer.write_text(OPTIMIZER_INDEX, manifest.to_json(index))
        state = {**run_state, "step": step, "format_version": FORMAT_VERSION}
        if frozen:
            state[FROZEN] = sorted(frozen)
        writer.write_text(RUN_STATE, manifest.to_json(state))
        writer.write_text(RESOLVED, resolved_config)

    def clean() -> None:
        if checkpoints_dir.is_dir():
            with naming("clean", checkpoints_dir):
                steps.remove_stale(checkpoints_dir)

    def settle() -> None:
        steps.point_latest(checkpoints_dir, final)
        steps.prune(checkpoints_dir, keep, trusted=final)

    world.from_rank_0(clean)
    write_directory(final, world, write, finish)
    world.from_rank_0(settle)
    return final


def _write_fragments(writer: Writer, fragments: Iterable[Fragment], rank: int) -> dict[str, Any]:
    """Write this rank's optimizer files; return its part of the index."""
    listing: dict[str, Any] = {}
    tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for fragment in fragments:
        if not 0 <= fragment.start <= fragment.stop <= prod(fragment.shape):
            raise ValueError(f"{fragment.name}: {fragment.start}+{fragment.numel} is out of range")
        for kind in KINDS:
            tensor = fragment.tensors.get(kind)
            if tensor is None:
                raise UserError(f"{fragment.name} has no {kind}: refusing to save without it")
            _check_tensor(fragment, kind, tensor)
            tensors[kind][_key(fragment.name, fragment.start)] = tensor.reshape(-1)
        entry = listing.setdefault(fragment.name, {"shape": list(fragment.shape), "fragments": []})
        entry["fragments"].append([fragment.start, fragment.numel, rank])
    for kind in KINDS:
        writer.write(_file(rank, kind), safetensors_parts(tensors[kind], {"format": "pt"}))
    return listing


def _check_tensor(fragment: Fragment, kind: str, tensor: torch.Tensor) -> None:
    if tensor.numel() != fragment.numel or tensor.dtype != torch.float32:
        raise ValueError(f"{fragment.name}: {kind} must be fp32 of {fragment.numel} elements")


def _file(rank: int, kind: str) -> str:
    return f"optimizer-r{rank:05d}-{kind}.safetensors"


def _key(name: str, start: int) -> str:
    return f"{name}|{start}"


def _merge(listings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    index: dict[str, Any] = {}
    for listing in listings:
        for name, entry in listing.items():
            known = index.setdefault(name, {"shape": entry["shape"], "fragments": []})
            if known["shape"] != entry["shape"]:
                raise UserError(
                    f"ranks disagree on the shape of {name}: {known['shape']}, {entry['shape']}"
                )
            known["fragments"] += entry["fragments"]
    return index


def _parameters(shards: Iterable[Shards]) -> set[str]:
    names = {from_hub(name)[0] for part in shards for name in part.file_of}
    return {name for name in names if not name.endswith(ROUTER_BIAS)}


def _check_complete(index: Mapping[str, Any], trained: Collection[str]) -> None:
    """Refuse a state in which a parameter, or a part of one, has no master and moments."""
    for name in sorted(set(trained) ^ index.keys()):
        lacks = "weights" if name in index else "optimizer state"
        raise UserError(f"{name} has no {lacks}: refusing to save an incomplete checkpoint")
    for name, entry in index.items():
        total = prod(entry["shape"])
        pieces = [_Saved(*piece) for piece in entry["fragments"]]
        gap = _first_gap(pieces, 0, total)
        if gap is not None:
            raise UserError(f"{name}: no rank gave element {gap} of {total}: refusing to save")


def _first_gap(pieces: Iterable[_Saved], start: int, stop: int) -> int | None:
    """The first element of [start, stop) that no piece holds."""
    reached = start
    for piece in sorted(pieces, key=lambda p: p.start):
        if reached >= stop or piece.start > reached:
            break
        reached = max(reached, piece.stop)
    return reached if reached < stop else None


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_rank_state(writer: Writer, state: Mapping[str, Any], rank: int) -> None:
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in state.items() if k not in tensors}
    parts = safetensors_parts(tensors, {_JSON: json.dumps(plain, allow_nan=False)})
    writer.write(_rank_file(rank), parts)


# ---- reading ----------------------------------------------------------------------------------


def check_resumable(
    directory: Path,
    config: HybridConfig,
    expected: Mapping[str, Any],
    otherwise: str = ", or another run_dir",
) -> dict[str, Any]:
    """Return the run state of a checkpoint that a run of this configuration may resume from.

    ``expected`` holds entries of the run state that must be equal (hashes of tokenizer and data,
    seed of the sampler ...); ``otherwise`` is what can be done but making them so. Raises UserError
    naming both sides of the first difference, for a directory that is not a training checkpoint,
    and for a newer format.
    """
    state = _read_run_state(directory)
    saved = read_config(directory)
    for f in fields(ModelConfig):
        theirs, ours = getattr(saved, f.name), getattr(config, f.name)
        if f.name == "mtp_pattern" and not (saved.mtp_num_depths or config.mtp_num_depths):
            continue
        if theirs != ours and f.name not in FREE:
            raise UserError(
                f"{directory} has model.{f.name} {theirs!r}, this run has {ours!r}; use the same "
                f"model{otherwise}"
            )
    for name, ours in expected.items():
        theirs = state.get(name)
        if theirs != ours:
            raise UserError(
                f"{directory} was written with {name} {theirs!r}, this run has {ours!r}; use the "
                f"same{otherwise}"
            )
    return state


def _read_run_state(directory: Path) -> dict[str, Any]:
    path = directory / RUN_STATE
    if not path.is_file():
        raise UserError(f"{directory} is not a training checkpoint: it has no {RUN_STATE}")
    state = read_json(path)
    version = state.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} has no format_version")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{directory} has checkpoint format {version}, this version reads up to "
            f"{FORMAT_VERSION}; use a newer nemo_hybrid"
        )
    return state


def load_state(directory: Path, wanted: Iterable[Fragment]) -> dict[str, Any]:
    """Fill the wanted fragments from a checkpoint of any layout; return its run state.

    Tensors that a fragment already has are filled in place (they must be fp32), missing ones are
    allocated on the CPU. Only the needed parts of files are read. Raises UserError when shapes
    differ, and CheckpointError when an element of any kind is not in the checkpoint.
    """
    state = _read_run_state(directory)
    saved = _read_optimizer_index(directory)
    # rank that wrote -> (stored fragment, wanted fragment)
    reads: dict[int, list[tuple[_Saved, Fragment]]] = defaultdict(list)
    for fragment in wanted:
        _locate(directory, fragment, saved, reads, KINDS)

    def read(source: tuple[int, str]) -> None:
        rank, kind = source
        with TensorFile(directory / _file(rank, kind)) as opened:
            for piece, fragment in reads[rank]:
                place, numbers = _overlap(opened, piece, fragment, kind)
                fragment.tensors[kind].view(-1)[place].copy_(numbers)

    side_by_side(read, product(reads, KINDS))
    return state


def check_state(directory: Path, parameters: Iterable[str]) -> dict[str, Any]:
    """Check that masters and moments of all these parameters are there, from headers alone; return
    the run state. Raises UserError, naming the parameter or the file."""
    state, index = _read_run_state(directory), _read_optimizer_index(directory)
    frozen = set(state.get(FROZEN, ()))
    for name in parameters:
        if name not in index and name not in frozen:
            raise CheckpointError(f"{directory} holds no optimizer state of {name}")
    of_rank: dict[int, list[tuple[str, _Saved]]] = defaultdict(list)
    for name, (shape, pieces) in index.items():
        gap = _first_gap(pieces, 0, prod(shape))
        if gap is not None:
            raise CheckpointError(f"{directory} holds no optimizer state of {name}[{gap}]")
        for piece in pieces:
            of_rank[piece.rank].append((name, piece))
    for rank, kind in product(of_rank, KINDS):
        with TensorFile(directory / _file(rank, kind)) as opened:
            for name, piece in of_rank[rank]:
                _check_entry(opened, name, piece, kind)
    return state


def _read_optimizer_index(directory: Path) -> dict[str, tuple[tuple[int, ...], list[_Saved]]]:
    path = directory / OPTIMIZER_INDEX
    try:
        index = {
            name: (tuple(entry["shape"]), [_Saved(*piece) for piece in entry["fragments"]])
            for name, entry in read_json(path).items()
        }
        numbers = chain.from_iterable(chain(shape, *found) for shape, found in index.values())
        valid = all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(f"damaged checkpoint: {path} is not an optimizer index")
    return index


def _locate(
    directory: Path,
    fragment: Fragment,
    saved: Mapping[str, tuple[tuple[int, ...], list[_Saved]]],
    reads: dict[int, list[tuple[_Saved, Fragment]]],
    kinds: Iterable[str],
) -> None:
    """Find the stored fragments that a wanted one overlaps, and allocate its tensors."""
    if fragment.name not in saved:
        raise CheckpointError(f"{directory} holds no optimizer state of {fragment.name}")
    shape, pieces = saved[fragment.name]
    if shape != tuple(fragment.shape):
        raise UserError(
            f"{directory} has {fragment.name} of shape {list(shape)}, this model has "
            f"{list(fragment.shape)}"
        )
    gap = _first_gap(pieces, fragment.start, fragment.stop)
    if gap is not None:
        raise CheckpointError(f"{directory} holds no optimizer state of {fragment.name}[{gap}]")
    for kind in kinds:
        tensor = fragment.tensors.get(kind)
        if tensor is None:
            fragment.tensors[kind] = torch.empty(fragment.numel, dtype=torch.float32)
        else:
            _check_tensor(fragment, kind, tensor)
    for piece in pieces:
        if piece.start < fragment.stop and fragment.start < piece.stop:
            reads[piece.rank].append((piece, fragment))


def _overlap(
    opened: TensorFile, piece: _Saved, fragment: Fragment, kind: str
) -> tuple[slice, torch.Tensor]:
    """Where in a fragment a stored one lies, and a view of what it holds of it."""
    start, stop = max(piece.start, fragment.start), min(piece.stop, fragment.stop)
    key = _check_entry(opened, fragment.name, piece, kind)
    numbers = opened.view(key, slice(start - piece.start, stop - piece.start))
    return slice(start - fragment.start, stop - fragment.start), numbers


def _check_entry(opened: TensorFile, name: str, piece: _Saved, kind: str) -> str:
    """The key of a stored fragment. Raises CheckpointError unless it is there as it should be."""
    key, path = _key(name, piece.start), opened.path
    entry = opened.entries.get(key)
    if entry is None:
        raise CheckpointError(f"damaged checkpoint: {path} has no {kind} of {name}")
    if entry.shape != (piece.numel,) or entry.dtype != "F32":
        raise CheckpointError(f"damaged checkpoint: {path}: {key} has a wrong shape or dtype")
    return key


class Masters:
    """The fp32 masters of a checkpoint, read one by one. Raises as `load_state`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """``stack``: closes the files in the end."""
        self._directory, self._stack = directory, stack
        self._saved = _read_optimizer_index(directory)
        self._files: dict[int, TensorFile] = {}

    def read(self, name: str, expert: int | None = None) -> torch.Tensor | None:
        """A master, flat, which may be a view of the file; of a stack the matrix of one expert.
        None: it was not trained."""
        if name not in self._saved:
            return None
        shape, kind = self._saved[name][0], KINDS[0]
        size = prod(shape if expert is None else shape[1:])
        wanted = Fragment(name, size * (expert or 0), size, shape)
        reads: dict[int, list[tuple[_Saved, Fragment]]] = defaultdict(list)
        _locate(self._directory, wanted, self._saved, reads, ())
        parts = [
            _overlap(self._open(rank), piece, wanted, kind)
            for rank, pieces in reads.items()
            for piece, _ in pieces
        ]
        if len(parts) == 1:
            return parts[0][1]
        master = torch.empty(size)
        for place, numbers in parts:
            master[place] = numbers
        return master

    def _open(self, rank: int) -> TensorFile:
        if rank not in self._files:
            opened = TensorFile(self._directory / _file(rank, KINDS[0]))
            self._files[rank] = self._stack.enter_context(opened)
        return self._files[rank]


def load_rank_state(directory: Path, rank: int) -> dict[str, Any] | None:
    """The rank_state that this rank saved; None if the checkpoint had fewer ranks."""
    path = directory / _rank_file(rank)
    if not path.is_file():
        return None
    with TensorFile(path) as opened:
        state: dict[str, Any] = {name: opened.read(name) for name in opened.entries}
        return {**state, **json.loads(opened.metadata.get(_JSON, "{}"))}


def check_masters(weights: Weights, masters: Iterable[Fragment]) -> None:
    """Compare every master with the weight that must be its rounding, bit by bit.

    The fragments must lie within the weights given here. Raises CheckpointError naming the
    parameter.
    """
    held = {name: (tensor, first_expert) for name, tensor, first_expert in weights}
    for fragment in masters:
        tensor, first_expert = held[fragment.name]
        offset = fragment.start - first_expert * prod(fragment.shape[1:])
        weight = tensor.detach().reshape(-1)[offset : offset + fragment.numel]
        if offset < 0 or weight.numel() != fragment.numel:
            raise ValueError(f"{fragment.name}: the fragment does not lie within the weight")
        master = fragment.tensors["master"].reshape(-1).to(weight)
        bits = torch.int16 if weight.element_size() == 2 else torch.int32  # NaN equals itself
        if not torch.equal(master.view(bits), weight.view(bits)):
            differing = int((master.view(bits) != weight.view(bits)).sum())
            raise CheckpointError(
                f"{fragment.name}: the weights are not the rounding of their fp32 masters "
                f"({differing} values differ); the checkpoint mixes two states"
            )
