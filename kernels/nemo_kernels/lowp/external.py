"""NVFP4 by Transformer Engine's quantizers and cuBLAS products, on sm_100 and later.

Not run yet: written from the library's public interface (NVFP4Quantizer, general_gemm; 2.x of
August 2026). Its formulas are those of :mod:`.reference`; its random bits are others, drawn from
CUDA's default generator, which is seeded for each operand and restored. Experts are quantized and
multiplied one after the other, which waits for the GPU to tell where their rows end.

Shapes: M, N dimensions of a product, K that it sums over; P rows of E experts' segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformer_engine.pytorch import NVFP4Quantizer
from transformer_engine.pytorch.cpp_extensions import general_gemm

from nemo_kernels.backend import Sizes, draw
from nemo_kernels.lowp import emulation, grouped, layout, reference
from nemo_kernels.lowp.operand import Rounding

EMULATION = grouped
DEVICE_TYPES = ("cuda",)
NATIVE = True
SEGMENT_ALIGNMENT = layout.SEGMENT_ALIGNMENT


class Native(NamedTuple):
    """A quantized tensor and which of its sides products take.

    Fields:
        tensor: the library's NVFP4 tensor, or a list of them, one per expert (None: without rows).
        shape: of all of it, as it was before.
    """

    tensor: Any
    shape: torch.Size
    columnwise: bool


def operands(
    x: Tensor, rows: Rounding | None, columns: Rounding | None, ends_E: Tensor | None = None
) -> tuple[Native | None, Native | None]:
    """:func:`nemo_kernels.lowp.operands`. The library transforms bf16 only, so that x is rounded
    to it where ``columns`` has a Hadamard transform.

    Raises:
        ValueError: a transform of rows.
    """
    if rows is not None and rows.rht:
        raise ValueError("rows: expected rht=False, got True")
    if rows and columns and not _alike(rows, columns):
        return operands(x, rows, None, ends_E)[0], operands(x, None, columns, ends_E)[1]
    how = rows or columns
    if how is None:
        return None, None
    rht = columns is not None and columns.rht
    quantizer = NVFP4Quantizer(
        rowwise=rows is not None,
        columnwise=columns is not None,
        with_rht=rht,
        with_post_rht_amax=rht,
        with_2d_quantization=how.tile[0] > 1,
        stochastic_rounding=how.seed is not None,
    )
    x = x.detach().contiguous()
    if rht:
        x = x.to(torch.bfloat16)
    with torch.random.fork_rng(devices=[x.device], enabled=how.seed is not None):
        if how.seed is not None:
            torch.cuda.manual_seed(how.seed)
        if x.dim() == 2 and ends_E is None:
            made = quantizer(x)
        else:
            parts = list(x) if ends_E is None else [x[part] for part in emulation.segments(ends_E)]
            made = [quantizer(part) if part.numel() else None for part in parts]
    return (
        None if rows is None else Native(made, x.shape, False),
        None if columns is None else Native(made, x.shape, True),
    )


def product(a: Native, b: Native, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.product`; see :func:`_product`."""
    return _product(a.tensor, a.columnwise, b.tensor, b.columnwise, dtype)


def grouped_product(a: Native, b: Native, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.grouped_product`."""
    width = b.shape[-1 if b.columnwise else -2]
    out_PN = torch.zeros(a.shape[0], width, dtype=dtype, device=ends_E.device)
    for rows, one, weight in zip(emulation.segments(ends_E), a.tensor, b.tensor, strict=True):
        if one is not None:
            out_PN[rows] = _product(one, a.columnwise, weight, b.columnwise, dtype)
    return out_PN


def grouped_wgrad(a: Native, b: Native, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`nemo_kernels.lowp.grouped_wgrad`."""
    size = (len(a.tensor), a.shape[-1], b.shape[-1])
    out_EMN = torch.zeros(size, dtype=dtype, device=ends_E.device)
    for out_MN, one, other in zip(out_EMN, a.tensor, b.tensor, strict=True):
        if one is not None:
            out_MN.copy_(_product(one, True, other, True, dtype))
    return out_EMN


def self_check(device_type: str, _: Sizes) -> float:
    """Largest deviation of products from the reference's, which has the same codes.

    Raises:
        RuntimeError: the GPU has no units for NVFP4.
    """
    if torch.cuda.get_device_capability() < (10, 0):
        raise RuntimeError("needs a GPU of compute capability 10.0 or later")
    x, w = draw(device_type, (256, 256), (256, 256))
    results = []
    for path in (operands, reference.operands):
        multiply: Any = product if path is operands else reference.product
        rows, columns = path(x, Rounding(), Rounding(rht=True))
        weight, transposed = path(w, Rounding((16, 16)), Rounding((16, 16)))
        pairs = (rows, weight), (rows, transposed), (columns, columns)
        results.append([multiply(*pair, torch.float32) for pair in pairs])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def _alike(rows: Rounding, columns: Rounding) -> bool:
    """Whether one quantizer makes both; of their seeds it takes the first."""
    return rows.tile == columns.tile and (rows.seed is None) == (columns.seed is None)


def _product(a: Any, a_columnwise: bool, b: Any, b_columnwise: bool, dtype: torch.dtype) -> Tensor:
    """Raises ValueError where a is blocked along its columns and b is not: cuBLAS has no such."""
    if a_columnwise and not b_columnwise:
        raise ValueError("b: expected columnwise like a, got blocks along rows")
    # The library's first operand is our second; "T" is the one whose blocks lie along rows.
    sides = f"{'N' if b_columnwise else 'T'}{'T' if a_columnwise else 'N'}"
    result: Tensor = general_gemm(b, a, out_dtype=dtype, layout=sides)[0]
    return result
