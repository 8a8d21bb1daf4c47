"""Triton's convolution: against float64, its isolation of documents, its steps, what it refuses.

Shapes: B batch, S sequence, C channels, K kernel width, J = K-1.
"""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.conv1d import causal_conv1d, kernel, reference, tap_kernel
from nemo_kernels.documents import Documents
from nemo_kernels.launch import recorded

K, TOKENS, CHANNELS = 4, 8, 32
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """On a GPU a program needs as many channels as threads."""
    if DEVICE == "cuda":
        yield
        return
    with mock.patch.multiple(kernel, _TOKENS=TOKENS, _CHANNELS=CHANNELS):
        yield


def inputs(length: int, channels: int, dtype: torch.dtype = FP32, k: int = K) -> list[Tensor]:
    """x is a slice of something wider."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, channels + 5), (channels, k), (channels,))
    x, weight, bias = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    return [x[..., 2 : 2 + channels], weight, bias]


def packed(*lengths: int) -> Documents:
    """In both rows; in the second one the other way round."""
    rows = [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))]
    rows.append(rows[0].flip(0).neg())
    return Documents.from_numbers(torch.stack(rows)).to(DEVICE)


def run(function, tensors: list[Tensor], documents: Documents | None) -> list[Tensor]:
    """Output and gradients, of a loss in which every element counts differently."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y_BSC = function(*leaves, documents)
    weights = torch.randn(y_BSC.shape, generator=torch.Generator().manual_seed(1))
    y_BSC.backward(weights.to(y_BSC.device, y_BSC.dtype))
    return [y_BSC.detach(), *(leaf.grad for leaf in leaves)]


