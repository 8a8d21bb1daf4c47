"""How kernels declare the configurations in which they are launched, so that each can be compiled
and checked without a GPU (``scripts/compile_kernels.py``).

A module of Triton kernels ends with ``def shipped() -> list[Shipped]`` and stands in ``MODULES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

MODULES = (
    "nemo_kernels.moe.sort_kernel",
    "nemo_kernels.moe.router_kernel",
    "nemo_kernels.moe.expert_kernel",
    "nemo_kernels.lowp.gemm_kernel",
    "nemo_kernels.lowp.quantize_kernel",
)


@dataclass(frozen=True)
class Shipped:
    """One kernel at one tile configuration, as it is launched."""

    kernel: Any
    """The ``@triton.jit`` function."""
    signature: dict[str, str]
    """Triton's type of every argument that is no constexpr: "*bf16", "*fp32", "*i64", "i32" ..."""
    constants: dict[str, Any]
    """Values of the constexpr arguments."""
    instruction: dict[int, str]
    """Instruction that the code for an architecture must contain: "wgmma" on 90, "tcgen05" on 100.
    Empty: needs none, which a kernel with a matrix product may not say."""
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 at launch. Pointers always are."""
    archs: tuple[int, ...] = (90, 100)
    """Architectures on which this configuration is launched."""
    spills: str = ""
    """Why registers may spill here; empty: they may not."""


class Tile(NamedTuple):
    """Rows, columns and depth of a program's product, and the warps and stages that compute it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}

    def options(self) -> dict[str, int]:
        return {**self.blocks(), "num_warps": self.warps, "num_stages": self.stages}
