"""Block scales and the factors elements are multiplied with before they are rounded.

A tensor is looked at as [L, ...] blocks, where L is the first dimension along which it can be cut
into parts without cutting a block; the "grid" has one number per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kernels.lowp.rounding import E2M1_MAX, round_to_e4m3_, round_to_nearest_

BLOCK = 16
E4M3_MAX = 448.0
# Four-over-six keeps the scale of a block that uses 6 below this: 1.5 times as much still fits.
E4M3_MAX_FOUR_OVER_SIX = 256.0
FLT_MAX = torch.finfo(torch.float32).max
# Elements worked on at a time: their temporaries stay in a CPU's L2 cache, and are small beside
# what else is on a GPU.
_PART = {"cpu": 1 << 17}
_PART_ELSEWHERE = 1 << 24


def parts(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Slices of the first dimension that are small enough for a CPU's cache."""
    per_row = max(1, shape[1:].numel())
    step = max(1, _PART.get(device.type, _PART_ELSEWHERE) // per_row)
    return (slice(i, i + step) for i in range(0, shape[0], step))


class Blocks(NamedTuple):
    """How a contiguous tensor is divided into blocks.

    Fields:
        shape: that of the tensor looked at as blocks, [L, ...]; inner: a block's dimensions in it.
        grid: shape of the grid in the tensor's own dimensions.
    """

    shape: torch.Size
    inner: tuple[int, ...]
    grid: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, tile: tuple[int, int], columnwise: bool) -> Blocks:
        if tile == (1, BLOCK) and not columnwise:
            shape = torch.Size((x.numel() // BLOCK, BLOCK))
            return cls(shape, (1,), (*x.shape[:-1], x.shape[-1] // BLOCK))
        *outer, rows, columns = x.shape
        length = x.shape[:-1].numel() // BLOCK
        if tile == (1, BLOCK):
            shape = torch.Size((length, BLOCK, columns))
            return cls(shape, (1,), (*outer, rows // BLOCK, columns))
        n = columns // BLOCK
        shape = torch.Size((length, BLOCK, n, BLOCK))
        return cls(shape, (1, 3), (*outer, rows // BLOCK, n))

    @property
    def grid_view(self) -> tuple[int, ...]:
        """Shape in which the grid can be broadcast to ``shape``."""
        return tuple(1 if i in self.inner else n for i, n in enumerate(self.shape))

    def parts(self, device: torch.device) -> Iterator[slice]:
        return parts(self.shape, device)

    def amax(self, x: Tensor) -> Tensor:
        """The largest |x| of each block, fp32, in the grid's shape; NaN if there is one."""
        x, result = x.view(self.shape), x.new_empty(self.grid_view, dtype=torch.float32)
        for part in self.parts(x.device):
            largest = x[part].abs()
            if largest.dim() > 2:
                largest = largest.amax(1)
            largest = largest.float()
            if self.inner[-1] == x.dim() - 1:
                # Pooling is the fastest way to reduce runs of 16.
                largest = torch.max_pool1d(largest.view(1, -1), BLOCK)
            result[part] = largest.view(result[part].shape)
        return result.view(self.grid)


def block_scales(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, factor) of each block, fp32; the scale is an E4M3 value. See :mod:`.reference`."""
    encode = _encode_scale(amax, E4M3_MAX)
    sixth = torch.full_like(encode, E2M1_MAX).reciprocal_()
    scale = _to_e4m3(block_amax * (encode * sixth), block_amax)
    return scale, _factor(scale, encode)


def four_over_six_scales(
    x: Tensor, blocks: Blocks, block_amax: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`block_scales`, but each block's largest value is mapped to 4 or to 6.

    The errors are sums of |decoded value - x|, in fp32 and in TransformerEngine's order: along a
    row one after the other, over the rows of a 16x16 block as a tree. 6 where they are equal.
    """
    encode = _encode_scale(amax, E4M3_MAX_FOUR_OVER_SIX)
    base = divide(block_amax, E2M1_MAX) * encode
    candidates = []
    for stretch in (1.5, 1.0):
        scale = _to_e4m3(base * stretch, block_amax)
        factor = _factor(scale, encode)
        error = _error(x, blocks, scale, factor, amax.expand(blocks.grid))
        candidates.append((scale, factor, error))
    (scale_4, factor_4, error_4), (scale_6, factor_6, error_6) = candidates
    use_4 = error_4 < error_6
    return torch.where(use_4, scale_4, scale_6), torch.where(use_4, factor_4, factor_6)


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once; on a GPU, PyTorch multiplies by 1 / by if that is a Python number."""
    return x / torch.full((), by, device=x.device)


def _encode_scale(amax: Tensor, e4m3_max: float) -> Tensor:
    # PyTorch calculates number / tensor as the number times 1 / tensor, which is not the same.
    encode = (torch.full_like(amax, E2M1_MAX * e4m3_max) / amax).clamp_max_(FLT_MAX)
    return torch.where((amax == 0) | (encode == 0), 1.0, encode)


def _to_e4m3(scale: Tensor, block_amax: Tensor) -> Tensor:
    rounded = round_to_e4m3_(scale.clamp_max_(E4M3_MAX).contiguous())
    return torch.where(block_amax.isfinite(), rounded, torch.nan)


def _factor(scale: Tensor, encode: Tensor) -> Tensor:
    return (scale * encode.reciprocal()).reciprocal_().clamp_max_(FLT_MAX)


def _error(x: Tensor, blocks: Blocks, scale: Tensor, factor: Tensor, amax: Tensor) -> Tensor:
    x = x.view(blocks.shape)
    scale, factor, amax = (t.reshape(blocks.grid_view) for t in (scale, factor, amax))
    result = torch.empty_like(scale)
    for part in blocks.parts(x.device):
        y = (x[part] * factor[part]).clamp_(-E2M1_MAX, E2M1_MAX)
        decoded = round_to_nearest_(y).mul_(scale[part]).mul_(amax[part])
        error = divide(decoded, E2M1_MAX * E4M3_MAX_FOUR_OVER_SIX).sub_(x[part]).abs_()
        along = blocks.inner[-1]
        total = torch.zeros_like(error.narrow(along, 0, 1))
        for i in range(BLOCK):
            total += error.narrow(along, i, 1)
        if len(blocks.inner) == 2:
            while total.shape[1] > 1:
                low, high = total.chunk(2, dim=1)
                total = low + high
        result[part] = total
    return result.view(blocks.grid)
