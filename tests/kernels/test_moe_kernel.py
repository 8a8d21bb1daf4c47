"""The experts in Triton against loops over tokens in float64. See ``helpers.triton_env`` for where
they run.

Shapes: T tokens, E experts, K experts per token, R = T*K, L width in which experts work, F expert
width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.bands import band
from helpers.drawn import drawn, st
from helpers.moe_inputs import (
    by_path,
    deviation,
    draw_ids,
    draw_inputs,
    oracle,
    rows_by_path,
    with_gradients,
)
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.launch import Tile, recorded
from nemo_kernels.moe import combine_slots, expert_kernel, function, kernel, moe_mlp, reference
from nemo_kernels.moe.expert_kernel import PLANS, Plan
from nemo_kernels.moe.function import Routed

FP32, BF16 = 1e-5, 1.2e-2
"""Largest deviations, relative to the largest value: rounding of sums, and that of h, act and y."""
SMALL = Plan(*[Tile(16, 16, 16, 4, 2)] * 3)


@contextmanager
def tiles(plan: Plan) -> Iterator[None]:
    with mock.patch.object(expert_kernel, "plan", return_value=plan):
        yield


def run(
    ids_TK: Tensor, inputs: tuple[Tensor, ...], dy: Tensor, recompute: bool = False
) -> list[Tensor]:
    """Output and gradients, in float64 on the CPU, from memory that was full of NaN."""
    inputs = tuple(t.detach().to(DEVICE).requires_grad_() for t in inputs)
    ids_TK, dy = ids_TK.to(DEVICE), dy.to(DEVICE)
    with guarded_memory():
        y, *gradients = with_gradients(
            lambda x, w, u, d: by_path(kernel, x, ids_TK, w, u, d, recompute), inputs, dy
        )
    return [t.cpu() for t in (y, *gradients)]


@pytest.mark.slow
@drawn(
    12,
    seed=st.integers(0, 2**31),
    n_tokens=st.integers(0, 12),
    n_experts=st.integers(1, 6),
    k=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    skew=st.sampled_from([0.0, 0.5, 8.0]),
    recompute=st.booleans(),
)
def test_values_and_gradients_equal_a_loop_over_tokens(
    seed: int, n_tokens: int, n_experts: int, k: int, widths, skew: float, recompute: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, n_experts)
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, skew)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, *widths)
    dy = torch.randn(inputs[0].shape, generator=generator)
    with tiles(SMALL):
        assert deviation(run(ids_TK, inputs, dy, recompute), oracle(ids_TK, inputs, dy)) < FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_slots(dtype: torch.dtype) -> None:
    """As processes that share experts take them, by each path; in bf16 rounded once."""
    y_RL = torch.randn(12, 40).to(DEVICE, dtype)
    inverse_TK = torch.randperm(12, device=DEVICE).view(4, 3)
    exact_TL = y_RL.double()[inverse_TK].sum(1)
    for path in (kernel, reference):
        close = {"rtol": band(dtype), "atol": band(torch.float32, 3)}
        torch.testing.assert_close(path.combine_slots(y_RL, inverse_TK).double(), exact_TL, **close)
        other_TL = path.combine_slots(y_RL, inverse_TK.flip(1)[:, :2])
        assert (other_TL.double() - exact_TL).norm() > 0.1 * exact_TL.norm()
        assert not len(path.combine_slots(y_RL[:0], inverse_TK[:0]))
    with backend.choosing(moe="triton"), recorded() as launches:
        combine_slots(y_RL, inverse_TK)
    assert [call.kernel for call in launches] == [expert_kernel.combine_kernel]
    with pytest.raises(ValueError, match="y_RL: expected shape"):
        combine_slots(y_RL, inverse_TK[:2])


@pytest.mark.parametrize(
    ("key", "dtype"),
    [*((key, torch.bfloat16) for key in sorted(PLANS)), ((True, False), torch.float16)],
)
def test_tiles_as_shipped(key: tuple[bool, bool], dtype: torch.dtype) -> None:
    """More than one tile of rows and of columns, none of them full."""
    generator = torch.Generator().manual_seed(1)
    n_tokens, k, n_experts, width, inner = 75, 2, 3, 272, 144
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, 1.0)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, width, inner, dtype)
    dy = torch.randn(n_tokens, width, generator=generator).to(dtype)
    with tiles(PLANS[key]):
        ours = run(ids_TK, inputs, dy)
    assert deviation(ours, oracle(ids_TK, inputs, dy)) < BF16


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_odd_widths_and_fp32_as_shipped(dtype: torch.dtype, band: float) -> None:
    generator = torch.Generator().manual_seed(2)
    ids_TK = draw_ids(generator, 45, 3, 2, 1.0)
    inputs = draw_inputs(generator, 45, 2, 3, 70, 104, dtype)
    dy = torch.randn(45, 70, generator=generator).to(dtype)
    assert deviation(run(ids_TK, inputs, dy), oracle(ids_TK, inputs, dy)) < band


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="too much for the interpreter; needs a CUDA device")
@pytest.mark.parametrize(("width", "inner"), [(1024, 2688), (2688, 1856)])
def test_widths_of_published_models(width: int, inner: int) -> None:
    """1856 and 2688 are no multiples of the largest tiles: nor are the widths of
    test_tiles_as_shipped, which is all that the interpreter could show."""
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.tensor([[0], [1], [0]])
    inputs = draw_inputs(generator, 3, 1, 2, width, inner, torch.bfloat16)
    dy = torch.randn(3, width, generator=generator).bfloat16()
    # Not the oracle: three routing weights' gradients say little about rounding over 1856 columns.
    theirs = with_gradients(lambda x, w, u, d: by_path(reference, x, ids_TK, w, u, d), inputs, dy)
    assert deviation(run(ids_TK, inputs, dy), theirs) < BF16


@pytest.mark.parametrize(
    ("counts", "recompute"),
    [([3, 0, 17, 1], False), ([3, 0, 17, 1], True), ([0, 0, 21, 0], False), ([0, 0, 0, 0], True)],
)
def test_grouped_mlp_on_sorted_rows(counts: list[int], recompute: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    n_rows = sum(counts)
    x, weights_TK, up, down = draw_inputs(generator, n_rows, 1, 4, 24, 40)
    ids_TK = torch.arange(4).repeat_interleave(torch.tensor(counts))[:, None]
    dy = torch.randn(n_rows, 24, generator=generator)
    inputs = tuple(t.detach().to(DEVICE).requires_grad_() for t in (x, weights_TK, up, down))
    counts_E = torch.tensor(counts, device=DEVICE)
    with tiles(SMALL), guarded_memory():
        ours = with_gradients(
            lambda x, w, u, d: rows_by_path(kernel, x, w[:, 0], counts_E, u, d, recompute),
            inputs,
            dy.to(DEVICE),
        )
    ours = [t.cpu() for t in ours]
    assert deviation(ours, oracle(ids_TK, (x, weights_TK, up, down), dy)) < FP32
    for gradient in ours[3:]:
        assert gradient[torch.tensor(counts) == 0].eq(0).all()


def test_a_gradient_may_be_expanded() -> None:
    generator = torch.Generator().manual_seed(5)
    ids_TK = draw_ids(generator, 9, 3, 2, 0.0)
    inputs = draw_inputs(generator, 9, 2, 3, 8, 24)
    ours = run(ids_TK, inputs, torch.ones(()).expand(9, 8))
    assert deviation(ours, oracle(ids_TK, inputs, torch.ones(9, 8))) < FP32


def test_fp32_copies_of_weights_keep_their_gradients_in_fp32() -> None:
    generator = torch.Generator().manual_seed(6)
    ids_TK = draw_ids(generator, 20, 4, 2, 0.0)
    inputs = draw_inputs(generator, 20, 2, 4, 24, 40, torch.bfloat16)
    copies = (*inputs[:2], *(t.detach().float() for t in inputs[2:]))
    dy = torch.randn(20, 24, generator=generator).bfloat16()
    plain, copied = run(ids_TK, inputs, dy), run(ids_TK, copies, dy)
    for ours, rounded in zip(copied[:3], plain[:3], strict=True):
        assert torch.equal(ours, rounded)
    for ours, rounded in zip(copied[3:], plain[3:], strict=True):
        assert torch.equal(ours.bfloat16().double(), rounded)
        assert not torch.equal(ours, rounded)


@cache
def all_trained() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Ids, dy and inputs with all gradients."""
    generator = torch.Generator().manual_seed(7)
    ids_TK = draw_ids(generator, 20, 4, 2, 0.0).to(DEVICE)
    inputs = draw_inputs(generator, 20, 2, 4, 24, 40, torch.bfloat16)
    dy = torch.randn(20, 24, generator=generator).bfloat16().to(DEVICE)
    whole = tuple(t.detach().to(DEVICE).requires_grad_() for t in inputs)
    by_path(kernel, whole[0], ids_TK, *whole[1:]).backward(dy)
    return ids_TK, dy, whole


