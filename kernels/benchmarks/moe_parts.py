"""The parts of path triton's MoE layer, one by one: dispatch, up and down projection.

They are not public operations: this file knows what ``nemo_kernels.moe.kernel`` is made of.

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
    def triton(self) -> Any:
        """The experts of path triton, with the tiles for this problem."""
        from nemo_kernels.moe import expert_kernel, kernel

        s = self.p.shape
        plan = expert_kernel.plan(self.p.x_TL.dtype, s.slots, s.experts, s.width, s.inner)
        return kernel.TritonExperts(plan)

    @cached_property
    def routed(self) -> function.Routed:
        """As path triton takes it."""
        x_TL, up_EFL, down_ELF = (t.detach() for t in (self.p.x_TL, self.p.up_EFL, self.p.down_ELF))
        groups = self.triton.groups(self.slots.counts_E, self.p.shape.slots)
        token_R = self.token_R.int()
        return function.Routed(x_TL, token_R, self.weights_R, groups, up_EFL, down_ELF)

    def inverse_TK(self, slots: function.Slots) -> Tensor:
        return slots.inverse_R.view(self.p.shape.tokens, self.p.shape.k)

    def dispatch(self) -> Callable[[], Results]:
        """Sort and sum over each token's slots: path triton gathers inside its products."""
        from nemo_kernels.moe import kernel

        experts, y_RL = self.triton, self.y_RL

        def call() -> Results:
            slots = kernel.sort_slots(self.p.ids_TK, self.p.shape.experts)
            return *slots, experts.combine(y_RL, self.inverse_TK(slots))

        return call

    def dispatch_of_torch(self) -> Callable[[], Results]:
        x_TL, y_RL, s = self.p.x_TL.detach(), self.y_RL, self.p.shape

        def call() -> Results:
            slots = reference.sort_slots(self.p.ids_TK, s.experts)
            x_TL.index_select(0, slots.order_R // s.k)
            return *slots, function.Experts().combine(y_RL, self.inverse_TK(slots))

        return call

    def dispatch_in_fp32(self) -> Results:
        inverse_TK = self.inverse_TK(self.slots)
        return *self.slots, function.Experts().combine(self.y_RL.float(), inverse_TK)

    def up(self) -> Callable[[], Results]:
        from nemo_kernels.moe import kernel

        s, routed, tile = self.p.shape, self.routed, self.triton.plan.up

        def call() -> Results:
            h_RF, act_RF = (routed.x_TL.new_empty(s.slots, s.inner) for _ in range(2))
            kernel.up(tile, routed, h_RF, act_RF)
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
        from nemo_kernels.moe import kernel

        tile, tiles = self.triton.plan.down, self.routed.groups.tiles
        act_RF, down_EFL = self.act_RF, self.routed.down_ELF.mT
        return lambda: (kernel.product(tile, act_RF, tiles, down_EFL),)

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
