"""Small problems of every operation, with packed documents, for ``first_contact.py``.

Shapes: those of the operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_kernels import lowp
from nemo_kernels.attention import attention
from nemo_kernels.conv1d import causal_conv1d
from nemo_kernels.documents import Documents
from nemo_kernels.loss import linear_cross_entropy, linear_kl
from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.moe import moe_mlp, topk_router
from nemo_kernels.norm import gated_rms_norm, rms_norm
from nemo_kernels.ssd import ssd_scan

ROWS = 2


class Problem(NamedTuple):
    """``run(moved, *inputs)``: results of inputs on a device, where ``moved`` brings what is no
    input. ``exact``: inputs from this one on stay fp32."""

    name: str
    run: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]
    exact: int = 99


def problems(tiny: bool) -> dict[str, list[Problem]]:
    """By operation; inputs are fp32 numbers that bf16 can hold."""
    length, heads, width, groups, state = (40, 2, 8, 1, 8) if tiny else (700, 8, 64, 2, 128)
    vocabulary, inner = (300, 24) if tiny else (20_000, 384)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    # Of 1, 3, 4 and 5 tokens (a tap more and less than the convolution has), and longer ones.
    starts_BS = torch.zeros(ROWS, length, dtype=torch.bool)
    starts_BS[:, [0, 1, 4, 8, 13, length // 2]] = True
    documents = Documents.from_starts(starts_BS)

    def scan(moved: Any, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Any:
        return ssd_scan(x, dt.sigmoid() / 8, -A.sigmoid(), B, C / 8, D, 128, moved(documents))

    channels = heads * width + 2 * groups * state
    rows = (ROWS, length)
    group = (*rows, groups, state)
    tokens, experts, chosen = ROWS * length, 6, 2
    ids_TK = torch.stack(
        [torch.randperm(experts - 1, generator=generator)[:chosen] for _ in range(tokens)]
    )
    labels_R = torch.randint(vocabulary, (tokens,), generator=generator)
    scale_R = (torch.arange(tokens) % 3).float() / tokens
    return {
        "ssd": [
            Problem(
                "documents", scan,
                [draw(*rows, heads, width), draw(*group), draw(*group), draw(*rows, heads),
                 draw(heads), draw(heads)],
                exact=3,
            ),
        ],
        "conv1d": [
            Problem(
                "documents",
                lambda moved, *t: (causal_conv1d(*t, moved(documents)),),
                [draw(*rows, channels), draw(channels, 4), draw(channels)],
            )
        ],
        "norm": [
            Problem(
                "gated",
                lambda moved, x, gate, w: (gated_rms_norm(x, gate, w, 1e-5, len(w) // groups),),
                [draw(tokens, heads * width), draw(tokens, heads * width), draw(heads * width)],
            ),
            Problem(
                "plain",
                lambda moved, x, w: (rms_norm(x, w, 1e-5),),
                [draw(tokens, heads * width), draw(heads * width)],
            ),
        ],
        "attention": [
            Problem(
                "documents",
                lambda moved, *t: (attention(*t, moved(documents)),),
                [draw(*rows, heads, width), *(draw(*rows, heads // 2, width) for _ in range(2))],
            ),
            Problem(
                "whole rows",
                lambda moved, *t: (attention(*t),),
                [draw(*rows, heads, width), *(draw(*rows, heads // 2, width) for _ in range(2))],
            ),
        ],
        "moe": [
            Problem(
                "experts, one without tokens",
                lambda moved, x, weights, up, down: (moe_mlp(x, moved(ids_TK), weights, up, down),),
                [draw(tokens, inner), draw(tokens, chosen), draw(experts, 2 * inner, inner) / 8,
                 draw(experts, inner, 2 * inner) / 8],
            ),
            Problem(
                "router, all experts chosen",
                lambda moved, x, w: (topk_router(x, w, w[:, 0].detach().float(), len(w), 2.5)[2],),
                [draw(tokens, inner), draw(experts, inner) / 8],
            ),
        ],
        "loss": [
            Problem(
                "cross-entropy",
                lambda moved, h, w: linear_cross_entropy(h, w, moved(labels_R), moved(scale_R)),
                [draw(tokens, inner), draw(vocabulary, inner) / 8],
            ),
            Problem(
                "divergence",
                lambda moved, h, w: (linear_kl(h, w, h.flip(0), w, moved(scale_R)),),
                [draw(tokens, inner), draw(vocabulary, inner) / 8],
            ),
        ],
        "nvfp4": [Problem("a product", nvfp4_product, [draw(128, 128), draw(64, 128)])],
    }  # fmt: skip


def nvfp4_product(moved: Any, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Without a gradient."""
    (a, _), (b, _) = (lowp.operands(t.detach(), Rounding(), None) for t in (x, w))
    assert a is not None
    assert b is not None
    return (lowp.product(a, b, torch.float32),)


def results(problem: Problem, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of all inputs, in fp32 on the CPU."""
    leaves = [
        t.to(device, torch.float32 if i >= problem.exact else dtype).requires_grad_()
        for i, t in enumerate(problem.inputs)
    ]
    outputs = [y for y in problem.run(lambda t: t.to(device), *leaves) if y.is_floating_point()]
    loss = torch.zeros((), device=device)
    for y in outputs:
        # Its gradient differs from number to number.
        weight = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)
        loss = loss + (y.float() * weight).sum() if y.requires_grad else loss
    gradients = torch.autograd.grad(loss, leaves) if loss.requires_grad else ()
    return [t.detach().float().cpu() for t in (*outputs, *gradients)]


def deviation(found: Tensor, expected: Tensor) -> float:
    """In the norm, relative to the expected; infinite for what is not finite."""
    found, expected = found.detach(), expected.detach()
    apart = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return apart if apart < float("inf") else float("inf")
