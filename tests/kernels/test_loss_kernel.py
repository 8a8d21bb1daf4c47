"""The losses of a linear head in Triton against formulas in float64. See ``helpers.triton_env`` for
where they run.

Shapes: R rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, jittered
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.loss import kernel, linear_cross_entropy, linear_kl, softmax_kernel
from nemo_kernels.loss.kernel import self_check

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
BLOCK, D, TEACHER_D = 16, 8, 6
ALIGNED, RAGGED = (8, 2 * BLOCK, 4), (7, 2 * BLOCK + 5, 3)
"""R, V and rows of a chunk."""
LOSSES = ("cross-entropy", "divergence")


class Inputs:
    """What both losses take, and which rows count."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype = FP32) -> None:
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.h, self.weight = normal(rows, D), normal(vocabulary, D)
        self.teacher, self.teacher_weight = normal(rows, TEACHER_D), normal(vocabulary, TEACHER_D)
        self.scale = torch.rand(rows, generator=generator) + 0.5
        self.scale[1::3] = 0
        labels = torch.randint(vocabulary, (rows,), generator=generator)
        self.labels = labels.masked_fill(self.scale == 0, -100)


def small(block: int = BLOCK) -> mock._patch:
    options = {**kernel._OPTIONS, "BLOCK": block}
    return mock.patch.multiple(kernel, _COLUMNS=block, _OPTIONS=options)


def run(name: str, given: Inputs, chunk: int) -> list[Tensor]:
    """The loss, three times its gradients, and each row's cross-entropy, out of memory that was
    full of NaN; on the CPU."""
    h, weight = (t.detach().to(DEVICE).requires_grad_() for t in (given.h, given.weight))
    labels, scale = given.labels.to(DEVICE), given.scale.to(DEVICE)
    values = []
    with backend.choosing(loss="triton"), small(), guarded_memory():
        if name == "divergence":
            teacher = (given.teacher.to(DEVICE), given.teacher_weight.to(DEVICE))
            loss = linear_kl(h, weight, *teacher, scale, chunk)
        else:
            loss, ce_R = linear_cross_entropy(h, weight, labels, scale, chunk)
            values = [ce_R]
        (3 * loss).backward()
    assert h.grad is not None
    assert weight.grad is not None
    assert loss.dtype == FP32
    assert h.grad.dtype == weight.grad.dtype == given.h.dtype
    return [t.detach().cpu() for t in (loss, h.grad, weight.grad, *values)]


def formula(name: str, given: Inputs, dtype: torch.dtype, rounded: bool = False) -> list[Tensor]:
    """The same of whole logits; ``rounded``: with the gradient of the logits in bf16, then those of
    h and head, that of h once more when it is multiplied by the loss's own."""
    h, weight, scale = given.h.to(dtype), given.weight.to(dtype), given.scale.to(dtype)[:, None]
    log_q = (h @ weight.t()).log_softmax(-1)
    if name == "divergence":
        log_p = (given.teacher.to(dtype) @ given.teacher_weight.to(dtype).t()).log_softmax(-1)
        target = log_p.exp()
        value = (target * (log_p - log_q)).sum(-1, keepdim=True)
    else:
        target = torch.zeros_like(log_q).scatter_(1, given.labels.clamp(min=0)[:, None], 1)
        value = -(target * log_q).sum(-1, keepdim=True)
    value = value * (scale != 0)
    gradient = scale * (log_q.exp() - target)
    gradient = gradient.to(BF16).to(dtype) if rounded else gradient
    gradients = [gradient @ weight, gradient.t() @ h]
    if rounded:
        gradients[0] = gradients[0].to(BF16).to(dtype)
    gradients = [3 * g for g in gradients]
    if rounded:
        gradients = [g.to(BF16).to(dtype) for g in gradients]
    values = [] if name == "divergence" else [value[:, 0]]
    return [(value * scale).sum(), *gradients, *values]


