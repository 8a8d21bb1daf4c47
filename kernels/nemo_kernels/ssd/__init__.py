"""Mamba-2 scan (state-space duality, arXiv 2405.21060).

Where a row is divided into parts, ``ssd_state`` of each part and ``entering_states`` give the
initial states with which scans of the parts make the scan of the row.

Shapes: B batch, S sequence, H heads, P head dim, G groups (each serves H/G heads), N state,
R parts.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.documents import Documents
from nemo_kernels.ssd.parts import entering_states, ssd_state

__all__ = ["PATHS", "entering_states", "ssd_scan", "ssd_state", "ssd_step"]

PATHS = {"triton": "nemo_kernels.ssd.kernel", "mamba_ssm": "nemo_kernels.ssd.external"}


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
    """y [B,S,H,P] in x's dtype and the last token's state [B,H,P,N] in fp32 of the recurrence

        state = exp(dt A) state + dt x B^T        y = state C + D x

    dt is positive (after softplus), A negative. With documents the state starts from zero at each
    of them; an initial state then belongs to the first one of its row. chunk_size changes speed
    and memory, not results.
    """
    impl = backend.implementation("ssd", x_BSHP.device.type, x_BSHP, B_BSGN, chunk_size)
    return impl.ssd_scan(
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk_size, documents, initial_state_BHPN
    )


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    """One token of :func:`ssd_scan`: y [B,H,P] in x's dtype. The state moves on in place."""
    impl = backend.implementation("ssd", x_BHP.device.type, x_BHP)
    return impl.ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN)