@pytest.mark.parametrize("trained", [(False, False), (True, False), (False, True)])
def test_no_gradient_of_frozen_weights_is_computed(trained: tuple[bool, bool]) -> None:
    """The other gradients keep every bit."""
    ids_TK, dy, whole = all_trained()
    part = tuple(t.detach().requires_grad_() for t in whole)
    for weight, train in zip(part[2:], trained, strict=True):
        weight.requires_grad_(train)
    with mock.patch.object(kernel, "wgrad", wraps=kernel.wgrad) as wgrad:
        by_path(kernel, part[0], ids_TK, *part[1:]).backward(dy)
    assert wgrad.call_count == sum(trained)
    for tensor, wanted in zip(part, whole, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, wanted.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_for_the_backward_pass(recompute: bool) -> None:
    n_tokens, k, n_experts, width, inner = 16, 3, 5, 24, 40
    generator = torch.Generator().manual_seed(7)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, width, inner, torch.bfloat16)
    x, w, up, down = (t.detach().to(DEVICE).requires_grad_() for t in inputs)
    up, down = (t.detach().float().requires_grad_() for t in (up, down))
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, 0.0).to(DEVICE)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        by_path(kernel, x, ids_TK, w, up, down, recompute)
    owned = {t.data_ptr() for t in (x, w, up, down)}
    floats = [t for t in kept if t.is_floating_point() and t.data_ptr() not in owned]
    slots = n_tokens * k
    wanted = {(slots,)} if recompute else {(slots,), (slots, inner)}
    assert {tuple(t.shape) for t in floats} == wanted
    assert len(floats) == len(wanted)


