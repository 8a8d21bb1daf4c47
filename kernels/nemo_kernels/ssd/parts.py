"""The state of a part of a sequence, and how states of parts follow from each other.

With the letters of ``reference.py``: the state after a part is linear in the one that enters it,

    state' = decay state + sum_j exp(cs_end - cs_j) dt_j x_j B_j^T

where both the sum over tokens and the decay know only the part. Plain PyTorch on every device: it
is a hundredth of the layer's work.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state, R parts, h heads per group,
W = h*P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.documents import Documents
from nemo_kernels.products import fp32_product


def ssd_state(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """What a scan that begins with zeros leaves: the last token's state [B,H,P,N] in fp32; and how
    much of the state before the part is left in it, [B,H]: exactly 0 where a document begins
    within the part. (It does not know whether one begins with the part.)

    In bf16 operands of products are rounded as in ``kernel.py``. Heads of one group after the other
    have their weighted x in memory, and the backward pass makes it once more.
    """
    exact = torch.promote_types(x_BSHP.dtype, torch.float32)
    dt_BSH = dt_BSH.to(exact)
    log_BSH, reach_BS1 = dt_BSH * A_H.to(exact), None
    if documents is not None:
        reach_BS1 = (documents.seq_idx_BS == documents.seq_idx_BS[:, -1:])[..., None]
        log_BSH = log_BSH * reach_BS1
    from_here_BSH = log_BSH.flip(1).cumsum(1).flip(1)
    weight_BSH = F.pad(from_here_BSH[:, 1:], (0, 0, 0, 1)).exp() * dt_BSH
    decay_BH = from_here_BSH[:, 0].exp()
    if reach_BS1 is not None:
        weight_BSH = weight_BSH * reach_BS1
        decay_BH = decay_BH * reach_BS1[:, 0]
    groups = B_BSGN.shape[2]
    by_group = zip(
        x_BSHP.chunk(groups, 2), weight_BSH.chunk(groups, 2), B_BSGN.unbind(2), strict=True
    )
    return torch.cat([_Written.apply(*parts) for parts in by_group], 1), decay_BH


class _Written(torch.autograd.Function):
    """Sum over tokens of weighted x B^T, [B,h,P,N]."""

    @staticmethod
    def forward(ctx: Any, x_BShP: Tensor, weight_BSh: Tensor, B_BSN: Tensor) -> Tensor:
        ctx.save_for_backward(x_BShP, weight_BSh, B_BSN)
        state_BWN = fp32_product(_weighted(x_BShP, weight_BSh).mT, B_BSN)
        return state_BWN.unflatten(1, x_BShP.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate_BhPN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BShP, weight_BSh, B_BSN = ctx.saved_tensors
        dstate_BWN = dstate_BhPN.flatten(1, 2).to(B_BSN.dtype)
        dwritten_BShP = fp32_product(B_BSN, dstate_BWN.mT).view(x_BShP.shape)
        dB_BSN = fp32_product(_weighted(x_BShP, weight_BSh), dstate_BWN)
        dx_BShP = dwritten_BShP * weight_BSh[..., None]
        dweight_BSh = (dwritten_BShP * x_BShP).sum(-1)
        return dx_BShP.to(x_BShP.dtype), dweight_BSh, dB_BSN.to(B_BSN.dtype)


def _weighted(x_BShP: Tensor, weight_BSh: Tensor) -> Tensor:
    """[B,S,W], in x's dtype."""
    return (x_BShP * weight_BSh[..., None]).to(x_BShP.dtype).flatten(2)


def entering_states(states_R: Tensor, decays_R: Tensor) -> Tensor:
    """The states with which all parts begin, like ``states_R`` [R, ..., P, N], which with
    ``decays_R`` [R, ...] are what :func:`ssd_state` gives of each; the first one begins with 0."""
    entering = [torch.zeros_like(states_R[0])]
    for state, decay in zip(states_R[:-1], decays_R[:-1], strict=True):
        entering.append(torch.addcmul(state, entering[-1], decay[..., None, None]))
    return torch.stack(entering)
