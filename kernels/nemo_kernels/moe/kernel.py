"""Mixture-of-experts operations in Triton.

Products have bf16 or fp16 operands and fp32 sums (with fp32 operands all is fp32); passes between
them are in fp32, in the products' epilogues. Rows of x and dy are gathered while they are loaded.
Results do not depend on the order in which programs run, and nothing waits for the GPU.

For the backward pass the pre-activation [R, F] is kept, besides inputs and the sort; with
``recompute`` it is computed once more instead.

Shapes: T tokens, E experts, K experts per token, R routed slots (T*K), L width in which experts
work, F expert inner width, N column blocks.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels import backend
from nemo_kernels.checks import expect_device
from nemo_kernels.moe import expert_kernel, function, reference
from nemo_kernels.moe.expert_kernel import Plan
from nemo_kernels.moe.function import Slots
from nemo_kernels.moe.router_kernel import MAX_CHOICES, topk_router
from nemo_kernels.moe.sort_kernel import MAX_EXPERTS, MAX_ROWS, Tiles, sort_slots, tile_table
from nemo_kernels.shipped import Tile

__all__ = [
    "DEVICE_TYPES", "grouped_mlp", "moe_mlp", "self_check", "sort_slots", "supports", "topk_router",
]  # fmt: skip

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
MIN_CAPABILITY = (9, 0)
"""Compute capability for whose instructions and shared memory the tiles are made."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_MATRIX = 2**31
"""Elements of one expert's matrix: offsets within it are int32."""


class _Rows(NamedTuple):
    """Rows sorted by expert, as the kernels need to know them."""

    token_R: Tensor
    """int32: the row of x that belongs to each."""
    weight_R: Tensor
    end_E: Tensor
    """int32: the row after the last one of each expert."""
    expert_M: Tensor
    first_M: Tensor
    end_M: Tensor

    @property
    def tiles(self) -> tuple[Tensor, ...]:
        return self[3:]


class _Experts(torch.autograd.Function):
    """Both entry points. ``slots`` None: x is sorted already and results are not combined."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TL: Tensor,
        weights: Tensor,
        slots: Slots | None,
        counts_E: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        plan: Plan,
        keep: bool,
    ) -> Tensor:
        inverse_R = None if slots is None else slots.inverse_R
        rows = _rows(weights, slots, counts_E, plan.up.m)
        act_RF = x_TL.new_empty(weights.numel(), w_up_EFL.shape[1])
        h_RF = torch.empty_like(act_RF) if keep else None
        _up(plan.up, x_TL, rows, w_up_EFL, h_RF, act_RF)
        y_RL = _product(plan.down, act_RF, rows, w_down_ELF.mT)
        ctx.plan = plan
        ctx.save_for_backward(x_TL, weights, inverse_R, w_up_EFL, w_down_ELF, h_RF, *rows)
        return y_RL if inverse_R is None else _combine(y_RL, inverse_R, weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TL: Tensor) -> tuple[Tensor | None, ...]:
        x_TL, weights, inverse_R, w_up_EFL, w_down_ELF, h_RF, *tensors = ctx.saved_tensors
        plan, rows = ctx.plan, _Rows(*tensors)
        dy_TL = dy_TL.contiguous()
        if h_RF is None:
            h_RF = x_TL.new_empty(weights.numel(), w_up_EFL.shape[1])
            _up(plan.up, x_TL, rows, w_up_EFL, h_RF, None)
        dh_RF, act_RF, dweights = _down_dgrad(plan.up, dy_TL, h_RF, rows, w_down_ELF)
        dup_EFL = ddown_ELF = None
        if ctx.needs_input_grad[5]:
            ddown_ELF = torch.empty_like(w_down_ELF)
            _wgrad(plan.wgrad, act_RF, dy_TL, rows.token_R, rows.end_E, ddown_ELF.mT)
        del act_RF
        if ctx.needs_input_grad[4]:
            dup_EFL = torch.empty_like(w_up_EFL)
            _wgrad(plan.wgrad, dh_RF, x_TL, rows.token_R, rows.end_E, dup_EFL)
        dx_TL = _product(plan.down, dh_RF, rows, w_up_EFL)
        if inverse_R is not None:
            dx_TL = _combine(dx_TL, inverse_R, weights.shape[1])
            dweights = dweights.index_select(0, inverse_R).view_as(weights)
        return dx_TL, dweights.to(weights.dtype), None, None, dup_EFL, ddown_ELF, None, None


def _apply(
    x_TL: Tensor,
    weights: Tensor,
    slots: Slots | None,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool,
) -> Tensor:
    n_experts, inner, width = w_up_EFL.shape
    plan = expert_kernel.plan(x_TL.dtype, weights.numel(), n_experts, width, inner)
    differentiable = any(t.requires_grad for t in (x_TL, weights, w_up_EFL, w_down_ELF))
    keep = not recompute and torch.is_grad_enabled() and differentiable
    return _Experts.apply(x_TL, weights, slots, counts_E, w_up_EFL, w_down_ELF, plan, keep)


def grouped_mlp(
    x_RL: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
) -> Tensor:
    """``nemo_kernels.moe.grouped_mlp``. Keeps the inputs and, without recompute, h [R, F].

    Raises:
        ValueError: dtype, device, contiguity or size that the kernels do not take.
    """
    slots = {"weights_R": weights_R, "counts_E": counts_E}
    _check({"x_RL": x_RL}, slots, w_up_EFL=w_up_EFL, w_down_ELF=w_down_ELF)
    with torch.cuda.device_of(x_RL):
        return _apply(x_RL, weights_R, None, counts_E, w_up_EFL, w_down_ELF, recompute)


def moe_mlp(
    x_TL: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
) -> Tensor:
    """``nemo_kernels.moe.moe_mlp``. Keeps the inputs, the sort and, without recompute, h [R, F].

    Raises:
        ValueError: dtype, device, contiguity or size that the kernels do not take.
    """
    n_experts, k = w_up_EFL.shape[0], topk_ids_TK.shape[1]
    choices = {"topk_ids_TK": topk_ids_TK, "topk_weights_TK": topk_weights_TK}
    _check({"x_TL": x_TL}, choices, w_up_EFL=w_up_EFL, w_down_ELF=w_down_ELF)
    if not 0 < k <= n_experts:
        raise ValueError(f"topk_ids_TK: expected 1 to {n_experts} (experts) columns, got {k}")
    with torch.cuda.device_of(x_TL):
        slots = sort_slots(topk_ids_TK, n_experts)
        return _apply(x_TL, topk_weights_TK, slots, slots.counts_E, w_up_EFL, w_down_ELF, recompute)


def rows_products(tile: Tile, a_RP: Tensor, counts_E: Tensor, b_EPQ: Tensor) -> Tensor:
    """Each row times its expert's matrix, in fp32: [R, Q]. Rows after the last expert's are not
    written. a is contiguous, one stride of b's matrices is 1; both have one dtype."""
    out_RQ = a_RP.new_empty(len(a_RP), b_EPQ.shape[2], dtype=torch.float32)
    with torch.cuda.device_of(a_RP):
        _product(tile, a_RP, tile_table(counts_E, len(a_RP), tile.m), b_EPQ, out_RQ)
    return out_RQ


