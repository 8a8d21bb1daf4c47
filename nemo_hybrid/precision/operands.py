"""Number formats of a layer's three matrix products, and the operands of each pass in its format.

Shapes: M, N dimensions of a tensor or a product; P rows of E experts' segments.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.precision.health import Probe
from nemo_kernels import lowp
from nemo_kernels.lowp import mxfp8
from nemo_kernels.lowp.operand import Operand, Rounding

Format = Literal["bf16", "fp32", "nvfp4", "mxfp8"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BLOCKS = {"bf16": 1, "fp32": 1, "nvfp4": 16, "mxfp8": 32}
"""By what number the dimension that a product sums over must be divisible."""


class PassFormats(NamedTuple):
    """Format of both operands: forward y = x W^T, dgrad dx = dy W, wgrad dW = dy^T x."""

    forward: Format
    dgrad: Format
    wgrad: Format


class Ingredients(NamedTuple):
    """What can be taken out of the NVFP4 recipe (arXiv 2509.25149 section 4), to see its worth."""

    rht: bool = True
    """The random Hadamard transform of both operands of wgrad."""
    stochastic_rounding: bool = True
    """Of gradients."""
    two_dimensional_weights: bool = True
    """Scales of weights per 16x16 block: forward and dgrad see the same weights."""


class Streams:
    """Seeds for stochastic rounding: another one for every tensor that is rounded in a run.

    They are made of (seed, rank, batch, micro-batch, layer, use, operand), so that a resumed run
    draws what one that never stopped would draw.

    Only gradients are rounded stochastically, and the backward pass of a layer's use happens once,
    whether its activations are recomputed or not. So uses are counted there.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._run = seed, rank
        self.start(0, 0)

    def start(self, batch: int, micro_batch: int) -> None:
        """Everything from here on belongs to this micro-batch of this global batch."""
        self._at = batch, micro_batch
        self._uses: dict[str, int] = {}

    def next_use(self, layer: str) -> tuple[object, ...]:
        """What to give to :meth:`seed` during one backward pass of a layer."""
        use = self._uses[layer] = self._uses.get(layer, -1) + 1
        return (*self._run, *self._at, use, layer)

    @staticmethod
    def seed(use: tuple[object, ...], operand: str) -> int:
        """64 bits for one operand, as a signed number."""
        digest = hashlib.blake2b(repr((*use, operand)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


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
        ends_E: Tensor | None = None,
        *,
        wgrad: bool,
    ) -> tuple[Any, Any]:
        """dy, for dgrad and, if asked, for wgrad. ``use``: of this backward pass, see `Streams`."""
        rows, columns = _NEAREST, self._transformed
        if self.ingredients.stochastic_rounding:
            rows = rows._replace(seed=self.streams.seed(use, "dy dgrad"))
            columns = columns._replace(seed=self.streams.seed(use, "dy wgrad"))
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
    """x for products that sum over its last dimension, and over the one before; one read of x for
    what is NVFP4."""
    low = [side.rounding if side and side.format == "nvfp4" else None for side in (rows, columns)]
    a, b = lowp.operands(x, low[0], low[1], ends_E) if any(low) else (None, None)
    return (
        a if low[0] else _operand(x, rows, False),
        b if low[1] else _operand(x, columns, True),
    )


def _operand(x: Tensor, side: Side | None, columnwise: bool) -> Any:
    """In another format."""
    if side is None:
        return None
    if side.format == "mxfp8":
        return mxfp8.operand(x, columnwise)
    return Operand(x.to(DTYPES[side.format]), None, columnwise)
