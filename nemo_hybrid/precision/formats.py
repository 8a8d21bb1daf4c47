"""Number formats of a layer's three matrix products, and what the NVFP4 recipe adds to them."""

from typing import Literal, NamedTuple

Format = Literal["bf16", "fp32", "nvfp4", "mxfp8"]
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
