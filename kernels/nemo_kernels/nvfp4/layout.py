"""NVFP4 tensors as Blackwell's matrix instructions read them: packed codes and swizzled scales.

Block scales are grouped in atoms of 128 rows by 4 blocks, 512 bytes each, in which the scale of row
r and block k has the place (r mod 32) * 16 + (r div 32) * 4 + k: the "1D block scaling factors
layout" of cuBLAS, which the tensor core copies to its memory as it is.

Shapes: R rows, K the summed dimension, A = ceil(R / 128) and C = ceil(K / 64) atoms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kernels.nvfp4.scales import BLOCK

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
        scale: float8_e4m3fn [.., A, C, 512], contiguous; :func:`swizzle`. The padding is zero.
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


def swizzle(block_scale: Tensor) -> Tensor:
    """Scales in plain order [.., R, K/16], of a type of one byte, in atoms [.., A, C, 512].

    Raises:
        ValueError: fewer than two dimensions, or another size of element.
    """
    if block_scale.dim() < 2 or block_scale.element_size() != 1:
        raise ValueError(
            "block_scale: expected at least 2 dimensions of a type of one byte, got "
            f"{list(block_scale.shape)} of {block_scale.dtype}"
        )
    *outer, rows, blocks = block_scale.shape
    n_rows, n_columns = atoms(rows, blocks * BLOCK)
    padded = torch.zeros(
        (*outer, n_rows * ATOM_ROWS, n_columns * ATOM_BLOCKS),
        dtype=torch.uint8,
        device=block_scale.device,
    )
    padded[..., :rows, :blocks] = block_scale.view(torch.uint8)
    # [A, r div 32, r mod 32, C, k] to [A, C, r mod 32, r div 32, k]; r in the atom
    parts = padded.unflatten(-2, (n_rows, 4, 32)).unflatten(-1, (n_columns, ATOM_BLOCKS))
    return parts.transpose(-4, -2).flatten(-3).view(block_scale.dtype)


def unswizzle(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Undoes :func:`swizzle`: [.., A, C, 512] to [.., R, K/16].

    Raises:
        ValueError: scale has not the atoms of so many rows and blocks.
    """
    n_rows, n_columns = atoms(rows, blocks * BLOCK)
    if scale.dim() < 3 or scale.shape[-3:] != (n_rows, n_columns, ATOM_BYTES):
        raise ValueError(
            f"scale: expected shape [.., {n_rows}, {n_columns}, {ATOM_BYTES}], got "
            f"{list(scale.shape)}"
        )
    parts = scale.view(torch.uint8).unflatten(-1, (32, 4, ATOM_BLOCKS))
    plain = parts.transpose(-4, -2).flatten(-2).flatten(-4, -2)
    return plain[..., :rows, :blocks].contiguous().view(scale.dtype)
