"""RMSNorm of x * SiLU(gate) by groups in Triton, forward and backward. Formulas: ``reference``.

A program has some rows of one group in registers; the backward one takes further rows by the same
steps, so that it can add up the weight's gradient.

Shapes: R rows, D channels, G groups, g channels of a group, K shares of the weight's gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated_norm_kernel(
    x_RD, gate_RD, weight_D, y_RD, r_RG, rows, x_stride, gate_stride, eps, size,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % GROUPS
    row = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    within = (row < rows)[:, None] & (channel < size)[None, :]
    at = group * size + channel
    x = tl.load(x_RD + row[:, None] * x_stride + at[None, :], mask=within, other=0).to(tl.float32)
    gate_at = row[:, None] * gate_stride + at[None, :]
    gate = tl.load(gate_RD + gate_at, mask=within, other=0).to(tl.float32)
    weight = tl.load(weight_D + at, mask=channel < size, other=0).to(tl.float32)
    h = x * gate * tl.sigmoid(gate)
    r = 1 / tl.sqrt(tl.sum(h * h, 1) / size + eps)
    y = h * r[:, None] * weight[None, :]
    y_at = row[:, None] * (size * GROUPS) + at[None, :]
    tl.store(y_RD + y_at, y.to(y_RD.dtype.element_ty), mask=within)
    tl.store(r_RG + row * GROUPS + group, r, mask=row < rows)


@triton.jit
def gated_norm_backward_kernel(
    x_RD, gate_RD, weight_D, r_RG, dy_RD, dx_RD, dgate_RD, dweight_KD, rows, x_stride, gate_stride,
    dy_stride, size, steps, GROUPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``steps`` times ROWS rows of a group."""
    group = tl.program_id(0) % GROUPS
    share = (tl.program_id(0) // GROUPS).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    at = group * size + channel
    weight = tl.load(weight_D + at, mask=channel < size, other=0).to(tl.float32)
    dweight = tl.zeros([ROWS, CHANNELS], tl.float32)
    for step in range(0, steps):
        row = (share * steps + step) * ROWS + tl.arange(0, ROWS)
        within = (row < rows)[:, None] & (channel < size)[None, :]
        x_at = row[:, None] * x_stride + at[None, :]
        gate_at = row[:, None] * gate_stride + at[None, :]
        dy_at = row[:, None] * dy_stride + at[None, :]
        x = tl.load(x_RD + x_at, mask=within, other=0).to(tl.float32)
        gate = tl.load(gate_RD + gate_at, mask=within, other=0).to(tl.float32)
        dy = tl.load(dy_RD + dy_at, mask=within, other=0).to(tl.float32)
        r = tl.load(r_RG + row * GROUPS + group, mask=row < rows, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        normed = x * silu * r[:, None]
        dweight += dy * normed
        dy *= weight[None, :]
        mean = tl.sum(dy * normed, 1) / size
        dh = r[:, None] * (dy - normed * mean[:, None])
        dgate = dh * x * (sigmoid + silu * (1 - sigmoid))
        out = row[:, None] * (size * GROUPS) + at[None, :]
        tl.store(dx_RD + out, (dh * silu).to(dx_RD.dtype.element_ty), mask=within)
        tl.store(dgate_RD + out, dgate.to(dgate_RD.dtype.element_ty), mask=within)
    out = dweight_KD + share * (size * GROUPS) + at
    tl.store(out, tl.sum(dweight, 0), mask=channel < size)
