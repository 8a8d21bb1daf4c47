"""NVFP4 in Triton: quantizers that equal :mod:`.reference` bit for bit, and products.

On chips with units for NVFP4 (sm_100, sm_103), operands are packed and products are native; on
others an operand holds decoded values in bf16, which are exact, and products are emulated. What the
quantizers do not take, such as a transform along rows, goes to the reference.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor

from nemo_kernels.backend import Sizes, draw
from nemo_kernels.lowp import gemm_kernel, grouped, layout, quantize_kernel, reference
from nemo_kernels.lowp.layout import Packed
from nemo_kernels.lowp.operand import Operand, Rounding, multiplier
from nemo_kernels.lowp.quantize_kernel import Result
from nemo_kernels.lowp.scales import BLOCK

EMULATION = grouped
product, grouped_product = gemm_kernel.gemm, gemm_kernel.grouped_rows
grouped_wgrad = gemm_kernel.grouped_wgrad
DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
NATIVE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 10
SEGMENT_ALIGNMENT = layout.SEGMENT_ALIGNMENT if NATIVE else BLOCK
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_COLUMNS = 2**31 // 64
"""Within a program's rows, places are int32."""


def operands(
    x: Tensor, rows: Rounding | None, columns: Rounding | None, ends_E: Tensor | None = None
) -> tuple[Operand | Packed | None, Operand | Packed | None]:
    """:func:`nemo_kernels.lowp.operands`; x is read once for maxima and once for all results."""
    takes = x.dim() in (2, 3) and (x.dim() == 2 or ends_E is None)
    if not takes or not _takes(x, rows, columns):
        return reference.operands(x, rows, columns, ends_E)
    x_EMN = x.detach().contiguous().view(-1, *x.shape[-2:])
    if rows is not None and columns is not None and rows.tile != columns.tile:
        return operands(x, rows, None, ends_E)[0], operands(x, None, columns, ends_E)[1]
    made = quantize_kernel.quantize(x_EMN, rows, columns, ends_E, packed=NATIVE)
    scalar = x.dim() == 2 and ends_E is None
    return _operand(made[0], x, False, scalar), _operand(made[1], x, True, scalar)


def self_check(device_type: str, sizes: Sizes) -> float:
    """Deviation of products from the reference's; infinity where quantized values differ."""
    steps = sizes.tokens // 128
    x, w_ENK = draw(device_type, (128 * steps, 256 * steps), (2, 96, 256 * steps))
    ends_E = torch.tensor([0, 128 * steps], dtype=torch.int32, device=device_type)
    rows, columns = Rounding(seed=1), Rounding(rht=True, seed=2)
    for sides in ((rows, columns), (Rounding((16, 16)), None)):
        made = quantize_kernel.quantize(x[None], *sides, packed=False)
        for found, wanted in zip(made, reference.operands(x, *sides), strict=True):
            if found is None or wanted is None or wanted.tensor_scale is None:
                continue
            same_scale = torch.equal(found.tensor_scale[0], wanted.tensor_scale)
            if not same_scale or not torch.equal(found.data[0], wanted.values):
                return torch.inf

    def products(path: Any) -> list[Tensor]:
        a, transposed = path.operands(x, rows, columns)
        b, _ = path.operands(w_ENK[0], Rounding(), None)
        of_experts, for_wgrad = path.operands(x, rows, columns, ends_E)
        weights, _ = path.operands(w_ENK, Rounding((16, 16)), None)
        by = multiplier(path, a, b)
        return [
            by.product(a, b, torch.float32),
            by.product(transposed, transposed, torch.float32),
            by.grouped_product(of_experts, weights, ends_E, torch.float32),
            by.grouped_wgrad(for_wgrad, for_wgrad, ends_E, torch.float32),
        ]

    pairs = zip(products(sys.modules[__name__]), products(reference), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _takes(x: Tensor, rows: Rounding | None, columns: Rounding | None) -> bool:
    """Whether the kernels quantize a matrix, or several, so."""
    hows = [how for how in (rows, columns) if how is not None]
    in_blocks = columns is not None or any(how.tile[0] > 1 for how in hows)
    return (
        x.dtype in _DTYPES
        and x.shape[-1] % BLOCK == 0
        and x.shape[-1] <= _MAX_COLUMNS
        and not (in_blocks and x.shape[-2] % BLOCK)
        and all(tuple(how.tile) in ((1, BLOCK), (BLOCK, BLOCK)) for how in hows)
        and not (rows is not None and rows.rht)
        and not (columns is not None and columns.rht and columns.tile[0] > 1)
    )


def _operand(
    made: Result | None, x: Tensor, columnwise: bool, scalar: bool
) -> Operand | Packed | None:
    if made is None:
        return None
    tensor_scale = made.tensor_scale.view(()) if scalar else made.tensor_scale
    if made.scale is None:
        return Operand(made.data.view(x.shape), tensor_scale, columnwise)
    data, scale = (made.data, made.scale) if x.dim() == 3 else (made.data[0], made.scale[0])
    return Packed(data, scale, tensor_scale)
