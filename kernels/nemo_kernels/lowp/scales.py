"""Block scales and the factors elements are multiplied with before they are rounded.

A tensor is looked at as [L, ...] blocks, where L is the first dimension along which it can be cut
into parts without cutting a block; the "grid" has one number per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kernels.lowp.rounding import E2M1_MAX, round_to_e4m3_

BLOCK = 16
E4M3_MAX = 448.0
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
    # PyTorch calculates number / tensor as the number times 1 / tensor, which is not the same.
    encode = (torch.full_like(amax, E2M1_MAX * E4M3_MAX) / amax).clamp_max_(FLT_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    sixth = torch.full_like(encode, E2M1_MAX).reciprocal_()
    scale = (block_amax * (encode * sixth)).clamp_max_(E4M3_MAX).contiguous()
    scale = torch.where(block_amax.isfinite(), round_to_e4m3_(scale), torch.nan)
    factor = (scale * encode.reciprocal()).reciprocal_().clamp_max_(FLT_MAX)
    return scale, factor


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once; on a GPU, PyTorch multiplies by 1 / by if that is a Python number."""
    return x / torch.full((), by, device=x.device)