def distances(ours: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative, in the norm."""
    return [
        float((a.double() - b).norm() / b.norm()) if b.numel() else 0.0
        for a, b in zip(ours, truth, strict=True)
    ]


CASES = {
    "aligned": (TOKENS, 2 * CHANNELS, (TOKENS,)),
    "ragged": (TOKENS + 5, CHANNELS - 3, (1, 3, 4, 5)),
    "shorter than the taps": (2, 3, None),
    "empty": (0, CHANNELS, None),
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    """A sum over taps, silu's slope and, for weight and bias, over tokens; one rounding at the end.
    Of values in bf16 only the roundings of results show."""
    length, channels, lengths = CASES[case]
    tensors, documents = inputs(length, channels, dtype), packed(*lengths) if lengths else None
    with guarded_memory():
        ours = run(kernel.causal_conv1d, tensors, documents)
    truth = run(reference.causal_conv1d, [t.double() for t in tensors], documents)
    assert [t.dtype for t in ours] == [dtype] * 4
    assert [t.shape for t in ours] == [t.shape for t in truth]
    assert max(distances(ours, truth)) <= band(dtype, 3 * K)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_fewer_taps(k: int) -> None:
    tensors, documents = inputs(6, 5, k=k), packed(1, 2, 3)
    ours = run(kernel.causal_conv1d, tensors, documents)
    truth = run(reference.causal_conv1d, [t.double() for t in tensors], documents)
    assert max(distances(ours, truth)) <= band(FP32, 3 * K)


def test_the_comparison_notices_mistakes() -> None:
    """Documents that begin a token late, and taps the other way round."""
    x, weight, bias = inputs(9, 4)
    truth = run(reference.causal_conv1d, [t.double() for t in (x, weight, bias)], packed(3, 6))
    for wrong in (
        run(kernel.causal_conv1d, [x, weight, bias], packed(4, 5)),
        run(kernel.causal_conv1d, [x, weight.flip(1), bias], packed(3, 6)),
    ):
        assert min(distances(wrong, truth)[:2]) > SABOTAGE * band(FP32, 3 * K)


def test_parameters_in_fp32() -> None:
    x, weight, bias = inputs(4, 4, BF16)
    for of_bias in (FP32, BF16):
        tensors = [x, weight.float(), bias.to(of_bias)]
        ours = run(kernel.causal_conv1d, tensors, None)
        truth = run(reference.causal_conv1d, [t.double() for t in tensors], None)
        assert [t.dtype for t in ours] == [BF16, BF16, FP32, of_bias]
        assert max(distances(ours, truth)) <= band(BF16, 3 * K)


def test_documents_are_isolated_bit_for_bit() -> None:
    """Every other document changes, and what stays gives the same, forward and backward."""
    lengths = (1, K - 1, 1, K, K + 1, 3)
    x, weight, bias = (t[:1] if t.dim() == 3 else t for t in inputs(sum(lengths), 3))
    number_S = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    documents = Documents.from_numbers(number_S[None]).to(DEVICE)
    odd_S = (number_S % 2 == 1).to(DEVICE)
    before = run(kernel.causal_conv1d, [x, weight, bias], documents)[:2]
    for kept_S in (odd_S, ~odd_S):
        changed = torch.where(kept_S[:, None], x, 3 - x)
        after = run(kernel.causal_conv1d, [changed, weight, bias], documents)[:2]
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, kept_S], b[:, kept_S])
    # The comparison notices taps that cross.
    crossing = kernel.causal_conv1d(x, weight, bias)
    assert not torch.equal(before[0][:, odd_S], crossing[:, odd_S])


@pytest.mark.parametrize("k", [1, 2, K])
def test_steps_move_the_last_inputs_on_in_place(k: int) -> None:
    """Also of a state whose channels lie side by side, and of a slice of something wider."""
    x, weight, bias = inputs(6, CHANNELS + 3, k=k)
    y_BSC = reference.causal_conv1d(x.double(), weight.double(), bias.double())
    state_BCJ = x.new_zeros(2, k - 1, x.shape[2]).mT
    for i in range(x.shape[1]):
        with guarded_memory():
            y_BC = kernel.causal_conv1d_step(x[:, i], state_BCJ, weight, bias)
        assert max(distances([y_BC], [y_BSC[:, i]])) <= band(FP32, K)
        if i >= k - 2:
            assert torch.equal(state_BCJ, x[:, i - k + 2 : i + 1].mT)
    empty = kernel.causal_conv1d_step(x[:0, 0], state_BCJ[:0], weight, bias)
    assert empty.shape == (0, x.shape[2])


def launches(lengths: tuple[int, ...] | None) -> list[str]:
    tensors = [t.to("meta").requires_grad_() for t in inputs(64, CHANNELS, BF16)]
    documents = packed(*lengths).to("meta") if lengths else None
    with recorded() as found:
        kernel.causal_conv1d(*tensors, documents).sum().backward()
    return [one.kernel.__name__ for one in found]


def test_as_many_launches_for_a_document_as_for_many() -> None:
    alone = launches(None)
    assert alone == ["forward_kernel", "backward_kernel"]
    assert launches((1,) * 64) == launches((64,)) == alone


def test_only_inputs_are_kept() -> None:
    kept: list[Tensor] = []
    x, weight, bias = (t.requires_grad_() for t in inputs(5, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.causal_conv1d(x, weight, bias)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, weight, bias)}


def test_self_check_notices_mistakes() -> None:
    if DEVICE == "cuda":
        assert kernel.self_check(DEVICE, backend.Sizes()) < backend.TOLERANCE
        return
    small = backend.Sizes(1, 3, 1, 1, tokens=12)
    assert kernel.self_check(DEVICE, small) < backend.TOLERANCE
    with mock.patch.object(tap_kernel, "backward_kernel", mock.MagicMock()):
        assert not kernel.self_check(DEVICE, small) < backend.TOLERANCE


def test_what_is_not_taken_is_the_references() -> None:
    x, weight, bias = inputs(5, 3)
    assert kernel.refusal(x.double(), weight).endswith("got torch.float64 and 4")
    assert kernel.refusal(x, weight.new_zeros(3, 5)).endswith(
        "1 to 4 taps, got torch.float32 and 5"
    )
    assert not kernel.refusal(x, weight)
    assert causal_conv1d(x.double(), weight.double(), bias.double()).dtype == FP64


def test_bad_input_is_named() -> None:
    x, weight, bias = inputs(5, 3)
    state = x.new_zeros(2, 3, 3)
    for message, call in {
        r"x_BSC: expected shape \[any, any, any\], got \[2, 3\]": (x[:, 0], weight, bias),
        r"x_BSC: expected channels side by side, got strides": (
            x.mT,
            weight[:1].expand(5, -1),
            bias[:1].expand(5),
        ),
        r"weight_CK: expected shape \[3, any\], got \[2, 4\]": (x, weight[:2], bias),
        r"bias_C: expected shape \[3\], got \[2\]": (x, weight, bias[:2]),
        r"bias_C: expected a tensor on .*, got meta": (x, weight, bias.to("meta")),
        r"seq_idx_BS: expected shape \[2, 5\], got \[2, 6\]": (x, weight, bias, packed(2, 4)),
    }.items():
        with pytest.raises(ValueError, match=message):
            kernel.causal_conv1d(*call)
    with pytest.raises(ValueError, match=r"state_BCJ: expected shape \[2, 3, 3\], got \[2, 3, 2\]"):
        kernel.causal_conv1d_step(x[:, 0], state[..., 1:], weight, bias)
    with pytest.raises(ValueError, match=r"x_BC: expected shape \[any, any\], got \[2, 5, 3\]"):
        kernel.causal_conv1d_step(x, state, weight, bias)
