"""Products of emulated operands on a GPU: as :mod:`.emulation`'s, but grouped ones by the Triton
kernels of ``moe``. Sizes of segments stay on the device, so that nothing waits for it.

Shapes: P rows of E experts' segments, K and N widths, M and N those of a weight gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels.lowp.emulation import product
from nemo_kernels.lowp.operand import Operand
from nemo_kernels.moe import expert_kernel, kernel
from nemo_kernels.moe.sort_kernel import tile_table

__all__ = ["grouped_product", "grouped_wgrad", "product"]


def grouped_product(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`.emulation.grouped_product`."""
    a_PK, b_EKN = a.matrix.contiguous(), b.matrix.mT
    (n_rows, _), (n_experts, *widths) = a_PK.shape, b_EKN.shape
    tile = expert_kernel.plan(a_PK.dtype, n_rows, n_experts, *widths).up
    out_PN = a_PK.new_empty(n_rows, b_EKN.shape[2], dtype=torch.float32)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    kernel.product(tile, a_PK, tile_table(counts_E, n_rows, tile.m), b_EKN, out_PN)
    rows_P = torch.arange(n_rows, dtype=torch.int32, device=ends_E.device)
    expert_P = torch.searchsorted(ends_E, rows_P, right=True).clamp_max_(n_experts - 1)
    for scale in (a.tensor_scale, b.tensor_scale):
        if scale is not None:
            out_PN *= scale[expert_P][:, None]
    # Rows after the last end were not written.
    return torch.where((rows_P < ends_E[-1])[:, None], out_PN, 0).to(dtype)


def grouped_wgrad(a: Operand, b: Operand, ends_E: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`.emulation.grouped_wgrad`."""
    a_PM, b_PN = a.matrix.mT.contiguous(), b.matrix.mT.contiguous()
    n_experts, widths = ends_E.numel(), (b_PN.shape[1], a_PM.shape[1])
    tile = expert_kernel.plan(a_PM.dtype, len(a_PM), n_experts, *widths).wgrad
    out_EMN = a_PM.new_empty(n_experts, a_PM.shape[1], b_PN.shape[1], dtype=torch.float32)
    rows_P = torch.arange(len(a_PM), dtype=torch.int32, device=ends_E.device)
    kernel.wgrad(tile, a_PM, b_PN, rows_P, ends_E, out_EMN)
    for scale in (a.tensor_scale, b.tensor_scale):
        if scale is not None:
            out_EMN *= scale[:, None, None]
    return out_EMN.to(dtype)
