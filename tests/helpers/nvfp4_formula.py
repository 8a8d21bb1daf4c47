"""TransformerEngine's NVFP4 formula restated in numpy, from its documentation; and test data.

Nothing is shared with the package: elements and scales are rounded by searching tables with
float64 numbers, the transform is a matrix. fp32 arithmetic is numpy's, one rounding per operation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

F = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)
TE_SIGNS = "+++-+------+-+--"


@dataclass(frozen=True)
class Formula:
    """Its constants, so that a test can change one and see that this is noticed."""

    e2m1_max: float = 6.0
    e4m3_max: float = 448.0
    sixth_first: bool = True
    """amax_b * (encode * (1/6)); else (amax_b / 6) * encode."""
    rounded_factor: bool = True
    """x * (1 / (s * (1 / encode))); else x * encode / s."""

    def encode_scale(self, amax: float) -> np.float32:
        if amax == 0:
            return F(1)
        return min(F(self.e2m1_max * self.e4m3_max) / F(amax), np.finfo(F).max)

    def scales(self, block_amax: np.ndarray, amax: float) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the block scales, and the factor of each block's elements."""
        encode, sixth = self.encode_scale(amax), F(1) / F(self.e2m1_max)
        block_amax = block_amax.astype(F)
        if self.sixth_first:
            wanted = block_amax * (encode * sixth)
        else:
            wanted = block_amax / F(self.e2m1_max) * encode
        codes = nearest(np.minimum(wanted, F(448)), E4M3)
        scale = E4M3[codes].astype(F)
        with np.errstate(divide="ignore", over="ignore"):
            if self.rounded_factor:
                factor = F(1) / (scale * (F(1) / encode))
            else:
                factor = encode / scale
        return codes, np.minimum(factor, np.finfo(F).max)

    def quantize(self, x: np.ndarray, tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(codes [N, K], codes of block scales [N, K/16]) of fp32 [N, K]."""
        rows, width = tile
        tiles = np.abs(x).reshape(len(x) // rows, rows, -1, width)
        codes, factor = self.scales(tiles.max(axis=(1, 3)), np.abs(x).max())
        codes, factor = codes.repeat(rows, axis=0), factor.repeat(rows, axis=0)
        with np.errstate(over="ignore"):
            y = x * factor.repeat(width, axis=1)
        return e2m1_codes(y), codes


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending table to each x >= 0, of two the even one."""
    x = np.minimum(x.astype(np.float64), table[-1])
    upper = np.searchsorted(table, x).clip(1)
    below, above = x - table[upper - 1], table[upper] - x
    return upper - ((below < above) | ((below == above) & (upper % 2 == 1)))


def e2m1_codes(y: np.ndarray) -> np.ndarray:
    return nearest(np.abs(y), E2M1) + 8 * np.signbit(y)


def hadamard(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """x [N, K] in fp32 times the signed 16x16 matrix, in fp32 as the package's order demands."""
    signs = np.array([1 if sign == "+" else -1 for sign in TE_SIGNS], dtype=F)
    t = x.reshape(-1, 16) * (signs * F(0.25))
    for h in (1, 2, 4, 8):
        place = np.arange(16)
        partner = t[:, place ^ h]
        t = np.where(place & h, partner - t, t + partner)
    return torch.from_numpy(t.reshape(x.shape)).to(dtype).float().numpy()


def decades(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers times powers of ten along both dimensions, with blocks, rows and columns of
    zeros and with blocks so small that their scale is 0 or one of E4M3's subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= 10 ** torch.empty(rows, 1).uniform_(-2, 2, generator=generator)
    x *= 10 ** torch.empty(1, columns).uniform_(-1, 1, generator=generator)
    x[:32, :48] = 0
    x[32:64, 16:64] *= 1e-9
    x[64:128] *= 10 ** torch.linspace(-7, -2, columns)
    x[5], x[:, 7] = 0, 0
    return x.to(dtype)
