"""Triton kernels of the expert MLP: grouped matrix products, and the sum over a token's experts.

Each works on rows sorted by expert. A tile table says which rows of which expert a program takes
(``sort_kernel.tile_table``), so that no size of a group is needed on the host. All accumulate in
fp32, round where they store and write every element of their outputs.

Shapes: T tokens, E experts, K experts per token, R routed slots (T*K), L width in which experts
work, F expert inner width, M tiles, N column blocks; P and Q are L and F, or F and L. Inside
kernels M, N and K are rows, columns and depth of one program's product. ``token_R`` is the row of x
or dy that belongs to a sorted slot: such rows are gathered as they are loaded, never copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nemo_kernels.launch import Tile


@triton.jit
def _product(
    a_MK, b_KN, ok_M, ok_N, depth, a_step, b_step,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """a @ b in fp32 from pointers to their first blocks, which advance by the steps. ``EVEN_K``:
    all blocks are whole."""
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    offset_K = tl.arange(0, BLOCK_K)
    for done in range(0, depth, BLOCK_K):
        ok_MK, ok_KN = ok_M[:, None], ok_N[None, :]
        if not EVEN_K:
            ok_K = offset_K < depth - done
            ok_MK, ok_KN = ok_MK & ok_K[None, :], ok_KN & ok_K[:, None]
        a = tl.load(a_MK, mask=ok_MK, other=0.0)
        b = tl.load(b_KN, mask=ok_KN, other=0.0)
        acc_MN = tl.dot(a, b, acc_MN, input_precision="ieee")
        a_MK += a_step
        b_KN += b_step
    return acc_MN


@triton.jit
def _block(
    expert_M, first_M, end_M, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The expert of a program (negative: none), its rows and columns, and which of them exist."""
    # Column blocks of a tile, and the tiles of an expert, run next to each other: they share
    # operands in the second-level cache.
    n_columns = tl.cdiv(width, BLOCK_N)
    tile, column_block = tl.program_id(0) // n_columns, tl.program_id(0) % n_columns
    row_M = tl.load(first_M + tile) + tl.arange(0, BLOCK_M)
    column_N = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(expert_M + tile).to(tl.int64)
    return expert, row_M, row_M < tl.load(end_M + tile), column_N, column_N < width


