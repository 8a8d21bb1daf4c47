"""How a matrix is quantized for a product, and what a product takes of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