def test_results_do_not_vary_between_calls() -> None:
    """Several tiles of an expert; in the interpreter, whose programs run one by one, this is what
    shows that recomputation changes no bit."""
    n_tokens, k, n_experts, width, inner = (
        (24, 2, 5, 32, 40) if DEVICE == "cpu" else (60, 4, 8, 48, 72)
    )
    generator = torch.Generator().manual_seed(8)
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, 0.5)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, width, inner, torch.bfloat16)
    dy = torch.randn(n_tokens, width, generator=generator).bfloat16()
    kept = run(ids_TK, inputs, dy)
    assert all(map(torch.equal, kept, run(ids_TK, inputs, dy)))
    assert all(map(torch.equal, kept, run(ids_TK, inputs, dy, recompute=True)))


def shifted(routed: Routed) -> Routed:
    assert routed.token_R is not None
    return routed._replace(token_R=routed.token_R.roll(1))


def unweighted(routed: Routed) -> Routed:
    return routed._replace(weight_R=torch.ones_like(routed.weight_R))


def one_row_late(routed: Routed) -> Routed:
    groups = routed.groups
    return routed._replace(groups=groups._replace(end_E=groups.end_E - 1))


def short_tiles(routed: Routed) -> Routed:
    groups = routed.groups
    tiles = groups.tiles._replace(end_M=groups.tiles.end_M - 1)
    return routed._replace(groups=groups._replace(tiles=tiles))


