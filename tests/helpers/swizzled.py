"""Block scales of NVFP4 in the order in which Blackwell's matrix instructions read them, and back;
see ``nemo_kernels.lowp.layout``.

Shapes: R rows, K the summed dimension, A = ceil(R / 128) and C = ceil(K / 64) atoms.
"""

import torch
from torch import Tensor

from nemo_kernels.lowp.layout import ATOM_BLOCKS, ATOM_ROWS, atoms
from nemo_kernels.lowp.scales import BLOCK


def swizzle(block_scale: Tensor) -> Tensor:
    """Scales in plain order [.., R, K/16], of a type of one byte, in atoms [.., A, C, 512]."""
    *outer, rows, blocks = block_scale.shape
    n_rows, n_columns = atoms(rows, blocks * BLOCK)
    size = (*outer, n_rows * ATOM_ROWS, n_columns * ATOM_BLOCKS)
    padded = torch.zeros(size, dtype=torch.uint8, device=block_scale.device)
    padded[..., :rows, :blocks] = block_scale.view(torch.uint8)
    # [A, r div 32, r mod 32, C, k] to [A, C, r mod 32, r div 32, k]; r in the atom
    parts = padded.unflatten(-2, (n_rows, 4, 32)).unflatten(-1, (n_columns, ATOM_BLOCKS))
    return parts.transpose(-4, -2).flatten(-3).view(block_scale.dtype)


def unswizzle(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Undoes :func:`swizzle`: [.., A, C, 512] to [.., R, K/16]."""
    assert scale.shape[-3:-1] == atoms(rows, blocks * BLOCK)
    parts = scale.view(torch.uint8).unflatten(-1, (32, 4, ATOM_BLOCKS))
    plain = parts.transpose(-4, -2).flatten(-2).flatten(-4, -2)
    return plain[..., :rows, :blocks].contiguous().view(scale.dtype)
