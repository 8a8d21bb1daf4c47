"""The 16x16 random Hadamard transform of the weight gradient's operands.

``x @ (S H) / 4`` for every 16 values: H the Sylvester matrix of +1 and -1, S the diagonal matrix of
TransformerEngine's signs (custom_recipes/reference_nvfp4.py). Both operands of a product have it
along the summed dimension; it is orthogonal, so the product stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels.lowp.scales import BLOCK, parts

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_MINUS = sum(1 << place for place, sign in enumerate(SIGNS) if sign < 0)


def transform(x: Tensor, dim: int) -> Tensor:
    """The transform of every 16 consecutive values along a dimension.

    Calculated in fp32 in this order, and rounded once to x's dtype: x_k sign_k / 4, then for
    h = 1, 2, 4, 8 each pair whose places differ by h becomes (sum, difference).

    Raises:
        ValueError: the dimension is not divisible by 16.
    """
    blocks, signs = _blocks(x, dim), _signs(x)
    result = torch.empty_like(blocks)
    for part in parts(blocks.shape, x.device):
        result[part] = _butterflies(blocks[part].float() * signs)
    return result.view(x.shape)


def _blocks(x: Tensor, dim: int) -> Tensor:
    """x as [before, 16, after]: places within a block along the middle dimension."""
    if x.shape[dim] % BLOCK:
        raise ValueError(
            f"x: expected dimension {dim} divisible by {BLOCK}, got {x.shape[dim]} "
            f"(shape {list(x.shape)})"
        )
    return x.contiguous().view(-1, BLOCK, x.shape[dim % x.dim() + 1 :].numel())


def _signs(x: Tensor) -> Tensor:
    """sign_k / 4 as a column, made without a copy from the host."""
    minus = _MINUS >> torch.arange(16, device=x.device) & 1
    return (0.25 - 0.5 * minus).view(16, 1)


def _butterflies(t: Tensor) -> Tensor:
    shape = t.shape
    for h in (1, 2, 4, 8):
        t = t.view(-1, 8 // h, 2, h, shape[-1])
        low, high, result = t[:, :, 0], t[:, :, 1], torch.empty_like(t)
        torch.add(low, high, out=result[:, :, 0])
        torch.sub(low, high, out=result[:, :, 1])
        t = result
    return t.view(shape)
