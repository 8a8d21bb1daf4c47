"""How the Triton quantizers (:mod:`.quantize_kernel`) are launched: in two passes over a tensor.

Shapes: E matrices of M rows and N columns, S tensor scales; T blocks of 16 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nemo_kernels.nvfp4 import rounding
from nemo_kernels.nvfp4.layout import ATOM_BYTES, atoms
from nemo_kernels.nvfp4.operand import Rounding
from nemo_kernels.nvfp4.quantize_kernel import (
    AMAX,
    DECODED,
    TILE,
    amax_kernel,
    dequantize_kernel,
    quantize_kernel,
)
from nemo_kernels.nvfp4.scales import BLOCK


class Result(NamedTuple):
    """Quantized matrices.

    Fields:
        data: uint8 codes [E, R, K/2], K being the dimension along which blocks lie; or bf16 code
            times block scale, in x's layout.
        scale: of codes: float8_e4m3fn [E, R, K/16], or its atoms (:mod:`.layout`); else None.
        tensor_scale: fp32 [S].
    """

    data: Tensor
    scale: Tensor | None
    tensor_scale: Tensor


def quantize(
    x_EMN: Tensor,
    rows: Rounding | None,
    columns: Rounding | None,
    ends_E: Tensor | None = None,
    amax: Tensor | None = None,
    *,
    packed: bool,
    swizzled: bool = False,
) -> tuple[Result | None, Result | None]:
    """x quantized with blocks along rows, along columns, or both, in two passes over it.

    Args:
        x_EMN: contiguous fp32, bf16 or fp16; one tensor scale per matrix. N must be divisible by
            16, and M unless only ``rows`` are wanted, with blocks of 1x16.
        rows, columns: how; tiles are the same; no Hadamard transform of rows.
        ends_E: int32, for one matrix: its rows are segments, each with a tensor scale of its own,
            that end before these multiples of 16. Rows after the last end must be zeros.
        amax: fp32 with one element, to take instead of one matrix's own; not for segments.
        packed: codes; else decoded values.
        swizzled: scales of codes in atoms, padded with zeros; else in plain order.
    """
    with torch.cuda.device_of(x_EMN):
        return _quantize(x_EMN, rows, columns, ends_E, amax, packed, swizzled)


def dequantize(
    data: Tensor, block_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """:func:`.reference.dequantize` of contiguous tensors; one tensor scale."""
    out = torch.empty(*data.shape[:-1], 2 * data.shape[-1], dtype=dtype, device=data.device)
    n = block_scale.numel()
    if n:
        with torch.cuda.device_of(data):
            dequantize_kernel[(triton.cdiv(n, DECODED["BLOCKS"]),)](
                data, block_scale, tensor_scale, out, n, **DECODED
            )
    return out


def _quantize(
    x_EMN: Tensor,
    rows: Rounding | None,
    columns: Rounding | None,
    ends_E: Tensor | None,
    amax: Tensor | None,
    packed: bool,
    swizzled: bool,
) -> tuple[Result | None, Result | None]:
    (n_matrices, m, n), device = x_EMN.shape, x_EMN.device
    n_scales = n_matrices if ends_E is None else ends_E.numel()
    segment_T = None
    if ends_E is not None:
        first_T = torch.arange(0, m, BLOCK, dtype=torch.int32, device=device)
        segment_T = torch.searchsorted(ends_E, first_T, right=True, out_int32=True)
    rht = columns is not None and columns.rht
    n_row_tiles = triton.cdiv(m, BLOCK * TILE["B"])
    if amax is None:
        bits_2S = torch.zeros(2, n_scales, dtype=torch.int32, device=device)
        if x_EMN.numel():
            grid = (n_row_tiles * triton.cdiv(n, BLOCK * AMAX["C"] * AMAX["STEPS"]), n_matrices)
            plain = bits_2S[0] if rows is not None or not rht else None
            transformed = bits_2S[1] if rht else None
            amax_kernel[grid](x_EMN, plain, transformed, segment_T, m, n, n_scales, **AMAX)
        row_amax, column_amax = bits_2S[0], bits_2S[int(rht)]
    else:
        row_amax = column_amax = amax.reshape(1).view(torch.int32)
    made = [
        None if how is None else _empty(x_EMN, shape, n_scales, packed, swizzled)
        for how, shape in ((rows, (m, n)), (columns, (n, m)))
    ]
    if x_EMN.numel():
        grid = (n_row_tiles * triton.cdiv(n, BLOCK * TILE["C"]), n_matrices)
        quantize_kernel[grid](
            x_EMN,
            segment_T,
            *_side(rows, made[0], row_amax),
            *_side(columns, made[1], column_amax),
            m,
            n,
            n_scales,
            SQUARE=any(how is not None and how.tile[0] > 1 for how in (rows, columns)),
            RHT=rht,
            ROW_RANDOM=rows is not None and rows.seed is not None,
            COLUMN_RANDOM=columns is not None and columns.seed is not None,
            SWIZZLED=swizzled,
            **TILE,
        )
    return made[0], made[1]


def _empty(
    x_EMN: Tensor, shape: tuple[int, int], n_scales: int, packed: bool, swizzled: bool
) -> Result:
    n_matrices, device = x_EMN.shape[0], x_EMN.device
    # Where there is nothing to quantize, no program writes them.
    make = torch.empty if x_EMN.numel() else torch.zeros
    tensor_scale = make(n_scales, dtype=torch.float32, device=device)
    if not packed:
        return Result(torch.empty_like(x_EMN, dtype=torch.bfloat16), None, tensor_scale)
    r, k = shape
    data = torch.empty(n_matrices, r, k // 2, dtype=torch.uint8, device=device)
    if swizzled:
        size = (n_matrices, *atoms(r, k), ATOM_BYTES)
        scale = torch.zeros(size, dtype=torch.uint8, device=device)
    else:
        scale = torch.empty(n_matrices, r, k // BLOCK, dtype=torch.uint8, device=device)
    return Result(data, scale.view(torch.float8_e4m3fn), tensor_scale)


def _side(how: Rounding | None, made: Result | None, amax: Tensor) -> tuple[Any, ...]:
    """Arguments of ``quantize_kernel``. Codes are written by eights."""
    if how is None or made is None:
        return None, None, None, None, 0
    seed = rounding._signed(how.seed or 0)
    if made.scale is None:
        return amax, made.data, None, made.tensor_scale, seed
    codes, scale = made.data.view(torch.int32), made.scale.view(torch.uint8)
    return amax, codes, scale, made.tensor_scale, seed
