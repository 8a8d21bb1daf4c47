"""Balancing expert load without a loss: the router bias, moved once per global batch.

The bias falls by ``rate`` for experts above the mean load and rises for those below
(arXiv 2408.15664). It is never part of the weights that mix experts.

Shapes: E experts.
"""

import torch
from torch import Tensor

from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.world import World


class LoadCounter:
    """Routed slots per expert and layer over one global batch, on all ranks."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, counts: dict[str, Tensor]) -> None:
        """Add one micro-batch: layer name -> counts [E]."""
        for name, counts_E in counts.items():
            held = self._counts.get(name)
            self._counts[name] = counts_E if held is None else held + counts_E

    def total(self, world: World) -> dict[str, Tensor]:
        """Sum over ranks and start anew."""
        counts, self._counts = self._counts, {}
        if counts:
            stacked = world.sum(torch.stack(list(counts.values())))
            counts = dict(zip(counts, stacked, strict=True))
        return counts


@torch.no_grad()
def update_router_bias(model: HybridLM, counts: dict[str, Tensor], rate: float) -> None:
    """bias += rate * sign(mean load - load), in fp32, for every layer counted."""
    for name, counts_E in counts.items():
        load_E = counts_E.float()
        bias_E = model.get_buffer(f"{name}.mixer.gate.e_score_correction_bias")
        bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=rate)


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: (largest load - mean load) / mean load; 0 is perfect balance."""
    load_E = counts_E.float()
    mean = load_E.mean()
    return float((load_E.max() - mean) / mean) if mean > 0 else 0.0
