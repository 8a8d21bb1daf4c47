"""A world of threads, and a toy training state that can be cut for any layout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_hybrid.agreement import Agreement
from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.names import is_stacked
from nemo_hybrid.checkpoint.state import KINDS, Fragment, save_checkpoint
from nemo_hybrid.config.hf import HybridConfig

CONFIG = HybridConfig(
    pattern="ME", vocab_size=32, hidden_size=12, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=6, moe_latent_size=5, mtp_pattern="*E",
)  # fmt: skip
SHAPES = {
    "backbone.embeddings.weight": (32, 12),
    "backbone.layers.0.mixer.A_log": (8,),
    "backbone.layers.0.mixer.conv1d.weight": (11, 1, 4),
    "backbone.layers.1.mixer.gate.weight": (4, 12),
    "backbone.layers.1.mixer.gate.e_score_correction_bias": (4,),
    "backbone.layers.1.mixer.experts.up_proj": (4, 6, 5),
    "backbone.layers.1.mixer.experts.down_proj": (4, 5, 6),
    "mtp.layers.1.mixer.experts.up_proj": (4, 6, 5),
    "mtp.layers.1.mixer.experts.down_proj": (4, 5, 6),
    "mtp.layers.0.eh_proj.weight": (12, 24),
    "lm_head.weight": (32, 12),
}
KEPT_FP32 = ("A_log", "e_score_correction_bias")


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=300)
        self.slots: list[Any] = [None] * size


@dataclass
class ThreadWorld(Agreement):
    rank: int
    size: int
    shared: _Shared

    def gather(self, obj: Any) -> list[Any]:
        self.shared.slots[self.rank] = obj
        self.shared.barrier.wait()
        everything = list(self.shared.slots)
        self.shared.barrier.wait()
        return everything


def in_ranks(size: int, action: Callable[[ThreadWorld], Any]) -> list[Any]:
    """Run action on `size` ranks; return results, with exceptions in the place of results."""
    shared, results = _Shared(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = action(ThreadWorld(rank, size, shared))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):
                shared.barrier.abort()  # a killed rank takes the others along

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@dataclass
class Toy:
    """Global tensors of a toy run: fp32 masters and moments, weights that are their rounding."""

    seed: int = 0
    state: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for name, shape in SHAPES.items():
            self.state[name] = {k: torch.randn(shape, generator=generator) for k in KINDS}
            kept = name.endswith(KEPT_FP32)
            master = self.state[name]["master"]
            self.weights[name] = master.clone() if kept else master.bfloat16()
        del self.state["backbone.layers.1.mixer.gate.e_score_correction_bias"]

    def owned_experts(self, rank: int, ep: int) -> range:
        per_rank = CONFIG.n_routed_experts // ep
        return range(rank % ep * per_rank, (rank % ep + 1) * per_rank)

    def owned_weights(self, rank: int, ep: int) -> list[tuple[str, torch.Tensor, int]]:
        """What a rank writes: rank 0 the dense tensors, the first of each expert group experts."""
        owned = self.owned_experts(rank, ep)
        out = []
        for name, tensor in self.weights.items():
            if is_stacked(name):
                if rank < ep:
                    out.append((name, tensor[owned.start : owned.stop], owned.start))
            elif rank == 0:
                out.append((name, tensor, 0))
        return out

    def local_weights(self, rank: int, ep: int) -> list[tuple[str, torch.Tensor, int]]:
        """What a rank holds in memory."""
        owned = self.owned_experts(rank, ep)
        return [
            (n, t[owned.start : owned.stop], owned.start) if is_stacked(n) else (n, t, 0)
            for n, t in self.weights.items()
        ]

    def fragments(self, rank: int, world: int, ep: int, filled: bool = True) -> list[Fragment]:
        """ZeRO-like: dense parameters joined end to end and cut in `world` parts, experts of an
        expert-parallel rank cut in `world / ep` parts."""
        dense = [(n, 0, prod(SHAPES[n])) for n in self.state if not is_stacked(n)]
        owned = self.owned_experts(rank, ep)
        stacked = []
        for name in filter(is_stacked, self.state):
            per = prod(SHAPES[name][1:])
            stacked.append((name, owned.start * per, len(owned) * per))
        pieces = _cut(dense, rank, world) + _cut(stacked, rank // ep, world // ep)
        out = []
        for name, start, numel in pieces:
            fragment = Fragment(name, start, numel, SHAPES[name])
            if filled:
                fragment.tensors = {
                    k: t.flatten()[start : start + numel] for k, t in self.state[name].items()
                }
            out.append(fragment)
        return out

    def save(
        self, checkpoints: Path, step: int, world: int = 1, ep: int = 1, **changes: Any
    ) -> list[Any]:
        def action(w: ThreadWorld) -> Path:
            given: dict[str, Any] = {
                "config": CONFIG,
                "weights": self.owned_weights(w.rank, ep),
                "fragments": self.fragments(w.rank, world, ep),
                "run_state": {"samples": 7 * step, "layout": {"world": world, "ep": ep}},
                "rank_state": {"torch": torch.arange(5) + w.rank, "python": [1, [2, 3], None]},
                "companions": Companions(),
                "resolved_config": "train: {}\n",
                "keep": 0,
                "max_shard_bytes": 700,
            }
            return save_checkpoint(checkpoints, step, w, **(given | changes))

        return in_ranks(world, action)


def _cut(runs: list[tuple[str, int, int]], part: int, parts: int) -> list[tuple[str, int, int]]:
    total = sum(numel for _, _, numel in runs)
    size = -(-total // parts)
    low, high, at, out = part * size, (part + 1) * size, 0, []
    for name, start, numel in runs:
        a, b = max(low, at), min(high, at + numel)
        if a < b:
            out.append((name, start + a - at, b - a))
        at += numel
    return out


@pytest.fixture(name="in_ranks")
def _in_ranks() -> Callable[..., list[Any]]:
    return in_ranks


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def other_toy() -> Toy:
    return Toy(seed=1)


@pytest.fixture
def config() -> HybridConfig:
    return CONFIG
