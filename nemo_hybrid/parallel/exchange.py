"""Rows that change processes, with gradients that take the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Exchange = Callable[[Tensor, Tensor, list[int], list[int]], None]
"""(received, x, receive, send): all-to-all of so many rows from and to each process of a group."""


class AllToAll(torch.autograd.Function):
    """Rows go where ``send`` says; ``receive`` rows come."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], exchange: Exchange
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.exchange = send, receive, exchange
        received = x.new_empty(sum(receive), *x.shape[1:])
        exchange(received, x.contiguous(), receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        returned = grad.new_empty(sum(ctx.send), *grad.shape[1:])
        ctx.exchange(returned, grad.contiguous(), ctx.send, ctx.receive)
        return returned, None, None, None
