"""Shapes, routings and random inputs of the MoE benchmark.

Shapes: T tokens, D hidden, E experts, K experts per token, R = T*K routed slots, L width in which
experts work, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """One MoE layer and the tokens it gets."""

    name: str
    tokens: int
    hidden: int
    experts: int
    k: int
    width: int
    inner: int

    @property
    def slots(self) -> int:
        return self.tokens * self.k


SUPER = Shape("Super, 704 per expert", 16384, 4096, 512, 22, 1024, 2688)
NANO = Shape("Nano, 768 per expert", 16384, 2688, 128, 6, 2688, 1856)
SUPER_64 = Shape("Super, 64 experts, 5632 per expert", 16384, 4096, 64, 22, 1024, 2688)
TINY = Shape("tiny", 48, 40, 8, 3, 16, 24)

UNIFORM, SKEWED, HALF = "uniform", "skewed", "half unused"
"""Routing: all experts alike, or chosen in proportion to 1 / rank (Zipf), or one half alike and the
other half never."""

CASES = (
    *((shape, routing) for routing in (UNIFORM, SKEWED) for shape in (SUPER, NANO, SUPER_64)),
    (SUPER, HALF),
)
TINY_CASES = ((TINY, UNIFORM), (TINY, SKEWED), (TINY, HALF))


@dataclass(frozen=True)
class Problem:
    """Random inputs in one dtype; routing weights and the router's bias in fp32."""

    shape: Shape
    scaling: float
    x_TL: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    up_EFL: Tensor
    down_ELF: Tensor
    dy_TL: Tensor
    hidden_TD: Tensor
    router_ED: Tensor
    bias_E: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x_TL, self.weights_TK, self.up_EFL, self.down_ELF

    def counts_E(self) -> Tensor:
        return self.ids_TK.flatten().bincount(minlength=self.shape.experts)

    def busiest(self) -> float:
        """Slots of the busiest expert over the mean."""
        counts_E = self.counts_E()
        return (counts_E.max() / counts_E.float().mean()).item()

    def used(self) -> int:
        """Experts that get any token."""
        return int(self.counts_E().count_nonzero())


def draw(shape: Shape, routing: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        x = torch.empty(size, dtype=dtype, device=device)
        return x.normal_(std=scale, generator=generator)

    T, K, E, D = shape.tokens, shape.k, shape.experts, shape.hidden
    L, F = shape.width, shape.inner
    rank_E = torch.randperm(E, device=device, generator=generator) + 1
    popularity_E = {
        UNIFORM: torch.ones(E, device=device),
        SKEWED: 1 / rank_E,
        HALF: (rank_E <= E // 2).float(),
    }[routing]
    # K draws without replacement at these odds are the K largest of logarithm + Gumbel noise.
    noise_TE = torch.rand(T, E, device=device, generator=generator).clamp_min(1e-30)
    ids_TK = (popularity_E.log() - noise_TE.log().neg().log()).topk(K, sorted=False).indices
    weights_TK = torch.rand(T, K, device=device, generator=generator) + 0.1
    scaling = 2.5
    weights_TK *= scaling / weights_TK.sum(1, keepdim=True)
    return Problem(
        shape=shape,
        scaling=scaling,
        x_TL=normal(T, L).requires_grad_(),
        ids_TK=ids_TK,
        weights_TK=weights_TK.requires_grad_(),
        up_EFL=nn.Parameter(normal(E, F, L, scale=L**-0.5)),
        down_ELF=nn.Parameter(normal(E, L, F, scale=F**-0.5)),
        dy_TL=normal(T, L),
        hidden_TD=normal(T, D),
        router_ED=normal(E, D, scale=D**-0.5),
        bias_E=normal(E, scale=0.1).float(),
    )