@pytest.mark.parametrize("mistake", [shifted, unweighted, one_row_late, short_tiles])
def test_the_comparison_notices(mistake: Callable[[Routed], Routed]) -> None:
    generator = torch.Generator().manual_seed(9)
    ids_TK = draw_ids(generator, 12, 3, 2, 0.0)
    inputs = draw_inputs(generator, 12, 2, 3, 24, 20)
    dy = torch.randn(12, 24, generator=generator)
    right = oracle(ids_TK, inputs, dy)
    with mock.patch.object(function, "Routed", lambda *a: mistake(Routed(*a))):
        assert not deviation(run(ids_TK, inputs, dy), right) < 0.05  # also true for NaN


@pytest.mark.slow
def test_self_check() -> None:
    """In the interpreter of one plan's tiles; test_tiles_as_shipped has all."""
    assert DEVICE in kernel.DEVICE_TYPES
    sizes = backend.Sizes()
    if DEVICE == "cpu":
        sizes = backend.Sizes(expert_width=64, expert_inner=128, tokens=96)
    one = dict.fromkeys(PLANS, PLANS[True, True]) if DEVICE == "cpu" else PLANS
    with mock.patch.object(expert_kernel, "PLANS", one):
        assert kernel.self_check(DEVICE, sizes) < BF16
        tokens = kernel._tokens
        with mock.patch.object(kernel, "_tokens", lambda routed: tokens(shifted(routed))):
            assert kernel.self_check(DEVICE, sizes) > 0.1
    with mock.patch.object(kernel.function, "self_check", return_value=0.5) as check:
        for width in (2688, 1024):
            assert kernel.self_check(DEVICE, backend.Sizes(expert_width=width)) == 0.5
        assert {call.args[0][0].plan for call in check.call_args_list} == {*PLANS.values()}
        assert kernel.self_check(DEVICE, backend.Sizes(expert_inner=20)) == 0.5
    assert check.call_args_list[-1].args[0][0].plan == expert_kernel.PLAIN


def test_offsets_beyond_int32() -> None:
    """On a GPU with h of more than 2**31 elements; the last rows are those that would overflow."""
    n_rows, width, inner = (40, 16, 72) if DEVICE == "cpu" else (32_800, 16, 2**16)
    generator = torch.Generator().manual_seed(10)
    inputs = draw_inputs(generator, n_rows, 1, 2, width, inner, torch.bfloat16)
    x, w, up, down = (t.detach().to(DEVICE).requires_grad_() for t in inputs)
    counts_E = torch.tensor([n_rows - 20, 20], device=DEVICE)
    y = rows_by_path(kernel, x, w[:, 0], counts_E, up, down)
    ours = [y, *torch.autograd.grad(y.float().square().sum(), (x, w))]
    tail = [t.detach()[-20:].cpu().requires_grad_() for t in (x, w)]
    tail += [t.detach()[1:].cpu().requires_grad_() for t in (up, down)]
    y = rows_by_path(reference, tail[0], tail[1][:, 0], torch.tensor([20]), tail[2], tail[3])
    theirs = [y, *torch.autograd.grad(y.float().square().sum(), tail[:2])]
    last = [t.detach()[-20:].cpu().double() for t in ours]
    assert deviation(last, [t.detach().double() for t in theirs]) < BF16


def test_plans() -> None:
    """One tile table serves a call, so that all its products have the same rows."""
    assert all(plan.up.m == plan.down.m for plan in PLANS.values())
    bf16 = torch.bfloat16
    assert expert_kernel.plan(bf16, 704 * 512, 512, 1024, 2688) is PLANS[False, True]
    assert expert_kernel.plan(bf16, 511 * 512, 512, 2688, 1856) is PLANS[True, False]
    assert expert_kernel.plan(bf16, 704 * 512, 512, 1024, 40) is expert_kernel.PLAIN
    assert expert_kernel.plan(torch.float32, 9, 3, 1024, 2688) is expert_kernel.FP32
    assert set(PLANS) == {(few, wide) for few in (False, True) for wide in (False, True)}


