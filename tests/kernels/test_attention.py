"""Attention against its definition, and its isolation of documents."""

from __future__ import annotations

import pytest
import torch

from nemo_kernels.attention import attention, attention_read
from nemo_kernels.documents import Documents


def inputs(length=21, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8))
    return [torch.randn(s, generator=gen).to(dtype) for s in shapes]


def packed(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)


def definition(q, k, v, seq=None):
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            seen = [j for j in range(i + 1) if seq is None or seq[b, j] == seq[b, i]]
            for h in range(q.shape[2]):
                scores = (k[b, seen, h // 2] @ q[b, i, h]) / q.shape[-1] ** 0.5
                out[b, i, h] = scores.softmax(0) @ v[b, seen, h // 2]
    return out


@pytest.mark.parametrize("lengths", [None, [21], [1, 8, 12]])
def test_equals_the_definition(lengths):
    seq = None if lengths is None else packed(lengths)
    documents = None if seq is None else Documents.from_numbers(seq)
    t = inputs()
    torch.testing.assert_close(attention(*t, documents), definition(*t, seq), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "new"), [((20, 20), 1), ((0, 0), 21), ((3, 12), 7)])
def test_reading_sees_what_its_row_holds_up_to_each_token(dtype, before, new):
    q, k, v = inputs(dtype=dtype)
    before_B = torch.tensor(before)
    whole, rows = attention(q, k, v), range(len(before))
    q_new = torch.stack([q[b, before[b] : before[b] + new] for b in rows])
    wanted = torch.stack([whole[b, before[b] : before[b] + new] for b in rows])
    read = attention_read(q_new, k, v, before_B)
    assert read.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(read, wanted, rtol=tolerance, atol=tolerance)
    for b in rows:  # nothing behind a row's tokens is looked at, nor its room
        k[b, before[b] + new :] = 1e4
        v[b, before[b] + new :] = -1e4
    assert torch.equal(attention_read(q_new, k, v, before_B), read)
    k[0, before[0]] += 1
    assert not torch.equal(attention_read(q_new, k, v, before_B)[0], read[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("second", [1, 32, 33])
def test_documents_are_isolated_bit_for_bit(first, second, dtype):
    seq = packed([first, second, 5])
    where = slice(first, first + second)

    def run(tensors, seq, where):
        documents = None if seq is None else Documents.from_numbers(seq)
        leaves = [t.clone().requires_grad_() for t in tensors]
        o = attention(*leaves, documents)[:, where]
        (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum().backward()
        return [o, *(t.grad[:, where] for t in leaves)]

    t = inputs(first + second + 5, dtype)
    before = run(t, seq, where)
    changed = [v.clone() for v in t]
    for v in changed:
        v[:, :first] *= -30
        v[:, first + second :] *= -30
    after = run(changed, seq, where)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    alone = run([v[:, where] for v in t], None, slice(None))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(before, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # The comparison notices attention that crosses.
    assert not torch.equal(run(t, None, where)[0], run(changed, None, where)[0])
