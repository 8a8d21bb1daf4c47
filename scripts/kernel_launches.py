"""Every kernel in every form in which it is shipped, for scripts/compile_kernels.py.

The operations are called at sizes of published models, on tensors without data, and say themselves
what they launch. A new kernel needs a call here.

Shapes: T tokens, D hidden, E experts, K experts per token, R routed slots, L width in which experts
work, F expert inner width; V vocabulary; M rows and N columns of a matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nemo_kernels.conv1d import kernel as conv1d_kernel
from nemo_kernels.documents import Documents
from nemo_kernels.launch import Launch, recorded
from nemo_kernels.loss import kernel as loss_kernel
from nemo_kernels.lowp import gemm_kernel, layout, quantize_kernel
from nemo_kernels.lowp.grouped import grouped_product, grouped_wgrad
from nemo_kernels.lowp.operand import Operand, Rounding
from nemo_kernels.moe import kernel, low_rank
from nemo_kernels.moe.function import mlp
from nemo_kernels.moe.low_rank import LowRank
from nemo_kernels.norm import kernel as norm_kernel
from nemo_kernels.ssd import kernel as ssd_kernel

BOTH, HOPPER, BLACKWELL = (90, 100), (90,), (100,)
BF16, FP32 = torch.bfloat16, torch.float32
SUPER, NANO = (512, 22, 1024, 2688), (128, 6, 2688, 1856)
"""Experts, experts per token, L and F."""
ODD, UNEVEN = (16, 1020, 2690), (8, 272, 144)
"""Experts, L and F that are not aligned; that are, but no multiples of a block."""
SQUARE, RHT = Rounding((16, 16)), Rounding(rht=True)
SIDES = (
    # (rows, columns) of activations forward and backward, of gradients, of weights, and without the
    # transform, random bits or 16x16 blocks.
    (Rounding(), None),
    (None, RHT),
    (Rounding(), RHT),
    (Rounding(seed=1), Rounding(rht=True, seed=2)),
    (SQUARE, None),
    (SQUARE, SQUARE),
    (Rounding(), Rounding()),
    (Rounding(seed=1), Rounding(seed=2)),
)


def launches() -> Iterator[tuple[Launch, tuple[int, ...]]]:
    """Each launch, also the same one twice, with the architectures on which it happens."""
    for architectures, call in calls():
        with recorded() as found:
            call()
        yield from ((launch, architectures) for launch in found)


def calls() -> Iterator[tuple[tuple[int, ...], Callable[[], object]]]:
    for tokens, (experts, k, width, inner) in itertools.product((4096, 16384), (SUPER, NANO)):
        for weights in (BF16, FP32):
            yield BOTH, partial(moe_layer, tokens, experts, k, width, inner, weights)
        yield BOTH, partial(emulated_experts, tokens * k, experts, width, inner, BF16)
    for dtype in (BF16, FP32):
        yield BOTH, partial(experts_on_rows, 4096, *ODD, dtype)
        yield BOTH, partial(emulated_experts, 4096, *ODD, dtype)
    for rows in (2048, 8192):
        yield BOTH, partial(experts_on_rows, rows, *UNEVEN, BF16)
    for experts in (128, 256, 512, 1024):
        yield BOTH, partial(router_and_sort, 16384, 4096, experts)
    for dtype in (BF16, FP32):
        yield BOTH, partial(losses, 8192, 2688, 131072, dtype)
        yield BOTH, partial(losses, 100, 48, 50, dtype)
        # Groups of Nano, Super and the most that there may be, behind a wider projection.
        for size, inner, width in ((512, 4096, 10304), (1024, 8192, 18560), (4096, 4096, 10304)):
            yield BOTH, partial(gated_norm, 8192, size, inner, width, dtype)
        yield BOTH, partial(gated_norm, 7, 12, 36, 41, dtype)
    for dtype, parameters in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
        for channels, packed in itertools.product((6144, 6150), (False, True)):
            yield BOTH, partial(convolution, 8192, channels, dtype, parameters, packed)
    for dtype, packed in itertools.product((BF16, FP32), (False, True)):
        for heads in (64, 128):
            yield BOTH, partial(scan, 8192, heads, 8, 64, 128, dtype, packed)
        yield BOTH, partial(scan, 100, 3, 1, 40, 72, dtype, packed)
    for dtype, n in itertools.product((BF16, FP32), (1024, 2688)):
        yield BLACKWELL, partial(native_products, 4096, n, 1024, 128, dtype)
    for dtype, sides in itertools.product((BF16, FP32), SIDES):
        yield BLACKWELL, partial(quantizers, 4096, 1024, 12, dtype, *sides, packed=True)
        yield HOPPER, partial(quantizers, 4096, 1024, 12, dtype, *sides, packed=False)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return meta(*shape, dtype=dtype).requires_grad_()


def moe_layer(
    tokens: int, experts: int, k: int, width: int, inner: int, weights: torch.dtype
) -> None:
    """Forward and backward, with and without recomputation; ``weights``: their dtype."""
    ids_TK = meta(tokens, k, dtype=torch.int64)
    x_TL, weights_TK = leaf(tokens, width), leaf(tokens, k, dtype=FP32)
    up_EFL = leaf(experts, inner, width, dtype=weights)
    down_ELF = leaf(experts, width, inner, dtype=weights)
    slots = kernel.sort_slots(ids_TK, experts)
    by_slot = (x_TL, weights_TK, slots, slots.counts_E)
    plain = kernel.experts_for(x_TL, tokens * k, experts, width, inner)
    for recompute in (False, True):
        mlp(plain, *by_slot, up_EFL, down_ELF, recompute).sum().backward()
    parts = (LowRank(leaf(experts, 16, width), leaf(experts, inner, 16), 2.0), None)
    by_path = kernel.experts_for(x_TL, tokens * k, experts, width, inner, 16)
    matrices = (up_EFL.detach(), down_ELF.detach(), False)
    low_rank.mlp(by_path, *by_slot, *matrices, parts).sum().backward()


def experts_on_rows(rows: int, experts: int, width: int, inner: int, dtype: torch.dtype) -> None:
    """The same on sorted rows; in bf16 with weights' gradients in both dtypes."""
    counts_E = meta(experts, dtype=torch.int64)
    x_RL, weights_R = leaf(rows, width, dtype=dtype), leaf(rows, dtype=FP32)
    for weights, recompute in itertools.product({dtype, FP32}, (False, True)):
        up_EFL = leaf(experts, inner, width, dtype=weights)
        down_ELF = leaf(experts, width, inner, dtype=weights)
        by_path = kernel.experts_for(x_RL, rows, experts, width, inner)
        y_RL = mlp(by_path, x_RL, weights_R, None, counts_E, up_EFL, down_ELF, recompute)
        y_RL.sum().backward()


