"""NVFP4 tensors as Blackwell's matrix instructions read them: packed codes and swizzled scales.

Block scales are grouped in atoms of 128 rows by 4 blocks, 512 bytes each, in which the scale of row
r and block k has the place (r mod 32) * 16 + (r div 32) * 4 + k: the "1D block scaling factors
layout" of cuBLAS, which the tensor core copies to its memory as it is.

Shapes: R rows, K the summed dimension, A = ceil(R / 128) and C = ceil(K / 64) atoms.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nemo_kernels.lowp.scales import BLOCK

ATOM_ROWS, ATOM_BLOCKS = 128, 4
ATOM_BYTES = ATOM_ROWS * ATOM_BLOCKS
ATOM_K = ATOM_BLOCKS * BLOCK
SEGMENT_ALIGNMENT = ATOM_ROWS
"""Rows to which each expert's segment must be padded: then no atom holds scales of two experts,
whether rows or the summed dimension are cut into segments."""


class Packed(NamedTuple):
    """An operand of a product, ready for the tensor core. Leading dimensions, if any, are experts.

    Fields:
        data: uint8 [.., R, K/2], contiguous: two codes per byte, the even element's in the low
            nibble.
        scale: float8_e4m3fn [.., A, C, 512], contiguous, in atoms. The padding is zero.
        tensor_scale: fp32 scalar, or [E]: one per expert.
    """

    data: Tensor
    scale: Tensor
    tensor_scale: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[.., R, K] of the tensor that is represented."""
        return (*self.data.shape[:-1], 2 * self.data.shape[-1])


def atoms(rows: int, k: int) -> tuple[int, int]:
    """(A, C) of a tensor of that many rows and columns."""
    return -(-rows // ATOM_ROWS), -(-k // ATOM_K)
