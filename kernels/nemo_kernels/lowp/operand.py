"""How a matrix is quantized for a product, and what a product takes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_kernels.checks import expect, may_read
from nemo_kernels.lowp.scales import BLOCK


class Rounding(NamedTuple):
    """How an operand is quantized; see :func:`.reference.quantize`."""

    tile: tuple[int, int] = (1, 16)
    rht: bool = False
    seed: int | None = None


class Operand(NamedTuple):
    """A matrix for a product that is emulated: ``values * tensor_scale``.

    Fields:
        values: bf16 code times block scale, or numbers that never were codes, in the layout of the
            tensor that was quantized: [M, N], or [E, M, N] for experts' weights.
        tensor_scale: fp32, to multiply: a scalar, or [E], one per expert; None: 1.
        columnwise: blocks, and so the dimension that a product sums over, lie along M, not N.
    """

    values: Tensor
    tensor_scale: Tensor | None
    columnwise: bool

    @property
    def matrix(self) -> Tensor:
        """The values with the dimension that is summed over last."""
        return self.values.mT if self.columnwise else self.values


def multiplier(path: Any, a: object, b: object) -> Any:
    """The module that multiplies two operands which a path made: the path, or where they are
    emulated what it names for that. Raises ValueError for one of each."""
    kinds = {isinstance(x, Operand) for x in (a, b)}
    if len(kinds) > 1:
        raise ValueError("operands: expected both emulated or neither, got one of each")
    return path.EMULATION if kinds.pop() else path


def expect_ends(ends_E: Tensor, n_rows: int, alignment: int = BLOCK) -> None:
    """Raise ValueError unless these are the ends of segments of so many rows; values are looked at
    on CPU tensors and in debug mode."""
    expect("ends_E", ends_E, (None,), torch.int32)
    if not may_read(ends_E):
        return
    ends = [0, *ends_E.tolist(), n_rows]
    if ends != sorted(ends) or any(end % alignment for end in ends[:-1]):
        raise ValueError(
            f"ends_E: expected multiples of {alignment} that rise to {n_rows} at most, "
            f"got {ends[1:-1]}"
        )
