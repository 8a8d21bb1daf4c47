"""The gated norm in Triton against its formula in float64, and the plain one by torch's kernel. See
``helpers.triton_env`` for where they run.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.bands import SABOTAGE, jittered
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.norm import gated_kernel, gated_rms_norm, kernel, reference, rms_norm

FP32, BF16, FP64, EPS = torch.float32, torch.bfloat16, torch.float64, 1e-5
ALIGNED, RAGGED = ((2, 8, 64), 16), ((3, 7, 36), 12)
"""Shape of x, and channels of a group; ragged: neither rows nor channels fill a program."""


def small() -> mock._patch:
    """Two rows of 16 channels for a program, and steps in the backward pass."""
    return mock.patch.multiple(kernel, _TILE=32, _PROGRAMS=8)


def draw(shape: tuple[int, ...], dtype: torch.dtype = FP32) -> list[Tensor]:
    """x, gate, which is a slice of something wider, weight and dy."""
    generator = torch.Generator().manual_seed(0)
    x, wide, dy = (
        torch.randn(*shape[:-1], width, generator=generator).to(dtype)
        for width in (shape[-1], shape[-1] + 5, shape[-1])
    )
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    return [x, wide[..., 3 : 3 + shape[-1]], weight, dy]


def run(given: list[Tensor], size: int) -> list[Tensor]:
    """Output and gradients out of memory that was full of NaN, on the CPU."""
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in given[:3]]
    with backend.choosing(norm="triton"), small(), guarded_memory():
        y = gated_rms_norm(*leaves, EPS, size)
        y.backward(given[3].to(DEVICE))
    return [t.detach().cpu() for t in (y, *(t.grad for t in leaves))]


def formula(given: list[Tensor], size: int, dtype: torch.dtype) -> list[Tensor]:
    x, gate, weight = (t.detach().to(dtype).requires_grad_() for t in given[:3])
    h = (x * F.silu(gate)).unflatten(-1, (-1, size))
    normed = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = normed.flatten(-2) * weight
    y.backward(given[3].to(dtype))
    return [t.detach() for t in (y, *(t.grad for t in (x, gate, weight)))]


def distances(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def bands(given: list[Tensor], size: int, truth: list[Tensor]) -> list[float]:
    """In fp32 what rounding does at most, in bf16 what rounding the results does; both twice."""
    draws = [distances(jittered(lambda: formula(given, size, FP32), s), truth) for s in range(3)]
    if given[0].dtype == BF16:
        draws.append(distances([t.to(BF16) for t in truth], truth))
    return [2 * max(of) for of in zip(*draws, strict=True)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("shape", "size"), [ALIGNED, RAGGED])
def test_equals_the_formula(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    given = draw(shape, dtype)
    found, truth = run(given, size), formula(given, size, FP64)
    assert {t.dtype for t in found} == {dtype}
    for off, band in zip(distances(found, truth), bands(given, size, truth), strict=True):
        assert off < band


def other_gate(given: list[Tensor]) -> None:
    given[1] = given[1].flip(0)


def one_channel_less(given: list[Tensor]) -> None:
    given[0] = given[0].clone()
    given[0][..., -1] = 0


def last_row_gone(given: list[Tensor]) -> None:
    given[3] = given[3].clone()
    given[0], given[3][-1, -1] = given[0] * 1.001, 0


@pytest.mark.parametrize("mistake", [other_gate, one_channel_less, last_row_gone])
def test_mistakes_are_noticed(mistake: Callable[[list[Tensor]], None]) -> None:
    shape, size = RAGGED
    given = draw(shape)
    truth = formula(given, size, FP64)
    allowed = bands(given, size, truth)
    mistake(given)
    off = distances(run(given, size), truth)
    later = slice(1, None) if mistake is last_row_gone else slice(None)
    for got, band in zip(off[later], allowed[later], strict=True):
        assert got > SABOTAGE * band


@pytest.mark.parametrize("absent", ["gated_norm_kernel", "gated_norm_backward_kernel"])
def test_what_no_kernel_writes_is_noticed(absent: str) -> None:
    with mock.patch.object(gated_kernel, absent, mock.MagicMock()):
        assert run(draw(RAGGED[0]), RAGGED[1])[3].isnan().all()


def test_no_rows() -> None:
    x, gate, weight, dy = draw((0, 36))
    found = run([x, gate, weight, dy], 12)
    assert [tuple(t.shape) for t in found] == [(0, 36), (0, 36), (0, 36), (36,)]
    assert found[3].eq(0).all()


def test_rows_and_groups_do_not_mix() -> None:
    (shape, size), other = RAGGED, slice(12, 24)
    before = run(draw(shape), size)
    given = draw(shape)
    given[0][1] *= 30
    given[0][:, :, other] *= 30
    after = run(given, size)
    for a, b in zip(before[:3], after[:3], strict=True):
        assert torch.equal(a[::2, :, :12], b[::2, :, :12])
        assert not torch.equal(a[::2, :, other], b[::2, :, other])


def test_a_weight_in_fp32_beside_bf16() -> None:
    given = draw(RAGGED[0], BF16)
    truth = formula(given, RAGGED[1], FP64)
    given[2] = given[2].float()
    found = run(given, RAGGED[1])
    assert found[3].dtype == FP32
    assert distances(found[3:], truth[3:])[0] < 1e-5


def test_paths_and_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain norm goes to torch's kernel where all is of one dtype."""
    assert not kernel.refusal(BF16, 512)
    assert kernel.refusal(FP64, 512).endswith("got torch.float64")
    assert kernel.refusal(BF16, kernel.MAX_GROUP + 1).endswith("got 4097")
    with backend.choosing(norm="triton"):
        with pytest.raises(ValueError, match=r"triton of op norm: expected .*float64"):
            gated_rms_norm(*[torch.ones(4, dtype=FP64, device=DEVICE)] * 3, EPS, 4)
        x, weight = torch.ones(2, 4, dtype=BF16), torch.full((4,), 1 + 2**-10)
        assert torch.equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    x, _, weight, _ = draw((3, 8), BF16)
    with backend.choosing(norm="triton"):
        plain = rms_norm(x, weight, EPS)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert distances([plain], [exact])[0] < 2 * distances([exact.to(BF16)], [exact])[0]


