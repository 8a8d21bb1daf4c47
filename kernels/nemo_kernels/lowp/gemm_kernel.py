"""Products of NVFP4 operands by Blackwell's block-scaled matrix instruction, in Triton.

Codes and whole atoms of scales (:mod:`.layout`) are loaded through tensor descriptors, which give
zeros for what does not exist; scales reach tensor memory in the order in which they are stored.
Sums are fp32. The tensor scales are multiplied one after the other, as their product could
underflow, and the result is rounded once, at the store.

Shapes: M rows of a and N of b, K summed; E experts; P rows of all experts' segments, one after the
other, each a multiple of 128 rows; A and C atoms of scales along rows and K.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nemo_kernels.launch import Tile, launch
from nemo_kernels.lowp.layout import ATOM_BYTES, ATOM_K, ATOM_ROWS, SEGMENT_ALIGNMENT, Packed
from nemo_kernels.lowp.operand import expect_ends

_E2M1 = tl.constexpr("e2m1")  # a string will not do in the interpreter of Triton 3.6


def gemm(a: Packed, b: Packed, dtype: torch.dtype) -> Tensor:
    """a b^T [M, N] for a [M, K] and b [N, K], whose tensor scales are scalars."""
    return _rows(a, b, None, dtype)


def grouped_rows(a: Packed, b: Packed, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, N]: row p of expert e times b[e]^T, for a [P, K] and b [E, N, K].

    Args:
        a, b: their tensor scales are [E]; those of a belong to the segments.
        ends_E: int32; expert e's rows end before ends_E[e], a multiple of 128. Rows of the result
            after the last end are zeros (NaN if the last expert's tensor scale is).

    Raises:
        ValueError: (seen on CPU tensors and in debug mode) ends are others; also below.
    """
    expect_ends(ends_E, a.shape[0], SEGMENT_ALIGNMENT)
    return _rows(a, b, ends_E, dtype)


