"""Mixture-of-experts operations over ``torch.nn.functional.grouped_mm``.

Group sizes stay on the device: nothing waits for a GPU. Matrix products take the inputs' dtype
(bf16 on a GPU) and round their results to it; the passes between them are in fp32.

Shapes as in ``reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from nemo_kernels.backend import Sizes
from nemo_kernels.moe import function, reference
from nemo_kernels.moe.function import Experts, Gradients, Routed, Wanted
from nemo_kernels.moe.reference import (
    accumulation_dtype,
    combine_slots,
    sort_slots,
    topk_router,
)

__all__ = [
    "DEVICE_TYPES", "combine_slots", "experts_for", "refusal", "self_check", "sort_slots",
    "topk_router",
]  # fmt: skip

DEVICE_TYPES = ("cuda", "cpu")
_ALIGNMENT = 16
"""Bytes to which grouped_mm needs rows aligned on a GPU."""


class GroupedMMExperts(Experts):
    """The expert MLP, all experts in each matrix product."""

    def groups(self, counts_E: Tensor, n_rows: int) -> Tensor:
        return counts_E.cumsum(0).int()

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor]:
        h_RF, dtype = self.pre_activation(routed), routed.x_TL.dtype
        act_RF = h_RF.to(accumulation_dtype(h_RF)).relu()
        act_RF = act_RF.square_().mul_(routed.weight_R[:, None]).to(dtype)
        return _of_rows(act_RF, routed.down_ELF.mT, routed.groups), h_RF

    def pre_activation(self, routed: Routed) -> Tensor:
        return _of_rows(routed.rows(routed.x_TL), routed.up_EFL.mT, routed.groups)

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        dtype, acc, groups = h_RF.dtype, accumulation_dtype(h_RF), routed.groups
        dy_RL, weight_R1 = routed.rows(dy_TL), routed.weight_R[:, None]
        relu_RF = h_RF.to(acc).relu()
        dh_RF = _of_rows(dy_RL, routed.down_ELF, groups).to(acc).mul_(relu_RF)
        dweight_R = torch.linalg.vecdot(dh_RF, relu_RF)
        dup_EFL = ddown_ELF = None
        if wanted[1]:
            act_RF = relu_RF.square_().mul_(weight_R1).to(dtype)
            ddown_ELF = _of_experts(dy_RL, act_RF, groups)
        dh_RF = dh_RF.mul_(2 * weight_R1).to(dtype)
        dx_RL = _of_rows(dh_RF, routed.up_EFL, groups)
        if wanted[0]:
            dup_EFL = _of_experts(dh_RF, routed.rows(routed.x_TL), groups)
        return dx_RL, dweight_R, dup_EFL, ddown_ELF

    def rows(self, a_RM: Tensor, b_EMN: Tensor, groups: Tensor) -> Tensor:
        return _of_rows(a_RM, b_EMN, groups)

    def sums(self, a_RM: Tensor, b_RN: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
        return _of_experts(a_RM, b_RN, groups).to(dtype)


def _of_rows(a_RM: Tensor, b_EMN: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's matrix. Torch refuses none on a GPU (pytorch issue 192497)."""
    if not len(a_RM):
        return a_RM.new_empty(0, b_EMN.shape[-1])
    return grouped_mm(a_RM, b_EMN, offs=ends_E)


def _of_experts(a_RM: Tensor, b_RN: Tensor, ends_E: Tensor) -> Tensor:
    """a^T b of each expert's rows. On Blackwell torch leaves the result of one without rows as it
    finds the memory (pytorch issue 172439)."""
    if not len(a_RM):
        return a_RM.new_zeros(len(ends_E), a_RM.shape[1], b_RN.shape[1])
    empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
    return grouped_mm(a_RM.t(), b_RN, offs=ends_E).masked_fill_(empty_E[:, None, None], 0)


def experts_for(x: Tensor, n_rows: int, n_experts: int, *widths: int) -> Experts:
    return GroupedMMExperts()


def self_check(device_type: str, sizes: Sizes) -> float:
    """Largest deviation from the reference; see ``function.self_check``."""
    by = (GroupedMMExperts(), sort_slots)
    return function.self_check(by, (reference.LoopExperts(), sort_slots), device_type, sizes)


def refusal(dtype: torch.dtype, n_experts: int, k: int = 1, *widths: int) -> str:
    """Rows of these widths have to be aligned."""
    step = _ALIGNMENT // dtype.itemsize
    wrong = any(width % step for width in widths)
    return f"expected widths in multiples of {step} for {dtype}, got {list(widths)}" * wrong
