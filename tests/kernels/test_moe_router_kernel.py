"""Triton's router: choice by its own scores, bit for bit; scores, weights and gradients against
float64.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.drawn import drawn, st
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.moe import reference, topk_router
from nemo_kernels.moe import router_kernel as kernel


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def route(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, *options) -> tuple[Tensor, ...]:
    """Of the kernel, on the tests' device, with outputs on the CPU."""
    with guarded_memory():
        results = kernel.topk_router(*(t.to(DEVICE) for t in (x_TD, weight_ED, bias_E)), *options)
    return tuple(t.cpu() for t in results)


def best(scores_TE: Tensor, bias_E: Tensor, k: int) -> list[list[int]]:
    """By biased score, and of equal ones the lower id first."""
    rows = (scores_TE + bias_E).tolist()
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in rows]


def exact(x: Tensor, weight: Tensor, ids_TK: Tensor, scaling: float, normalize: bool):
    """Weights and scores for a given choice."""
    scores_TE = (x @ weight.t()).sigmoid()
    chosen_TK = scores_TE.gather(1, ids_TK)
    if normalize:
        chosen_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20)
    return scaling * chosen_TK, scores_TE


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Up to the rounding of scores, also where 1 - score is what remains of them."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=3e-6 * scale)


@drawn(
    25,
    seed=st.integers(0, 2**31),
    n_tokens=st.integers(0, 6),
    width=st.integers(1, 9),
    n_experts=st.sampled_from([1, 2, 3, 7, 32, 40, 130]),
    k=st.integers(1, 8),
    spread=st.sampled_from([0.3, 1.0, 6.0]),  # 6: many scores are 0 or 1 and equal
    skew=st.sampled_from([0.0, 0.1, 2.0]),
    normalize=st.booleans(),
)
def test_values_and_gradients(
    seed: int, n_tokens: int, width: int, n_experts: int, k: int, spread: float, skew: float,
    normalize: bool,
) -> None:  # fmt: skip
    x_TD, weight_ED = normal(n_tokens, width, seed=seed), normal(n_experts, width, seed=seed + 1)
    x_TD = (x_TD * spread).round(decimals=1).requires_grad_()
    weight_ED, k = weight_ED.requires_grad_(), min(k, n_experts)
    bias_E = -skew * torch.arange(n_experts)
    ids_TK, weights_TK, scores_TE = route(x_TD, weight_ED, bias_E, k, 2.5, normalize)
    assert ids_TK.dtype == torch.int64
    assert weights_TK.dtype == scores_TE.dtype == torch.float32
    assert ids_TK.tolist() == best(scores_TE, bias_E, k)

    leaves = [t.detach().double().requires_grad_() for t in (x_TD, weight_ED)]
    expected = exact(*leaves, ids_TK, 2.5, normalize)
    dweights_TK, dscores_TE = normal(n_tokens, k, seed=seed), normal(n_tokens, n_experts, seed=seed)
    for ours, wanted in zip((weights_TK, scores_TE), expected, strict=True):
        assert_close(ours.detach(), wanted.detach())
    with guarded_memory():
        loss = (weights_TK * dweights_TK).sum() + (scores_TE * dscores_TE).sum()
        ours = torch.autograd.grad(loss, (x_TD, weight_ED))
    loss = (expected[0] * dweights_TK).sum() + (expected[1] * dscores_TE).sum()
    for gradient, wanted in zip(ours, torch.autograd.grad(loss, leaves), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("n_experts", "k", "dtype"),
    [(512, 22, torch.float32), (1024, 32, torch.bfloat16), (128, 6, torch.float32)],
)
def test_equals_the_reference_as_shipped(n_experts: int, k: int, dtype: torch.dtype) -> None:
    """The kernels see logits in fp32, whatever the dtype of tokens."""
    n_tokens = 4 if DEVICE == "cpu" else 3000
    x_TD = normal(n_tokens, 64, seed=1).to(dtype).requires_grad_()
    weight_ED = (normal(n_experts, 64, seed=2) / 8).to(dtype).requires_grad_()
    bias_E = normal(n_experts, seed=3) / 100
    results = []
    for ids, weights, scores in (
        route(x_TD, weight_ED, bias_E, k, 5.0),
        reference.topk_router(x_TD, weight_ED, bias_E, k, 5.0, True),
    ):
        weights_TE = torch.zeros_like(scores).scatter(1, ids, weights)
        loss = (weights_TE * normal(*scores.shape, seed=4)).sum() + scores.square().sum()
        gradients = torch.autograd.grad(loss, (x_TD, weight_ED))
        results.append((weights_TE.detach(), scores.detach(), *gradients))
    near_ties = ((results[0][0] != 0) != (results[1][0] != 0)).any(1).sum()
    assert near_ties <= n_tokens // 500  # none without a GPU
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        if not near_ties:
            tolerance = 1e-5 if dtype == torch.float32 else 8e-3
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance / 10)