def emulated_experts(rows: int, experts: int, width: int, inner: int, dtype: torch.dtype) -> None:
    """The grouped products of a format that is emulated in ``dtype``."""
    ends_E = meta(experts, dtype=torch.int32)
    x_RL, h_RF = meta(rows, width, dtype=dtype), meta(rows, inner, dtype=dtype)
    up_EFL = meta(experts, inner, width, dtype=dtype)
    forward, columns = Operand(x_RL, None, False), Operand(x_RL, None, True)
    gradient, transposed = Operand(h_RF, None, False), Operand(h_RF, None, True)
    grouped_product(forward, Operand(up_EFL, None, False), ends_E, BF16)
    grouped_product(gradient, Operand(up_EFL, None, True), ends_E, BF16)
    grouped_wgrad(transposed, columns, ends_E, FP32)


def router_and_sort(tokens: int, hidden: int, experts: int) -> None:
    x_TD, weight_ED = leaf(tokens, hidden), leaf(experts, hidden)
    bias_E = meta(experts, dtype=FP32)
    ids_TK, weights_TK, scores_TE = kernel.topk_router(x_TD, weight_ED, bias_E, 8, 2.5, True)
    (weights_TK.sum() + scores_TE.sum()).backward()
    kernel.sort_slots(ids_TK, experts)