def test_the_self_check_passes_as_shipped_and_notices_another_group_size() -> None:
    gated = kernel.gated_rms_norm

    def by_other_groups(x: Tensor, gate: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
        return gated(x, gate, weight, eps, 2 * size)

    sizes = backend.Sizes() if DEVICE == "cuda" else backend.Sizes(tokens=3)
    with mock.patch.object(kernel, "_PROGRAMS", 8):
        assert kernel.self_check(DEVICE, sizes) < backend.TOLERANCE / 2
        with mock.patch.object(kernel, "gated_rms_norm", by_other_groups):
            assert not kernel.self_check(DEVICE, sizes) <= backend.TOLERANCE


def test_bad_input_is_named() -> None:
    x, gate, weight, _ = draw((3, 8))
    with pytest.raises(ValueError, match=r"gate: expected shape \[3, 8\], got \[3, 7\]"):
        gated_rms_norm(x, gate[:, :7], weight, EPS, 4)
    with pytest.raises(ValueError, match=r"weight_D: expected shape \[8\], got \[7\]"):
        gated_rms_norm(x, gate, weight[:7], EPS, 4)
    with pytest.raises(ValueError, match=r"weight_D: expected shape \[8\], got \[7\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight_D: expected a tensor on cpu, got meta"):
        rms_norm(x, weight.to("meta"), EPS)
    for size in (3, 0, -4):
        expected = rf"group_size: expected a divisor of 8 \(channels\), got {size}"
        with pytest.raises(ValueError, match=expected):
            gated_rms_norm(x, gate, weight, EPS, size)
