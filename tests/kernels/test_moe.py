"""Router, sort and experts against loops over tokens in float64, gradcheck and transformers.

Shapes: T tokens, D hidden, E experts, K experts per token, R = T*K, L width in which experts work,
F expert width.
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.drawn import drawn, st
from helpers.moe_inputs import (
    by_path,
    deviation,
    draw_ids,
    draw_inputs,
    naive_moe,
    oracle,
    rows_by_path,
    with_gradients,
)
from nemo_kernels import backend
from nemo_kernels.moe import grouped_mlp, grouped_mm, moe_mlp, reference, sort_slots, topk_router

PATHS = [reference, grouped_mm]
SMALL = backend.Sizes(expert_width=64, expert_inner=128, tokens=96)
IDS = ["reference", "grouped_mm"]


@pytest.fixture(autouse=True)
def restore_choice() -> Iterator[None]:
    yield
    backend.choose(moe="auto")


@pytest.mark.parametrize("path", PATHS, ids=IDS)
@drawn(
    25,
    seed=st.integers(0, 2**31),
    n_tokens=st.integers(0, 24),
    n_experts=st.integers(1, 9),
    k=st.integers(1, 4),
    units=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    skew=st.sampled_from([0.0, 0.5, 8.0]),
)
def test_moe_mlp_equals_a_loop_over_tokens(
    path: ModuleType, seed: int, n_tokens: int, n_experts: int, k: int, units, skew: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, n_experts)
    unit = 4 if path is grouped_mm else 3
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, skew)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, unit * units[0], unit * units[1])
    dy = torch.randn(inputs[0].shape, generator=generator)
    ours = with_gradients(lambda x, w, u, d: by_path(path, x, ids_TK, w, u, d), inputs, dy)
    assert deviation(ours, oracle(ids_TK, inputs, dy)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("unit", [3, 4])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 24])
def test_without_gradients_it_equals_the_loop_too(unit: int, n_tokens: int) -> None:
    """Few tokens, and widths that let all experts be multiplied at once or not."""
    generator = torch.Generator().manual_seed(n_tokens)
    ids_TK = draw_ids(generator, n_tokens, 7, 2, 0.5)
    x, weights, up, down = draw_inputs(generator, n_tokens, 2, 7, 2 * unit, 5 * unit)
    right = naive_moe(x.double(), ids_TK, weights.double(), up.double(), down.double())

    def off() -> float:
        y = moe_mlp(x, ids_TK, weights, up, down)
        return float((y - right).norm() / right.norm().clamp(min=1e-30))

    bound = band(torch.float32, 2 * unit) + band(torch.float32, 5 * unit)
    with mock.patch.object(reference, "_at_once", wraps=reference._at_once) as at_once:
        assert off() < bound
    assert at_once.called == (unit == 4 and n_tokens > 0)
    if at_once.called:
        real = reference._at_once
        with mock.patch.object(
            reference, "_at_once", lambda x, r: real(x, r._replace(groups=r.groups[::-1]))
        ):
            assert off() > SABOTAGE * bound


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_bf16_is_within_its_rounding(path: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    ids_TK = draw_ids(generator, 40, 6, 3, 0.5)
    inputs = draw_inputs(generator, 40, 3, 6, 32, 64, torch.bfloat16)
    dy = torch.randn(40, 32, generator=generator).bfloat16()
    ours = with_gradients(lambda x, w, u, d: by_path(path, x, ids_TK, w, u, d), inputs, dy)
    assert deviation(ours, oracle(ids_TK, inputs, dy)) < 2e-2
    y = by_path(path, inputs[0], ids_TK, *inputs[1:])
    assert y.dtype == torch.bfloat16


def test_the_comparison_notices_mistakes() -> None:
    generator = torch.Generator().manual_seed(4)
    ids_TK = draw_ids(generator, 20, 5, 2, 0.0)
    inputs = draw_inputs(generator, 20, 2, 5, 6, 9)
    dy = torch.randn(20, 6, generator=generator)
    right = oracle(ids_TK, inputs, dy)
    swapped = ids_TK.flip(1)
    weight_before_square = with_gradients(
        lambda x, w, u, d: moe_mlp(x, ids_TK, w.sign() * w.square(), u, d), inputs, dy
    )
    other_experts = with_gradients(lambda x, w, u, d: moe_mlp(x, swapped, w, u, d), inputs, dy)
    assert deviation(weight_before_square, right) > 0.1
    assert deviation(other_experts, right) > 0.1


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_experts_without_rows_get_exact_zeros(path: ModuleType) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = draw_inputs(generator, 8, 1, 4, 8, 8)
    ids_TK = torch.full((8, 1), 2)  # one-hot: every token on expert 2
    y = by_path(path, inputs[0], ids_TK, *inputs[1:])
    y.sum().backward()
    for weight in inputs[2:]:
        assert weight.grad is not None
        assert weight.grad[[0, 1, 3]].eq(0).all()
        assert weight.grad[2].ne(0).any()


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_grouped_mlp_equals_moe_mlp_on_sorted_rows(path: ModuleType) -> None:
    generator = torch.Generator().manual_seed(6)
    ids_TK = draw_ids(generator, 15, 5, 2, 0.7)
    x_TL, weights_TK, up, down = draw_inputs(generator, 15, 2, 5, 8, 12)
    dy = torch.randn(15, 8, generator=generator)

    def by_hand(x: Tensor, w: Tensor, u: Tensor, d: Tensor) -> Tensor:
        order_R, inverse_R, counts_E = path.sort_slots(ids_TK, 5)
        y_RL = rows_by_path(path, x[order_R // 2], w.flatten()[order_R], counts_E, u, d)
        return y_RL[inverse_R].view(15, 2, 8).sum(1)

    inputs = (x_TL, weights_TK, up, down)
    assert deviation(with_gradients(by_hand, inputs, dy), oracle(ids_TK, inputs, dy)) < 1e-5


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(7)
    ids_TK = draw_ids(generator, 6, 4, 2, 0.0)
    inputs = tuple(
        t.detach().double().requires_grad_() for t in draw_inputs(generator, 6, 2, 4, 3, 5)
    )
    assert torch.autograd.gradcheck(lambda x, w, u, d: moe_mlp(x, ids_TK, w, u, d), inputs)
    counts_E = torch.tensor([2, 0, 3, 1])
    rows = (inputs[0], inputs[1][:, 0].detach().requires_grad_(), *inputs[2:])
    assert torch.autograd.gradcheck(lambda x, w, u, d: grouped_mlp(x, w, counts_E, u, d), rows)


def test_results_do_not_vary_between_calls() -> None:
    generator = torch.Generator().manual_seed(8)
    ids_TK = draw_ids(generator, 300, 8, 4, 0.5)
    inputs = draw_inputs(generator, 300, 4, 8, 16, 24)
    dy = torch.randn(300, 16, generator=generator)

    def run() -> list[Tensor]:
        return with_gradients(lambda x, w, u, d: moe_mlp(x, ids_TK, w, u, d), inputs, dy)

    assert all(map(torch.equal, run(), run()))


def test_what_is_kept_for_the_backward_pass() -> None:
    n_tokens, k, n_experts, width, inner = 64, 4, 6, 16, 8
    generator = torch.Generator().manual_seed(9)
    inputs = draw_inputs(generator, n_tokens, k, n_experts, width, inner)
    ids_TK = draw_ids(generator, n_tokens, n_experts, k, 0.0)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        moe_mlp(inputs[0], ids_TK, *inputs[1:])
    owned = {t.data_ptr() for t in inputs}
    floats = sum(t.numel() for t in kept if t.is_floating_point() and t.data_ptr() not in owned)
    slots = n_tokens * k
    assert floats == slots * inner + slots  # pre-activation and sorted routing weights


@drawn(50, st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40))
def test_sort_slots(choices: list[tuple[int, int]]) -> None:
    ids_TK = torch.tensor(choices, dtype=torch.int64).view(-1, 2)
    order_R, inverse_R, counts_E = sort_slots(ids_TK, 7)
    flat = ids_TK.flatten().tolist()
    assert order_R.tolist() == sorted(range(len(flat)), key=lambda slot: flat[slot])
    assert order_R[inverse_R].tolist() == list(range(len(flat)))
    assert counts_E.tolist() == [flat.count(e) for e in range(7)]
    assert counts_E.dtype == order_R.dtype == torch.int64


def naive_router(x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float, normalize: bool):
    """Sets of chosen experts and their weights, one token at a time, in float64."""
    chosen = []
    for x_D in x.double():
        scores = [1 / (1 + torch.exp(-(x_D @ w_D)).item()) for w_D in weight.double()]
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        best = sorted(range(len(scores)), key=lambda e: -biased[e])[:k]
        total = sum(scores[e] for e in best) if normalize else 1.0
        chosen.append({e: scaling * scores[e] / total for e in best})
    return chosen


@pytest.mark.parametrize("normalize", [True, False])
def test_router_equals_a_loop_over_tokens(normalize: bool) -> None:
    generator = torch.Generator().manual_seed(10)
    x_TD = torch.randn(30, 12, generator=generator)
    weight_ED, bias_E = torch.randn(7, 12, generator=generator), torch.linspace(-0.6, 0.6, 7)
    ids, weights, scores = topk_router(x_TD, weight_ED, bias_E, 3, 2.5, normalize)
    expected = naive_router(x_TD, weight_ED, bias_E, 3, 2.5, normalize)
    for ids_K, weights_K, wanted in zip(ids.tolist(), weights.tolist(), expected, strict=True):
        assert dict(zip(ids_K, weights_K, strict=True)) == pytest.approx(wanted, rel=1e-5)
    assert ids.dtype == torch.int64
    assert weights.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.sigmoid(x_TD @ weight_ED.t()))
    # The bias matters for the choice, so forgetting it would have been noticed.
    unbiased = topk_router(x_TD, weight_ED, torch.zeros(7), 3, 2.5, normalize)[0]
    assert any(set(a) != set(b) for a, b in zip(ids.tolist(), unbiased.tolist(), strict=True))


def test_router_gradients() -> None:
    generator = torch.Generator().manual_seed(11)
    x_TD = torch.randn(6, 5, generator=generator, dtype=torch.double, requires_grad=True)
    weight_ED = torch.randn(4, 5, generator=generator, dtype=torch.double, requires_grad=True)
    bias_E = torch.zeros(4, requires_grad=True)

    def router(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return topk_router(x, w, bias_E, 2, 1.5)[1:]

    assert torch.autograd.gradcheck(router, (x_TD, weight_ED))
    topk_router(x_TD, weight_ED, bias_E, 2, 1.5)[1].sum().backward()
    assert bias_E.grad is None


def test_router_computes_in_fp32_from_bf16() -> None:
    generator = torch.Generator().manual_seed(12)
    x_TD = torch.randn(50, 64, generator=generator).bfloat16()
    weight_ED = torch.randn(8, 64, generator=generator).bfloat16()
    scores = topk_router(x_TD, weight_ED, torch.zeros(8), 2, 1.0)[2]
    exact = torch.sigmoid(x_TD.double() @ weight_ED.double().t())
    rounded = torch.sigmoid((x_TD @ weight_ED.t()).double())
    allowed = band(torch.float32, terms=64)
    assert (scores - exact).abs().max() < allowed
    assert (rounded - exact).abs().max() > SABOTAGE * allowed


def test_router_and_experts_equal_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h import modeling_nemotron_h as peer

    torch.manual_seed(0)
    config = NemotronHConfig(
        hidden_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_latent_size=12,
        moe_intermediate_size=20,
        routed_scaling_factor=2.5,
        hybrid_override_pattern="E",
    )
    config._experts_implementation = "eager"
    router, experts = peer.NemotronHTopkRouter(config), peer.NemotronHExperts(config)
    for parameter in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    router.e_score_correction_bias.uniform_(-0.3, 0.3)
    x_TD, x_TL = torch.randn(40, 24), torch.randn(40, 12, requires_grad=True)

    _, their_weights, their_ids = router(x_TD)
    ids, weights, _ = topk_router(x_TD, router.weight, router.e_score_correction_bias, 3, 2.5)
    ours, theirs = (
        torch.zeros(40, 8).scatter(1, i, w.detach())
        for i, w in ((ids, weights), (their_ids, their_weights))
    )
    torch.testing.assert_close(ours, theirs)

    inputs = (x_TL, weights.detach().requires_grad_(), experts.up_proj, experts.down_proj)
    dy = torch.randn(40, 12)
    ours = with_gradients(lambda x, w, u, d: moe_mlp(x, ids, w, u, d), inputs, dy)
    theirs = with_gradients(lambda x, w, u, d: experts(x, ids, w), inputs, dy)
    assert deviation(ours, theirs) < 1e-5


@pytest.mark.parametrize("ids", [[[0], [2], [0]], []])
def test_what_torch_leaves_open_on_gpus(ids: list[list[int]], monkeypatch) -> None:
    """No rows, which it refuses there; and gradients of experts without any, which it leaves
    unwritten on Blackwell."""
    real = grouped_mm.grouped_mm

    def on_gpu(a, b, offs):
        assert a.numel()
        result = real(a, b, offs=offs)
        if b.dim() == 2:
            result[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return result

    monkeypatch.setattr(grouped_mm, "grouped_mm", on_gpu)
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 1)
    inputs = draw_inputs(torch.Generator().manual_seed(0), len(ids), 1, 3, 8, 4)
    dy = torch.randn(len(ids), 8)
    found, expected = (
        with_gradients(lambda x, w, u, d, path=path: by_path(path, x, ids_TK, w, u, d), inputs, dy)
        for path in (grouped_mm, reference)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[3][1].eq(0).all()


def test_paths_are_taken_by_name() -> None:
    assert backend.path("moe", "cpu").name == "reference"
    backend.choose(moe="grouped_mm")
    assert backend.path("moe", "cpu").name == "grouped_mm"
    assert grouped_mm.self_check("cpu", SMALL) < backend.TOLERANCE
    # Only this path restricts widths, which shows that it really ran.
    inputs = draw_inputs(torch.Generator(), 4, 1, 2, 3, 4)
    ids_TK = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="path grouped_mm of op moe: expected widths in multiples of 4"
    ):
        moe_mlp(inputs[0], ids_TK, *inputs[1:])


def test_bad_input_is_named() -> None:
    x_TL, weights_TK, up, down = draw_inputs(torch.Generator(), 4, 2, 3, 6, 5)
    ids_TK = torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected torch.int64, got torch.int32"):
        moe_mlp(x_TL, ids_TK.int(), weights_TK, up, down)
    with pytest.raises(ValueError, match=r"topk_weights_TK: expected a tensor on cpu, got meta"):
        moe_mlp(x_TL, ids_TK, weights_TK.to("meta"), up, down)
    with pytest.raises(
        ValueError, match=r"topk_ids_TK: expected 1 to 3 \(experts\) columns, got 4"
    ):
        moe_mlp(x_TL, ids_TK.repeat(1, 2), weights_TK.repeat(1, 2), up, down)
    with pytest.raises(ValueError, match=r"topk_weights_TK: expected shape \[4, any\]"):
        moe_mlp(x_TL, ids_TK, weights_TK[:3], up, down)
    with pytest.raises(ValueError, match=r"w_down_ELF: expected shape \[3, 6, 5\], got"):
        moe_mlp(x_TL, ids_TK, weights_TK, up, down.mT)
    with pytest.raises(ValueError, match=r"w_up_EFL: expected torch.float32, got torch.bfloat16"):
        moe_mlp(x_TL, ids_TK, weights_TK, up.bfloat16(), down)
    with pytest.raises(ValueError, match=r"counts_E: expected shape \[3\]"):
        grouped_mlp(x_TL, weights_TK[:, 0], torch.tensor([4]), up, down)
    with pytest.raises(ValueError, match=r"counts_E: expected a sum of 4 \(rows\), got 5"):
        grouped_mlp(x_TL, weights_TK[:, 0], torch.tensor([4, 0, 1]), up, down)
    with pytest.raises(ValueError, match=r"k: expected 1 to 3 \(experts\), got 4"):
        topk_router(x_TL, torch.zeros(3, 6), torch.zeros(3), 4, 1.0)
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected ids in \[0, 3\), got 0 to 3"):
        moe_mlp(x_TL, ids_TK.index_fill(0, torch.tensor([1]), 3), weights_TK, up, down)


@pytest.mark.parametrize(("width", "inner", "served"), [(64, 100, False), (64, 104, True)])
def test_auto_leaves_widths_that_cannot_be_aligned_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, width: int, inner: int, served: bool
) -> None:
    """As on a GPU, where auto takes grouped_mm."""
    chosen = (backend.Path("grouped_mm", "as on a GPU"), grouped_mm)
    monkeypatch.setattr(backend, "_resolve", lambda op, device_type: chosen)
    generator = torch.Generator().manual_seed(7)
    x_TL, weights_TK, up, down = draw_inputs(generator, 12, 2, 3, width, inner, torch.bfloat16)
    ids_TK = draw_ids(generator, 12, 3, 2, skew=0.0)
    what = (torch.bfloat16, 3, 2, inner, width)
    assert (backend.implementation("moe", "cpu", *what) is grouped_mm) == served
    expected_TL = by_path(reference, x_TL, ids_TK, weights_TK, up, down)
    y_TL = moe_mlp(x_TL, ids_TK, weights_TK, up, down)
    torch.testing.assert_close(y_TL, expected_TL, rtol=2e-2, atol=2e-2)
    order_R, _, counts_E = sort_slots(ids_TK, 3)
    rows = (x_TL[order_R // 2], weights_TK.flatten()[order_R], counts_E, up, down)
    torch.testing.assert_close(
        grouped_mlp(*rows), rows_by_path(reference, *rows), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_fp32_copies_of_weights_keep_their_gradients_in_fp32(path: ModuleType) -> None:
    """The same output, and gradients that are rounded by nobody (by grouped_mm at its output)."""
    generator = torch.Generator().manual_seed(0)
    x, w, up, down = draw_inputs(generator, 32, 2, 4, 16, 32, torch.bfloat16)
    ids = draw_ids(generator, 32, 4, 2, 0.0)
    wide = [t.detach().float().requires_grad_() for t in (up, down)]
    plain, copied = by_path(path, x, ids, w, up, down), by_path(path, x, ids, w, *wide)
    assert torch.equal(plain, copied)
    ours = torch.autograd.grad(copied.float().square().sum(), wide)
    rounded = torch.autograd.grad(plain.float().square().sum(), (up, down))
    for gradient, expected in zip(ours, rounded, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.bfloat16(), expected)
        if path is reference:
            assert not torch.equal(gradient, expected.float())


@pytest.mark.parametrize("trained", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_no_gradient_of_frozen_weights_is_computed(
    path: ModuleType, trained: tuple[bool, bool]
) -> None:
    """The other gradients keep every bit."""
    generator = torch.Generator().manual_seed(1)
    inputs = draw_inputs(generator, 32, 2, 4, 16, 32)
    ids = draw_ids(generator, 32, 4, 2, 0.0)
    dy = torch.randn(32, 16, generator=generator)
    wanted = with_gradients(lambda x, w, u, d: by_path(path, x, ids, w, u, d), inputs, dy)
    for weight, train in zip(inputs[2:], trained, strict=True):
        weight.requires_grad_(train)
    kind = {reference: "LoopExperts", grouped_mm: "GroupedMMExperts"}[path]
    found: list[Tensor | None] = []
    plain = getattr(path, kind).backward

    def observed(*args: object) -> tuple[Tensor | None, ...]:
        found.extend(plain(*args))
        return tuple(found)

    with mock.patch.object(getattr(path, kind), "backward", observed):
        by_path(path, inputs[0], ids, *inputs[1:]).backward(dy)
    assert [gradient is not None for gradient in found] == [True, True, *trained]
    for tensor, gradient in zip(inputs, wanted[1:], strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad.double(), gradient)


@pytest.mark.parametrize("implementation", PATHS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_keeps_less_and_changes_no_bit(
    implementation: ModuleType, dtype: torch.dtype
) -> None:
    """``moe_mlp``, and with rows sorted before ``grouped_mlp``."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = draw_ids(generator, 20, 6, 3, 1.0)
    x_TL, weights_TK, up, down = draw_inputs(generator, 20, 3, 6, 16, 32, dtype)
    order_R, _, counts_E = sort_slots(ids_TK, 6)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def whole(*inputs: Tensor, recompute: bool) -> Tensor:
        x, w, u, d = inputs
        return by_path(implementation, x, ids_TK, w, u, d, recompute)

    def rows(*inputs: Tensor, recompute: bool) -> Tensor:
        x, w, u, d = inputs
        x_RL, w_R = x[order_R // 3].contiguous(), w.flatten()[order_R]
        return rows_by_path(implementation, x_RL, w_R, counts_E, u, d, recompute)

    for function in (whole, rows):
        results, sizes = [], []
        for recompute in (False, True):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = function(x_TL, weights_TK, up, down, recompute=recompute)
            sizes.append(sum(kept))
            results.append([y, *torch.autograd.grad(y.float().square().sum(), (x_TL, up, down))])
        assert sizes[0] - sizes[1] == 60 * 32 * dtype.itemsize
        for kept_all, kept_less in zip(*results, strict=True):
            assert torch.equal(kept_all, kept_less)
