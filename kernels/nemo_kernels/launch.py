"""The one place where our Triton kernels are launched.

While launches are `recorded` they are noted and not run. With tensors on the device "meta", which
have no data, a call then tells in which form it needs which kernel: so
``scripts/compile_kernels.py`` compiles for GPUs that need not be there what is really launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A kernel, the ``@triton.jit`` function, and what it was given."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Constants by their names, ``num_warps`` and ``num_stages``."""


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


_notes: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on a grid of programs."""
    if _notes is None:
        kernel[grid](*arguments, **options)
    else:
        _notes.append(Launch(kernel, arguments, options))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, launches are added to the list instead of run."""
    global _notes
    notes: list[Launch] = []
    _notes = notes
    try:
        yield notes
    finally:
        _notes = None
