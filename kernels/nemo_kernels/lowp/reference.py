"""NVFP4 in plain PyTorch: the specification.

A value is ``E2M1 code * block scale * tensor scale``. The formulas are TransformerEngine's
(pytorch/custom_recipes/reference_nvfp4.py); each operation is one fp32 rounding:

    amax    = largest |x| of the tensor; amax_b of a block
    encode  = min(2688 / amax, FLT_MAX), 1 if amax is 0                 2688 = 6 * 448
    s_b     = E4M3(min(amax_b * (encode * (1/6)), 448))                 nearest, ties to even
    y       = x * min(1 / (s_b * (1 / encode)), FLT_MAX)
    code    = E2M1(y limited to [-6, 6])                                nearest, ties to even code

So a block of zeros has the scale 0, and a block whose scale rounds to 0 has codes of +-6 that
decode to 0. Two things are stricter here: -0 keeps its sign, and a block with NaN or infinity has
the scale NaN (where amax is not given, so have all blocks). NaN itself gets the code of 6.

K is the dimension along which blocks lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kernels.checks import expect_device
from nemo_kernels.lowp import emulation, hadamard
from nemo_kernels.lowp.emulation import grouped_product, grouped_wgrad, product
from nemo_kernels.lowp.operand import Operand, Rounding, expect_ends
from nemo_kernels.lowp.packing import decode_packed, encode, pack
from nemo_kernels.lowp.rounding import (
    E2M1_MAX,
    random_bits,
    round_stochastically_,
    round_to_e4m3_,
    round_to_nearest_,
)
from nemo_kernels.lowp.scales import (
    BLOCK,
    E4M3_MAX,
    Blocks,
    block_scales,
    divide,
)

__all__ = [
    "EMULATION", "NATIVE", "SEGMENT_ALIGNMENT", "Quantized", "dequantize", "fake_quantize",
    "grouped_product", "grouped_wgrad", "operands", "product", "quantize", "quantize_modelopt",
]  # fmt: skip

EMULATION = emulation
NATIVE = False
"""Products are emulated."""
SEGMENT_ALIGNMENT = BLOCK
"""Of experts' rows: so that no block holds those of two."""


class Quantized(NamedTuple):
    """An NVFP4 tensor. Blocks lie along the last dimension; scales are in plain order, unpadded.

    Fields:
        data: uint8 [..., K/2], two codes per byte, the even element's in the low nibble.
            A code is 8 * sign + index into 0, 0.5, 1, 1.5, 2, 3, 4, 6.
        block_scale: float8_e4m3fn [..., K/16].
        tensor_scale: fp32, amax/2688, in the shape of amax; multiply.
    """

    data: Tensor
    block_scale: Tensor
    tensor_scale: Tensor


def quantize(
    x: Tensor,
    *,
    tile: tuple[int, int] = (1, 16),
    columnwise: bool = False,
    rht: bool = False,
    seed: int | None = None,
    amax: Tensor | None = None,
) -> Quantized:
    """x in NVFP4; without options, blocks of 1x16 along the last dimension, rounded to nearest.

    Args:
        x: fp32, bf16 or fp16 [..., rows, columns]; [columns] will do for the default.
        tile: shape of a block, (1, 16) or (16, 16). The latter's scales are repeated for each row.
        columnwise: quantize the transpose of the last two dimensions: blocks lie along x's rows.
            For 16x16 the codes are the same, transposed.
        rht: apply :func:`.hadamard.transform` along the blocks first; for 1x16 only.
        seed: round stochastically, with :func:`.rounding.random_bits` of this seed. An element's
            number is its place in x, whether columnwise or not.
        amax: fp32 to take for the largest |x| (after the transform), for example one common to
            several tensors; larger values saturate. A scalar, or of stacked matrices one each,
            [..., 1, 1].

    Raises:
        ValueError: a dimension that blocks lie along is not divisible by 16, or a dtype, a shape or
            a combination of options is not as described.
    """
    scaled = _scale(x, tile, columnwise, rht, amax)
    codes = torch.empty_like(scaled.x, dtype=torch.uint8)
    for part, x_part, y in scaled.divided():
        if seed is not None:
            y = scaled.stochastic(part, y, seed)
        codes[part] = encode(y.nan_to_num_(nan=E2M1_MAX), x_part)
    codes = codes.view(x.shape)
    block_scale = scaled.scale_as_e4m3()
    if columnwise:
        codes, block_scale = codes.mT.contiguous(), block_scale.mT
    if tile[0] > 1:
        block_scale = block_scale.repeat_interleave(BLOCK, dim=-2)
    block_scale = block_scale.contiguous().view(torch.float8_e4m3fn)
    return Quantized(pack(codes), block_scale, scaled.tensor_scale)