def outer_products(tile: Tile, a_RF: Tensor, b_RL: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's sum over its rows of the outer products, in fp32: [E, F, L]. Expert e's rows
    end before ends_E[e] (int32)."""
    out_EFL = a_RF.new_empty(ends_E.numel(), a_RF.shape[1], b_RL.shape[1], dtype=torch.float32)
    token_R = torch.arange(len(a_RF), dtype=torch.int32, device=a_RF.device)
    with torch.cuda.device_of(a_RF):
        _wgrad(tile, a_RF, b_RL, token_R, ends_E, out_EFL)
    return out_EFL


def supports(dtype: torch.dtype, n_experts: int, k: int = 1, *widths: int) -> bool:
    """Whether the kernels take tokens of this dtype, so many experts, so many choices per token,
    and matrices of these widths (F and L, or none)."""
    return dtype in _DTYPES and k <= MAX_CHOICES and not _problem(n_experts, prod(widths))


def self_check(device_type: str) -> float:
    """Largest deviation of experts, with each plan of tiles, and router from the reference,
    relative to its largest value, of outputs and gradients.

    Raises RuntimeError on a GPU that the kernels are not made for.
    """
    if device_type == "cuda" and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        raise RuntimeError("needs compute capability 9.0 (Hopper) or newer")
    x_TD = torch.linspace(-1, 1, 40 * 48, device=device_type).sin().view(40, 48)
    weight_ED = torch.linspace(-9, 9, 24 * 48, device=device_type).cos().view(24, 48)
    router = backend.relative_deviation(
        lambda topk, x, w: topk(x, w, w[:, 0].detach(), 4, 2.5, True)[1].sort().values,
        (topk_router, reference.topk_router),
        (x_TD, weight_ED),
    )
    experts = [
        function.self_check(partial(_moe, plan), reference.moe_mlp, device_type)
        for plan in {*expert_kernel.PLANS.values()}
    ]
    return max(router, *experts)


def _moe(
    plan: Plan, x_TL: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EFL: Tensor, down_ELF: Tensor
) -> Tensor:
    slots = sort_slots(ids_TK, up_EFL.shape[0])
    return _Experts.apply(x_TL, weights_TK, slots, slots.counts_E, up_EFL, down_ELF, plan, True)


def _problem(n_experts: int, elements: int) -> str:
    """What the kernels do not take: expected ..., got ...; empty if nothing."""
    if not 0 < elements < _MAX_MATRIX:
        return f"expected 1 to 2**31 - 1 elements per expert, got {elements}"
    if not 0 < n_experts <= MAX_EXPERTS:
        return f"expected 1 to {MAX_EXPERTS} experts, got {n_experts}"
    return ""


def _check(x: dict[str, Tensor], slots: dict[str, Tensor], **others: Tensor) -> None:
    """Raise ValueError for what the kernels do not take, from shapes, dtypes and devices alone. The
    first of ``slots`` has an element per slot."""
    (x_TL,), (slot_name, slot_TK) = x.values(), next(iter(slots.items()))
    tensors = {**slots, **others}
    expect_device(x_TL, **tensors)
    for name, t in {**x, **tensors}.items():
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")
    for name, t in {**x, **others}.items():
        if t.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected one of {_DTYPES}, got {t.dtype}")
    if slot_TK.numel() > MAX_ROWS:
        raise ValueError(
            f"{slot_name}: expected at most {MAX_ROWS} elements, got {slot_TK.numel()}"
        )
    n_experts, inner, width = others["w_up_EFL"].shape
    problem = _problem(n_experts, inner * width)
    if problem:
        raise ValueError(f"w_up_EFL: {problem} (path triton of op moe)")


def _rows(weights: Tensor, slots: Slots | None, counts_E: Tensor, rows_per_tile: int) -> _Rows:
    n_rows = weights.numel()
    if slots is None:
        token_R = torch.arange(n_rows, dtype=torch.int32, device=weights.device)
        weight_R = weights
    else:
        token_R = slots.order_R.int().div_(weights.shape[1], rounding_mode="floor")
        weight_R = weights.view(-1).index_select(0, slots.order_R)
    # Rows that do not exist are not read, whatever the counts.
    end_E = counts_E.cumsum(0).clamp_(0, n_rows).int()
    return _Rows(token_R, weight_R, end_E, *tile_table(counts_E, n_rows, rows_per_tile))


def _launch(kernel: Any, blocks: int, tile: Tile, *arguments: Any) -> None:
    kernel[(blocks,)](*arguments, **tile.options())


def _over_tiles(
    kernel: Any, rows: _Rows | Tiles, tile: Tile, columns: int, *arguments: Any
) -> None:
    blocks = rows.expert_M.numel() * triton.cdiv(columns, tile.n)
    _launch(kernel, blocks, tile, *arguments)


def _up(
    tile: Tile, x_TL: Tensor, rows: _Rows, w_EFL: Tensor, h_RF: Tensor | None, act_RF: Tensor | None
) -> None:
    """Write h and act, those that are given."""
    _, inner, width = w_EFL.shape
    arguments = (x_TL, rows.token_R, w_EFL.to(x_TL.dtype), rows.weight_R, h_RF, act_RF)
    _over_tiles(expert_kernel.up_kernel, rows, tile, inner, *arguments, *rows.tiles, width, inner)


def _product(
    tile: Tile, a_RD: Tensor, rows: _Rows | Tiles, b_EDO: Tensor, out_RO: Tensor | None = None
) -> Tensor:
    """Each row times its expert's matrix."""
    b_EDO = b_EDO.to(a_RD.dtype)
    _, depth, columns = b_EDO.shape
    if out_RO is None:
        out_RO = a_RD.new_empty(a_RD.shape[0], columns)
    tiles = (rows.expert_M, rows.first_M, rows.end_M)
    arguments = (a_RD, b_EDO, out_RO, *tiles, depth, columns, *b_EDO.stride()[1:])
    _over_tiles(expert_kernel.rows_kernel, rows, tile, columns, *arguments)
    return out_RO


def _down_dgrad(
    tile: Tile, dy_TL: Tensor, h_RF: Tensor, rows: _Rows, w_ELF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h and of the routing weights, and act."""
    _, width, inner = w_ELF.shape
    dh_RF, act_RF = torch.empty_like(h_RF), torch.empty_like(h_RF)
    parts_RN = rows.weight_R.new_empty(
        h_RF.shape[0], triton.cdiv(inner, tile.n), dtype=torch.float32
    )
    operands = (dy_TL, rows.token_R, w_ELF.to(dy_TL.dtype), rows.weight_R, h_RF)
    results = (dh_RF, act_RF, parts_RN)
    kernel = expert_kernel.down_dgrad_kernel
    _over_tiles(kernel, rows, tile, inner, *operands, *results, *rows.tiles, width, inner)
    return dh_RF, act_RF, parts_RN.sum(1)


def _wgrad(
    tile: Tile, row_RF: Tensor, gathered_TL: Tensor, token_R: Tensor, end_E: Tensor, out_EFL: Tensor
) -> None:
    """Write each expert's sum over its rows of the outer products."""
    n_experts, inner, width = out_EFL.shape
    blocks = n_experts * triton.cdiv(inner, tile.m) * triton.cdiv(width, tile.n)
    operands = (row_RF, gathered_TL, token_R, end_E, out_EFL)
    strides = out_EFL.stride()[1:]
    _launch(expert_kernel.wgrad_kernel, blocks, tile, *operands, inner, width, *strides)


def _combine(y_RL: Tensor, inverse_R: Tensor, k: int) -> Tensor:
    """Sum of each token's k rows, in fp32 and in their order."""
    width, columns = y_RL.shape[1], expert_kernel.COMBINED
    out_TL = y_RL.new_empty(y_RL.shape[0] // k, width)
    blocks = out_TL.shape[0] * triton.cdiv(width, columns)
    if blocks:
        expert_kernel.combine_kernel[(blocks,)](
            y_RL, inverse_R, out_TL, width, k, columns, num_warps=4, num_stages=3
        )
    return out_TL
