"""Triton kernels that quantize to NVFP4, bit for bit as :mod:`.reference` does.

Two passes: ``amax_kernel`` finds the largest values of tensors or experts' segments, before and
after the Hadamard transform; ``quantize_kernel`` then reads a tile once and writes it row-wise,
column-wise or both. A tile is [16, B, C, 16]: B blocks of 16 rows and C blocks of 16 columns.
Threads lie along columns, so all 16 rows of a block are in one thread's registers: the transform
and the largest values along rows need no exchange. Maxima are taken of the bits of |x|, where
infinity and NaN come after all numbers.

Shapes: E experts, M rows, N columns, S tensor scales; T blocks of 16 rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_kernels.launch import launch
from nemo_kernels.lowp import hadamard, rounding
from nemo_kernels.lowp.layout import ATOM_BYTES, atoms
from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.lowp.scales import BLOCK

TILE = {"B": 4, "C": 16, "num_warps": 4}
"""Column-wise, 32 bytes of codes lie together."""
AMAX = {"B": 4, "C": 8, "STEPS": 8, "num_warps": 4}
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_MINUS = tl.constexpr(sum(1 << i for i, sign in enumerate(hadamard.SIGNS) if sign < 0))
_GAMMA = tl.constexpr(rounding._signed(rounding._GAMMA))
_MIX_1 = tl.constexpr(rounding._signed(rounding._MIX[0][1]))
_MIX_2 = tl.constexpr(rounding._signed(rounding._MIX[1][1]))


class Result(NamedTuple):
    """Quantized matrices.

    Fields:
        data: uint8 codes [E, R, K/2], K being the dimension along which blocks lie; or bf16 code
            times block scale, in x's layout.
        scale: of codes: float8_e4m3fn [E, A, C, 512], in atoms (:mod:`.layout`); else None.
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
    *,
    packed: bool,
) -> tuple[Result | None, Result | None]:
    """x quantized with blocks along rows, along columns, or both, in two passes over it.

    Args:
        x_EMN: contiguous fp32, bf16 or fp16; one tensor scale per matrix. N must be divisible by
            16, and M unless only ``rows`` are wanted, with blocks of 1x16.
        rows, columns: how; tiles are the same; no Hadamard transform of rows.
        ends_E: int32, for one matrix: its rows are segments, each with a tensor scale of its own,
            that end before these multiples of 16. Rows after the last end must be zeros.
        packed: codes, with scales in atoms, padded with zeros; else decoded values.
    """
    (n_matrices, m, n), device = x_EMN.shape, x_EMN.device
    n_scales = n_matrices if ends_E is None else ends_E.numel()
    segment_T = None
    if ends_E is not None:
        first_T = torch.arange(0, m, BLOCK, dtype=torch.int32, device=device)
        segment_T = torch.searchsorted(ends_E, first_T, right=True, out_int32=True)
    rht = columns is not None and columns.rht
    made = [
        None if how is None else _empty(x_EMN, shape, n_scales, packed)
        for how, shape in ((rows, (m, n)), (columns, (n, m)))
    ]
    if not x_EMN.numel():
        return made[0], made[1]
    bits_2S = torch.zeros(2, n_scales, dtype=torch.int32, device=device)
    plain = bits_2S[0] if rows is not None or not rht else None
    sizes, n_row_tiles = (m, n, n_scales), triton.cdiv(m, BLOCK * TILE["B"])
    grid = (n_row_tiles * triton.cdiv(n, BLOCK * AMAX["C"] * AMAX["STEPS"]), n_matrices)
    transformed = bits_2S[1] if rht else None
    launch(amax_kernel, grid, x_EMN, plain, transformed, segment_T, *sizes, **AMAX)
    grid = (n_row_tiles * triton.cdiv(n, BLOCK * TILE["C"]), n_matrices)
    launch(
        quantize_kernel,
        grid,
        x_EMN,
        segment_T,
        *_side(rows, made[0], bits_2S[0]),
        *_side(columns, made[1], bits_2S[int(rht)]),
        *sizes,
        SQUARE=any(how is not None and how.tile[0] > 1 for how in (rows, columns)),
        RHT=rht,
        ROW_RANDOM=rows is not None and rows.seed is not None,
        COLUMN_RANDOM=columns is not None and columns.seed is not None,
        **TILE,
    )
    return made[0], made[1]


