"""Kernels that are well and kernels that are not, for the test of scripts/compile_kernels.py.

``CASE`` in the environment says which of them are launched.
"""

import multiprocessing
import os

import torch
import triton
import triton.language as tl

from nemo_kernels.launch import Launch


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
    """Ends the process that compiles it, as a failed assertion of the compiler does."""

    __name__ = "aborting"
    arg_names = center.arg_names

    def warmup(self, *arguments, **options):
        if multiprocessing.parent_process():
            os.abort()
        center.warmup(*arguments, **options)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm(*tile, depth=256):
    m, n, _ = tile
    a, b, c = (empty(*shape, dtype=torch.bfloat16) for shape in ((m, depth), (n, depth), (m, n)))
    return Launch(matmul, (a, b, c, depth, *tile), {"num_warps": 4, "num_stages": 3})


def rows(columns, num_warps=4):
    x, y = empty(columns), empty(columns)
    return Launch(center, (x, y), {"N": columns, "num_warps": num_warps})


CASES = {
    "good": lambda: [gemm(128, 64, 64), rows(1024), gemm(128, 64, 64, depth=512)],
    "missing": lambda: [gemm(16, 16, 64)],
    "shared": lambda: [gemm(128, 256, 256)],
    "spill": lambda: [rows(16384, num_warps=1)],
    "refused": lambda: [Launch(refused, (empty(4), 4), {})],
    "aborting": lambda: [Launch(Aborting(), (empty(4), empty(4), 4), {})],
}


def launches():
    for case in os.environ["CASE"].split():
        for launch in CASES[case]():
            yield launch, (90, 100)
