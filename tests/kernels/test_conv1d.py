"""The convolution against torch's conv1d, a loop, and its isolation of documents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_hybrid.meter import Meter
from nemo_kernels.conv1d import causal_conv1d, causal_conv1d_step, reference
from nemo_kernels.documents import Documents

K = 4


def inputs(batch=2, length=11, channels=6, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, channels), (channels, K), (channels,))
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def packed(lengths, batch=2):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(
        batch, -1
    )


def by_loop(x, weight, bias, seq=None):
    rows = []
    for s in range(x.shape[1]):
        z = bias.expand(len(x), -1)
        for k in range(K):
            i = s - K + 1 + k
            if i >= 0:
                same = 1 if seq is None else (seq[:, i] == seq[:, s])[:, None]
                z = z + weight[:, k] * x[:, i] * same
        rows.append(z * torch.sigmoid(z))
    return torch.stack(rows, 1)


def by_torch(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=K - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def with_gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, *(t.grad for t in leaves)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
def test_equals_torch(length):
    t = inputs(length=length)
    for a, b in zip(with_gradients(causal_conv1d, t), with_gradients(by_torch, t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [[23], [9, 14]])
def test_long_documents_have_their_gradient_piece_by_piece(lengths, monkeypatch):
    tensors, documents = inputs(length=23), Documents.from_numbers(packed(lengths))
    whole = with_gradients(lambda *t: causal_conv1d(*t, documents), tensors)
    monkeypatch.setattr(reference, "_POSITIONS", 5)
    pieces = with_gradients(lambda *t: causal_conv1d(*t, documents), tensors)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], pieces[:2], strict=True))
    for a, b in zip(whole[2:], pieces[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_memory_of_the_gradient_is_that_of_a_piece(monkeypatch):
    monkeypatch.setattr(reference, "_POSITIONS", 64)

    def most(length):
        x_BSC = torch.empty(1, length, 6, device="meta", requires_grad=True)
        weight_CK, bias_C = torch.empty(6, K, device="meta"), torch.empty(6, device="meta")
        with Meter() as meter:
            causal_conv1d(x_BSC, weight_CK.requires_grad_(), bias_C).sum().backward()
        return meter.peak

    one = 2048 * 6 * 4
    assert most(4096) - most(2048) < 4 * one
    monkeypatch.setattr(reference, "_POSITIONS", 4096)
    assert most(4096) - most(2048) > 6 * one


@pytest.mark.parametrize("lengths", [[11], [1, 2, 3, 5], [4, 5, 2], [1] * 11])
def test_documents_equal_the_loop(lengths):
    t, seq = inputs(), packed(lengths)
    ours = with_gradients(lambda *a: causal_conv1d(*a, Documents.from_numbers(seq)), t)
    truth = with_gradients(lambda *a: by_loop(*a, seq), t)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_documents_may_differ_from_row_to_row():
    t, seq = inputs(), torch.cat((packed([4, 7], 1), packed([1, 2, 8], 1)))
    torch.testing.assert_close(causal_conv1d(*t, Documents.from_numbers(seq)), by_loop(*t, seq))


def test_gradcheck():
    t = [v.requires_grad_() for v in inputs(channels=2, length=6)]
    assert torch.autograd.gradcheck(
        lambda *a: causal_conv1d(*a, Documents.from_numbers(packed([2, 4]))), t
    )


def test_slices_of_a_wider_tensor():
    x, weight, bias = inputs(channels=6)
    wide = torch.randn(2, 11, 20, dtype=x.dtype)
    wide[..., 5:11] = x
    torch.testing.assert_close(
        causal_conv1d(wide[..., 5:11], weight, bias), causal_conv1d(x, weight, bias)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_fp32_parameters(dtype):
    x, weight, bias = inputs(dtype=dtype)
    ours = with_gradients(causal_conv1d, [x, weight.float(), bias.float()])
    truth = with_gradients(by_torch, [x.double(), weight.double(), bias.double()])
    assert [v.dtype for v in ours] == [dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(ours, truth, strict=True):
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_steps_move_the_last_inputs_on_in_place():
    x, weight, bias = inputs()
    y = causal_conv1d(x, weight, bias)
    state = x.new_zeros(2, 6, K - 1)
    for i in range(11):
        torch.testing.assert_close(causal_conv1d_step(x[:, i], state, weight, bias), y[:, i])
        if i >= K - 2:
            assert torch.equal(state, x[:, i - K + 2 : i + 1].mT)


@pytest.mark.parametrize("first", [1, K - 1, K, K + 1])
@pytest.mark.parametrize("second", [1, K - 1, K, K + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_isolated_bit_for_bit(first, second, dtype):
    seq = packed([first, second, 3])
    x, weight, bias = inputs(length=first + second + 3, dtype=dtype)
    where = slice(first, first + second)

    def run(x, seq, where):
        documents = None if seq is None else Documents.from_numbers(seq)
        x = x.clone().requires_grad_()
        y = causal_conv1d(x, weight, bias, documents)[:, where]
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        return y, x.grad[:, where]

    before = run(x, seq, where)
    changed = x.clone()
    changed[:, :first] *= -100
    changed[:, first + second :] *= -100
    after = run(changed, seq, where)
    alone = run(x[:, where], None, slice(None))
    for a, b, c in zip(before, after, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    # The comparison notices taps that cross.
    assert not torch.equal(run(x, None, where)[0], run(changed, None, where)[0])