def fake_quantize(
    x: Tensor,
    *,
    tile: tuple[int, int] = (1, 16),
    columnwise: bool = False,
    rht: bool = False,
    seed: int | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`quantize` gives, decoded for emulation: ``(values, tensor_scale)``.

    ``values`` is bf16 and holds code times block scale, which bf16 does exactly, in the shape of x:
    ``columnwise`` does not transpose it. So a product of two such tensors, times both tensor
    scales, is the product of the NVFP4 tensors. Zeros may differ in sign.

    Args and errors: as :func:`quantize`.
    """
    scaled = _scale(x, tile, columnwise, rht, amax)
    return scaled.decoded(seed).view(x.shape), scaled.tensor_scale


def operands(
    x: Tensor, rows: Rounding | None, columns: Rounding | None, ends_E: Tensor | None = None
) -> tuple[Operand | None, Operand | None]:
    """:func:`nemo_kernels.lowp.operands`; values of ends are checked on CPU tensors and in debug
    mode."""
    made = [
        None if how is None else _operand(x, how, columnwise, ends_E)
        for how, columnwise in ((rows, False), (columns, True))
    ]
    return made[0], made[1]


def _operand(x: Tensor, how: Rounding, columnwise: bool, ends_E: Tensor | None) -> Operand:
    scaled = scale_operand(x, how, columnwise, ends_E)
    return Operand(scaled.decoded(how.seed).view(x.shape), scaled.tensor_scale, columnwise)


def scale_operand(x: Tensor, how: Rounding, columnwise: bool, ends_E: Tensor | None) -> Scaled:
    """What one of the `operands` is before it is rounded; arguments and errors are those."""
    if x.dim() not in (2, 3) or (x.dim() == 3 and ends_E is not None):
        raise ValueError(f"x: expected [M, N], or [E, M, N] without ends_E, got {list(x.shape)}")
    if (x.dim() == 3 or ends_E is not None) and x.shape[-2] % BLOCK:
        raise ValueError(f"x: expected rows divisible by {BLOCK}, got {list(x.shape)}")
    if ends_E is not None:
        expect_device(x, ends_E=ends_E)
        expect_ends(ends_E, len(x))
    if x.dim() == 3:
        n_experts, m, _ = x.shape
        ends_E = torch.arange(1, n_experts + 1, dtype=torch.int32, device=x.device) * m
    return _scale(x, how.tile, columnwise, how.rht, ends_E=ends_E)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * block_scale * tensor_scale`` [..., K]: the first product is exact, the second is
    rounded to fp32, the result to dtype."""
    values = decode_packed(q.data).unflatten(-1, (-1, BLOCK))
    values.mul_(q.block_scale.float().unsqueeze(-1))
    values.mul_(q.tensor_scale.unsqueeze(-1) if q.tensor_scale.dim() else q.tensor_scale)
    return values.flatten(-2).to(dtype)


def quantize_modelopt(x: Tensor, *, amax: Tensor | None = None) -> Quantized:
    """x in NVFP4 (1x16, to nearest) with the operations of nvidia-modelopt's NVFP4QTensor.

    With ``t = amax / 2688``, the block scale is E4M3(amax_b / (6 t)) within [2^-9, 448], 1 for a
    block of zeros, and y is x / (s_b t). -0 loses its sign. A tensor of zeros has zeros for codes
    (modelopt has NaN there).

    Args and errors: as :func:`quantize`.
    """
    _expect_blocks(x, (1, BLOCK), columnwise=False)
    x = x.detach().contiguous()
    blocks = Blocks.of(x, (1, BLOCK), columnwise=False)
    block_amax = blocks.amax(x)
    amax = _tensor_amax(amax, x, block_amax)
    tensor_scale = divide(amax, E2M1_MAX * E4M3_MAX)
    scale = block_amax / (tensor_scale * E2M1_MAX)
    scale = torch.where(block_amax == 0, 1.0, scale).clamp_(2.0**-9, E4M3_MAX)
    scale = torch.where(block_amax.isfinite(), round_to_e4m3_(scale), torch.nan)
    y = x.view(blocks.shape) / (scale * tensor_scale).view(blocks.grid_view)
    y = torch.where(block_amax.view(blocks.grid_view) == 0, 0.0, y).clamp_(-E2M1_MAX, E2M1_MAX)
    y.nan_to_num_(nan=E2M1_MAX).add_(0.0)  # -0 becomes 0
    codes = encode(y, y).view(x.shape)
    return Quantized(pack(codes), scale.to(torch.float8_e4m3fn), tensor_scale)


class Scaled(NamedTuple):
    """A tensor looked at as blocks, with what is needed to round it."""

    x: Tensor  # transformed, in the shape of blocks
    blocks: Blocks
    scale: Tensor  # fp32, in grid_view's shape; E4M3 values
    factor: Tensor  # the same shape
    tensor_scale: Tensor

    def divided(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(part of the first dimension, what it holds in fp32, that over its scales and limited to
        what E2M1 holds), one after the other."""
        for part in self.blocks.parts(self.x.device):
            x = self.x[part].float()
            yield part, x, (x * self.factor[part]).clamp_(-E2M1_MAX, E2M1_MAX)

    def stochastic(self, part: slice, y: Tensor, seed: int) -> Tensor:
        """What `divided` gives, rounded in place."""
        start = part.start * self.blocks.shape[1:].numel()
        return round_stochastically_(y, random_bits(y.numel(), seed, y.device, start=start))

    def rounded(self, seed: int | None) -> Iterator[tuple[slice, Tensor]]:
        """(part of the first dimension, its E2M1 values in fp32), one after the other."""
        for part, _, y in self.divided():
            yield part, round_to_nearest_(y) if seed is None else self.stochastic(part, y, seed)

    def decoded(self, seed: int | None) -> Tensor:
        """Codes times block scales, which bf16 holds exactly."""
        values = torch.empty_like(self.x, dtype=torch.bfloat16)
        for part, y in self.rounded(seed):
            values[part] = y.mul_(self.scale[part])
        return values

    def scale_as_e4m3(self) -> Tensor:
        """The bytes of the block scales, in the grid's shape."""
        return self.scale.view(self.blocks.grid).to(torch.float8_e4m3fn).view(torch.uint8)


def _scale(
    x: Tensor,
    tile: tuple[int, int],
    columnwise: bool,
    rht: bool,
    amax: Tensor | None = None,
    ends_E: Tensor | None = None,
) -> Scaled:
    if rht and tile[0] > 1:
        raise ValueError("rht: expected tile (1, 16), got (16, 16)")
    _expect_blocks(x, tile, columnwise)
    x = x.detach().contiguous()
    if rht:
        x = hadamard.transform(x, -2 if columnwise else -1)
    blocks = Blocks.of(x, tile, columnwise)
    block_amax = blocks.amax(x)
    if ends_E is None:
        amax = amax_in_grid = _tensor_amax(amax, x, block_amax)
    else:
        amax, amax_in_grid = _amax_of_segments(block_amax, ends_E, x.shape[:-1].numel())
    scale, factor = (t.reshape(blocks.grid_view) for t in block_scales(block_amax, amax_in_grid))
    tensor_scale = divide(amax, E2M1_MAX * E4M3_MAX)
    return Scaled(x.view(blocks.shape), blocks, scale, factor, tensor_scale)


def _expect_blocks(x: Tensor, tile: tuple[int, int], columnwise: bool) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    if tuple(tile) not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"tile: expected (1, 16) or (16, 16), got {tile}")
    square = tile[0] > 1
    least = 2 if square or columnwise else 1
    if x.dim() < least:
        raise ValueError(f"x: expected at least {least} dimensions, got {x.dim()}")
    for name, dim, blocked in (
        ("last", -1, square or not columnwise),
        ("second to last", -2, square or columnwise),
    ):
        if blocked and x.shape[dim] % BLOCK:
            raise ValueError(
                f"x: expected a {name} dimension divisible by {BLOCK}, got {x.shape[dim]} "
                f"(shape {list(x.shape)})"
            )


def _amax_of_segments(block_amax: Tensor, ends_E: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Per segment [E], and per row of the grid, where it can be broadcast to the grid."""
    n_groups, last = n_rows // BLOCK, ends_E.numel() - 1
    first_rows = torch.arange(n_groups, dtype=torch.int32, device=ends_E.device) * BLOCK
    segment = torch.searchsorted(ends_E, first_rows, right=True).clamp_max_(last)
    per_group = max(1, block_amax.numel() // max(1, n_groups))
    group_amax = block_amax.reshape(n_groups, per_group).amax(1)
    amax = group_amax.new_zeros(last + 1).scatter_reduce_(0, segment, group_amax, "amax")
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    grid = block_amax.shape[:-1]
    in_grid = amax[segment].repeat_interleave(grid.numel() // max(1, n_groups))
    return amax, in_grid.view(*grid, 1)


def _tensor_amax(amax: Tensor | None, x: Tensor, block_amax: Tensor) -> Tensor:
    """The given amax, checked, or that of x; NaN where it is not finite."""
    if amax is None:
        amax = block_amax.amax() if block_amax.numel() else block_amax.new_zeros(())
    elif amax.dtype != torch.float32 or amax.shape not in ((), (*x.shape[:-2], 1, 1)):
        each = [*x.shape[:-2], 1, 1]
        raise ValueError(
            f"amax: expected float32 [] or {each}, got {amax.dtype} {list(amax.shape)}"
        )
    return torch.where(amax.isfinite(), amax, torch.nan)
