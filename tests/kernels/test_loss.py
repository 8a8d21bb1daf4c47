"""Chunked linear cross-entropy against torch's own on whole logits.

Shapes: R rows, D hidden, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_kernels import backend
from nemo_kernels.loss import linear_cross_entropy, linear_kl


def draw(
    seed: int, rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h_RD = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    labels_R = torch.randint(vocab, (rows,), generator=generator)
    scale_R = torch.rand(rows, generator=generator)
    return h_RD, weight_VD, labels_R, scale_R


def oracle(
    h_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, scale_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross-entropy per row, and both gradients, in float64 on whole logits."""
    h, weight = (t.detach().double().requires_grad_() for t in (h_RD, weight_VD))
    labels_R = torch.where(scale_R == 0, -100, labels_R)
    ce_R = F.cross_entropy(h @ weight.t(), labels_R, reduction="none", ignore_index=-100)
    loss = (ce_R * scale_R).sum()
    return loss, ce_R, *torch.autograd.grad(loss, (h, weight), materialize_grads=True)


def sizes(
    h_RD: Tensor, weight_VD: Tensor, labels_R: Tensor, scale_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of what is added up in a row's cross-entropy and in both gradients, without signs: where a
    row is nearly certain, its result is what cancelling has left of that."""
    h, weight = h_RD.detach().double(), weight_VD.detach().double()
    p_RV = (h @ weight.t()).softmax(-1)
    share_RV = (p_RV + F.one_hot(labels_R.clamp_min(0), len(weight))) * scale_R[:, None]
    return h.abs() @ weight.abs().t(), share_RV @ weight.abs(), share_RV.t() @ h.abs()


def close(ours: Tensor, theirs: Tensor, tolerance: float, size: Tensor | None = None) -> bool:
    """Whether the largest difference is small against the largest value, or in fp32 against the
    largest ``size`` of what was added up."""
    assert ours.shape == theirs.shape
    if not ours.numel():
        return True
    bound = tolerance * theirs.abs().max().clamp_min(1e-3)
    if size is not None:
        bound += 1e-6 * size.max()
    return bool((ours - theirs).abs().max() <= bound)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 23),
    width=st.integers(1, 9),
    vocab=st.integers(1, 17),
    chunk_size=st.sampled_from([None, 1, 3, 8, 100]),
    skip=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(2, 2, 9, 2, None, 0.4, torch.float32)  # 6e-4 of logits of about 5
def test_equals_cross_entropy_of_whole_logits(
    seed: int, rows: int, width: int, vocab: int, chunk_size, skip: float, dtype: torch.dtype
) -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(seed, rows, width, vocab, dtype)
    skipped = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < skip
    scale_R = scale_R.masked_fill(skipped, 0)
    labels_R = labels_R.masked_fill(skipped, -100)
    loss, ce_R = linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, chunk_size)
    loss.backward()
    expected_loss, expected_ce_R, dh_RD, dweight_VD = oracle(h_RD, weight_VD, labels_R, scale_R)
    assert loss.dtype == ce_R.dtype == torch.float32
    assert not ce_R.requires_grad
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-5)
    of_ce, of_dh, of_dweight = sizes(h_RD, weight_VD, labels_R, scale_R)
    assert close(ce_R, expected_ce_R, 1e-5, of_ce)
    assert ce_R[skipped].eq(0).all()
    gradient_tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert close(h_RD.grad, dh_RD, gradient_tolerance, of_dh)
    assert close(weight_VD.grad, dweight_VD, gradient_tolerance, of_dweight)
    assert h_RD.grad.dtype == weight_VD.grad.dtype == dtype


def test_gradcheck() -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(1, 7, 4, 9)
    inputs = tuple(t.detach().double().requires_grad_() for t in (h_RD, weight_VD))
    scale_R[2], scale_R[4] = 0, -0.5

    def scaled(h: Tensor, weight: Tensor) -> Tensor:
        return 3 * linear_cross_entropy(h, weight, labels_R, scale_R, 3)[0]

    assert torch.autograd.gradcheck(scaled, inputs)


def test_backward_can_run_twice() -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(2, 7, 4, 9)
    loss, _ = linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R)
    loss.backward(retain_graph=True)
    once = weight_VD.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close(weight_VD.grad, 3 * once)


def test_small_shares_of_the_weight_gradient_survive_in_bf16() -> None:
    # 64 rows with 2^-10 of the first row's scale each: together 1/16 of its gradient.
    h_RD, weight_VD, labels_R, _ = draw(3, 1, 8, 16, torch.bfloat16)
    h_RD = h_RD.detach().expand(65, -1).contiguous()
    labels_R = labels_R.expand(65).contiguous()
    scale_R = torch.tensor([1.0] + [2.0**-10] * 64)
    linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, 4)[0].backward()
    together, weight_VD.grad = weight_VD.grad, None
    for row in range(65):
        rows = slice(row, row + 1)
        linear_cross_entropy(h_RD[rows], weight_VD, labels_R[rows], scale_R[rows])[0].backward()
    exact = oracle(h_RD, weight_VD, labels_R, scale_R)[3]
    assert close(together, exact, 2**-8)
    assert not close(weight_VD.grad, exact, 2**-5)


class Recorder(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_never_holds_all_logits_and_computes_gradients_only_when_asked() -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(4, 64, 2, 500)
    with Recorder() as training:
        linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, 8)
    assert training.largest == 8 * 500
    assert training.products == 3 * 8
    with Recorder() as evaluation, torch.no_grad():
        loss, ce_R = linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, 8)
    assert evaluation.products == 8
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (ce_R * scale_R).sum())
    with Recorder() as frozen_head:
        linear_cross_entropy(h_RD, weight_VD.detach(), labels_R, scale_R, 8)[0].backward()
    assert frozen_head.products == 2 * 8


def test_skipped_rows_cost_nothing() -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(5, 64, 2, 500)
    with Recorder() as recorder:
        linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R * (torch.arange(64) < 16), 8)
    assert recorder.products == 3 * 2


def test_huge_logits_stay_finite() -> None:
    h_RD, weight_VD, labels_R, scale_R = draw(6, 9, 4, 11)
    loss, ce_R = linear_cross_entropy(h_RD * 1e4, weight_VD, labels_R, scale_R)
    loss.backward()
    assert loss.isfinite()
    assert weight_VD.grad.isfinite().all()
    assert close(ce_R, oracle(h_RD * 1e4, weight_VD, labels_R, scale_R)[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_its_gradients_are_those_of_the_formula(dtype: torch.dtype) -> None:
    h_RD, weight_VD, _, scale_R = draw(8, 30, 16, 50, dtype)
    teacher_RD, teacher_VD, _, _ = draw(9, 30, 12, 50, dtype)
    h, weight = (t.detach().double().requires_grad_() for t in (h_RD, weight_VD))
    p = F.softmax(teacher_RD.double() @ teacher_VD.double().t(), -1).detach()
    q = F.softmax(h @ weight.t(), -1)
    expected = (scale_R * (p * (p / q).log()).sum(-1)).sum()
    loss = linear_kl(h_RD, weight_VD, teacher_RD, teacher_VD, scale_R, 7)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    for own, their in ((h_RD, h), (weight_VD, weight)):
        # The head's gradient is rounded once, however many chunks there are.
        torch.testing.assert_close(own.grad, their.grad.to(dtype), rtol=2e-2, atol=1e-5)
    assert teacher_RD.grad is teacher_VD.grad is None


def test_path_and_bad_input() -> None:
    assert backend.path("loss", "cpu").name == "reference"
    h_RD, weight_VD, labels_R, scale_R = draw(7, 5, 4, 9)
    with pytest.raises(ValueError, match=r"weight_VD: expected shape \[any, 4\], got \[9, 3\]"):
        linear_cross_entropy(h_RD, weight_VD[:, :3], labels_R, scale_R)
    with pytest.raises(ValueError, match=r"weight_VD: expected torch.float32, got torch.bfloat16"):
        linear_cross_entropy(h_RD, weight_VD.bfloat16(), labels_R, scale_R)
    with pytest.raises(ValueError, match=r"labels_R: expected torch.int64, got torch.int32"):
        linear_cross_entropy(h_RD, weight_VD, labels_R.int(), scale_R)
    with pytest.raises(ValueError, match=r"scale_R: expected shape \[5\], got \[4\]"):
        linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R[:4])
    with pytest.raises(ValueError, match=r"h_RD: expected shape \[any, any\], got \[5\]"):
        linear_cross_entropy(h_RD[:, 0], weight_VD, labels_R, scale_R)
    with pytest.raises(ValueError, match=r"labels_R: expected labels in \[0, 9\), got 9 to 9"):
        linear_cross_entropy(h_RD, weight_VD, torch.full((5,), 9), scale_R)
    with pytest.raises(ValueError, match="chunk_size: expected a positive number, got 0"):
        linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, 0)
    with pytest.raises(ValueError, match=r"labels_R: expected a tensor on cpu, got meta"):
        linear_cross_entropy(h_RD, weight_VD, labels_R.to("meta"), scale_R)
    teacher = (h_RD, weight_VD)
    with pytest.raises(ValueError, match=r"teacher_RD: expected shape \[5, any\], got \[4, 4\]"):
        linear_kl(h_RD, weight_VD, h_RD[:4], weight_VD, scale_R)
    with pytest.raises(ValueError, match=r"teacher_VD: expected shape \[9, any\], got \[8, 4\]"):
        linear_kl(h_RD, weight_VD, h_RD, weight_VD[:8], scale_R)
    with pytest.raises(ValueError, match=r"teacher_VD: expected torch.float32, got torch.bfloat16"):
        linear_kl(h_RD, weight_VD, h_RD, weight_VD.bfloat16(), scale_R)
    with pytest.raises(ValueError, match=r"scale_R: expected shape \[5\], got \[4\]"):
        linear_kl(h_RD, weight_VD, *teacher, scale_R[:4])
    with pytest.raises(ValueError, match="chunk_size: expected a positive number, got -1"):
        linear_kl(h_RD, weight_VD, *teacher, scale_R, -1)
