"""The norms against their formulas under autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo_kernels.norm import gated_rms_norm, reference, rms_norm

EPS = 1e-5


def plain(x, weight):
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x32 / (x32.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).to(x.dtype)


def gated(x, gate, weight, group_size):
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) * F.silu(gate.to(wide))
    groups = h.split(group_size, dim=-1)
    parts = [g / (g.square().mean(-1, keepdim=True) + EPS).sqrt() for g in groups]
    return (torch.cat(parts, -1) * weight.to(wide)).to(x.dtype)


def tensors(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 8), (3, 5, 8), (8,))
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def with_gradients(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y, *(t.grad for t in leaves)]


@pytest.mark.parametrize("block", [1 << 17, 32])
def test_rms_norm(block, monkeypatch):
    monkeypatch.setitem(reference._BLOCK, "cpu", block)
    x, _, weight = tensors()
    ours = with_gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    for a, b in zip(ours, with_gradients(plain, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [1 << 17, 32])
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_gated_rms_norm(block, group_size, monkeypatch):
    monkeypatch.setitem(reference._BLOCK, "cpu", block)
    ours = with_gradients(lambda *t: gated_rms_norm(*t, EPS, group_size), tensors())
    truth = with_gradients(lambda *t: gated(*t, group_size), tensors())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_group_size_and_order_of_the_gate_matter():
    x, gate, weight = tensors()
    y = gated_rms_norm(x, gate, weight, EPS, 4)
    assert not torch.allclose(y, gated_rms_norm(x, gate, weight, EPS, 8), rtol=1e-2)
    assert not torch.allclose(y, rms_norm(x, weight, EPS) * F.silu(gate), rtol=1e-2)


def test_bf16_is_rounded_once_at_the_end():
    x, gate, weight = tensors(torch.bfloat16)
    weight = weight.float()
    ours = with_gradients(lambda *t: gated_rms_norm(*t, EPS, 4), (x, gate, weight))
    assert [v.dtype for v in ours] == [x.dtype, x.dtype, x.dtype, torch.float32]
    truth = with_gradients(lambda *t: gated(*t, 4), (x.double(), gate.double(), weight.double()))
    assert (ours[0] - truth[0].bfloat16()).abs().max() <= 0.01 * truth[0].abs().max()
    torch.testing.assert_close(
        rms_norm(x, weight, EPS), plain(x.double(), weight).bfloat16(), rtol=8e-3, atol=0
    )
    for a, b in zip(ours[1:], truth[1:], strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_gradcheck():
    x, gate, weight = (t.requires_grad_() for t in tensors())
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, EPS, 4), (x, gate, weight))
    assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, EPS), (x, weight))


def test_a_slice_as_gate():
    x, gate, weight = tensors()
    wide = torch.randn(3, 5, 20, dtype=x.dtype)
    wide[..., 4:12] = gate
    torch.testing.assert_close(
        gated_rms_norm(x, wide[..., 4:12], weight, EPS, 4), gated_rms_norm(x, gate, weight, EPS, 4)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_inference_mode_other_steps_give_the_same(dtype):
    """And rows stay what they are, whatever stands beside them."""
    x, gate, weight = tensors(dtype)
    for norm in (lambda *t: rms_norm(t[0], t[2], EPS), lambda *t: gated_rms_norm(*t, EPS, 4)):
        with torch.inference_mode():
            found = norm(x, gate, weight)
            assert torch.equal(norm(x[1:2], gate[1:2], weight), found[1:2])
        assert found.dtype == dtype
        torch.testing.assert_close(found, norm(x, gate, weight))
        assert not torch.allclose(found, norm(x, gate, weight.flip(0)), rtol=1e-2)
