"""Weights into Hugging Face directories: shards and one index, written by all ranks.

Shapes: E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_hybrid.agreement import ALONE, Agreement
from nemo_hybrid.checkpoint import manifest
from nemo_hybrid.checkpoint.companions import GENERATION, Companions
from nemo_hybrid.checkpoint.directory import Writer, new_directory, write_directory
from nemo_hybrid.checkpoint.names import from_hub, to_hub
from nemo_hybrid.checkpoint.tensors import safetensors_parts
from nemo_hybrid.checkpoint.weights import INDEX, READABLE
from nemo_hybrid.config.hf import HybridConfig, config_json
from nemo_hybrid.errors import UserError

Weights = Iterable[tuple[str, torch.Tensor, int]]
"""(our name, tensor, first expert). The last counts for stacked experts only: the global index
of the tensor's first one."""

MAX_SHARD_BYTES = 4 << 30


@dataclass
class Shards:
    """What one rank wrote: the file of every tensor, by name on disk, and bytes of each dtype."""

    rank: int = 0
    count: int = 0
    file_of: dict[str, str] = field(default_factory=dict)
    bytes_in: Counter[torch.dtype] = field(default_factory=Counter)

    def write(
        self,
        writer: Writer,
        tensors: Mapping[str, torch.Tensor],
        fetch: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        """Write one more file, ``model-rRRRRR-NNNNN.safetensors``; see `safetensors_parts`."""
        for name, tensor in tensors.items():
            if tensor.dtype not in READABLE.values():
                raise UserError(f"{name} is {tensor.dtype}; weights must be {', '.join(READABLE)}")
        self.count += 1
        file = f"model-r{self.rank:05d}-{self.count:05d}.safetensors"
        writer.write(file, safetensors_parts(tensors, {"format": "pt"}, fetch))
        for name, tensor in tensors.items():
            self.file_of[name] = file
            self.bytes_in[tensor.dtype] += tensor.nbytes


def write_shards(
    writer: Writer, weights: Weights, rank: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Shards:
    """Write this rank's tensors. Every tensor must come from exactly one rank; a shard holds at
    least one."""
    shards = Shards(rank)
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0
    for own_name, tensor, first_expert in weights:
        for name, part in to_hub(own_name, tensor, first_expert):
            size = part.numel() * part.element_size()
            if pending and pending_bytes + size > max_shard_bytes:
                shards.write(writer, pending)
                pending, pending_bytes = {}, 0
            pending[name] = part
            pending_bytes += size
    if pending:
        shards.write(writer, pending)
    return shards


def write_model_files(
    writer: Writer, config: HybridConfig, parts: list[Shards], companions: Companions
) -> None:
    """Write, on rank 0, what describes all shards: the index, and all of `describe_model`. Raises
    UserError when a tensor came from two ranks, or from none as far as experts go."""
    file_of: dict[str, str] = {}
    for part in parts:
        for name, file in part.file_of.items():
            if name in file_of:
                raise UserError(f"{name} was written by two ranks: {file_of[name]} and {file}")
            file_of[name] = file
    _check_experts(file_of, config.n_routed_experts)
    bytes_in = sum((part.bytes_in for part in parts), Counter[torch.dtype]())
    index = {"metadata": {"total_size": bytes_in.total()}, "weight_map": file_of}
    writer.write_text(INDEX, manifest.to_json(index))
    most = max(bytes_in, key=bytes_in.__getitem__, default=torch.float32)
    describe_model(writer, config, most, companions)


def describe_model(
    writer: Writer,
    config: HybridConfig,
    dtype: torch.dtype,
    companions: Companions,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json, with ``more`` in it, and the companions; a generation config is made where
    they hold none."""
    described = {**config_json(config, str(dtype).removeprefix("torch.")), **(more or {})}
    ids = companions.eos_token_ids
    if ids and ids[0] == config.eos_token_id:
        described["eos_token_id"] = ids
    writer.write_text("config.json", manifest.to_json(described))
    if GENERATION not in companions.files:
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {"_from_model_config": True, **{name: described[name] for name in tokens}}
        writer.write_text(GENERATION, manifest.to_json(generation))
    for name, content in companions.files.items():
        writer.write(name, [content])


def _check_experts(written: Iterable[str], n_experts: int) -> None:
    counts = Counter(own for own, expert in map(from_hub, written) if expert is not None)
    for name, count in counts.items():
        if count != n_experts:
            raise UserError(f"{name}: {count} of {n_experts} experts were written")


def save_weights(
    final: str | Path,
    config: HybridConfig,
    weights: Weights,
    *,
    world: Agreement = ALONE,
    companions: Companions | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory (no training state): whole, or not at all.

    Raises UserError when final exists and is not empty, or cannot be written.
    """
    write_directory(
        world.from_rank_0(new_directory, final),
        world,
        lambda writer: write_shards(writer, weights, world.rank, max_shard_bytes),
        lambda writer, parts: write_model_files(writer, config, parts, companions or Companions()),
    )