def test_equal_scores_prefer_the_lower_id() -> None:
    x_TD, weight_ED = torch.ones(3, 2), torch.zeros(40, 2)
    weight_ED[5] = weight_ED[37] = 1.0
    ids_TK, weights_TK, _ = route(x_TD, weight_ED, torch.zeros(40), 4, 1.0, False)
    assert ids_TK.tolist() == [[5, 37, 0, 1]] * 3
    assert weights_TK[0, 2:].tolist() == [0.5, 0.5]
    negative = route(x_TD, weight_ED, torch.full((40,), -3.0), 4, 1.0, False)
    assert torch.equal(negative[0], ids_TK)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["x", "bias", "every score"])
def test_ids_are_distinct_and_in_range_whatever_the_values(value: float, place: str) -> None:
    x_TD, weight_ED, bias_E = normal(4, 6, seed=5), normal(9, 6, seed=6), torch.zeros(9)
    clean = route(x_TD, weight_ED, bias_E, 3, 1.0)
    if place == "x":
        x_TD[1, 2] = value
    elif place == "bias":
        bias_E[4] = value
    else:
        weight_ED.fill_(value)
    x_TD.requires_grad_()
    ids_TK, weights_TK, scores_TE = route(x_TD, weight_ED, bias_E, 3, 1.0)
    with guarded_memory():
        (weights_TK.sum() + scores_TE.sum()).backward()
    for ids in ids_TK.tolist():
        assert len({*ids}) == 3
        assert {*ids} <= {*range(9)}
    if place == "x":
        others = [0, 2, 3]
        for ours, wanted in zip((ids_TK, weights_TK, scores_TE), clean, strict=True):
            assert torch.equal(ours[others], wanted[others])
        assert x_TD.grad is not None
        assert x_TD.grad[others].isfinite().all()
    if place == "bias":
        chosen = (ids_TK == 4).any(1)
        assert not chosen.any() if value == -float("inf") else chosen.all()


@pytest.mark.parametrize("which", [1, 2])
def test_gradient_of_one_output_alone(which: int) -> None:
    x_TD, weight_ED = normal(3, 5, seed=7).requires_grad_(), normal(6, 5, seed=8).requires_grad_()
    results = route(x_TD, weight_ED, torch.zeros(6), 2, 2.0)
    with guarded_memory():
        # An expanded gradient: one number for all elements.
        ours = torch.autograd.grad(results[which].sum() * 3, (x_TD, weight_ED))
    leaves = [t.detach().double().requires_grad_() for t in (x_TD, weight_ED)]
    wanted = torch.autograd.grad(exact(*leaves, results[0], 2.0, True)[which - 1].sum() * 3, leaves)
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_differentiable_and_what_is_kept() -> None:
    x_TD, weight_ED = normal(3, 5).requires_grad_(), normal(6, 5)
    bias_E = torch.zeros(6, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        inputs = (t.to(DEVICE) for t in (x_TD, weight_ED, bias_E))
        ids, weights, scores = kernel.topk_router(*inputs, 2, 1.0)
    assert [tuple(t.shape) for t in kept] == [(3, 5), (6, 5), (3, 2), (3, 6)]
    assert not ids.requires_grad
    assert weights.requires_grad
    assert scores.requires_grad
    weights.square().sum().backward()
    assert bias_E.grad is None
    assert x_TD.grad is not None


def test_the_comparisons_notice_mistakes() -> None:
    x_TD, weight_ED = normal(5, 6, seed=9), normal(12, 6, seed=10)
    bias_E = torch.linspace(-0.5, 0.5, 12)
    ids, weights, scores = route(x_TD, weight_ED, bias_E, 3, 2.5, True)
    assert ids.tolist() != best(scores, torch.zeros(12), 3)
    for other in (exact(x_TD, weight_ED, ids, 2.5, False), exact(x_TD, weight_ED, ids, 2.0, True)):
        with pytest.raises(AssertionError):
            assert_close(weights, other[0].double())
    launch = mock.MagicMock()
    with mock.patch.object(kernel, "_router_kernel", launch):
        assert route(x_TD, weight_ED, bias_E, 3, 2.5, True)[2].isnan().all()
    x_TD.requires_grad_()
    with mock.patch.object(kernel, "_router_backward_kernel", launch), guarded_memory():
        weights = kernel.topk_router(*(t.to(DEVICE) for t in (x_TD, weight_ED, bias_E)), 3, 2.5)[1]
        weights.square().sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isnan().all()


def test_bad_input_is_named() -> None:
    x, w, b = (t.to(DEVICE) for t in (normal(4, 6), normal(40, 6), torch.zeros(40)))
    with pytest.raises(ValueError, match=r"weight_ED: expected shape \[any, 6\], got \[6, 40\]"):
        topk_router(x, w.t(), b, 2, 1.0)
    with pytest.raises(ValueError, match=r"bias_E: expected shape \[40\], got \[39\]"):
        topk_router(x, w, b[1:], 2, 1.0)
    with pytest.raises(ValueError, match=r"bias_E: expected a tensor on .*, got meta"):
        topk_router(x, w, b.to("meta"), 2, 1.0)
    with pytest.raises(ValueError, match=r"k: expected 1 to 3 \(experts\), got 4"):
        topk_router(x, w[:3], b[:3], 4, 1.0)
    with backend.choosing(moe="triton"), pytest.raises(ValueError, match="at most 1024 experts"):
        topk_router(x, x.new_zeros(1025, 6), x.new_zeros(1025), 4, 1.0)
