"""Mamba-2 scan in plain PyTorch: the specification.

The chunked form of arXiv 2405.21060, section 6: within a chunk the scan is a masked matrix product
M x, between chunks a state is carried. In the notation below, for one chunk and head,

    a = dt A                         log-decay of each token
    cs_i = sum of a over the document's tokens in the chunk up to i
    decay_ij = exp(cs_i - cs_j) dt_j            M = mask * (C B^T) * decay + diag(D)
    state' = exp(cs_end) state + sum_j decay_end,j x_j B_j^T
    y = M x + exp(cs) C state

The mask holds 1 where j <= i and both are in one document. Sums restart with each document and the
state is multiplied by an exact 0 where a document begins, so (finite) tokens of one document do not
change another one by a single bit. No exponent is positive. The backward pass is written by hand:
it keeps only the states between chunks and recomputes M, a few batch rows at a time.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state, c chunks, L chunk length,
b batch rows of a block, h heads per group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.documents import Documents

# Elements of M per block: a few such tensors stay in a CPU's L2 cache.
_BLOCK = {"cpu": 1 << 19}
_BLOCK_ELSEWHERE = 1 << 28
# Elements of states that one token is added to: they stay in a CPU's L2 cache.
_STEP_BLOCK = {"cpu": 1 << 18}
# Decays end at exp(-40), 4e-18: too small to be seen beside a token's own share, and products of
# two stay clear of the denormal numbers that a CPU multiplies many times slower.
_MIN_LOG = -40.0


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
    length = x_BSHP.shape[1]
    chunk = min(chunk_size, length)
    pad = -length % chunk
    seq_idx_BS = None if documents is None else documents.seq_idx_BS
    if pad:  # padded tokens have dt = 0: they pass the state on unchanged
        x_BSHP, B_BSGN, C_BSGN = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x_BSHP, B_BSGN, C_BSGN))
        dt_BSH = F.pad(dt_BSH, (0, 0, 0, pad))
        if seq_idx_BS is not None:
            seq_idx_BS = torch.cat((seq_idx_BS, seq_idx_BS[:, -1:].expand(-1, pad)), dim=1)
    if initial_state_BHPN is None:
        batch, _, heads, head_dim = x_BSHP.shape
        initial_state_BHPN = dt_BSH.new_zeros(batch, heads, head_dim, B_BSGN.shape[-1])
    y_BSHP, state_BHPN = _ChunkedScan.apply(
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, initial_state_BHPN, chunk, seq_idx_BS
    )
    return y_BSHP[:, :length], state_BHPN


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    groups, dtype = B_BGN.shape[1], state_BHPN.dtype
    x, dt_BH, B_BGN, C_BGN = (t.to(dtype) for t in (x_BHP, dt_BH, B_BGN, C_BGN))
    y_BHP = x * D_H[:, None]
    # Heads of a group share B and C: their channels are taken side by side, [B,G,hP,N].
    by_group = (len(x), groups, x.shape[1] * x.shape[2] // groups, 1)
    written_BGQ1, y_BGQ = (x * dt_BH[..., None]).view(by_group), y_BHP.view(by_group[:3])
    decay_BH11 = torch.exp(dt_BH * A_H)[..., None, None]
    whole = (state_BHPN, decay_BH11, written_BGQ1, B_BGN[:, :, None], C_BGN[:, :, None], y_BGQ)
    per_row = state_BHPN[:1].numel()
    rows = max(1, _STEP_BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // max(1, per_row))
    parts = zip(*(t.split(rows) for t in whole), strict=True) if rows < len(x) else [whole]
    for state, decay, written, B, C, y in parts:
        by_group_BGQN = state.mul_(decay).view(*y.shape, state.shape[-1])
        by_group_BGQN.addcmul_(written, B)
        # On CPUs several times as fast as the product of many small matrices and vectors.
        y.add_((by_group_BGQN * C).sum(-1))
    return y_BHP.to(x_BHP.dtype)


class _Chunks(NamedTuple):
    """What forward and backward need of a block of batch rows, in the computation's dtype."""

    x_bcHLP: Tensor
    B_bcGLN: Tensor
    C_bcGLN: Tensor
    dt_bcHL: Tensor
    mask_bcLL: Tensor
    scores_bcGLL: Tensor
    """Masked C B^T."""
    decay_bcHLL: Tensor
    """exp(cs_i - cs_j) dt_j, at most dt_j where the mask is 0."""
    from_start_bcHL: Tensor
    """exp(cs), 0 for tokens whose document does not reach back before the chunk."""
    to_end_bcHL: Tensor
    """decay_end,j, 0 for tokens whose document does not reach the end of the chunk."""

    def by_group(self, t_bcH: Tensor) -> Tensor:
        """[b,c,H,...] as [b,c,G,h,...]."""
        return t_bcH.unflatten(2, (self.B_bcGLN.shape[2], -1))

    def matrix(self, D_H: Tensor) -> Tensor:
        """M, [b,c,H,L,L]."""
        M_bcGhLL = self.by_group(self.decay_bcHLL) * self.scores_bcGLL[:, :, :, None]
        M_bcHLL = M_bcGhLL.flatten(2, 3)
        M_bcHLL.diagonal(dim1=-2, dim2=-1).add_(D_H[:, None])
        return M_bcHLL

    def scaled(self, t_bcGLN: Tensor, scale_bcHL: Tensor) -> Tensor:
        """B or C of each head times a factor per token, [b,c,H,L,N]."""
        return (t_bcGLN[:, :, :, None] * self.by_group(scale_bcHL)[..., None]).flatten(2, 3)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        initial_state_BHPN: Tensor,
        chunk: int,
        seq_idx_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_BSHP.dtype, torch.float32)
        batch, length = x_BSHP.shape[:2]
        masks = _masks(seq_idx_BS, length, chunk, x_BSHP.device, dtype)
        y_BSHP = torch.empty(x_BSHP.shape, dtype=x_BSHP.dtype, device=x_BSHP.device)
        # states[:, c] enters chunk c; the last one is the final state.
        states_BcHPN = torch.empty(
            (batch, length // chunk + 1, *initial_state_BHPN.shape[1:]),
            dtype=dtype,
            device=x_BSHP.device,
        )
        states_BcHPN[:, 0] = initial_state_BHPN
        for rows in _row_blocks(x_BSHP, chunk):
            k = _chunks(rows, x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk, masks)
            states_bcHPN = states_BcHPN[rows]
            new_bcHPN = k.x_bcHLP.mT @ k.scaled(k.B_bcGLN, k.to_end_bcHL)
            gate_bcH = k.from_start_bcHL[..., -1]
            for c in range(length // chunk):
                torch.addcmul(
                    new_bcHPN[:, c],
                    states_bcHPN[:, c],
                    gate_bcH[:, c, :, None, None],
                    out=states_bcHPN[:, c + 1],
                )
            y_bcHLP = k.matrix(D_H.to(dtype)) @ k.x_bcHLP
            C_bcHLN = k.scaled(k.C_bcGLN, k.from_start_bcHL)
            y_bcHLP.flatten(0, 2).baddbmm_(
                C_bcHLN.flatten(0, 2), states_bcHPN[:, :-1].mT.flatten(0, 2)
            )
            _by_head(y_BSHP[rows], chunk).copy_(y_bcHLP)
        ctx.save_for_backward(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, states_BcHPN, seq_idx_BS)
        ctx.chunk, ctx.initial_dtype = chunk, initial_state_BHPN.dtype
        return y_BSHP, states_BcHPN[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSHP: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, states_BcHPN, seq_idx_BS = ctx.saved_tensors
        chunk, dtype = ctx.chunk, states_BcHPN.dtype
        masks = _masks(seq_idx_BS, x_BSHP.shape[1], chunk, x_BSHP.device, dtype)
        dx_BSHP, ddt_BSH, dB_BSGN, dC_BSGN = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN)
        )
        dinitial_BHPN = torch.empty_like(dfinal_BHPN)
        dA_H, dD_H = A_H.new_zeros(A_H.shape, dtype=dtype), D_H.new_zeros(D_H.shape, dtype=dtype)
        for rows in _row_blocks(x_BSHP, chunk):
            k = _chunks(rows, x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk, masks)
            dy_bcHLP = _by_head(dy_BSHP[rows], chunk).to(dtype).contiguous()
            before_bcHPN = states_BcHPN[rows, :-1]

            # States, last chunk first: dafter[:, c] is the gradient of the state after chunk c.
            C_bcHLN = k.scaled(k.C_bcGLN, k.from_start_bcHL)
            gate_bcH = k.from_start_bcHL[..., -1]
            dread_bcHPN = dy_bcHLP.mT @ C_bcHLN
            dafter_bcHPN = torch.empty_like(dread_bcHPN)
            dstate_bHPN = dfinal_BHPN[rows]
            for c in reversed(range(dafter_bcHPN.shape[1])):
                dafter_bcHPN[:, c] = dstate_bHPN
                dstate_bHPN = torch.addcmul(
                    dread_bcHPN[:, c], dstate_bHPN, gate_bcH[:, c, :, None, None]
                )
            dinitial_BHPN[rows] = dstate_bHPN

            B_bcHLN = k.scaled(k.B_bcGLN, k.to_end_bcHL)
            dx_bcHLP = k.matrix(D_H.to(dtype)).mT @ dy_bcHLP
            dx_bcHLP.flatten(0, 2).baddbmm_(B_bcHLN.flatten(0, 2), dafter_bcHPN.mT.flatten(0, 2))
            _by_head(dx_BSHP[rows], chunk).copy_(dx_bcHLP)

            dM_bcHLL = dy_bcHLP @ k.x_bcHLP.mT
            dD_H += dM_bcHLL.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
            dM_bcHLL.mul_(k.decay_bcHLL)
            dscores_bcGLL = k.by_group(dM_bcHLL).sum(3).mul_(k.mask_bcLL[:, :, None])
            k.by_group(dM_bcHLL).mul_(k.scores_bcGLL[:, :, :, None])
            # Now dM holds its product with M (without D). What depends on decay_ij and to_end_j is
            # proportional to dt_j and to exp(-cs_j), so one column sum gives both gradients.
            dC_bcHLN = dy_bcHLP @ before_bcHPN
            dB_bcHLN = k.x_bcHLP @ dafter_bcHPN
            written_bcHL = (dB_bcHLN * B_bcHLN).sum(-1)
            column_bcHL = dM_bcHLL.sum(-2) + written_bcHL
            dcs_bcHL = dM_bcHLL.sum(-1) - column_bcHL + (dC_bcHLN * C_bcHLN).sum(-1)
            dcs_bcHL[..., -1] += written_bcHL.sum(-1)
            dcs_bcHL[..., -1] += (dafter_bcHPN * before_bcHPN).sum((-1, -2)) * gate_bcH
            da_bcHL = dcs_bcHL @ k.mask_bcLL
            dA_H += (da_bcHL * k.dt_bcHL).sum((0, 1, 3))
            ddt_bcHL = column_bcHL / k.dt_bcHL
            ddt_bcHL.masked_fill_(k.dt_bcHL == 0, 0).add_(da_bcHL * A_H.to(dtype)[:, None])
            ddt_BSH[rows].unflatten(1, (-1, chunk)).copy_(ddt_bcHL.transpose(2, 3))

            dC_bcHLN *= k.from_start_bcHL[..., None]
            dB_bcHLN *= k.to_end_bcHL[..., None]
            dC_bcGLN = dscores_bcGLL @ k.B_bcGLN + k.by_group(dC_bcHLN).sum(3)
            dB_bcGLN = dscores_bcGLL.mT @ k.C_bcGLN + k.by_group(dB_bcHLN).sum(3)
            _by_head(dC_BSGN[rows], chunk).copy_(dC_bcGLN)
            _by_head(dB_BSGN[rows], chunk).copy_(dB_bcGLN)
        dA_H, dD_H = dA_H.to(A_H.dtype), dD_H.to(D_H.dtype)
        dinitial_BHPN = dinitial_BHPN.to(ctx.initial_dtype)
        return dx_BSHP, ddt_BSH, dA_H, dB_BSGN, dC_BSGN, dD_H, dinitial_BHPN, None, None


def _masks(
    seq_idx_BS: Tensor | None, length: int, chunk: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """1 where j <= i is in i's document, [B,c,L,L]; 1 where i's document began earlier, [B,c,L].

    Without documents both have batch size 1.
    """
    if seq_idx_BS is None:
        seq_idx_BS = torch.zeros(1, length, dtype=torch.int32, device=device)
    doc_BcL = seq_idx_BS.unflatten(1, (-1, chunk))
    mask_BcLL = (doc_BcL[..., :, None] == doc_BcL[..., None, :]).tril()
    # What enters the first chunk is the initial state, of the first document.
    before_Bc = torch.cat((doc_BcL[:, :1, 0], doc_BcL[:, :-1, -1]), dim=1)
    return mask_BcLL.to(dtype), (doc_BcL == before_Bc[..., None]).to(dtype)


def _row_blocks(x_BSHP: Tensor, chunk: int) -> list[slice]:
    batch, length, heads, _ = x_BSHP.shape
    budget = _BLOCK.get(x_BSHP.device.type, _BLOCK_ELSEWHERE)
    step = max(1, budget // (length * heads * chunk))
    return [slice(b, min(b + step, batch)) for b in range(0, batch, step)]


def _by_head(t_bSHP: Tensor, chunk: int) -> Tensor:
    """[b,S,H,P] viewed as [b,c,H,L,P]."""
    return t_bSHP.unflatten(1, (-1, chunk)).transpose(2, 3)


def _chunks(
    rows: slice,
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk: int,
    masks: tuple[Tensor, Tensor],
) -> _Chunks:
    mask_bcLL, carried_bcL = (m if len(m) == 1 else m[rows] for m in masks)
    dtype = mask_bcLL.dtype
    x_bcHLP, B_bcGLN, C_bcGLN = (
        _by_head(t[rows], chunk).to(dtype).contiguous() for t in (x_BSHP, B_BSGN, C_BSGN)
    )
    dt_bcHL = dt_BSH[rows].unflatten(1, (-1, chunk)).transpose(2, 3).to(dtype).contiguous()
    scores_bcGLL = (C_bcGLN @ B_bcGLN.mT).mul_(mask_bcLL[:, :, None])
    # A sum as a product with the mask: exact zeros keep other documents out of it.
    cs_bcHL = (dt_bcHL * A_H.to(dtype)[:, None]) @ mask_bcLL.mT
    decay_bcHLL = (cs_bcHL[..., :, None] - cs_bcHL[..., None, :]).clamp_(_MIN_LOG, 0).exp_()
    decay_bcHLL.mul_(dt_bcHL[..., None, :])
    from_start_bcHL = cs_bcHL.clamp(min=_MIN_LOG).exp() * carried_bcL[:, :, None]
    to_end_bcHL = decay_bcHLL[..., -1, :] * mask_bcLL[:, :, None, -1]
    return _Chunks(
        x_bcHLP,
        B_bcGLN,
        C_bcGLN,
        dt_bcHL,
        mask_bcLL,
        scores_bcGLL,
        decay_bcHLL,
        from_start_bcHL,
        to_end_bcHL,
    )
