"""The matrix products of a training step, to be timed for themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
linear = torch.ops.mkldnn._linear_pointwise  # a product with its right operand transposed
PRODUCTS = {aten.mm, aten.mv, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_,
            aten._grouped_mm, linear}  # fmt: skip
"""Without those within attention, which torch computes in one operation with all the rest of it."""


class _Recorder(TorchDispatchMode):
    """Notes products as (operation, its arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in PRODUCTS:
            self.calls.append((func, args, kwargs))
        return func(*args, **kwargs)


def replay(step: Callable[[], Any]) -> tuple[Callable[[], float], int]:
    """A function that computes the products of ``step`` once more and returns its seconds, and
    their FLOP.

    Operands have the shapes, strides and dtypes that they have in the step; those that agree in
    these are the same tensors, so the products find more in the caches than in the step.
    """
    recorder = _Recorder()
    with recorder:
        step()
    operands: dict[Any, Tensor] = {}

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        key = (x.shape, x.stride(), x.dtype)
        if key not in operands:
            same = torch.empty_strided(*key[:2], dtype=x.dtype)
            # Offsets of grouped products are kept: they say which rows belong together.
            operands[key] = same.normal_(std=0.01) if x.is_floating_point() else x.clone()
        return operands[key]

    calls = [
        (func, [stand_in(x) for x in args], {k: stand_in(x) for k, x in kwargs.items()})
        for func, args, kwargs in recorder.calls
    ]
    flop = sum(_flop(func, args) for func, args, _ in recorder.calls)
    recorder.calls.clear()

    @torch.no_grad()
    def products() -> float:
        start = time.perf_counter()
        for func, args, kwargs in calls:
            func(*args, **kwargs)
        return time.perf_counter() - start

    return products, flop


def _flop(func: Any, args: tuple[Any, ...]) -> int:
    """Two per element of the left operand and column of the right one."""
    left, right = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()][-2:]
    right = right.t() if func.overloadpacket == linear else right
    columns = right.shape[-1] if right.dim() > 1 else 1
    return 2 * left.numel() * columns
