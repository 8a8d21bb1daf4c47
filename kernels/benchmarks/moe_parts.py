"""The parts of path triton's MoE layer, one by one: dispatch, up and down projection.

They are not public operations: this file knows how ``nemo_kernels.moe.kernel`` calls its kernels.

Shapes as in ``moe_problem``; R = T*K routed slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from moe_problem import Problem
from torch import Tensor
from torch.nn.functional import grouped_mm

from nemo_kernels.moe import function, reference

Results = tuple[Tensor, ...]


class Parts:
    """Inputs of each part, made when the first call needs them, and the calls."""

    def __init__(self, p: Problem) -> None:
        self.p = p

    @cached_property
    def slots(self) -> function.Slots:
        return reference.sort_slots(self.p.ids_TK, self.p.shape.experts)

    @cached_property
    def token_R(self) -> Tensor:
        return self.slots.order_R // self.p.shape.k

    @cached_property
    def weights_R(self) -> Tensor:
        return self.p.weights_TK.detach().flatten()[self.slots.order_R]

    @cached_property
    def offsets_E(self) -> Tensor:
        return self.slots.counts_E.cumsum(0).int()

    @cached_property
    def act_RF(self) -> Tensor:
        return self._random(self.p.shape.inner)

    @cached_property
    def y_RL(self) -> Tensor:
        return self._random(self.p.shape.width)

    def _random(self, columns: int) -> Tensor:
        """Rows for slots: to the speed of a product or a sum it does not matter what they hold."""
        return self.p.x_TL.new_empty(self.p.shape.slots, columns).normal_()

    @cached_property
    def launched(self) -> tuple[Any, Any, Any]:
        """The module of path triton, its tiles for this problem and its rows."""
        from nemo_kernels.moe import expert_kernel, kernel

        s = self.p.shape
        plan = expert_kernel.plan(self.p.x_TL.dtype, s.slots, s.experts, s.width, s.inner)
        weights_TK = self.p.weights_TK.detach()
        return kernel, plan, kernel._rows(weights_TK, self.slots, self.slots.counts_E, plan.up.m)

    def dispatch(self) -> Callable[[], Results]:
        """Sort and sum over each token's slots: path triton gathers inside its products."""
        kernel, y_RL, s = self.launched[0], self.y_RL, self.p.shape

        def call() -> Results:
            slots = kernel.sort_slots(self.p.ids_TK, s.experts)
            return *slots, kernel._combine(y_RL, slots.inverse_R, s.k)

        return call

    def dispatch_of_torch(self) -> Callable[[], Results]:
        x_TL, y_RL, s = self.p.x_TL.detach(), self.y_RL, self.p.shape

        def call() -> Results:
            slots = reference.sort_slots(self.p.ids_TK, s.experts)
            x_TL.index_select(0, slots.order_R // s.k)
            return *slots, function.combine(y_RL, slots.inverse_R, s.tokens)

        return call

    def dispatch_in_fp32(self) -> Results:
        tokens = self.p.shape.tokens
        return *self.slots, function.combine(self.y_RL.float(), self.slots.inverse_R, tokens)

    def up(self) -> Callable[[], Results]:
        kernel, plan, rows = self.launched
        x_TL, up_EFL = self.p.x_TL.detach(), self.p.up_EFL.detach()

        def call() -> Results:
            h_RF, act_RF = (x_TL.new_empty(self.p.shape.slots, up_EFL.shape[1]) for _ in range(2))
            kernel._up(plan.up, x_TL, rows, up_EFL, h_RF, act_RF)
            return h_RF, act_RF

        return call

    def up_of_torch(self) -> Callable[[], Results]:
        x_TL, up_EFL = self.p.x_TL.detach(), self.p.up_EFL.detach()
        weights_R1 = self.weights_R[:, None].to(x_TL.dtype)

        def call() -> Results:
            h_RF = grouped_mm(x_TL.index_select(0, self.token_R), up_EFL.mT, offs=self.offsets_E)
            return h_RF, h_RF.relu().square_().mul_(weights_R1)

        return call

    def up_in_fp32(self) -> Results:
        h_RF = self._by_expert(self.p.x_TL[self.token_R], self.p.up_EFL)
        return h_RF, h_RF.relu().square() * self.weights_R[:, None]

    def down(self) -> Callable[[], Results]:
        kernel, plan, rows = self.launched
        act_RF, down_ELF = self.act_RF, self.p.down_ELF.detach()
        return lambda: (kernel._product(plan.down, act_RF, rows, down_ELF.mT),)

    def down_of_torch(self) -> Callable[[], Results]:
        act_RF, down_ELF = self.act_RF, self.p.down_ELF.detach()
        return lambda: (grouped_mm(act_RF, down_ELF.mT, offs=self.offsets_E),)

    def down_in_fp32(self) -> Results:
        return (self._by_expert(self.act_RF, self.p.down_ELF),)

    def _by_expert(self, x_RN: Tensor, weight_EMN: Tensor) -> Tensor:
        """Each expert's rows times its matrix, in fp32."""
        rows = zip(x_RN.split(self.slots.counts_E.tolist()), weight_EMN, strict=True)
        with torch.no_grad():
            return torch.cat([x.float() @ weight_MN.float().t() for x, weight_MN in rows])


def parts(p: Problem) -> Iterator[dict[str, Any]]:
    """What :class:`moe_rows.Row` needs to know of each part."""
    s, made = p.shape, Parts(p)
    product = 2 * s.slots * s.width * s.inner
    weights = 2 * p.used() * s.inner * s.width
    yield {
        "name": "dispatch: sort, combine",
        "builders": {"triton": made.dispatch, "torch, with gather": made.dispatch_of_torch},
        "expected": made.dispatch_in_fp32,
        "flops": 0,
        "bytes": (8 + 16 + 8) * s.slots + 2 * (s.slots + s.tokens) * s.width,
    }
    yield {
        "name": "gather, up projection, relu^2",
        "builders": {"triton": made.up, "grouped_mm": made.up_of_torch},
        "expected": made.up_in_fp32,
        "flops": product,
        "bytes": 2 * s.tokens * s.width + weights + 4 * s.slots * s.inner,
    }
    yield {
        "name": "down projection",
        "builders": {"triton": made.down, "grouped_mm": made.down_of_torch},
        "expected": made.down_in_fp32,
        "flops": product,
        "bytes": 2 * s.slots * (s.inner + s.width) + weights,
    }