def distances(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Norm of each difference relative to that of the truth."""
    return [
        float((a.detach().double() - b).norm() / b.norm())
        for a, b in zip(found, truth, strict=True)
    ]


def bands(name: str, given: Inputs, truth: list[Tensor]) -> list[float]:
    """In fp32 what rounding does at most, in bf16 what rounding to it does; both twice."""
    draws = [distances(jittered(lambda: formula(name, given, FP32), s), truth) for s in range(3)]
    if given.h.dtype == BF16:
        draws.append(distances(formula(name, given, FP32, rounded=True), truth))
    return [2 * max(of) for of in zip(*draws, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED])
def test_equals_the_formula(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, vocabulary, chunk = shape
    given = Inputs(rows, vocabulary, dtype)
    found, truth = run(name, given, chunk), formula(name, given, FP64)
    allowed = bands(name, given, truth)
    for off, band in zip(distances(found, truth), allowed, strict=True):
        assert off < band
    assert found[1][given.scale == 0].eq(0).all()


def one_label_on(given: Inputs) -> None:
    given.labels[0] = (given.labels[0] + 1) % len(given.weight)


def last_column_gone(given: Inputs) -> None:
    given.weight[-1] = given.teacher_weight[-1] = -1


def one_row_twice(given: Inputs) -> None:
    given.scale[0] *= 2


def other_teacher(given: Inputs) -> None:
    given.teacher = given.teacher.flip(0)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("cross-entropy", one_label_on),
        ("cross-entropy", last_column_gone),
        ("cross-entropy", one_row_twice),
        ("divergence", last_column_gone),
        ("divergence", one_row_twice),
        ("divergence", other_teacher),
    ],
)
def test_mistakes_are_noticed(name: str, mistake: Callable[[Inputs], None]) -> None:
    rows, vocabulary, chunk = RAGGED
    given = Inputs(rows, vocabulary)
    truth = formula(name, given, FP64)
    allowed = bands(name, given, truth)
    mistake(given)
    off = distances(run(name, given, chunk), truth)
    for got, band in zip(off[:3], allowed, strict=False):
        assert got > SABOTAGE * band


@pytest.mark.parametrize("name", LOSSES)
def test_what_no_kernel_writes_is_noticed(name: str) -> None:
    gradient = "cross_entropy_gradient_kernel" if name != "divergence" else "divergence_kernel"
    for absent in ("sums_kernel", gradient):
        with mock.patch.object(softmax_kernel, absent, mock.MagicMock()):
            assert run(name, Inputs(*RAGGED[:2]), 3)[2].isnan().any()


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows(name: str) -> None:
    found = run(name, Inputs(0, 20), 3)
    assert [tuple(t.shape) for t in found[:3]] == [(), (0, D), (20, D)]
    assert all(t.eq(0).all() for t in found)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_do_not_mix_and_those_that_do_not_count_are_not_read(name: str) -> None:
    """Whatever their labels and logits are."""
    rows, vocabulary, chunk = RAGGED
    given = Inputs(rows, vocabulary)
    before = run(name, given, chunk)
    off = given.scale == 0
    given.labels[off] = 10**6
    given.h[off] *= 1e3
    given.teacher[off] *= 1e3
    after = run(name, given, chunk)
    # The head's gradient multiplies them by zero.
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_logits_of_any_size_and_labels_that_are_none() -> None:
    rows, vocabulary, chunk = RAGGED
    given = Inputs(rows, vocabulary)
    given.h *= 1e4
    found, truth = (
        run("cross-entropy", given, chunk), formula("cross-entropy", given, FP64)
    )  # fmt: skip
    assert all(t.isfinite().all() for t in found)
    assert distances(found[3:], truth[3:])[0] < 1e-5
    labels, scale = given.labels.fill_(vocabulary).to(DEVICE), given.scale.to(DEVICE)
    h, weight = given.h.to(DEVICE), given.weight.to(DEVICE)
    assert kernel.linear_cross_entropy(h, weight, labels, scale, chunk)[0].isnan()


def test_without_gradients_only_sums_are_made() -> None:
    given = Inputs(*RAGGED[:2])
    arguments = [given.h.to(DEVICE), given.weight.to(DEVICE), given.labels.to(DEVICE),
                 given.scale.to(DEVICE)]  # fmt: skip
    absent = mock.patch.object(softmax_kernel, "cross_entropy_gradient_kernel", None)
    with absent, backend.choosing(loss="triton"), small():
        loss, ce_R = linear_cross_entropy(*arguments, 3)
        assert not loss.requires_grad
        arguments[0].requires_grad_()
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(*arguments, 3)[1], ce_R)
    truth = formula("cross-entropy", given, FP64)
    assert distances([loss.cpu()], truth[:1])[0] < bands("cross-entropy", given, truth)[0]


def test_a_frozen_head_has_no_gradient() -> None:
    given = Inputs(*RAGGED[:2])
    h = given.h.to(DEVICE).requires_grad_()
    rest = [t.to(DEVICE) for t in (given.weight, given.labels, given.scale)]
    products = mock.patch.object(kernel, "add_fp32_product", None)
    with products, backend.choosing(loss="triton"), small():
        (3 * linear_cross_entropy(h, *rest, 3)[0]).backward()
    assert h.grad is not None
    assert torch.equal(h.grad.cpu(), run("cross-entropy", given, 3)[1])


def test_the_self_check_passes_as_shipped_and_notices_a_block_that_is_left_out() -> None:
    small = backend.Sizes(vocabulary=2 * kernel._COLUMNS + 100)
    assert self_check(DEVICE, small) < backend.TOLERANCE / 2
    sums = kernel._sums

    def short(logits_CV: Tensor, *others: Tensor | None) -> Tensor:
        return sums(logits_CV[:, : kernel._COLUMNS].contiguous(), *others)

    with mock.patch.object(kernel, "_sums", short):
        assert not self_check(DEVICE, small) <= backend.TOLERANCE


def test_other_dtypes_take_the_reference() -> None:
    assert kernel.refusal(torch.float16).startswith("expected one of (torch.bfloat16, ")
    h, weight = torch.ones(2, 3, dtype=FP64), torch.ones(4, 3, dtype=FP64)
    given = [t.to(DEVICE) for t in (h, weight, torch.zeros(2, dtype=torch.int64), torch.ones(2))]
    assert linear_cross_entropy(*given)[0].dtype == FP64
    message = r"path triton of op loss: expected one of .*, got torch.float64"
    with backend.choosing(loss="triton"), pytest.raises(ValueError, match=message):
        linear_cross_entropy(*given)
