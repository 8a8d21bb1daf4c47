"""Triton kernels of the chunked scan: what lies between its matrix products.

Notation of ``reference.py``: a chunk's tokens have log-decays summed up to them (``cs``), within
their document; a token is read from the state that enters with ``from_start``, and written to the
state that leaves with ``to_end`` times dt; ``gate`` is what stays of the state. No value passes
from one document to another: sums and products of pairs are masked, factors of states exact zeros.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state, h heads per group; L chunk
length, ``chunks`` of a row, U = B*chunks; X tokens that a program has (``ROWS``), R = L/X; T tiles
of a state, ``BLOCK`` elements each. Inside kernels i is a token that reads, j one that is read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(seq_idx_BS, u, chunks, S, L: tl.constexpr):
    """Row of the batch, places of a chunk's tokens in it, their documents, and that of what enters
    the chunk. Tokens behind the end belong to the last document."""
    row, first = u // chunks, u % chunks * L
    s_L = first + tl.arange(0, L)
    document_L, before = tl.zeros((L,), tl.int32), 0
    if seq_idx_BS is not None:
        of_row = seq_idx_BS + row * S
        document_L = tl.load(of_row + tl.minimum(s_L, S - 1))
        before = tl.load(of_row + tl.maximum(first - 1, 0))
    return row, s_L, document_L, before


@triton.jit
def _decay(cs_i, cs_j, together):
    """exp(cs_i - cs_j), at most 1 however that is rounded; 0 where j does not reach i."""
    return tl.where(together, tl.exp(tl.minimum(cs_i[:, None] - cs_j[None, :], 0.0)), 0.0)


@triton.jit
def _pairs(seq_idx_BS, u, i_X, chunks, S, L: tl.constexpr):
    """A chunk's tokens, and which of them those of a program read: not those behind them, nor those
    of other documents."""
    row, _, document_j, _ = _tokens(seq_idx_BS, u, chunks, S, L)
    j_L = tl.arange(0, L)
    together = i_X[:, None] >= j_L[None, :]
    if seq_idx_BS is not None:
        s_X = tl.minimum(u % chunks * L + i_X, S - 1)
        document_i = tl.load(seq_idx_BS + row * S + s_X)
        together = together & (document_i[:, None] == document_j[None, :])
    return j_L, together


@triton.jit
def times_kernel(
    dt_BSH, A_H, seq_idx_BS, cs_UHL, dt_UHL, from_start_UHL, to_end_UHL, gate_UH,
    S, H, chunks, stride_B, stride_S, stride_H, L: tl.constexpr,
):  # fmt: skip
    """Decays of a chunk and head. A token that is not there has dt = 0 and changes nothing."""
    u, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    row, s_L, document_L, before = _tokens(seq_idx_BS, u, chunks, S, L)
    at_L = row * stride_B + s_L * stride_S + head * stride_H
    dt_L = tl.load(dt_BSH + at_L, mask=s_L < S, other=0.0).to(tl.float32)
    a_L = dt_L * tl.load(A_H + head).to(tl.float32)
    i_L = tl.arange(0, L)
    earlier = i_L[:, None] >= i_L[None, :]
    together = earlier & (document_L[:, None] == document_L[None, :])
    cs_L = tl.sum(tl.where(together, a_L[None, :], 0.0), 1)
    cs_end = tl.sum(tl.where(i_L == L - 1, cs_L, 0.0), 0)
    document_end = tl.sum(tl.where(i_L == L - 1, document_L, 0), 0)
    from_start_L = tl.where(document_L == before, tl.exp(cs_L), 0.0)
    reaches_L = document_L == document_end
    to_end_L = tl.where(reaches_L, tl.exp(tl.minimum(cs_end - cs_L, 0.0)), 0.0)
    here = (u * H + head) * L + i_L
    tl.store(cs_UHL + here, cs_L)
    tl.store(dt_UHL + here, dt_L)
    tl.store(from_start_UHL + here, from_start_L)
    tl.store(to_end_UHL + here, to_end_L)
    tl.store(gate_UH + u * H + head, tl.sum(tl.where(i_L == L - 1, from_start_L, 0.0), 0))


@triton.jit
def _where(before, H, L: tl.constexpr, ROWS: tl.constexpr):
    """Chunk, head, tokens of a program, and the place of these in [U,H,L]; ``before``: programs
    that do something else."""
    blocks: tl.constexpr = L // ROWS
    program = (tl.program_id(0) - before) // blocks
    i_X = (tl.program_id(0) - before) % blocks * ROWS + tl.arange(0, ROWS)
    u = (program // H).to(tl.int64)
    return u, program % H, i_X, (u * H + program % H) * L + i_X


@triton.jit
def _in_rows(u, head, i_X, w_W, width, S, chunks, stride_B, stride_S, L: tl.constexpr):
    """Places in a tensor [B,S,H,width] whose heads lie side by side, and which of them exist."""
    s_X = u % chunks * L + i_X
    at_X = u // chunks * stride_B + s_X * stride_S + head * width
    return at_X[:, None] + w_W[None, :], (s_X < S)[:, None] & (w_W < width)[None, :]


@triton.jit
def _in_group(u, head, i_X, w_W, width, H, per_group, L: tl.constexpr):
    """Places in [U,G,L,h*width]: the heads of a group side by side."""
    group = u * (H // per_group) + head // per_group
    at_X = ((group * L + i_X) * per_group + head % per_group) * width
    return at_X[:, None] + w_W[None, :]


@triton.jit
def _heads_laid_out(
    x_BSHP, dy_BSHP, dt_UHL, to_end_UHL, x_UHLP, dy_UHLP, written_UGLhP,
    S, H, G, P, chunks, x_B, x_S, dy_B, dy_S,
    L: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    u, head, i_X, here_X = _where(0, H, L, ROWS)
    w_W = tl.arange(0, WIDTH)
    ok_W = (w_W < P)[None, :]
    by_head = here_X[:, None] * P + w_W[None, :]
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, x_B, x_S, L)
    x = tl.load(x_BSHP + at, mask=ok, other=0.0).to(tl.float32)
    if x_UHLP is not None:
        tl.store(x_UHLP + by_head, x.to(x_UHLP.dtype.element_ty), mask=ok_W)
    if written_UGLhP is not None:
        at = _in_group(u, head, i_X, w_W, P, H, H // G, L)
        to_end_X = tl.load(to_end_UHL + here_X).to(tl.float32)
        written = x * (to_end_X * tl.load(dt_UHL + here_X).to(tl.float32))[:, None]
        tl.store(written_UGLhP + at, written.to(written_UGLhP.dtype.element_ty), mask=ok_W)
    if dy_BSHP is not None:
        at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, dy_B, dy_S, L)
        dy = tl.load(dy_BSHP + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dy_UHLP + by_head, dy.to(dy_UHLP.dtype.element_ty), mask=ok_W)


@triton.jit
def _groups_laid_out(
    B_BSGN, C_BSGN, BC_2UGLN, n_pairs, before, S, G, N, chunks, B_B, B_S, C_B, C_S,
    L: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    u, group, i_X, here_X = _where(before, G, L, ROWS)
    n_W = tl.arange(0, STATE)
    ok_W = (n_W < N)[None, :]
    to = here_X[:, None] * N + n_W[None, :]
    at, ok = _in_rows(u, group, i_X, n_W, N, S, chunks, B_B, B_S, L)
    of_B = tl.load(B_BSGN + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(BC_2UGLN + to, of_B.to(BC_2UGLN.dtype.element_ty), mask=ok_W)
    at, ok = _in_rows(u, group, i_X, n_W, N, S, chunks, C_B, C_S, L)
    of_C = tl.load(C_BSGN + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(BC_2UGLN + n_pairs + to, of_C.to(BC_2UGLN.dtype.element_ty), mask=ok_W)


@triton.jit
def layout_kernel(
    x_BSHP, dy_BSHP, B_BSGN, C_BSGN, dt_UHL, to_end_UHL, x_UHLP, dy_UHLP, written_UGLhP, BC_2UGLN,
    n_pairs, of_heads, S, H, G, P, N, chunks, x_B, x_S, dy_B, dy_S, B_B, B_S, C_B, C_S,
    L: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """To where products want it: x and dy by chunk and head; x as it is written to a state, B and C
    by chunk and group. What is None is left out. The first ``of_heads`` programs have heads;
    ``n_pairs``: elements of B by chunk."""
    if tl.program_id(0) < of_heads:
        _heads_laid_out(
            x_BSHP, dy_BSHP, dt_UHL, to_end_UHL, x_UHLP, dy_UHLP, written_UGLhP,
            S, H, G, P, chunks, x_B, x_S, dy_B, dy_S, L, ROWS, WIDTH,
        )  # fmt: skip
    else:
        if BC_2UGLN is not None:
            _groups_laid_out(
                B_BSGN, C_BSGN, BC_2UGLN, n_pairs, of_heads, S, G, N, chunks, B_B, B_S, C_B, C_S,
                L, ROWS, STATE,
            )  # fmt: skip


@triton.jit
def read_kernel(
    dy_BSHP, from_start_UHL, across_UGLhP, read_UGLhP, dread_UHL,
    S, H, G, P, chunks, dy_B, dy_S, L: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dy as it reads from a state; and of each token what depends on from_start, where ``across``
    is C state^T."""
    u, head, i_X, here_X = _where(0, H, L, ROWS)
    w_W = tl.arange(0, WIDTH)
    ok_W = (w_W < P)[None, :]
    from_start_X = tl.load(from_start_UHL + here_X).to(tl.float32)
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, dy_B, dy_S, L)
    read = tl.load(dy_BSHP + at, mask=ok, other=0.0).to(tl.float32) * from_start_X[:, None]
    at = _in_group(u, head, i_X, w_W, P, H, H // G, L)
    across = tl.load(across_UGLhP + at, mask=ok_W, other=0.0).to(tl.float32)
    tl.store(read_UGLhP + at, read.to(read_UGLhP.dtype.element_ty), mask=ok_W)
    tl.store(dread_UHL + here_X, tl.sum(read * across, 1))


@triton.jit
def matrix_kernel(
    scores_UGLL, cs_UHL, dt_UHL, seq_idx_BS, M_UHLL, S, H, G, chunks,
    L: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """M = mask * (C B^T) * decay * dt, rounded."""
    u, head, i_X, here_X = _where(0, H, L, ROWS)
    j_L, together = _pairs(seq_idx_BS, u, i_X, chunks, S, L)
    here_L = (u * H + head) * L + j_L
    at = ((u * G + head // (H // G)) * L + i_X)[:, None] * L + j_L[None, :]
    scores = tl.load(scores_UGLL + at, mask=together, other=0.0).to(tl.float32)
    cs_X = tl.load(cs_UHL + here_X).to(tl.float32)
    cs_L = tl.load(cs_UHL + here_L).to(tl.float32)
    dt_L = tl.load(dt_UHL + here_L).to(tl.float32)
    M = scores * _decay(cs_X, cs_L, together) * dt_L[None, :]
    tl.store(M_UHLL + here_X[:, None] * L + j_L[None, :], M.to(M_UHLL.dtype.element_ty))


@triton.jit
def state_kernel(
    new_BchPN, initial_BHPN, gate_UH, states_BcHPN, final_BHPN, chunks, H, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """state' = gate * state + new, chunk by chunk; ``size``: elements of a head's state."""
    tiles = tl.cdiv(size, BLOCK)
    of, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, head = of // H, of % H
    n_N = tile * BLOCK + tl.arange(0, BLOCK)
    ok_N = n_N < size
    state_N = tl.zeros((BLOCK,), tl.float32)
    if initial_BHPN is not None:
        state_N = tl.load(initial_BHPN + of * size + n_N, mask=ok_N, other=0.0).to(tl.float32)
    for chunk in range(0, chunks):
        place = (row * chunks + chunk) * H + head
        at_N = place * size + n_N
        tl.store(states_BcHPN + at_N, state_N.to(states_BcHPN.dtype.element_ty), mask=ok_N)
        new_N = tl.load(new_BchPN + at_N, mask=ok_N, other=0.0).to(tl.float32)
        state_N = tl.load(gate_UH + place).to(tl.float32) * state_N + new_N
    tl.store(final_BHPN + of * size + n_N, state_N, mask=ok_N)


@triton.jit
def state_gradient_kernel(
    dread_BchPN, states_BcHPN, dfinal_BHPN, gate_UH, dafter_BcHPN, dgate_UHT, dinitial_BHPN,
    chunks, H, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the state after each chunk, last one first, and, tile by tile, of gates."""
    tiles = tl.cdiv(size, BLOCK)
    of, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row, head = of // H, of % H
    n_N = tile * BLOCK + tl.arange(0, BLOCK)
    ok_N = n_N < size
    dstate_N = tl.zeros((BLOCK,), tl.float32)
    if dfinal_BHPN is not None:
        dstate_N = tl.load(dfinal_BHPN + of * size + n_N, mask=ok_N, other=0.0).to(tl.float32)
    for after in range(0, chunks):
        place = (row * chunks + chunks - 1 - after) * H + head
        at_N = place * size + n_N
        tl.store(dafter_BcHPN + at_N, dstate_N.to(dafter_BcHPN.dtype.element_ty), mask=ok_N)
        before_N = tl.load(states_BcHPN + at_N, mask=ok_N, other=0.0).to(tl.float32)
        tl.store(dgate_UHT + place * tiles + tile, tl.sum(dstate_N * before_N, 0))
        dread_N = tl.load(dread_BchPN + at_N, mask=ok_N, other=0.0).to(tl.float32)
        dstate_N = dread_N + tl.load(gate_UH + place).to(tl.float32) * dstate_N
    if dinitial_BHPN is not None:
        tl.store(dinitial_BHPN + of * size + n_N, dstate_N, mask=ok_N)


@triton.jit
def output_kernel(
    within_UHLP, across_UGLhP, x_BSHP, from_start_UHL, D_H, y_BSHP,
    S, H, G, P, chunks, x_B, x_S, y_B, L: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = M x + from_start * (C state) + D x."""
    u, head, i_X, here_X = _where(0, H, L, ROWS)
    w_W = tl.arange(0, WIDTH)
    ok_W = (w_W < P)[None, :]
    within = tl.load(within_UHLP + here_X[:, None] * P + w_W[None, :], mask=ok_W, other=0.0)
    at = _in_group(u, head, i_X, w_W, P, H, H // G, L)
    across = tl.load(across_UGLhP + at, mask=ok_W, other=0.0).to(tl.float32)
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, x_B, x_S, L)
    x = tl.load(x_BSHP + at, mask=ok, other=0.0).to(tl.float32)
    D = tl.load(D_H + head).to(tl.float32)
    from_start_X = tl.load(from_start_UHL + here_X).to(tl.float32)
    y = within.to(tl.float32) + from_start_X[:, None] * across + D * x
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, y_B, H * P, L)
    tl.store(y_BSHP + at, y.to(y_BSHP.dtype.element_ty), mask=ok)


@triton.jit
def score_gradient_kernel(
    dM_UHLL, scores_UGLL, cs_UHL, dt_UHL, seq_idx_BS, dscores_2UGLL, row_UHL, column_RUHL,
    n_scores, n_times, S, H, G, chunks, L: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of C B^T, also transposed, summed over a group's heads in registers. And with
    e_ij = dM_ij * M_ij / dt_j, from the same numbers so that they cancel: sums of e_ij dt_j over j,
    and of e_ij over the i of a program. ``n_scores``, ``n_times``: elements of a slice."""
    u, group, i_X, _ = _where(0, G, L, ROWS)
    j_L, together = _pairs(seq_idx_BS, u, i_X, chunks, S, L)
    pair = i_X[:, None] * L + j_L[None, :]
    of_scores = (u * G + group) * L * L
    scores = tl.load(scores_UGLL + of_scores + pair, mask=together, other=0.0).to(tl.float32)
    dscores = tl.zeros((ROWS, L), tl.float32)
    per_group = H // G
    block = tl.program_id(0) % (L // ROWS)
    for of_group in range(0, per_group):
        place = (u * H + group * per_group + of_group) * L
        dM = tl.load(dM_UHLL + place * L + pair, mask=together, other=0.0).to(tl.float32)
        cs_X = tl.load(cs_UHL + place + i_X).to(tl.float32)
        cs_L = tl.load(cs_UHL + place + j_L).to(tl.float32)
        dt_L = tl.load(dt_UHL + place + j_L).to(tl.float32)
        dM *= _decay(cs_X, cs_L, together)
        dscores += dM * dt_L[None, :]
        dM *= scores
        tl.store(row_UHL + place + i_X, tl.sum(dM * dt_L[None, :], 1))
        tl.store(column_RUHL + block * n_times.to(tl.int64) + place + j_L, tl.sum(dM, 0))
    rounded = dscores.to(dscores_2UGLL.dtype.element_ty)
    tl.store(dscores_2UGLL + of_scores + pair, rounded)
    transposed = j_L[:, None] * L + i_X[None, :]
    tl.store(dscores_2UGLL + n_scores + of_scores + transposed, rounded.T)


@triton.jit
def input_gradient_kernel(
    within_UHLP, across_UGLhP, x_BSHP, dy_BSHP, dt_UHL, to_end_UHL, D_H,
    dx_BSHP, dwritten_UHL, dD_UHR,
    S, H, G, P, chunks, x_B, x_S, dy_B, dy_S, dx_B,
    L: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx = M^T dy + to_end dt (B dafter^T) + D dy, where ``across`` is B dafter^T; of each token
    what depends on to_end dt, divided by dt; and a tile's part of dD."""
    u, head, i_X, here_X = _where(0, H, L, ROWS)
    w_W = tl.arange(0, WIDTH)
    ok_W = (w_W < P)[None, :]
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, x_B, x_S, L)
    x = tl.load(x_BSHP + at, mask=ok, other=0.0).to(tl.float32)
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, dy_B, dy_S, L)
    dy = tl.load(dy_BSHP + at, mask=ok, other=0.0).to(tl.float32)
    by_group = _in_group(u, head, i_X, w_W, P, H, H // G, L)
    across = tl.load(across_UGLhP + by_group, mask=ok_W, other=0.0).to(tl.float32)
    within = tl.load(within_UHLP + here_X[:, None] * P + w_W[None, :], mask=ok_W, other=0.0)
    to_end_X = tl.load(to_end_UHL + here_X).to(tl.float32)
    dt_X = tl.load(dt_UHL + here_X).to(tl.float32)
    dx = within.to(tl.float32) + (to_end_X * dt_X)[:, None] * across
    dx += tl.load(D_H + head).to(tl.float32) * dy
    at, ok = _in_rows(u, head, i_X, w_W, P, S, chunks, dx_B, H * P, L)
    tl.store(dx_BSHP + at, dx.to(dx_BSHP.dtype.element_ty), mask=ok)
    tl.store(dwritten_UHL + here_X, to_end_X * tl.sum(x * across, 1))
    tl.store(dD_UHR + tl.program_id(0), tl.sum(tl.sum(x * dy, 1), 0))


@triton.jit
def group_gradient_kernel(
    pairs_2UGLN, dC_UGLN, dB_UGLN, dC_BSGN, dB_BSGN, n_pairs, S, G, N, chunks, dB_B,
    L: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """What C and B get within chunks, and from states. ``n_pairs``: elements of a half."""
    u, group, i_X, here_X = _where(0, G, L, ROWS)
    n_W = tl.arange(0, STATE)
    ok_W = (n_W < N)[None, :]
    from_ = here_X[:, None] * N + n_W[None, :]
    to, ok = _in_rows(u, group, i_X, n_W, N, S, chunks, dB_B, G * N, L)
    dC = tl.load(pairs_2UGLN + from_, mask=ok_W, other=0.0).to(tl.float32)
    dC += tl.load(dC_UGLN + from_, mask=ok_W, other=0.0).to(tl.float32)
    tl.store(dC_BSGN + to, dC.to(dC_BSGN.dtype.element_ty), mask=ok)
    dB = tl.load(pairs_2UGLN + n_pairs + from_, mask=ok_W, other=0.0).to(tl.float32)
    dB += tl.load(dB_UGLN + from_, mask=ok_W, other=0.0).to(tl.float32)
    tl.store(dB_BSGN + to, dB.to(dB_BSGN.dtype.element_ty), mask=ok)


@triton.jit
def time_gradient_kernel(
    row_UHL, column_RUHL, dwritten_UHL, dread_UHL, dgate_UHT, dD_UHR, dt_UHL, A_H, gate_UH,
    seq_idx_BS, ddt_BSH, sums_2UH, n_times, n_sums, S, H, chunks, tiles,
    L: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of a chunk and head: the gradient of cs, that of each dt A as a sum over the tokens behind it
    in its document, and from it those of dt and, as parts of sums, of A and D."""
    u, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    row, s_L, document_L, _ = _tokens(seq_idx_BS, u, chunks, S, L)
    i_L, place = tl.arange(0, L), u * H + head
    here = place * L + i_L
    column_L = tl.load(dwritten_UHL + here).to(tl.float32)
    dt_L = tl.load(dt_UHL + here).to(tl.float32)
    dend = tl.sum(dt_L * column_L, 0)
    t_T = tl.arange(0, TILES)
    dgate_T = tl.load(dgate_UHT + place * tiles + t_T, mask=t_T < tiles, other=0.0).to(tl.float32)
    dend += tl.load(gate_UH + place).to(tl.float32) * tl.sum(dgate_T, 0)
    for block in tl.static_range(BLOCKS):
        column_L += tl.load(column_RUHL + block * n_times.to(tl.int64) + here).to(tl.float32)
    dcs_L = tl.load(row_UHL + here).to(tl.float32) + tl.load(dread_UHL + here).to(tl.float32)
    dcs_L += tl.where(i_L == L - 1, dend, 0.0) - dt_L * column_L
    behind = i_L[:, None] <= i_L[None, :]
    behind = behind & (document_L[:, None] == document_L[None, :])
    da_L = tl.sum(tl.where(behind, dcs_L[None, :], 0.0), 1)
    ddt_L = column_L + da_L * tl.load(A_H + head).to(tl.float32)
    tl.store(ddt_BSH + (row * S + s_L) * H + head, ddt_L.to(ddt_BSH.dtype.element_ty), mask=s_L < S)
    tl.store(sums_2UH + place, tl.sum(da_L * dt_L, 0))
    r_R = tl.arange(0, BLOCKS)
    dD_R = tl.load(dD_UHR + place * BLOCKS + r_R).to(tl.float32)
    tl.store(sums_2UH + n_sums + place, tl.sum(dD_R, 0))


@triton.jit
def step_kernel(
    x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN, y_BHP,
    H, G, P, N, x_B, dt_B, B_B, C_B, WIDTH: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One token of some channels of a head; the state moves on in place."""
    tiles = tl.cdiv(P, WIDTH)
    of, w_W = tl.program_id(0) // tiles, tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    row, head, n_N = (of // H).to(tl.int64), of % H, tl.arange(0, STATE)
    ok_W, ok_N = w_W < P, n_N < N
    dt = tl.load(dt_BH + row * dt_B + head).to(tl.float32)
    decay = tl.exp(dt * tl.load(A_H + head).to(tl.float32))
    x_W = tl.load(x_BHP + row * x_B + head * P + w_W, mask=ok_W, other=0.0).to(tl.float32)
    group = head // (H // G) * N
    B_N = tl.load(B_BGN + row * B_B + group + n_N, mask=ok_N, other=0.0).to(tl.float32)
    C_N = tl.load(C_BGN + row * C_B + group + n_N, mask=ok_N, other=0.0).to(tl.float32)
    at = ((row * H + head) * P + w_W[:, None]) * N + n_N[None, :]
    ok = ok_W[:, None] & ok_N[None, :]
    state = tl.load(state_BHPN + at, mask=ok, other=0.0).to(tl.float32)
    state = decay * state + (dt * x_W)[:, None] * B_N[None, :]
    tl.store(state_BHPN + at, state, mask=ok)
    y_W = tl.sum(state * C_N[None, :], 1) + tl.load(D_H + head).to(tl.float32) * x_W
    tl.store(y_BHP + (row * H + head) * P + w_W, y_W.to(y_BHP.dtype.element_ty), mask=ok_W)