def _empty(x_EMN: Tensor, shape: tuple[int, int], n_scales: int, packed: bool) -> Result:
    n_matrices, device = x_EMN.shape[0], x_EMN.device
    # Where there is nothing to quantize, no program writes it.
    make = torch.empty if x_EMN.numel() else torch.zeros
    tensor_scale = make(n_scales, dtype=torch.float32, device=device)
    if not packed:
        return Result(torch.empty_like(x_EMN, dtype=torch.bfloat16), None, tensor_scale)
    r, k = shape
    data = torch.empty(n_matrices, r, k // 2, dtype=torch.uint8, device=device)
    size = (n_matrices, *atoms(r, k), ATOM_BYTES)
    scale = torch.zeros(size, dtype=torch.uint8, device=device)
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


@triton.jit
def _octave(y, LEAST: tl.constexpr):
    """The power of two below |y|, 2^LEAST at least."""
    bits = y.to(tl.int32, bitcast=True) & _INFINITY
    return tl.maximum(bits, (127 + LEAST) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_nearest(y, LEAST: tl.constexpr, UP: tl.constexpr):
    """To multiples of 2^-UP of y's octave, as in :func:`.rounding.round_to_nearest_`."""
    magic = _octave(y, LEAST) * (1.5 * (1 << (23 - UP)))
    return y + magic - magic


@triton.jit
def _stochastically(y, bits):
    """See :func:`.rounding.round_stochastically_`; without conversions between int and float, which
    are slow."""
    octave = _octave(y, 0)
    inverse_step = ((255 << 23) - octave.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    p = y * inverse_step + 192.0  # its last place is 2^-16
    p += (-0x3DA20000 - 4 * bits).to(tl.float32, bitcast=True)  # -55.5 + bits * 2^-16
    # Around 136.5 + y / step, the last 16 places are the fraction.
    floor = (p.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return (floor * 0.5 - 68.0) * octave


@triton.jit
def _places(N, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """(row [A, W], column [W], place [A, W]) of every UNIT-th element of a tile, counted from its
    first; columns and places in units, N of which make a row. W is B * WIDTH / UNIT: threads lie
    along it, a warp's in one row, and so not along A."""
    w = tl.arange(0, B * WIDTH // UNIT)
    column_W = tl.max_contiguous(w % (WIDTH // UNIT), max(1, WIDTH // UNIT // 32))
    row_AW = (w // (WIDTH // UNIT) * 16)[None, :] + tl.arange(0, A)[:, None]
    return row_AW, column_W, row_AW * N + column_W


@triton.jit
def _random_bits(
    first, seed, N, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of a tile whose first element has the place ``first``: int32 [A, W/4, 4]; see
    :mod:`.rounding`."""
    _, _, word = _places(N // 4, A, B, WIDTH, 4)
    z = word.to(tl.int64) * _GAMMA + ((first // 4 + 1) * _GAMMA + seed)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_2
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    shift = (48 - 16 * tl.arange(0, 4)).to(tl.int64)
    return ((z[:, :, None] << shift) >> 48).to(tl.int32)


@triton.jit
def _butterfly(x, H: tl.constexpr, W: tl.constexpr):
    """(sum, difference) of the rows of [16, W] whose places differ by H."""
    pairs = tl.permute(tl.reshape(x, (8 // H, 2, H, W)), (0, 2, 3, 1))
    low, high = tl.split(pairs)
    pairs = tl.permute(tl.join(low + high, low - high), (0, 3, 1, 2))
    return tl.reshape(pairs, (16, W))


@triton.jit
def _transform(x, W: tl.constexpr):
    """See :func:`.hadamard.transform`: of [16, W] along the first dimension, in fp32."""
    minus = (_MINUS >> tl.arange(0, 16)) & 1
    t = x * (0.25 - 0.5 * minus.to(tl.float32))[:, None]
    return _butterfly(_butterfly(_butterfly(_butterfly(t, 1, W), 2, W), 4, W), 8, W)


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(block_amax, amax_B, B: tl.constexpr):
    """(E4M3 scale, factor) of blocks, from the bits of their and of the tensors' largest values;
    see :func:`.scales.block_scales`."""
    amax_B = tl.where(amax_B >= _INFINITY, _NAN, amax_B).to(tl.float32, bitcast=True)
    encode_B = tl.minimum(tl.div_rn(2688.0, amax_B), _FLT_MAX, propagate_nan=tl.PropagateNan.ALL)
    encode_B = tl.where(amax_B == 0, 1.0, encode_B)
    inverse_B = tl.reshape(tl.div_rn(1.0, encode_B), (1, B, 1, 1))
    sixth_B = tl.reshape(encode_B * (1.0 / 6.0), (1, B, 1, 1))
    scale = block_amax.to(tl.float32, bitcast=True) * sixth_B
    scale = tl.minimum(scale, 448.0, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where(block_amax >= _INFINITY, float("nan"), _to_nearest(scale, -6, 3))
    factor = tl.div_rn(1.0, scale * inverse_B)
    return scale, tl.minimum(factor, _FLT_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _codes(y, x):
    """Codes of E2M1 values, of 6 for NaN; the sign is that of x."""
    # The bits of 2 to 8, but for 7, begin with consecutive numbers.
    shifted = (tl.minimum(tl.abs(y), 6.0) + 2.0).to(tl.int32, bitcast=True) >> 21
    return (tl.minimum(shifted, 519) & 7) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _scale_codes(scale):
    """Bits of fp32 numbers that E4M3 holds, not negative."""
    bits = scale.to(tl.int32, bitcast=True)
    code = tl.where(scale < 0.015625, (scale * 512).to(tl.int32), (bits >> 20) - (120 << 3))
    return tl.where(scale != scale, 0x7F, code)


@triton.jit
def _scale_places(matrix, row, group, rows, groups):
    """(first place of the matrix, place in it) of the scale of a row's group of 16; see
    :mod:`.layout`. A matrix has fewer than 2^31 of them."""
    columns = tl.cdiv(groups, 4)
    place = (row // 128 * columns + group // 4) * 512
    place += row % 32 * 16 + row // 32 % 4 * 4 + group % 4
    return matrix * tl.cdiv(rows, 128) * columns * 512, place


@triton.jit
def _segments(segment_T, t_B, matrix, M):
    """Which tensor scale blocks of rows have."""
    if segment_T is None:
        segment_B = t_B * 0 + matrix.to(tl.int32)
    else:
        segment_B = tl.load(segment_T + t_B, mask=t_B * 16 < M, other=2147483647)
    return segment_B


@triton.jit
def _write_tensor_scales(amax_S, scale_S, first, S):
    s = first + tl.arange(0, 128)
    amax = tl.load(amax_S + s, mask=s < S, other=0)
    amax = tl.where(amax >= _INFINITY, _NAN, amax).to(tl.float32, bitcast=True)
    tl.store(scale_S + s, tl.div_rn(amax, 2688.0), mask=s < S)


@triton.jit(do_not_specialize=["S"])
def amax_kernel(
    x_EMN, amax_S, transformed_amax_S, segment_T, M, N, S,
    B: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Raises the bits of the largest |x| of each tensor or segment, and of |x| transformed along
    the rows; one may be None. A program reads STEPS tiles, one beside the other."""
    WIDTH: tl.constexpr = C * 16
    n_columns = tl.cdiv(N, STEPS * WIDTH)
    matrix = tl.program_id(1)
    first_t = tl.program_id(0) // n_columns * B
    first_column = tl.program_id(0) % n_columns * (STEPS * WIDTH)
    row, column, place = _places(N, 16, B, WIDTH, 1)
    ok_row = first_t * 16 + row < M
    x_EMN += (matrix.to(tl.int64) * M + first_t * 16) * N
    plain = tl.zeros((B * WIDTH,), dtype=tl.int32)
    transformed = tl.zeros((B * WIDTH,), dtype=tl.int32)
    for step in range(STEPS):
        before = first_column + step * WIDTH
        ok = ok_row & (before + column < N)
        x = tl.load(x_EMN + before + place, mask=ok, other=0.0).to(tl.float32)
        if amax_S is not None:
            plain = tl.maximum(plain, tl.max(_magnitude(x), 0))
        if transformed_amax_S is not None:
            t = _transform(x, B * WIDTH).to(x_EMN.dtype.element_ty).to(tl.float32)
            transformed = tl.maximum(transformed, tl.max(_magnitude(t), 0))
    segment_B = _segments(segment_T, first_t + tl.arange(0, B), matrix, M)
    if amax_S is not None:
        amax_B = tl.max(tl.reshape(plain, (B, WIDTH)), 1)
        tl.atomic_max(amax_S + segment_B, amax_B, mask=segment_B < S)
    if transformed_amax_S is not None:
        amax_B = tl.max(tl.reshape(transformed, (B, WIDTH)), 1)
        tl.atomic_max(transformed_amax_S + segment_B, amax_B, mask=segment_B < S)


@triton.jit
def _quantize_tile(
    x_EMN, data, scale_ptr, amax_B, seed, matrix, first_t, first_row, first_column, M, N,
    COLUMNWISE: tl.constexpr, SQUARE: tl.constexpr, RHT: tl.constexpr, RANDOM: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile [A, B, C, 16] from row ``first_row`` of its blocks of 16 rows on: one side of it."""
    WIDTH: tl.constexpr = C * 16
    # Places count from the tile's first, so that int32 holds them.
    first_row += first_t * 16
    first = (matrix * M + first_row) * N + first_column
    row, column, place = _places(N, A, B, WIDTH, 1)
    ok = (first_row + row < M) & (first_column + column < N)
    x = tl.load(x_EMN + first + place, mask=ok, other=0.0).to(tl.float32)
    if RHT:
        x = _transform(x, B * WIDTH).to(x_EMN.dtype.element_ty).to(tl.float32)
    tile = tl.reshape(x, (A, B, C, 16))
    block_amax = _magnitude(tile)
    if COLUMNWISE or SQUARE:
        block_amax = tl.max(block_amax, 0, keep_dims=True)
    if SQUARE or not COLUMNWISE:
        block_amax = tl.max(block_amax, 3, keep_dims=True)
    scale, factor = _scales(block_amax, amax_B, B)
    y = tl.minimum(tile * factor, 6.0, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, -6.0, propagate_nan=tl.PropagateNan.ALL)
    if RANDOM:
        bits = _random_bits(first, seed, N, A, B, WIDTH)
        y = _stochastically(y, tl.reshape(bits, (A, B, C, 16)))
    else:
        y = _to_nearest(y, 0, 1)

    if scale_ptr is None:
        values = tl.reshape(y * scale, (A, B * WIDTH))
        tl.store(data + first + place, values.to(data.dtype.element_ty), mask=ok)
    elif COLUMNWISE:
        codes = tl.reshape(_codes(y, tile), (2, 8, B * WIDTH))
        codes = tl.sum(codes << (4 * tl.arange(0, 8))[None, :, None], 1)
        codes = tl.permute(tl.reshape(codes, (2, B, WIDTH)), (2, 1, 0))
        column, eight = tl.arange(0, WIDTH), tl.arange(0, B * 2)
        data += (matrix * N + first_column) * (M // 8) + first_t * 2
        place = (column * (M // 8))[:, None] + eight
        column += first_column
        ok = (column < N)[:, None] & (first_t * 16 + eight * 8 < M)
        tl.store(data + place, tl.reshape(codes, (WIDTH, B * 2)), mask=ok)
        scale = tl.reshape(tl.broadcast_to(_scale_codes(scale), (1, B, C, 16)), (B, WIDTH))
        t_B = first_t + tl.arange(0, B)
        at, place = _scale_places(matrix, column[:, None], t_B, N, M // 16)
        ok = (column < N)[:, None] & (t_B * 16 < M)
        tl.store(scale_ptr + at + place, tl.trans(scale).to(tl.uint8), mask=ok)
    else:
        codes = tl.reshape(_codes(y, tile), (A, B * WIDTH // 8, 8))
        row, eight, place = _places(N // 8, A, B, WIDTH, 8)
        ok = (first_row + row < M) & (first_column + eight * 8 < N)
        tl.store(data + first // 8 + place, tl.sum(codes << (4 * tl.arange(0, 8)), 2), mask=ok)
        scale = tl.reshape(tl.broadcast_to(_scale_codes(scale), (A, B, C, 1)), (A, B * C))
        row, group, _ = _places(N // 16, A, B, WIDTH, 16)
        group += first_column // 16
        at, place = _scale_places(matrix, first_row + row, group, M, N // 16)
        ok = (first_row + row < M) & (group * 16 < N)
        tl.store(scale_ptr + at + place, scale.to(tl.uint8), mask=ok)


@triton.jit
def _quantize_side(
    x_EMN, segment_T, amax_S, data, scale_ptr, tensor_scale_S, seed, M, N, S,
    COLUMNWISE: tl.constexpr, SQUARE: tl.constexpr, RHT: tl.constexpr, RANDOM: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """16 B rows of 16 C columns, some rows or columns at a time, for which registers suffice."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        for s in range(0, S, 128):
            _write_tensor_scales(amax_S, tensor_scale_S, s, S)
    n_columns = tl.cdiv(N, C * 16)
    matrix = tl.program_id(1).to(tl.int64)
    first_t = tl.program_id(0) // n_columns * B
    first_column = tl.program_id(0) % n_columns * (C * 16)
    segment_B = _segments(segment_T, first_t + tl.arange(0, B), matrix, M)
    amax_B = tl.load(amax_S + segment_B, mask=segment_B < S, other=0)
    if COLUMNWISE or SQUARE:
        PARTS: tl.constexpr = 4 if RANDOM or (SQUARE and scale_ptr is not None) else 2
        for column in range(0, C * 16, C * 16 // PARTS):
            _quantize_tile(
                x_EMN, data, scale_ptr, amax_B, seed, matrix, first_t, 0, first_column + column,
                M, N, COLUMNWISE, SQUARE, RHT, RANDOM, 16, B, C // PARTS,
            )  # fmt: skip
    else:
        for row in range(0, 16, 4):
            _quantize_tile(
                x_EMN, data, scale_ptr, amax_B, seed, matrix, first_t, row, first_column,
                M, N, COLUMNWISE, SQUARE, RHT, RANDOM, 4, B, C,
            )  # fmt: skip


@triton.jit(do_not_specialize=["S", "row_seed", "column_seed"])
def quantize_kernel(
    x_EMN, segment_T,
    row_amax_S, row_data, row_scale, row_tensor_scale_S, row_seed: tl.int64,
    column_amax_S, column_data, column_scale, column_tensor_scale_S, column_seed: tl.int64,
    M, N, S,
    SQUARE: tl.constexpr, RHT: tl.constexpr, ROW_RANDOM: tl.constexpr,
    COLUMN_RANDOM: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A side whose data is None is not made; where its scale is None, data are decoded values in
    x's layout, else codes by eights. SQUARE: blocks of 16x16. The second side finds x in a cache.
    """
    if row_data is not None:
        _quantize_side(
            x_EMN, segment_T, row_amax_S, row_data, row_scale, row_tensor_scale_S, row_seed,
            M, N, S, False, SQUARE, False, ROW_RANDOM, B, C,
        )  # fmt: skip
    if column_data is not None:
        _quantize_side(
            x_EMN, segment_T, column_amax_S, column_data, column_scale, column_tensor_scale_S,
            column_seed, M, N, S, True, SQUARE, RHT, COLUMN_RANDOM, B, C,
        )  # fmt: skip
