"""Operands and products of a layer in the format of each of its passes.

Shapes: M, N dimensions of a tensor or a product; P rows of E experts' segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.precision.formats import Format, Ingredients, PassFormats
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.precision.streams import Streams
from nemo_kernels import mxfp8, nvfp4
from nemo_kernels.nvfp4.operand import Operand, Rounding

_NEAREST = Rounding()


class Side(NamedTuple):
    """How a tensor is to be taken by products that sum over one of its dimensions."""

    format: Format
    rounding: Rounding = _NEAREST


class Products:
    """Makes the operands of one layer and multiplies them.

    Which operand gets what is the table of arXiv 2509.25149 and TransformerEngine's recipe: weights
    in blocks of 16x16; wgrad's operands transformed; gradients rounded stochastically, in dgrad
    and wgrad independently; all else in blocks of 1x16, to nearest.
    """

    def __init__(
        self,
        name: str,
        formats: PassFormats,
        ingredients: Ingredients,
        streams: Streams,
        probe: Probe | None = None,
    ) -> None:
        self.name, self.formats, self.ingredients = name, formats, ingredients
        self.streams, self.probe = streams, probe
        self._weight = Rounding((16, 16) if ingredients.two_dimensional_weights else (1, 16))
        self._transformed = Rounding(rht=ingredients.rht)

    def forward_input(self, x: Tensor, ends_E: Tensor | None = None) -> Any:
        """x, for the forward pass."""
        return self._operands("x", x, Side(self.formats.forward), None, ends_E)[0]

    def forward_weight(self, weight: Tensor) -> Any:
        return self._operands("w", weight, Side(self.formats.forward, self._weight), None)[0]

    def dgrad_weight(self, weight: Tensor) -> Any:
        return self._operands("w", weight, None, Side(self.formats.dgrad, self._weight))[1]

    def wgrad_input(self, x: Tensor, ends_E: Tensor | None = None) -> Any:
        return self._operands("x", x, None, Side(self.formats.wgrad, self._transformed), ends_E)[1]

    def gradient(
        self,
        dy: Tensor,
        use: tuple[object, ...],
        operand: str,
        ends_E: Tensor | None = None,
        *,
        wgrad: bool,
    ) -> tuple[Any, Any]:
        """dy, for dgrad and, if asked, for wgrad. ``use``: of this backward pass, see `Streams`."""
        rows, columns = _NEAREST, self._transformed
        if self.ingredients.stochastic_rounding:
            rows = rows._replace(seed=self.streams.seed(use, f"{operand} dgrad"))
            columns = columns._replace(seed=self.streams.seed(use, f"{operand} wgrad"))
        for_wgrad = Side(self.formats.wgrad, columns) if wgrad else None
        return self._operands("dy", dy, Side(self.formats.dgrad, rows), for_wgrad, ends_E)

    def _operands(
        self,
        role: str,
        x: Tensor,
        rows: Side | None,
        columns: Side | None,
        ends_E: Tensor | None = None,
    ) -> tuple[Any, Any]:
        if self.probe is not None and self.probe.active:
            for side, columnwise in ((rows, False), (columns, True)):
                if side is not None and side.format == "nvfp4":
                    self.probe.operand(self.name, role, x, side.rounding, columnwise, ends_E)
        return operands(x, rows, columns, ends_E)


def operands(
    x: Tensor, rows: Side | None, columns: Side | None, ends_E: Tensor | None = None
) -> tuple[Any, Any]:
    """x for products that sum over its last dimension, and over the one before; one read of x where
    both are NVFP4."""
    if rows and columns and rows.format == columns.format == "nvfp4":
        return nvfp4.operands(x, rows.rounding, columns.rounding, ends_E)
    return (
        None if rows is None else _MAKE[rows.format](x, rows.rounding, False, ends_E),
        None if columns is None else _MAKE[columns.format](x, columns.rounding, True, ends_E),
    )


def _nvfp4(x: Tensor, rounding: Rounding, columnwise: bool, ends_E: Tensor | None) -> Any:
    if columnwise:
        return nvfp4.operands(x, None, rounding, ends_E)[1]
    return nvfp4.operands(x, rounding, None, ends_E)[0]


def _mxfp8(x: Tensor, rounding: Rounding, columnwise: bool, ends_E: Tensor | None) -> Any:
    return mxfp8.operands(x, rows=not columnwise, columns=columnwise)[columnwise]


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(x: Tensor, rounding: Rounding, columnwise: bool, ends_E: Tensor | None) -> Operand:
        return Operand(x.to(dtype), None, columnwise)

    return cast


_MAKE: dict[str, Callable[..., Any]] = {
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "bf16": _cast(torch.bfloat16),
    "fp32": _cast(torch.float32),
}
