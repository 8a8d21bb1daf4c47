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

from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.launch import Tile, launch
from nemo_kernels.moe import expert_kernel, function, reference
from nemo_kernels.moe.expert_kernel import Plan
from nemo_kernels.moe.function import Experts, Gradients, Routed, Wanted
from nemo_kernels.moe.router_kernel import MAX_CHOICES, topk_router
from nemo_kernels.moe.sort_kernel import MAX_EXPERTS, Tiles, sort_slots, tile_table

__all__ = [
    "DEVICE_TYPES", "combine_slots", "experts_for", "refusal", "self_check", "sort_slots",
    "topk_router",
]  # fmt: skip

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
MIN_CAPABILITY = (9, 0)
"""Compute capability for whose instructions and shared memory the tiles are made."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_MATRIX = 2**31
"""Elements of one expert's matrix: offsets within it are int32."""


class Groups(NamedTuple):
    """Rows sorted by expert, as the kernels need to know them; all int32."""

    end_E: Tensor
    """The row after the last one of each expert."""
    tiles: Tiles


class TritonExperts(Experts):
    """The expert MLP by kernels with the tiles of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def groups(self, counts_E: Tensor, n_rows: int) -> Groups:
        # Rows that do not exist are not read, whatever the counts.
        end_E = counts_E.cumsum(0).clamp_(0, n_rows).int()
        return Groups(end_E, tile_table(counts_E, n_rows, self.plan.up.m))

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor | None]:
        act_RF = _empty_inner(routed)
        h_RF = torch.empty_like(act_RF) if keep else None
        up(self.plan.up, routed, h_RF, act_RF)
        return product(self.plan.down, act_RF, routed.groups.tiles, routed.down_ELF.mT), h_RF

    def pre_activation(self, routed: Routed) -> Tensor:
        h_RF = _empty_inner(routed)
        up(self.plan.up, routed, h_RF, None)
        return h_RF

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        plan, token_R, (end_E, tiles) = self.plan, _tokens(routed), routed.groups
        dh_RF, act_RF, dweight_R = down_dgrad(plan.up, routed, h_RF, dy_TL)
        dup_EFL = ddown_ELF = None
        if wanted[1]:
            ddown_ELF = torch.empty_like(routed.w_down_ELF)
            wgrad(plan.wgrad, act_RF, dy_TL, token_R, end_E, ddown_ELF.mT)
        del act_RF
        if wanted[0]:
            dup_EFL = torch.empty_like(routed.w_up_EFL)
            wgrad(plan.wgrad, dh_RF, routed.x_TL, token_R, end_E, dup_EFL)
        return product(plan.down, dh_RF, tiles, routed.up_EFL), dweight_R, dup_EFL, ddown_ELF

    def rows(self, a_RM: Tensor, b_EMN: Tensor, groups: Groups) -> Tensor:
        # Tiles of as many rows; of few columns where there are few.
        tile = self.plan.down if b_EMN.shape[2] > self.plan.up.n else self.plan.up
        return product(tile, a_RM, groups.tiles, b_EMN)

    def sums(self, a_RM: Tensor, b_RN: Tensor, groups: Groups, dtype: torch.dtype) -> Tensor:
        shape = (len(groups.end_E), a_RM.shape[1], b_RN.shape[1])
        y_EMN = torch.empty(shape, dtype=dtype, device=a_RM.device)
        row_R = torch.arange(len(a_RM), dtype=torch.int32, device=a_RM.device)
        wgrad(self.plan.wgrad, a_RM, b_RN, row_R, groups.end_E, y_EMN)
        return y_EMN

    def combine(self, y_RL: Tensor, inverse_TK: Tensor) -> Tensor:
        return combine_slots(y_RL, inverse_TK)


def combine_slots(y_RL: Tensor, inverse_TK: Tensor) -> Tensor:
    """``nemo_kernels.moe.combine_slots``; no gradients. y is contiguous."""
    (n_tokens, k), width, columns = inverse_TK.shape, y_RL.shape[1], expert_kernel.COMBINED
    out_TL = y_RL.new_empty(n_tokens, width)
    grid = (n_tokens * triton.cdiv(width, columns),)
    arguments = (y_RL, inverse_TK, out_TL, width, k, columns)
    launch(expert_kernel.combine_kernel, grid, *arguments, num_warps=4, num_stages=3)
    return out_TL


def experts_for(x: Tensor, n_rows: int, n_experts: int, *widths: int) -> TritonExperts:
    """``widths``: L, F, and others that products have."""
    return TritonExperts(expert_kernel.plan(x.dtype, n_rows, n_experts, *widths))


def refusal(dtype: torch.dtype, n_experts: int, k: int = 1, *widths: int) -> str:
    """Of tokens of this dtype, so many experts, so many choices per token, and matrices of these
    widths (L, F and those of low-rank parts, or none)."""
    if dtype not in _DTYPES:
        return f"expected one of {_DTYPES}, got {dtype}"
    if n_experts > MAX_EXPERTS:
        return f"expected at most {MAX_EXPERTS} experts, got {n_experts}"
    if k > MAX_CHOICES:
        return f"expected at most {MAX_CHOICES} choices of a token, got {k}"
    elements = prod(widths[:2])
    if not 0 < elements < _MAX_MATRIX:
        return f"expected 1 to 2**31 - 1 elements per expert, got {elements}"
    return ""


def self_check(device_type: str, sizes: backend.Sizes) -> float:
    """Largest deviation of experts, with each plan for these widths, and router from the reference,
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
    widths = sizes.expert_width, sizes.expert_inner
    plans = {expert_kernel.plan(torch.bfloat16, rows, 1, *widths) for rows in (1, 2**20)}
    plain = reference.LoopExperts(), reference.sort_slots
    experts = [
        function.self_check((TritonExperts(plan), sort_slots), plain, device_type, sizes)
        for plan in plans
    ]
    return max(router, *experts)


