"""Checks of arguments on the host, from shapes and dtypes: nothing waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def expect(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless x has that shape (None: any size) and dtype (None: any)."""
    fits = x.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")


def expect_range(name: str, what: str, x: Tensor, end: int) -> None:
    """Raise ValueError unless all values lie in [0, end). CPU tensors only: others pass."""
    if x.device.type != "cpu" or not x.numel():
        return
    low, high = (v.item() for v in x.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected {what} in [0, {end}), got {low} to {high}")
