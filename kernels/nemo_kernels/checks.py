"""Checks of arguments on the host, from shapes and dtypes: nothing waits for a GPU.

Values are checked as well where they are on the CPU, and everywhere, waiting for the GPU, in debug
mode: with ``NEMO_KERNELS_DEBUG=1`` in the environment.
"""

from __future__ import annotations

import os

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


def expect_device(x: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless the other tensors are on x's device."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, got {other.device}")


def span(x: Tensor) -> int:
    """Elements of memory from the first one of x to its last, also those in between."""
    if not x.numel():
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def may_read(x: Tensor) -> bool:
    """Whether a check may look at x's values; see above."""
    return x.device.type == "cpu" or os.environ.get("NEMO_KERNELS_DEBUG") == "1"


def expect_range(name: str, what: str, x: Tensor, end: int) -> None:
    """Raise ValueError unless all values lie in [0, end). Passes if it may not read them."""
    if not x.numel() or not may_read(x):
        return
    low, high = (v.item() for v in x.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected {what} in [0, {end}), got {low} to {high}")