def losses(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
    """With gradients and without."""
    h_RD, weight_VD = leaf(rows, hidden, dtype=dtype), leaf(vocabulary, hidden, dtype=dtype)
    labels_R, scale_R = meta(rows, dtype=torch.int64), meta(rows, dtype=FP32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss_kernel.linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R)
            loss_kernel.linear_kl(h_RD, weight_VD, h_RD, weight_VD, scale_R)


def documents(rows: int, tokens: int, packed: bool) -> Documents | None:
    if not packed:
        return None
    cu_seqlens = meta(tokens, dtype=torch.int32)
    return Documents(meta(rows, tokens, dtype=torch.int32), cu_seqlens, tokens, ())


def convolution(
    tokens: int, channels: int, dtype: torch.dtype, parameters: torch.dtype, packed: bool
) -> None:
    """Of a slice of a projection; forward, backward and one token."""
    x_BSC = leaf(2, tokens, channels + 4160, dtype=dtype)[..., 4096 : 4096 + channels]
    given = leaf(channels, 4, dtype=parameters), leaf(channels, dtype=parameters)
    y_BSC = conv1d_kernel.causal_conv1d(x_BSC, *given, documents(2, tokens, packed))
    y_BSC.sum().backward()
    state_BCJ = meta(2, 3, channels, dtype=dtype).mT
    conv1d_kernel.causal_conv1d_step(x_BSC[:, 0], state_BCJ, *given)


def gated_norm(rows: int, size: int, inner: int, width: int, dtype: torch.dtype) -> None:
    """Of groups of ``size`` channels, gated by a part of what is ``width`` wide."""
    x_RD, wide_RW = leaf(rows, inner, dtype=dtype), leaf(rows, width, dtype=dtype)
    y_RD = norm_kernel.gated_rms_norm(
        x_RD, wide_RW[:, :inner], leaf(inner, dtype=dtype), 1e-5, size
    )
    y_RD.backward(meta(rows, inner, dtype=dtype))


def scan(
    tokens: int, heads: int, groups: int, width: int, state: int, dtype: torch.dtype, packed: bool
) -> None:
    """Slices of the convolution; forward, backward (packed: without a state) and one token."""
    widths = [heads * width, groups * state, groups * state]
    parts = leaf(2, tokens, sum(widths), dtype=dtype).split(widths, dim=-1)
    x_BSHP = parts[0].unflatten(-1, (heads, width))
    B_BSGN, C_BSGN = (t.unflatten(-1, (groups, state)) for t in parts[1:])
    dt_BSH = leaf(2, tokens, heads, dtype=FP32)
    A_H, D_H = leaf(heads, dtype=FP32), leaf(heads, dtype=FP32)
    initial_BHPN = None if packed else leaf(2, heads, width, state, dtype=FP32)
    given = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, 128, documents(2, tokens, packed))
    y_BSHP, state_BHPN = ssd_kernel.ssd_scan(*given, initial_BHPN)
    (y_BSHP.sum() if packed else y_BSHP.sum() + state_BHPN.sum()).backward()
    token = (x_BSHP[:, 0], dt_BSH[:, 0], A_H, B_BSGN[:, 0], C_BSGN[:, 0], D_H)
    ssd_kernel.ssd_step(*token, state_BHPN.detach())


def native_products(m: int, n: int, k: int, experts: int, dtype: torch.dtype) -> None:
    def packed(*shape: int, scales: tuple[int, ...] = (experts,)) -> layout.Packed:
        *outer, rows, columns = shape
        data = meta(*outer, rows, columns // 2, dtype=torch.uint8)
        size = (*outer, *layout.atoms(rows, columns), layout.ATOM_BYTES)
        tensor_scale = meta(*scales, dtype=FP32)
        return layout.Packed(data, meta(*size, dtype=torch.float8_e4m3fn), tensor_scale)

    ends_E = meta(experts, dtype=torch.int32)
    gemm_kernel.gemm(packed(m, k, scales=()), packed(n, k, scales=()), dtype)
    gemm_kernel.grouped_rows(packed(m, k), packed(experts, n, k), ends_E, dtype)
    gemm_kernel.grouped_wgrad(packed(k, m), packed(n, m), ends_E, dtype)


def quantizers(
    m: int, n: int, experts: int, dtype: torch.dtype, rows: Rounding | None,
    columns: Rounding | None, packed: bool,
) -> None:  # fmt: skip
    """Of experts' rows."""
    x_1MN, ends_E = meta(1, m, n, dtype=dtype), meta(experts, dtype=torch.int32)
    quantize_kernel.quantize(x_1MN, rows, columns, ends_E, packed=packed)
