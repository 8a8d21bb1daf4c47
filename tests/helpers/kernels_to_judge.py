"""Kernels that are well and kernels that are not, for the test of scripts/compile_kernels.py.

``CASE`` in the environment says which of them ``shipped`` declares.
"""

import os

import triton
import triton.language as tl

from nemo_kernels.shipped import Shipped


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + n[:, None] * K + start + k[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(tl.bfloat16))


@triton.jit
def center(x_ptr, y_ptr, N: tl.constexpr):
    """Needs all of a row at once: with many columns and few warps registers run out."""
    columns = tl.arange(0, N)
    x = tl.load(x_ptr + columns)
    tl.store(y_ptr + columns, x - tl.sum(x) / N)


@triton.jit
def refused(x_ptr, N: tl.constexpr):
    tl.static_assert(N > 1000, "N is too small")


class Aborting:
    """Ends the process that looks at it, as a failed assertion of the compiler does."""

    __name__ = "aborting"

    @property
    def arg_names(self):
        os.abort()


def gemm(tile, instruction=None, **more):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "K": "i32"}
    constants = dict(zip(("M", "N", "BLOCK_K"), tile, strict=True))
    wanted = instruction or {90: "wgmma", 100: "tcgen05"}
    return Shipped(matmul, signature, constants, wanted, 4, 3, divisible=("K",), **more)


def rows(columns, num_warps=4, wanted=None, **more):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    return Shipped(center, signature, {"N": columns}, {90: wanted}, num_warps, 3, **more)


CASES = {
    "good": lambda: [gemm((128, 64, 64)), rows(1024)],
    "missing": lambda: [rows(1024, wanted="wgmma")],
    "shared": lambda: [gemm((128, 256, 256))],
    "spill": lambda: [rows(16384, num_warps=1)],
    "excused": lambda: [rows(16384, num_warps=1, spills="a row is wide")],
    "stale": lambda: [rows(1024, spills="it once did")],
    "undeclared": lambda: [gemm((128, 64, 64), {90: None})],
    "refused": lambda: [Shipped(refused, {"x_ptr": "*fp32"}, {"N": 4}, {}, 4, 3)],
    "aborting": lambda: [Shipped(Aborting(), {}, {}, {}, 4, 3)],
    "argument": lambda: [Shipped(center, {"x_ptr": "*fp32"}, {"N": 64}, {}, 4, 3)],
}


def shipped():
    return [item for case in os.environ["CASE"].split() for item in CASES[case]()]