def test_what_the_kernels_do_not_take_is_named() -> None:
    assert not kernel.refusal(torch.bfloat16, 1024, 32, 2688, 1024)
    for what, why in (
        ((torch.float64, 8, 2, 64, 64), "expected one of (torch.bfloat16, "),
        ((torch.bfloat16, 1025, 2, 64, 64), "expected at most 1024 experts, got 1025"),
        ((torch.bfloat16, 64, 33), "expected at most 32 choices of a token, got 33"),
        ((torch.bfloat16, 8, 2, 2**16, 2**15), "expected 1 to 2**31 - 1 elements per expert, got"),
    ):
        assert kernel.refusal(*what).startswith(why)
    inputs = draw_inputs(torch.Generator(), 4, 2, 3, 6, 5)
    x, w, up, down = (t.detach().double().to(DEVICE) for t in inputs)
    ids = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    message = r"path triton of op moe: expected one of .*, got torch.float64; choose auto or"
    with backend.choosing(moe="triton"), pytest.raises(ValueError, match=message):
        moe_mlp(x, ids, w, up, down)
    assert moe_mlp(x, ids, w, up, down).dtype == torch.float64


def test_operands_may_be_apart_in_memory() -> None:
    generator = torch.Generator().manual_seed(4)
    ids_TK = draw_ids(generator, 9, 3, 2, 0.0)
    inputs = draw_inputs(generator, 9, 2, 3, 16, 24)
    x, w, up, down = (t.detach().to(DEVICE) for t in inputs)
    y = by_path(kernel, x, ids_TK.to(DEVICE), w, up, down)
    apart = (x.t().contiguous().t(), w.t().contiguous().t(), up.mT.contiguous().mT, down)
    assert torch.equal(by_path(kernel, apart[0], ids_TK.to(DEVICE), *apart[1:]), y)


@pytest.mark.parametrize("where", ["token", "up", "down"])
def test_nan_goes_where_the_reference_lets_it_go(where: str) -> None:
    """A fault must not look healthy: into outputs and gradients alike."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = draw_ids(generator, 9, 4, 2, 0.0)
    x, w, up, down = (t.detach() for t in draw_inputs(generator, 9, 2, 4, 16, 16))
    {"token": x, "up": up[1], "down": down[1]}[where][3] = torch.nan
    results = []
    for path in (kernel, reference):
        device = DEVICE if path is kernel else "cpu"
        inputs = [t.to(device).requires_grad_() for t in (x, w, up, down)]
        y = by_path(path, inputs[0], ids_TK.to(device), *inputs[1:])
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
        results.append([t.detach().isnan().cpu() for t in (y, *grads)])
    assert results[1][0].any()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_without_gradients_the_pre_activation_is_not_even_written() -> None:
    x, w, up, down = (
        t.detach().to("meta") for t in draw_inputs(torch.Generator(), 9, 2, 4, 16, 16)
    )
    ids_TK = torch.empty(9, 2, dtype=torch.int64, device="meta")

    def writes() -> bool:
        with recorded() as launches:
            by_path(kernel, x, ids_TK, w, up, down)
        (launch,) = (one for one in launches if one.kernel is expert_kernel.up_kernel)
        return launch.arguments[4] is not None

    assert not writes()
    up.requires_grad_()
    assert writes()
    with torch.no_grad():
        assert not writes()


@pytest.mark.parametrize(("widths", "even"), [((32, 48), {True}), ((24, 40), {False})])
def test_depths_of_whole_blocks_are_read_without_masks(
    widths: tuple[int, int], even: set[bool]
) -> None:
    generator = torch.Generator().manual_seed(3)
    ids_TK = draw_ids(generator, 9, 3, 2, 1.0)
    inputs = draw_inputs(generator, 9, 2, 3, *widths)
    dy = torch.randn(inputs[0].shape, generator=generator)
    with tiles(SMALL), mock.patch.object(kernel, "launch", wraps=kernel.launch) as launches:
        ours = run(ids_TK, inputs, dy)
    asked = [call.kwargs["EVEN_K"] for call in launches.mock_calls if "EVEN_K" in call.kwargs]
    assert len(asked) == 4
    assert set(asked) == even
    assert deviation(ours, oracle(ids_TK, inputs, dy)) < FP32
