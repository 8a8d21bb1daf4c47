"""Mamba-2 scan on GPUs: products by libraries, Triton for what lies between them.

The chunked form of ``reference.py``. All products are batches of matrices with operands in x's
dtype and results in fp32; those with a state take all heads of a group at once. Decays, sums,
states as they are carried, and gradients of dt, A and D are fp32; rounded to x's dtype (in bf16: by
2^-9) are M and its scores' gradient, and what is written to or read from a state. How many kernels
are launched does not depend on documents. Nothing is added atomically, nothing waits for the GPU.

The backward pass keeps the inputs, decays of each token (20 bytes per head), and the states that
enter chunks, in x's dtype; M and its scores are made once more.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state, h heads per group; L chunk
length, c chunks of a row, U of all rows, R tiles of a chunk's tokens, T tiles of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.backend import Sizes, draw, relative_deviation
from nemo_kernels.checks import expect, expect_device
from nemo_kernels.documents import Documents
from nemo_kernels.launch import launch
from nemo_kernels.products import fp32_product
from nemo_kernels.ssd import chunk_kernel, reference
from nemo_kernels.ssd.passes import Passes, Times, padded

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
_DTYPES = (torch.bfloat16, torch.float32)
_CHUNKS = (16, 128)
"""Chunks are powers of two in this range, the asked length where that is one."""
_BLOCK = 8192
"""Tokens of all rows that are worked on at a time, if rows have several chunks: states, scores and
decays of all would take more memory than inputs and results."""
_WIDTH = 16  # channels of a head that move on together


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
    """``nemo_kernels.ssd.ssd_scan``.

    Raises:
        ValueError: shapes or devices that do not fit.
    """
    rows, length, heads, head_dim = _check(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    if initial_state_BHPN is not None:
        state = (rows, heads, head_dim, B_BSGN.shape[3])
        expect("initial_state_BHPN", initial_state_BHPN, state)
        expect_device(x_BSHP, initial_state_BHPN=initial_state_BHPN)
        initial_state_BHPN = initial_state_BHPN.contiguous()
    seq_idx_BS = None
    if documents is not None:
        seq_idx_BS = documents.seq_idx_BS.contiguous()
        expect("documents.seq_idx_BS", seq_idx_BS, (rows, length), torch.int32)
        expect_device(x_BSHP, **{"documents.seq_idx_BS": seq_idx_BS})
    lowest, highest = _CHUNKS
    chunk = min(max(triton.next_power_of_2(min(chunk_size, length)), lowest), highest)
    x_BSHP, B_BSGN, C_BSGN = (_side_by_side(t) for t in (x_BSHP, B_BSGN, C_BSGN))
    block = max(_BLOCK // (max(rows, 1) * chunk), 1) * chunk
    inputs = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, initial_state_BHPN, seq_idx_BS)
    return _Scan.apply(*inputs, chunk) if length <= block else _in_blocks(block, chunk, *inputs)


def _in_blocks(
    block: int,
    chunk: int,
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None,
    seq_idx_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """So many tokens of every row at a time, each with the state that those before it leave."""
    numbers = None if seq_idx_BS is None else seq_idx_BS.split(block, 1)
    blocks = zip(*(t.split(block, 1) for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN)), strict=True)
    parts = []
    for i, (x, dt, B, C) in enumerate(blocks):
        of_block = None if numbers is None else numbers[i].contiguous()
        y, last_BHPN = _Scan.apply(x, dt, A_H, B, C, D_H, state_BHPN, of_block, chunk)
        parts.append(y)
        state_BHPN = last_BHPN
        if numbers is not None and i + 1 < len(numbers):  # nothing is left of what has ended
            begins_B = numbers[i + 1][:, 0] != numbers[i][:, -1]
            state_BHPN = last_BHPN.masked_fill(begins_B[:, None, None, None], 0)
    return torch.cat(parts, 1), last_BHPN


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> Tensor:
    """``nemo_kernels.ssd.ssd_step``; no gradients.

    Raises:
        ValueError: shapes, strides or devices that do not fit, or a state that is not fp32.
    """
    tokens = (t[:, None] for t in (x_BHP, B_BGN, C_BGN))
    x_BSHP, B_BSGN, C_BSGN = tokens
    rows, _, heads, head_dim = _check(x_BSHP, dt_BH[:, None], A_H, B_BSGN, C_BSGN, D_H)
    groups, state = B_BGN.shape[1:]
    expect("state_BHPN", state_BHPN, (rows, heads, head_dim, state), torch.float32)
    expect_device(x_BHP, state_BHPN=state_BHPN)
    if not state_BHPN.is_contiguous():
        raise ValueError(f"state_BHPN: expected a contiguous tensor, got {state_BHPN.stride()}")
    y_BHP = torch.empty(x_BHP.shape, dtype=x_BHP.dtype, device=x_BHP.device)
    x_BSHP, B_BSGN, C_BSGN = (_side_by_side(t) for t in (x_BSHP, B_BSGN, C_BSGN))
    dt_BH = dt_BH.contiguous()
    strides = (x_BSHP.stride(0), dt_BH.stride(0), B_BSGN.stride(0), C_BSGN.stride(0))
    tensors = (x_BSHP, dt_BH, A_H, B_BSGN, C_BSGN, D_H, state_BHPN, y_BHP)
    moved = sum(t.nbytes for t in (*tensors, state_BHPN))
    sizes = (heads, groups, head_dim, state, *strides, _WIDTH, padded(state))
    grid = (rows * heads * triton.cdiv(head_dim, _WIDTH),)
    launch(chunk_kernel.step_kernel, grid, *tensors, *sizes, moved=moved, num_warps=4)
    return y_BHP


def refusal(x: Tensor, *_: Any) -> str:
    """In fp16 states could overflow."""
    return "" if x.dtype in _DTYPES else f"expected one of {_DTYPES}, got {x.dtype}"


def self_check(device_type: str, sizes: Sizes) -> float:
    return checked(ssd_scan, device_type, sizes)


def checked(scan: Callable[..., Any], device_type: str, sizes: Sizes) -> float:
    """Largest deviation from the reference, over nine chunks amid which documents begin."""
    heads, head_dim, groups, state, chunk, *_, length = sizes
    group = (2, length, groups, state)
    x_BSHP, B_BSGN, C_BSGN, *others = draw(
        device_type, (2, length, heads, head_dim), group, group, (2, length, heads), (heads,),
        (heads,), (2, heads, head_dim, state),
    )  # fmt: skip
    dt_BSH, A_H, D_H, initial_BHPN = (t.float().sigmoid() for t in others)
    numbers_BS = torch.stack([torch.arange(length) // 90, torch.arange(length) // 500])
    documents = Documents.from_numbers(numbers_BS).to(device_type)

    def run(impl: Any, *t: Tensor) -> Tensor:
        y_BSHP, state_BHPN = impl(*t[:6], chunk, documents, t[6])
        return torch.cat([y_BSHP.flatten(1), state_BHPN.flatten(1)], 1)

    inputs = (x_BSHP, dt_BSH / 8, -A_H, B_BSGN, C_BSGN / 8, D_H, initial_BHPN)
    return relative_deviation(run, (scan, reference.ssd_scan), inputs)


def _check(
    x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, D_H: Tensor
) -> tuple[int, int, int, int]:
    """Rows, tokens, heads and head dim."""
    expect("x", x_BSHP, (None,) * 4)
    rows, length, heads, head_dim = x_BSHP.shape
    expect("dt", dt_BSH, (rows, length, heads))
    expect("A_H", A_H, (heads,))
    expect("D_H", D_H, (heads,))
    expect("B", B_BSGN, (rows, length, None, None))
    expect("C", C_BSGN, tuple(B_BSGN.shape))
    groups = B_BSGN.shape[2]
    if not groups or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides {heads}, got {groups}")
    expect_device(x_BSHP, dt=dt_BSH, A_H=A_H, B=B_BSGN, C=C_BSGN, D_H=D_H)
    return rows, length, heads, head_dim


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor | None,
        seq_idx_BS: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        p = Passes.of(x_BSHP, B_BSGN, chunk)
        times = p.times(dt_BSH, A_H, seq_idx_BS)
        x_UHLP, written_UGLhP, BC_2UGLN = p.for_output(x_BSHP, B_BSGN, C_BSGN, times)
        B_UGLN, C_UGLN = BC_2UGLN
        M_UHLL = p.matrix(_product(C_UGLN, B_UGLN.mT), times, seq_idx_BS)
        within_UHLP = _product(M_UHLL, x_UHLP)
        del M_UHLL, x_UHLP
        new_UGhPN = _product(written_UGLhP.mT, B_UGLN)
        del written_UGLhP
        states_BcHPN, final_BHPN = p.states(new_UGhPN, times.gate, initial_BHPN)
        del new_UGhPN
        across_UGLhP = _product(C_UGLN, p.by_group(states_BcHPN).mT)
        y_BSHP = p.output(within_UHLP, across_UGLhP, x_BSHP, times, D_H)
        inputs = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, seq_idx_BS)
        ctx.save_for_backward(*inputs, states_BcHPN, *times)
        ctx.passes = p
        ctx.initial_dtype = None if initial_BHPN is None else initial_BHPN.dtype
        ctx.set_materialize_grads(False)
        return y_BSHP, final_BHPN

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy_BSHP: Tensor | None, dfinal_BHPN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, seq_idx_BS, states_BcHPN, *kept = (
            ctx.saved_tensors
        )
        p, times = ctx.passes, Times(*kept)
        if dy_BSHP is None:
            dy_BSHP = x_BSHP.new_zeros(x_BSHP.shape)
        dy_BSHP = _side_by_side(dy_BSHP)
        if dfinal_BHPN is not None:
            dfinal_BHPN = dfinal_BHPN.contiguous()

        # Within chunks. Tensors are let go as soon as they may be: dM is the largest of all.
        x_UHLP, dy_UHLP, BC_2UGLN = p.for_gradients(x_BSHP, dy_BSHP, B_BSGN, C_BSGN)
        B_UGLN, C_UGLN = BC_2UGLN
        scores_UGLL = _product(C_UGLN, B_UGLN.mT)
        dM_UHLL = _product(dy_UHLP, x_UHLP.mT)
        del x_UHLP
        dscores_2UGLL, row_UHL, column_RUHL = p.score_gradients(
            dM_UHLL, scores_UGLL, times, seq_idx_BS
        )
        del dM_UHLL
        M_UHLL = p.matrix(scores_UGLL, times, seq_idx_BS)
        del scores_UGLL
        within_UHLP = _product(M_UHLL.mT, dy_UHLP)
        del M_UHLL, dy_UHLP

        # Through states.
        states_UGhPN = p.by_group(states_BcHPN)
        read_UGLhP, dread_UHL = p.read(dy_BSHP, _product(C_UGLN, states_UGhPN.mT), times)
        dread_UGhPN = _product(read_UGLhP.mT, C_UGLN)
        initial = ctx.initial_dtype is not None and ctx.needs_input_grad[6]
        dafter_BcHPN, dgate_UHT, dinitial_BHPN = p.state_gradients(
            dread_UGhPN, states_BcHPN, times.gate, dfinal_BHPN, initial
        )
        del dread_UGhPN
        dafter_UGhPN = p.by_group(dafter_BcHPN)
        dC_UGLN = _product(read_UGLhP, states_UGhPN)
        del read_UGLhP
        dB_UGLN = _product(p.written(x_BSHP, times), dafter_UGhPN)
        pairs_2UGLN = _product(dscores_2UGLL, BC_2UGLN)
        dC_BSGN, dB_BSGN = p.group_gradients(pairs_2UGLN, dC_UGLN, dB_UGLN)
        del dscores_2UGLL, pairs_2UGLN, dC_UGLN, dB_UGLN
        across_UGLhP = _product(B_UGLN, dafter_UGhPN.mT)
        del dafter_BcHPN, dafter_UGhPN
        dx_BSHP, dwritten_UHL, dD_UHR = p.input_gradients(
            within_UHLP, across_UGLhP, x_BSHP, dy_BSHP, times, D_H
        )
        del within_UHLP, across_UGLhP
        sums = (row_UHL, column_RUHL, dwritten_UHL, dread_UHL, dgate_UHT, dD_UHR)
        ddt_BSH, sums_2UH = p.time_gradients(sums, times, dt_BSH, A_H, seq_idx_BS)
        dA_H, dD_H = sums_2UH.sum(1)
        if dinitial_BHPN is not None:
            dinitial_BHPN = dinitial_BHPN.to(ctx.initial_dtype)
        of_heads = (dA_H.to(A_H.dtype), dB_BSGN, dC_BSGN, dD_H.to(D_H.dtype))
        return dx_BSHP, ddt_BSH, *of_heads, dinitial_BHPN, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of each two matrices of the leading dimensions, in fp32."""
    return fp32_product(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def _side_by_side(t: Tensor) -> Tensor:
    """[B,S,H,P] with heads side by side, rows and tokens where they are."""
    return t if t.stride()[2:] == (t.shape[3], 1) else t.contiguous()
