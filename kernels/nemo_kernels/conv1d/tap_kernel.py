"""Triton kernels of the convolution with SiLU.

A program walks over a tile's tokens with the last three of its channels in registers, so that each
is loaded once; it begins three tokens before the tile, and the backward pass ends three behind it.

Shapes: B batch, S sequence, C channels, K kernel width (at most 4), J = K-1, T tiles of tokens; N
channels of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(S, C, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Row of the batch, number of the tile, its first token, and channels."""
    # Channel blocks of a tile run next to each other.
    n_channels, n_tiles = tl.cdiv(C, CHANNELS), tl.cdiv(S, TOKENS)
    tile = tl.program_id(0) // n_channels
    c_N = tl.program_id(0) % n_channels * CHANNELS + tl.arange(0, CHANNELS)
    return (tile // n_tiles).to(tl.int64), tile, tile % n_tiles * TOKENS, c_N


@triton.jit
def _weight(weight_CK, back: tl.constexpr, c_N, ok_N, K: tl.constexpr):
    """Of the token so many before another; 0 for a tap that there is not."""
    weight_N = tl.zeros(c_N.shape, tl.float32)
    if back < K:
        at_N = weight_CK + c_N * K + (K - 1 - back)
        weight_N = tl.load(at_N, mask=ok_N, other=0.0).to(tl.float32)
    return weight_N


@triton.jit
def _weights(weight_CK, bias_C, c_N, ok_N, K: tl.constexpr):
    """Of a token and the three before it, and the bias."""
    w0_N = _weight(weight_CK, 0, c_N, ok_N, K)
    w1_N = _weight(weight_CK, 1, c_N, ok_N, K)
    w2_N = _weight(weight_CK, 2, c_N, ok_N, K)
    w3_N = _weight(weight_CK, 3, c_N, ok_N, K)
    return w0_N, w1_N, w2_N, w3_N, tl.load(bias_C + c_N, mask=ok_N, other=0.0).to(tl.float32)


@triton.jit
def _token(x_BSC, seq_idx_BS, row, t, c_N, S, C, stride_B, stride_S):
    """A token's x, and the number of its document; 0 and -1 where there is no token."""
    exists = (t >= 0) & (t < S)
    at_N = row * stride_B + t.to(tl.int64) * stride_S + c_N
    x_N = tl.load(x_BSC + at_N, mask=c_N < tl.where(exists, C, 0), other=0.0).to(tl.float32)
    document = tl.where(exists, 0, -1)
    if seq_idx_BS is not None:
        document = tl.load(seq_idx_BS + row * S + t, mask=exists, other=-1)
    return x_N, document


@triton.jit
def forward_kernel(
    x_BSC, weight_CK, bias_C, seq_idx_BS, y_BSC, S, C, stride_B, stride_S,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, _, first, c_N = _place(S, C, TOKENS, CHANNELS)
    w0_N, w1_N, w2_N, w3_N, bias_N = _weights(weight_CK, bias_C, c_N, c_N < C, K)
    zero_N = tl.zeros((CHANNELS,), tl.float32)
    x1_N, x2_N, x3_N = zero_N, zero_N, zero_N
    previous, since = -1, 0  # of a token: its document, and how many of it came before
    for i in range(0, TOKENS + 3):
        t = first - 3 + i
        x_N, document = _token(x_BSC, seq_idx_BS, row, t, c_N, S, C, stride_B, stride_S)
        since = tl.where(document == previous, since + 1, 0)
        z_N = bias_N + w0_N * x_N
        z_N += tl.where(since >= 1, w1_N * x1_N, 0.0)
        z_N += tl.where(since >= 2, w2_N * x2_N, 0.0)
        z_N += tl.where(since >= 3, w3_N * x3_N, 0.0)
        y_N = z_N * tl.sigmoid(z_N)
        at_N = (row * S + t) * C + c_N
        ok_N = c_N < tl.where((t >= first) & (t < S), C, 0)
        tl.store(y_BSC + at_N, y_N.to(y_BSC.dtype.element_ty), mask=ok_N)
        previous, x1_N, x2_N, x3_N = document, x_N, x1_N, x2_N


@triton.jit
def backward_kernel(
    x_BSC, weight_CK, bias_C, seq_idx_BS, dy_BSC, dx_BSC, parts_TKC, S, C, stride_B, stride_S,
    K: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz = dy * (sig + z sig (1 - sig)); a token's goes to its own dx and those before it, so that
    the dx of the third one before it is complete."""
    row, tile, first, c_N = _place(S, C, TOKENS, CHANNELS)
    w0_N, w1_N, w2_N, w3_N, bias_N = _weights(weight_CK, bias_C, c_N, c_N < C, K)
    zero_N = tl.zeros((CHANNELS,), tl.float32)
    x1_N, x2_N, x3_N = zero_N, zero_N, zero_N
    dx1_N, dx2_N, dx3_N = zero_N, zero_N, zero_N
    dw0_N, dw1_N, dw2_N, dw3_N, dbias_N = zero_N, zero_N, zero_N, zero_N, zero_N
    previous, since = -1, 0
    for i in range(0, TOKENS + 6):
        t = first - 3 + i
        x_N, document = _token(x_BSC, seq_idx_BS, row, t, c_N, S, C, stride_B, stride_S)
        since = tl.where(document == previous, since + 1, 0)
        near1_N = tl.where(since >= 1, x1_N, 0.0)
        near2_N = tl.where(since >= 2, x2_N, 0.0)
        near3_N = tl.where(since >= 3, x3_N, 0.0)
        z_N = bias_N + w0_N * x_N + w1_N * near1_N + w2_N * near2_N + w3_N * near3_N
        sig_N = tl.sigmoid(z_N)
        at_N = (row * S + t) * C + c_N
        ok_t = c_N < tl.where((t >= first) & (t < S), C, 0)
        dy_N = tl.load(dy_BSC + at_N, mask=ok_t, other=0.0).to(tl.float32)
        dz_N = dy_N * (sig_N + z_N * sig_N * (1 - sig_N))
        dx3_N += tl.where(since >= 3, w3_N * dz_N, 0.0)
        ok_3 = c_N < tl.where((t - 3 >= first) & (t - 3 < S), C, 0)
        tl.store(dx_BSC + at_N - 3 * C, dx3_N.to(dx_BSC.dtype.element_ty), mask=ok_3)
        dx3_N = dx2_N + tl.where(since >= 2, w2_N * dz_N, 0.0)
        dx2_N = dx1_N + tl.where(since >= 1, w1_N * dz_N, 0.0)
        dx1_N = w0_N * dz_N
        mine_N = tl.where(t < first + TOKENS, dz_N, 0.0)  # others' belong to the next tile
        dw0_N += mine_N * x_N
        dw1_N += mine_N * near1_N
        dw2_N += mine_N * near2_N
        dw3_N += mine_N * near3_N
        dbias_N += mine_N
        previous, x1_N, x2_N, x3_N = document, x_N, x1_N, x2_N
    parts_N = parts_TKC + tile.to(tl.int64) * (K + 1) * C + c_N
    tl.store(parts_N + (K - 1) * C, dw0_N, mask=c_N < C)
    if K > 1:
        tl.store(parts_N + (K - 2) * C, dw1_N, mask=c_N < C)
    if K > 2:
        tl.store(parts_N + (K - 3) * C, dw2_N, mask=c_N < C)
    if K > 3:
        tl.store(parts_N + (K - 4) * C, dw3_N, mask=c_N < C)
    tl.store(parts_N + K * C, dbias_N, mask=c_N < C)


@triton.jit
def step_kernel(
    x_BC, state_BCJ, weight_CK, bias_C, y_BC, C, x_B, x_C, state_B, state_C, state_J,
    K: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n_channels = tl.cdiv(C, CHANNELS)
    row = (tl.program_id(0) // n_channels).to(tl.int64)
    c_N = tl.program_id(0) % n_channels * CHANNELS + tl.arange(0, CHANNELS)
    ok_N = c_N < C
    x_N = tl.load(x_BC + row * x_B + c_N * x_C, mask=ok_N, other=0.0).to(tl.float32)
    z_N = tl.load(bias_C + c_N, mask=ok_N, other=0.0).to(tl.float32)
    z_N += tl.load(weight_CK + c_N * K + K - 1, mask=ok_N, other=0.0).to(tl.float32) * x_N
    state_N = state_BCJ + row * state_B + c_N * state_C
    for k in tl.static_range(K - 1):
        tap_N = tl.load(state_N + k * state_J, mask=ok_N, other=0.0).to(tl.float32)
        z_N += tl.load(weight_CK + c_N * K + k, mask=ok_N, other=0.0).to(tl.float32) * tap_N
        next_N = x_N
        if k < K - 2:
            next_N = tl.load(state_N + (k + 1) * state_J, mask=ok_N, other=0.0).to(tl.float32)
        tl.store(state_N + k * state_J, next_N.to(state_BCJ.dtype.element_ty), mask=ok_N)
    y_N = z_N * tl.sigmoid(z_N)
    tl.store(y_BC + row * C + c_N, y_N.to(y_BC.dtype.element_ty), mask=ok_N)
