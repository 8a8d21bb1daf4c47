"""Mamba-2 scan in plain PyTorch: the specification.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state, L chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    chunk_size: int,
    seq_idx_BS: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = x_BSHP.shape
    groups, state = B_BSGN.shape[2:]
    chunk = min(chunk_size, length)
    pad = -length % chunk
    dtype = torch.promote_types(x_BSHP.dtype, torch.float32)
    x, dt, Bm, Cm = (t.to(dtype) for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN))
    if pad:  # dt = 0: the state passes through unchanged
        x, Bm, Cm = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, Bm, Cm))
        dt = F.pad(dt, (0, 0, 0, pad))
    if seq_idx_BS is None:
        seq_idx_BS = torch.zeros(batch, length, dtype=torch.int32, device=x.device)
    seq = F.pad(seq_idx_BS[:, None].double(), (0, pad), mode="replicate")[:, 0]
    chunks = (length + pad) // chunk

    doc_BcL = seq.view(batch, chunks, chunk)
    same_BcLL = (doc_BcL[..., :, None] == doc_BcL[..., None, :]).tril()
    dt_BcHL = dt.view(batch, chunks, chunk, heads).transpose(2, 3)
    a_BcHL = dt_BcHL * A_H.to(dtype)[:, None]
    cs_BcHL = a_BcHL @ same_BcLL.to(dtype).transpose(-1, -2)
    decay = (cs_BcHL[..., :, None] - cs_BcHL[..., None, :]).masked_fill(
        ~same_BcLL[:, :, None], -torch.inf
    )
    L_BcHLL = decay.exp()
    xd = (x.view(batch, chunks, chunk, heads, head_dim).permute(0, 1, 3, 2, 4)) * dt_BcHL[..., None]
    per = heads // groups
    Bc = Bm.view(batch, chunks, chunk, groups, state).transpose(2, 3)
    Cc = Cm.view(batch, chunks, chunk, groups, state).transpose(2, 3)
    scores = (Cc @ Bc.transpose(-1, -2)).repeat_interleave(per, 2)
    Bh, Ch = Bc.repeat_interleave(per, 2), Cc.repeat_interleave(per, 2)
    y = (scores * L_BcHLL) @ xd
    new = (xd * L_BcHLL[..., -1, :, None]).transpose(-1, -2) @ Bh  # BcHPN
    previous_doc = torch.cat((doc_BcL[:, :1, 0], doc_BcL[:, :-1, -1]), 1)
    carried = (doc_BcL == previous_doc[..., None])[:, :, None]  # Bc1L
    gate = cs_BcHL.exp() * carried
    if initial_state_BHPN is None:
        S = x.new_zeros(batch, heads, head_dim, state)
    else:
        S = initial_state_BHPN.to(dtype)
    before = []
    for c in range(chunks):
        before.append(S)
        S = S * gate[:, c, :, -1, None, None] + new[:, c]
    y = y + (Ch @ torch.stack(before, 1).transpose(-1, -2)) * gate[..., None]
    y = y.permute(0, 1, 3, 2, 4).reshape(batch, length + pad, heads, head_dim)[:, :length]
    y = y + x[:, :length] * D_H.to(dtype)[:, None]
    return y.to(x_BSHP.dtype), S


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    per_group = x_BHP.shape[1] // B_BGN.shape[1]
    x, dt = x_BHP.to(state_BHPN.dtype), dt_BH.to(state_BHPN.dtype)
    B_BHN = B_BGN.to(x.dtype).repeat_interleave(per_group, dim=1)
    C_BHN = C_BGN.to(x.dtype).repeat_interleave(per_group, dim=1)
    decay_BH = torch.exp(dt * A_H)
    xd_BHP = x * dt[..., None]
    state_BHPN = state_BHPN * decay_BH[..., None, None] + xd_BHP[..., None] * B_BHN[..., None, :]
    y_BHP = (state_BHPN @ C_BHN[..., None])[..., 0] + x * D_H[:, None].to(x.dtype)
    return y_BHP.to(x_BHP.dtype), state_BHPN
