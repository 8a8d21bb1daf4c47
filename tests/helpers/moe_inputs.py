"""Inputs for tests of the experts, and an oracle that takes one token and one expert at a time.

Shapes: T tokens, E experts, K experts per token, L width in which experts work, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_kernels.moe import function


def draw_ids(generator: torch.Generator, n_tokens: int, n_experts: int, k: int, skew: float):
    """Distinct experts per token; with skew, low-numbered experts get most tokens."""
    popularity_E = torch.exp(-skew * torch.arange(n_experts))
    if not n_tokens:
        return torch.empty(0, k, dtype=torch.int64)
    return torch.multinomial(popularity_E.expand(n_tokens, -1), k, generator=generator)


def draw_inputs(
    generator: torch.Generator,
    n_tokens: int,
    k: int,
    n_experts: int,
    width: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_TL, weights_TK (fp32), up_EFL and down_ELF that require gradients."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_TL, weights_TK = normal(n_tokens, width).to(dtype), normal(n_tokens, k)
    up_EFL = (normal(n_experts, inner, width) / width**0.5).to(dtype)
    down_ELF = (normal(n_experts, width, inner) / inner**0.5).to(dtype)
    x, w, u, d = (t.requires_grad_() for t in (x_TL, weights_TK, up_EFL, down_ELF))
    return x, w, u, d


def by_path(
    path: Any, x_TL: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor,
    recompute: bool = False,
) -> Tensor:  # fmt: skip
    """``moe_mlp`` by the module of a path."""
    slots = path.sort_slots(ids_TK, len(up))
    experts = path.experts_for(x_TL, ids_TK.numel(), *_sizes(up))
    given = (x_TL, weights_TK, slots, slots.counts_E, up, down, recompute)
    return function.mlp(experts, *given)


def rows_by_path(
    path: Any, x_RL: Tensor, weights_R: Tensor, counts_E: Tensor, up: Tensor, down: Tensor,
    recompute: bool = False,
) -> Tensor:  # fmt: skip
    """``grouped_mlp`` by the module of a path."""
    experts = path.experts_for(x_RL, len(x_RL), *_sizes(up))
    return function.mlp(experts, x_RL, weights_R, None, counts_E, up, down, recompute)


def _sizes(up_EFL: Tensor) -> tuple[int, int, int]:
    n_experts, inner, width = up_EFL.shape
    return n_experts, width, inner


def naive_moe(x_TL: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for x_L, ids_K, weights_K in zip(x_TL, ids_TK.tolist(), weights_TK, strict=True):
        y_L = torch.zeros_like(x_L)
        for e, weight in zip(ids_K, weights_K, strict=True):
            y_L = y_L + down[e] @ (weight * torch.relu(up[e] @ x_L) ** 2)
        rows.append(y_L)
    return torch.stack(rows) if rows else x_TL * 1


def with_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor
) -> list[Tensor]:
    """Output and gradients, in float64."""
    y = function(*inputs)
    grads = torch.autograd.grad(y, inputs, dy.to(y.dtype), materialize_grads=True)
    return [t.detach().double() for t in (y, *grads)]


def oracle(ids_TK: Tensor, inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    return with_gradients(lambda x, w, u, d: naive_moe(x, ids_TK, w, u, d), exact, dy)


def deviation(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference relative to the largest value of the same tensor; NaN if there is one."""
    worst = torch.zeros((), dtype=torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if a.numel():
            worst = torch.maximum(worst, (a - b).abs().max() / b.abs().max().clamp_min(1e-3))
    return worst.item()