def grouped_wgrad(a: Packed, b: Packed, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, M, N]: a b^T over each expert's part of P, for a [M, P] and b [N, P]; 0 if empty.

    Args:
        a, b: their tensor scales are [E], those of the segments.
        ends_E: int32; expert e's part of P ends before ends_E[e], a multiple of 128.
    """
    expect_ends(ends_E, a.shape[-1], SEGMENT_ALIGNMENT)
    M, N, E = a.shape[0], b.shape[0], len(ends_E)
    out = torch.empty(E, M, N, dtype=dtype, device=a.data.device)
    if not a.data.numel() or not b.data.numel() or not E:
        return out.zero_()
    tile = _WGRAD[N % 256 == 0]
    grid = (E * triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    operands = (*_arguments(a, tile.m, tile.k), *_arguments(b, tile.n, tile.k))
    flop = 2 * M * N * a.shape[-1]
    launch(_wgrad_kernel, grid, *operands, ends_E, out, M, N, flop=flop, **tile.options())
    return out


def _rows(a: Packed, b: Packed, ends_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    (M, K), N = a.shape, b.shape[-2]
    out = torch.empty(M, N, dtype=dtype, device=a.data.device)
    if not a.data.numel() or not b.data.numel():
        return out.zero_()
    tile = _ROWS[N % 256 == 0]
    grid = (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)
    operands = (*_arguments(a, tile.m, tile.k), *_arguments(b, tile.n, tile.k))
    sizes = (M, N, K, 0 if ends_E is None else len(ends_E))
    flop = 2 * M * N * K
    launch(_rows_kernel, grid, *operands, ends_E, out, *sizes, flop=flop, **tile.options())
    return out


def _arguments(x: Packed, rows: int, depth: int) -> tuple[Any, ...]:
    """An operand for a kernel that takes blocks of so many rows and elements of K. Experts follow
    each other along the rows."""
    half, columns = x.data.shape[-1], x.scale.shape[-2]
    # A descriptor's rows start at multiples of 16 bytes.
    data = F.pad(x.data, (0, 8)) if half % 16 else x.data
    codes = [data.shape[:-1].numel(), half], [data.shape[-1], 1]
    scales = (
        [x.scale.shape[:-2].numel(), columns, 2, ATOM_BYTES // 2],
        [columns * ATOM_BYTES, ATOM_BYTES, ATOM_BYTES // 2, 1],
    )
    return (
        TensorDescriptor(data, *codes, [rows, depth // 2]),
        # A dimension of a block may have at most 256 elements: an atom has two.
        TensorDescriptor(
            x.scale, *scales, [rows // ATOM_ROWS, depth // ATOM_K, 2, ATOM_BYTES // 2]
        ),
        x.tensor_scale,
    )


@triton.jit
def _product(
    a, a_scale, b, b_scale, row_a, row_b, atom_a, atom_b, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The fp32 sums of a b^T from ``begin`` to ``end`` along K, for blocks whose first row, and row
    of atoms, are given."""
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        a_MK = a.load([row_a, k // 2])
        b_NK = b.load([row_b, k // 2])
        # From [A, C, r mod 32, r div 32, block] to the order of rows and blocks.
        a_scale_AC = tl.reshape(
            a_scale.load([atom_a, k // 64, 0, 0]), (BLOCK_M // 128, BLOCK_K // 64, 32, 4, 4)
        )
        b_scale_AC = tl.reshape(
            b_scale.load([atom_b, k // 64, 0, 0]), (BLOCK_N // 128, BLOCK_K // 64, 32, 4, 4)
        )
        a_scale_MK = tl.reshape(tl.trans(a_scale_AC, 0, 3, 2, 1, 4), (BLOCK_M, BLOCK_K // 16))
        b_scale_NK = tl.reshape(tl.trans(b_scale_AC, 0, 3, 2, 1, 4), (BLOCK_N, BLOCK_K // 16))
        acc_MN = tl.dot_scaled(a_MK, a_scale_MK, _E2M1, b_NK.T, b_scale_NK, _E2M1, acc_MN)
    return acc_MN


@triton.jit
def _store(
    acc_MN, a_tensor_scale, b_tensor_scale, out, expert, row_block, column_block, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    acc_MN *= tl.load(a_tensor_scale + expert).to(tl.float32)
    acc_MN *= tl.load(b_tensor_scale + expert).to(tl.float32)
    m_M = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    out_MN = out + m_M.to(tl.int64)[:, None] * N + n_N[None, :]
    ok_MN = (m_M < M)[:, None] & (n_N < N)[None, :]
    tl.store(out_MN, acc_MN.to(out.dtype.element_ty), mask=ok_MN)


@triton.jit
def _rows_kernel(
    a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, ends_E, out, M, N, K, n_experts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = a b[e]^T, e the expert in whose segment a row is; ends_E None: there are none."""
    n_columns = tl.cdiv(N, BLOCK_N)
    tile, column_block = tl.program_id(0) // n_columns, tl.program_id(0) % n_columns
    # Segments consist of whole tiles, so that a tile belongs to the first expert that ends after
    # its first row.
    expert = 0
    if ends_E is not None:
        for start in range(0, n_experts, 128):
            e = start + tl.arange(0, 128)
            end = tl.load(ends_E + e, mask=e < n_experts, other=2**31 - 1)
            expert += tl.sum((end <= tile * BLOCK_M).to(tl.int32), 0)
        if expert >= n_experts:  # no expert's: zeros
            K = 0
            expert = n_experts - 1
    acc_MN = _product(
        a, a_scale, b, b_scale,
        tile * BLOCK_M, expert * N + column_block * BLOCK_N,
        tile * (BLOCK_M // 128), expert * tl.cdiv(N, 128) + column_block * (BLOCK_N // 128),
        0, K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store(
        acc_MN, a_tensor_scale, b_tensor_scale, out, expert, tile, column_block, M, N,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _wgrad_kernel(
    a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, ends_E, out, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = a b^T over expert e's segment, which consists of whole blocks."""
    n_columns = tl.cdiv(N, BLOCK_N)
    n_blocks = tl.cdiv(M, BLOCK_M) * n_columns
    expert, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    row_block, column_block = block // n_columns, block % n_columns
    begin = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    acc_MN = _product(
        a, a_scale, b, b_scale,
        row_block * BLOCK_M, column_block * BLOCK_N,
        row_block * (BLOCK_M // 128), column_block * (BLOCK_N // 128),
        begin, tl.load(ends_E + expert), BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _store(
        acc_MN, a_tensor_scale, b_tensor_scale, out + expert.to(tl.int64) * M * N, expert,
        row_block, column_block, M, N, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# By whether the number of columns is a multiple of 256.
_ROWS = {False: Tile(128, 128, 256, 8, 4), True: Tile(128, 256, 256, 8, 4)}
_WGRAD = {False: Tile(128, 128, 128, 8, 6), True: Tile(128, 256, 128, 8, 6)}
