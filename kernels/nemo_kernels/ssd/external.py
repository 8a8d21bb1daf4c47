"""Mamba-2 scan by the mamba-ssm library (mamba_ssm.ops.triton.ssd_combined, 2.3 interface).

Not run on a GPU yet. The library differences one cumulative sum across documents, so packed
documents are separate within tolerance, not bit for bit.

Shapes: as in reference.py.
"""

from __future__ import annotations

import torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from nemo_kernels.backend import draw, relative_deviation
from nemo_kernels.documents import Documents
from nemo_kernels.ssd import reference

DEVICE_TYPES = ("cuda",)
ssd_step = reference.ssd_step


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
        state_dtype=torch.float32,
    )
    return y_BSHP, state_BHPN


def self_check(device_type: str) -> float:
    group = (2, 160, 2, 32)
    x_BSHP, B_BSGN, C_BSGN, *others = draw(
        device_type, (2, 160, 4, 64), group, group, (2, 160, 4), (4,), (4,)
    )
    dt_BSH, A_H, D_H = (t.float().sigmoid() for t in others)
    documents = Documents.from_numbers((torch.arange(160) // 90).expand(2, -1)).to(device_type)
    return relative_deviation(
        lambda impl, *t: impl(*t, 64, documents)[0],
        (ssd_scan, reference.ssd_scan),
        (x_BSHP, dt_BSH, -A_H, B_BSGN, C_BSGN, D_H),
    )
