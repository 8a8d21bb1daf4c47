"""Products in low precision: NVFP4, and MXFP8 and bf16 emulated beside it.

NVFP4 has E2M1 elements, an E4M3 scale per block of 16 of them and an fp32 scale per tensor;
``reference`` is its specification. This module is what training takes of it, by the path that
``backend`` chooses for op "nvfp4": operands, quantized as they are needed, and products of them. An
operand goes only to products of the path that made it; but every path names in ``EMULATION`` what
multiplies `operand.Operand`, which is how products of other formats (:mod:`.mxfp8`) are emulated.

Shapes: M, N dimensions of a product, K that it sums over; P rows of E experts' segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.lowp.operand import Operand, Rounding, multiplier

PATHS = {"transformer_engine": "nemo_kernels.lowp.external", "triton": "nemo_kernels.lowp.kernel"}


def segment_alignment(device_type: str) -> int:
    """Rows by which each expert's segment must be divisible."""
    return int(_path(device_type).SEGMENT_ALIGNMENT)


def native(device_type: str) -> bool:
    """Whether products run on units for NVFP4; else they are emulated."""
    return bool(_path(device_type).NATIVE)


def operands(
    x: Tensor, rows: Rounding | None, columns: Rounding | None, ends_E: Tensor | None = None
) -> tuple[Operand | None, Operand | None]:
    """x, quantized for products that sum over its last dimension, and over the one before.

    Args:
        x: fp32, bf16 or fp16 [M, N]; or experts' weights [E, M, N], each with a tensor scale.
        rows: how to quantize it in blocks along N; columns: along M. None: not.
        ends_E: int32. x holds experts' rows, those of expert e end before row ends_E[e], and each
            expert's have a tensor scale. Ends are multiples of `segment_alignment`; rows after the
            last one must be zeros.

    Returns:
        The two operands; what they hold is the path's business. With 16x16 blocks they have the
        same codes. Elements count by their place in x for the random bits of both.

    Raises:
        ValueError: a dimension is not divisible by 16, or a dtype or a shape is not as described.
    """
    a, b = _path(x.device.type).operands(x, rows, columns, ends_E)
    return a, b


def product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """a b^T [M, N] of operands over [M, K] and [N, K]: sums in fp32, rounded once to dtype."""
    result: Tensor = multiplier(_path(a[0].device.type), a, b).product(a, b, dtype)
    return result


def grouped_product(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Row p of expert e times b[e]^T: [P, N], of a over [P, K] and b over [E, N, K]. Zeros after
    the last end."""
    path = multiplier(_path(ends_E.device.type), a, b)
    result: Tensor = path.grouped_product(a, b, ends_E, dtype)
    return result


def grouped_wgrad(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over each expert's rows of outer products: [E, M, N], of a over [M, P], b over [N, P]."""
    path = multiplier(_path(ends_E.device.type), a, b)
    result: Tensor = path.grouped_wgrad(a, b, ends_E, dtype)
    return result


def _path(device_type: str) -> Any:
    return backend.implementation("nvfp4", device_type)