@triton.jit
def _relu(x):
    """NaN stays NaN, as in PyTorch: a fault must not look healthy."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def up_kernel(
    x_TL, token_R, w_EFL, weight_R, h_RF, act_RF, expert_M, first_M, end_M, L, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """h = x @ w^T, and act = weight * relu(h)^2 of h as it is stored. An output may be None."""
    expert, row_M, ok_M, f_N, ok_N = _block(expert_M, first_M, end_M, F, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    token_M = tl.load(token_R + row_M, mask=ok_M, other=0).to(tl.int64)
    l_K = tl.arange(0, BLOCK_K)
    x_MK = x_TL + token_M[:, None] * L + l_K[None, :]
    w_KN = w_EFL + expert * F * L + (l_K[:, None] + f_N[None, :] * L)
    acc_MN = _product(
        x_MK, w_KN, ok_M, ok_N, L, BLOCK_K, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
    )
    h_MN = acc_MN.to(x_TL.dtype.element_ty)
    place_MN = row_M.to(tl.int64)[:, None] * F + f_N[None, :]
    ok_MN = ok_M[:, None] & ok_N[None, :]
    if h_RF is not None:
        tl.store(h_RF + place_MN, h_MN, mask=ok_MN)
    if act_RF is not None:
        weight_M = tl.load(weight_R + row_M, mask=ok_M, other=0.0).to(tl.float32)
        relu_MN = _relu(h_MN.to(tl.float32))
        act_MN = relu_MN * relu_MN * weight_M[:, None]
        tl.store(act_RF + place_MN, act_MN.to(act_RF.dtype.element_ty), mask=ok_MN)


@triton.jit
def rows_kernel(
    a_RP, b_EPQ, out_RQ, expert_M, first_M, end_M, P, Q, stride_P, stride_Q,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out = a @ b, b of the row's expert. One stride of b is 1."""
    expert, row_M, ok_M, q_N, ok_N = _block(expert_M, first_M, end_M, Q, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    row_M = row_M.to(tl.int64)
    p_K = tl.arange(0, BLOCK_K)
    a_MK = a_RP + row_M[:, None] * P + p_K[None, :]
    b_KN = b_EPQ + expert * P * Q + (p_K[:, None] * stride_P + q_N[None, :] * stride_Q)
    b_step = BLOCK_K * stride_P
    acc_MN = _product(a_MK, b_KN, ok_M, ok_N, P, BLOCK_K, b_step, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    out_MN = out_RQ + row_M[:, None] * Q + q_N[None, :]
    tl.store(out_MN, acc_MN.to(out_RQ.dtype.element_ty), mask=ok_M[:, None] & ok_N[None, :])


@triton.jit
def _relu2_dgrad(dact_MN, h_RF, dh_RF, act_RF, weight_M, row_M, ok_M, f_N, F):
    place_MN = row_M[:, None] * F + f_N[None, :]
    ok_MN = ok_M[:, None] & (f_N < F)[None, :]
    relu_MN = _relu(tl.load(h_RF + place_MN, mask=ok_MN, other=0.0).to(tl.float32))
    dact_MN *= relu_MN
    dweight_M = tl.sum(relu_MN * dact_MN, axis=1)
    dh_MN = dact_MN * (2.0 * weight_M[:, None])
    tl.store(dh_RF + place_MN, dh_MN.to(dh_RF.dtype.element_ty), mask=ok_MN)
    act_MN = relu_MN * relu_MN * weight_M[:, None]
    tl.store(act_RF + place_MN, act_MN.to(act_RF.dtype.element_ty), mask=ok_MN)
    return dweight_M


@triton.jit
def down_dgrad_kernel(
    dy_TL, token_R, w_ELF, weight_R, h_RF, dh_RF, act_RF, dweight_RN,
    expert_M, first_M, end_M, L, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """From dact = dy @ w: dh = 2 * weight * relu(h) * dact, act once more for the gradient of w,
    and the sums of relu(h)^2 * dact over each column block, parts of the routing weight's."""
    expert, row_M, ok_M, f_N, ok_N = _block(expert_M, first_M, end_M, F, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    n_columns = tl.cdiv(F, BLOCK_N)
    column_block = tl.program_id(0) % n_columns
    token_M = tl.load(token_R + row_M, mask=ok_M, other=0).to(tl.int64)
    l_K = tl.arange(0, BLOCK_K)
    dy_MK = dy_TL + token_M[:, None] * L + l_K[None, :]
    w_KN = w_ELF + expert * L * F + (l_K[:, None] * F + f_N[None, :])
    dact_MN = _product(
        dy_MK, w_KN, ok_M, ok_N, L, BLOCK_K, BLOCK_K * F, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K
    )
    row_M = row_M.to(tl.int64)
    weight_M = tl.load(weight_R + row_M, mask=ok_M, other=0.0).to(tl.float32)
    # In halves, for which registers suffice.
    HALF: tl.constexpr = BLOCK_N // 2
    left_MN, right_MN = tl.split(tl.permute(tl.reshape(dact_MN, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    f_N = column_block * BLOCK_N + tl.arange(0, HALF)
    dweight_M = _relu2_dgrad(left_MN, h_RF, dh_RF, act_RF, weight_M, row_M, ok_M, f_N, F)
    dweight_M += _relu2_dgrad(right_MN, h_RF, dh_RF, act_RF, weight_M, row_M, ok_M, f_N + HALF, F)
    tl.store(dweight_RN + row_M * n_columns + column_block, dweight_M, mask=ok_M)


@triton.jit
def wgrad_kernel(
    row_RF, gathered_TL, token_R, end_E, out_EFL, F, L, stride_F, stride_L,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e, f, l] = sum of row[r, f] * gathered[token of r, l] over the rows r of expert e, which
    end at ``end_E``; 0 for experts without rows. One stride of out is 1."""
    n_l = tl.cdiv(L, BLOCK_N)
    n_blocks = tl.cdiv(F, BLOCK_M) * n_l
    expert, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    f_M = (block // n_l) * BLOCK_M + tl.arange(0, BLOCK_M)
    l_N = (block % n_l) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_M, ok_N = f_M < F, l_N < L
    first = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_E + expert)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(first, end, BLOCK_K):
        r_K = done + tl.arange(0, BLOCK_K)
        ok_K = r_K < end
        token_K = tl.load(token_R + r_K, mask=ok_K, other=0).to(tl.int64)
        row_KM = tl.load(
            row_RF + r_K.to(tl.int64)[:, None] * F + f_M[None, :],
            mask=ok_K[:, None] & ok_M[None, :], other=0.0,
        )  # fmt: skip
        gathered_KN = tl.load(
            gathered_TL + token_K[:, None] * L + l_N[None, :],
            mask=ok_K[:, None] & ok_N[None, :], other=0.0,
        )  # fmt: skip
        acc_MN = tl.dot(tl.trans(row_KM), gathered_KN, acc_MN, input_precision="ieee")
    place_MN = expert.to(tl.int64) * F * L + (f_M[:, None] * stride_F + l_N[None, :] * stride_L)
    ok_MN = ok_M[:, None] & ok_N[None, :]
    tl.store(out_EFL + place_MN, acc_MN.to(out_EFL.dtype.element_ty), mask=ok_MN)


@triton.jit
def combine_kernel(
    y_RL, inverse_R, out_TL, L, n_slots: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out = sum of y over each token's slots, in their order."""
    n_columns = tl.cdiv(L, BLOCK_N)
    token = (tl.program_id(0) // n_columns).to(tl.int64)
    l_N = (tl.program_id(0) % n_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok_N = l_N < L
    acc_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot in tl.static_range(n_slots):
        place = tl.load(inverse_R + token * n_slots + slot)
        acc_N += tl.load(y_RL + place * L + l_N, mask=ok_N, other=0.0).to(tl.float32)
    tl.store(out_TL + token * L + l_N, acc_N.to(out_TL.dtype.element_ty), mask=ok_N)


class Plan(NamedTuple):
    """The tiles of a call. ``up`` (also for its output's gradient, and for products that stay in
    fp32) has F columns, ``down`` has L; both have the same rows. ``wgrad`` has F rows and L
    columns; its depth are slots."""

    up: Tile
    down: Tile
    wgrad: Tile


FEW_ROWS = 512
"""Rows per expert on average below which tiles of 64 rows waste less than those of 128."""
WIDE = 256
"""L in multiples of this has tiles of as many columns."""
# The gathered operand of wgrad needs its index before, for which the pipeline takes two stages.
PLANS = {
    # (few rows, wide)
    (False, False): Plan(
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 5)
    ),
    (False, True): Plan(
        Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 5)
    ),
    (True, False): Plan(Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 5)),
    (True, True): Plan(Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 8, 4), Tile(128, 256, 64, 8, 5)),
}
PLAIN = Plan(*[Tile(64, 64, 32, 4, 3)] * 3)
"""For widths that are no multiples of 16: their rows are not aligned, and registers must suffice
for what else is copied past them."""
FP32 = Plan(*[Tile(32, 64, 32, 4, 3)] * 3)
"""For fp32, which matrix instructions would round."""
COMBINED = 1024
"""Columns that a program of ``combine_kernel`` sums."""


def plan(dtype: torch.dtype, rows: int, experts: int, *widths: int) -> Plan:
    """Tiles for ``rows`` over ``experts`` of widths L and F; from what the host knows."""
    if dtype == torch.float32:
        return FP32
    if any(width % 16 for width in widths):
        return PLAIN
    return PLANS[rows < FEW_ROWS * experts, widths[0] % WIDE == 0]
