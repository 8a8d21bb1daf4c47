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

from nemo_kernels.moe import function, reference
from nemo_kernels.moe.function import Gradients, Wanted
from nemo_kernels.moe.reference import accumulation_dtype, sort_slots, topk_router

__all__ = [
    "DEVICE_TYPES", "grouped_mlp", "moe_mlp", "self_check", "sort_slots", "supports", "topk_router",
]  # fmt: skip

DEVICE_TYPES = ("cuda", "cpu")
_ALIGNMENT = 16
"""Bytes to which grouped_mm needs rows aligned on a GPU."""


class GroupedMMExperts:
    """The expert MLP, all experts in each matrix product."""

    def groups(self, counts_E: Tensor) -> Tensor:
        return counts_E.cumsum(0).int()

    def forward(
        self, x_RL: Tensor, weights_R: Tensor, groups: Tensor, w_up_EFL: Tensor, w_down_ELF: Tensor
    ) -> tuple[Tensor, Tensor]:
        h_RF = self.pre_activation(x_RL, groups, w_up_EFL)
        act_RF = h_RF.to(accumulation_dtype(x_RL)).relu()
        act_RF = act_RF.square_().mul_(weights_R[:, None]).to(x_RL.dtype)
        return grouped_mm(act_RF, w_down_ELF.mT, offs=groups), h_RF

    def pre_activation(self, x_RL: Tensor, groups: Tensor, w_up_EFL: Tensor) -> Tensor:
        """Raises ValueError for rows that cannot be aligned."""
        n_experts, *widths = w_up_EFL.shape
        if not supports(x_RL.dtype, n_experts, 1, *widths):
            raise ValueError(
                f"w_up_EFL: expected widths in multiples of {_ALIGNMENT // x_RL.dtype.itemsize} "
                f"for {x_RL.dtype} (path grouped_mm of op moe), got {list(w_up_EFL.shape)}; path "
                "reference takes any"
            )
        return grouped_mm(x_RL, w_up_EFL.mT, offs=groups)

    def backward(
        self,
        dy_RL: Tensor,
        h_RF: Tensor,
        x_RL: Tensor,
        weights_R: Tensor,
        groups: Tensor,
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        acc, weights_R1 = accumulation_dtype(x_RL), weights_R[:, None]
        relu_RF = h_RF.to(acc).relu()
        dh_RF = grouped_mm(dy_RL, w_down_ELF, offs=groups).to(acc).mul_(relu_RF)
        dweights_R = torch.linalg.vecdot(dh_RF, relu_RF)
        dup_EFL = ddown_ELF = None
        if wanted[1]:
            act_RF = relu_RF.square_().mul_(weights_R1).to(x_RL.dtype)
            ddown_ELF = grouped_mm(dy_RL.t(), act_RF, offs=groups)
        dh_RF = dh_RF.mul_(2 * weights_R1).to(x_RL.dtype)
        dx_RL = grouped_mm(dh_RF, w_up_EFL, offs=groups)
        if wanted[0]:
            dup_EFL = grouped_mm(dh_RF.t(), x_RL, offs=groups)
        return dx_RL, dweights_R, dup_EFL, ddown_ELF


grouped_mlp = partial(function.grouped_mlp, GroupedMMExperts())
moe_mlp = partial(function.moe_mlp, GroupedMMExperts(), sort=sort_slots)


def self_check(device_type: str) -> float:
    """Largest deviation from the reference; see ``function.self_check``."""
    return function.self_check(moe_mlp, reference.moe_mlp, device_type)


def supports(dtype: torch.dtype, n_experts: int, k: int = 1, *widths: int) -> bool:
    """Whether rows of these widths (F and L, or none) can be aligned."""
    return all(width % (_ALIGNMENT // dtype.itemsize) == 0 for width in widths)
