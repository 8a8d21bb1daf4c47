"""Mamba-2 scan by the mamba-ssm library (mamba_ssm.ops.triton.ssd_combined, 2.3 interface).

Not run on a GPU yet. The library differences one cumulative sum across documents, so packed
documents are separate within tolerance, not bit for bit. Its kernels have 32-bit offsets.

Shapes: as in reference.py.
"""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from nemo_kernels.backend import Sizes
from nemo_kernels.checks import span
from nemo_kernels.documents import Documents
from nemo_kernels.ssd import kernel, reference

DEVICE_TYPES = ("cuda",)
MAX_OFFSET = 2**31
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Not in a release up to 2.3.2; there the last state is fp32 anyway.
_LATER = {"state_dtype": torch.float32}
_ARGUMENTS: dict[str, Any] = {
    name: value
    for name, value in _LATER.items()
    if name in inspect.signature(mamba_chunk_scan_combined).parameters
}
ssd_step = reference.ssd_step


def refusal(x: Tensor, B: Tensor | None = None, chunk_size: int = 1) -> str:
    """The library's kernels have to reach all of x and of the states of chunks. (A step is the
    reference's.)"""
    largest = 0 if B is None else _largest(x, B, chunk_size)
    if x.dtype in _DTYPES and largest <= MAX_OFFSET:
        return ""
    return f"expected one of {_DTYPES} and offsets below {MAX_OFFSET}, got {x.dtype} and {largest}"


def _largest(x_BSHP: Tensor, B_BSGN: Tensor, chunk_size: int) -> int:
    rows, length, heads, head_dim = x_BSHP.shape
    states = rows * -(-length // chunk_size) * heads * head_dim * B_BSGN.shape[3]
    scores = rows * length * B_BSGN.shape[2] * chunk_size
    return max(span(x_BSHP), span(B_BSGN), prod(x_BSHP.shape), states, scores)


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    documents: Documents | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``nemo_kernels.ssd.ssd_scan``."""
    y_BSHP, state_BHPN = mamba_chunk_scan_combined(
        x_BSHP,
        dt_BSH,
        A_H,
        B_BSGN,
        C_BSGN,
        chunk_size,
        D=D_H,
        initial_states=initial_state_BHPN,
        seq_idx=None if documents is None else documents.seq_idx_BS.contiguous(),
        return_final_states=True,
        **_ARGUMENTS,
    )
    return y_BSHP, state_BHPN


def self_check(device_type: str, sizes: Sizes) -> float:
    return kernel.checked(ssd_scan, device_type, sizes)
