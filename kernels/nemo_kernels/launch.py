"""The one place where our Triton kernels are launched, each with what it costs.

While launches are `noted` they are not run. With tensors on the device "meta", which have no data,
a call then tells in which form it needs which kernel, and what that moves and multiplies. So
``scripts/compile_kernels.py`` compiles for GPUs that need not be there what is really launched, and
a step's time can be modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel, the ``@triton.jit`` function, and what it was given."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Constants by their names, ``num_warps`` and ``num_stages``."""
    flop: int = 0
    """Of its matrix product; 0: it has none."""
    moved: int = 0
    """Bytes that it reads and bytes that it writes, each once however often it asks for them."""
    grid: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, an operand of the matrix product."""
        return next(_tensors(self.arguments)).dtype


class Tile(NamedTuple):
    """Rows, columns and depth of a program's product, and the warps and stages that compute it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """For `launch`."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


_note: Callable[[Launch], object] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    flop: int = 0,
    moved: int | None = None,
    **options: Any,
) -> None:
    """Run a kernel on a grid of programs, of which there may be none, on the device of its tensors.

    ``flop``, ``moved``: see `Launch`. Without ``moved`` each tensor is read or written once, as far
    as it is there.
    """
    if 0 in grid:
        return
    if _note is None:
        with torch.cuda.device_of(next(_tensors(arguments))):
            kernel[grid](*arguments, **options)
        return
    if moved is None:
        moved = sum(tensor.nbytes for tensor in _tensors(arguments))
    _note(Launch(kernel, arguments, options, flop, moved, grid))


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Those among arguments, and those that descriptors describe."""
    for argument in arguments:
        tensor = getattr(argument, "base", argument)
        if isinstance(tensor, Tensor):
            yield tensor


@contextmanager
def noted(note: Callable[[Launch], object]) -> Iterator[None]:
    """Inside, launches are given to ``note`` instead of run."""
    global _note
    around, _note = _note, note
    try:
        yield
    finally:
        _note = around


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are added to the list instead of run."""
    notes: list[Launch] = []
    with noted(notes.append):
        yield notes
