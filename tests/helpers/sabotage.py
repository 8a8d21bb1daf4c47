"""Ways to break a model that a comparison of its outputs must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from nemo_hybrid.model.hybrid import HybridLM
from nemo_kernels.ssd import ssd_scan

Sabotage = Callable[[HybridLM], AbstractContextManager[None]]


def sabotages(pattern: str) -> dict[str, Sabotage]:
    """What a comparison over these layers must notice."""
    return {
        name: sabotage
        for letter, by_name in _SABOTAGES.items()
        if letter in pattern
        for name, sabotage in by_name.items()
    }


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Sabotage:
    """Sabotage by changing the parameters whose names end so."""

    @contextmanager
    def sabotage(model: HybridLM) -> Iterator[None]:
        chosen = [p for name, p in model.named_parameters() if name.endswith(ending)]
        assert chosen, ending
        before = [p.clone() for p in chosen]
        for p in chosen:
            p.copy_(change(p))
        yield
        for p, value in zip(chosen, before, strict=True):
            p.copy_(value)

    return sabotage


@contextmanager
def state_dropped_between_chunks(_model: HybridLM) -> Iterator[None]:
    """Every chunk of the Mamba-2 scan starts from a zero state."""

    def forgetful(*args: Tensor | int | None) -> tuple[Tensor, Tensor]:
        x_BSHP, *rest, chunk, _seq_idx = args
        chunk_BS = (torch.arange(x_BSHP.shape[1]) // chunk).expand(x_BSHP.shape[:2])
        return ssd_scan(x_BSHP, *rest, chunk, chunk_BS)

    with patch("nemo_hybrid.model.mamba2.ssd_scan", forgetful):
        yield


_SABOTAGES: dict[str, dict[str, Sabotage]] = {
    "M": {
        "scan killed": changed("mixer.dt_bias", lambda p: torch.full_like(p, -30.0)),
        "state dropped between chunks": state_dropped_between_chunks,
        "decay rates of other heads": changed("mixer.A_log", lambda p: p.roll(1, 0)),
        "skip connection lost": changed("mixer.D", torch.zeros_like),
    },
    "E": {
        "routed experts zeroed": changed("experts.down_proj", torch.zeros_like),
        "router rows permuted": changed("gate.weight", lambda p: p.roll(1, 0)),
        "shared expert zeroed": changed("shared_experts.down_proj.weight", torch.zeros_like),
    },
    "*": {
        "query heads of other key/value heads": changed(
            "mixer.q_proj.weight", lambda p: p.roll(p.shape[0] // 2, 0)
        ),
        "attention without preference": changed("mixer.q_proj.weight", torch.zeros_like),
    },
    "-": {"mlp zeroed": changed("mixer.down_proj.weight", torch.zeros_like)},
}