def _tokens(routed: Routed) -> Tensor:
    """int32: the row of x that belongs to each slot."""
    if routed.token_R is not None:
        return routed.token_R
    return torch.arange(len(routed.x_TL), dtype=torch.int32, device=routed.x_TL.device)


def _empty_inner(routed: Routed) -> Tensor:
    """[R, F] in x's dtype."""
    return routed.x_TL.new_empty(len(routed.weight_R), routed.w_up_EFL.shape[1])


def _over_tiles(
    kernel: Any, tiles: Tiles, tile: Tile, size: tuple[int, int, int], *arguments: Any
) -> None:
    """``size``: rows, columns and depth of the product."""
    blocks = tiles.expert_M.numel() * triton.cdiv(size[1], tile.n)
    options = {"EVEN_K": size[2] % tile.k == 0, **tile.options()}
    launch(kernel, (blocks,), *arguments, flop=2 * prod(size), **options)


def up(tile: Tile, routed: Routed, h_RF: Tensor | None, act_RF: Tensor | None) -> None:
    """Write h and act, those that are given."""
    _, inner, width = routed.w_up_EFL.shape
    tiles, operands = routed.groups.tiles, (routed.x_TL, _tokens(routed), routed.up_EFL)
    weight_R = None if act_RF is None else routed.weight_R
    arguments = (*operands, weight_R, h_RF, act_RF, *tiles, width, inner)
    size = (len(routed.weight_R), inner, width)
    _over_tiles(expert_kernel.up_kernel, tiles, tile, size, *arguments)


def product(
    tile: Tile, a_RD: Tensor, tiles: Tiles, b_EDO: Tensor, out_RO: Tensor | None = None
) -> Tensor:
    """Each row times its expert's matrix."""
    _, depth, columns = b_EDO.shape
    if out_RO is None:
        out_RO = a_RD.new_empty(a_RD.shape[0], columns)
    arguments = (a_RD, b_EDO, out_RO, *tiles, depth, columns, *b_EDO.stride()[1:])
    size = (len(a_RD), columns, depth)
    _over_tiles(expert_kernel.rows_kernel, tiles, tile, size, *arguments)
    return out_RO


def down_dgrad(
    tile: Tile, routed: Routed, h_RF: Tensor, dy_TL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h and of the routing weights, and act."""
    _, width, inner = routed.w_down_ELF.shape
    tiles, weight_R = routed.groups.tiles, routed.weight_R
    dh_RF, act_RF = torch.empty_like(h_RF), torch.empty_like(h_RF)
    parts_RN = h_RF.new_empty(len(h_RF), triton.cdiv(inner, tile.n), dtype=torch.float32)
    operands = (dy_TL, _tokens(routed), routed.down_ELF, weight_R, h_RF)
    arguments = (*operands, dh_RF, act_RF, parts_RN, *tiles, width, inner)
    size = (len(h_RF), inner, width)
    _over_tiles(expert_kernel.down_dgrad_kernel, tiles, tile, size, *arguments)
    return dh_RF, act_RF, parts_RN.sum(1)


def wgrad(
    tile: Tile, row_RF: Tensor, gathered_TL: Tensor, token_R: Tensor, end_E: Tensor, out_EFL: Tensor
) -> None:
    """Write each expert's sum over its rows of the outer products."""
    n_experts, inner, width = out_EFL.shape
    blocks = n_experts * triton.cdiv(inner, tile.m) * triton.cdiv(width, tile.n)
    operands = (row_RF, gathered_TL, token_R, end_E, out_EFL)
    sizes = (inner, width, *out_EFL.stride()[1:])
    flop = 2 * len(token_R) * inner * width
    launch(expert_kernel.wgrad_kernel, (blocks,), *operands, *sizes, flop=flop, **tile.options())
