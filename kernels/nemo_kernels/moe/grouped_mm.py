"""Mixture-of-experts operations over ``torch.nn.functional.grouped_mm``.

Group sizes stay on the device: nothing waits for a GPU. Matrix products take the inputs' dtype
(bf16 on a GPU) and round their results to it; the passes between them are in fp32.

Shapes as in ``reference``.
"""

from __future__ import annotations

from functools import partial

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
    "DEVICE_TYPES", "combine_slots", "grouped_mlp", "moe_mlp", "self_check", "sort_slots",
    "supports", "topk_router",
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
        """Raises ValueError for rows that cannot be aligned."""
        dtype, (n_experts, *widths) = routed.x_TL.dtype, routed.w_up_EFL.shape
        if not supports(dtype, n_experts, 1, *widths):
            raise ValueError(
                f"w_up_EFL: expected widths in multiples of {_ALIGNMENT // dtype.itemsize} for "
                f"{dtype} (path grouped_mm of op moe), got {[n_experts, *widths]}; path reference "
                "takes any"
            )
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


grouped_mlp = partial(function.grouped_mlp, GroupedMMExperts())
moe_mlp = partial(function.moe_mlp, GroupedMMExperts(), sort=sort_slots)


def self_check(device_type: str, sizes: Sizes) -> float:
    """Largest deviation from the reference; see ``function.self_check``."""
    return function.self_check(moe_mlp, reference.moe_mlp, device_type, sizes)


def supports(dtype: torch.dtype, n_experts: int, k: int = 1, *widths: int) -> bool:
    """Whether rows of these widths (F and L, or none) can be aligned."""
    return all(width % (_ALIGNMENT // dtype.itemsize) == 0 for width in widths)
