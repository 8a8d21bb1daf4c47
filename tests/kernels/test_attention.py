"""Attention against its definition, and its isolation of documents."""

from __future__ import annotations

import inspect
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from nemo_kernels import backend
from nemo_kernels.attention import attention, attention_read, by_document, reference, varlen
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


def test_reading_beside_much_that_is_cached_goes_a_few_tokens_at_a_time():
    """Each sees what it would see anyhow, and no mask is larger than may be."""
    q, k, v = inputs()
    before_B, sizes, attend = torch.tensor([0, 9]), [], reference._attend

    def watched(q_BSHP, k_BTGP, v_BTGP, mask_B1ST):
        sizes.append(mask_B1ST.numel())
        return attend(q_BSHP, k_BTGP, v_BTGP, mask_B1ST)

    at_once = attention_read(q[:, :12], k, v, before_B)
    with mock.patch.multiple(reference, _MASKED=5 * 2 * 21, _attend=watched):
        torch.testing.assert_close(
            attention_read(q[:, :12], k, v, before_B), at_once, rtol=1e-6, atol=1e-6
        )
    assert sizes == [5 * 2 * 21, 5 * 2 * 21, 2 * 2 * 21]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [21], [1, 8, 12], [7, 7, 7]])
def test_document_by_document_is_the_same(lengths, dtype):
    """As the reference with a mask, forward and backward, and documents are isolated to the bit."""
    documents = None if lengths is None else Documents.from_numbers(packed(lengths))

    def run(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        o = function(*leaves, documents)
        (o * torch.linspace(-1, 1, o.numel(), dtype=dtype).view(o.shape)).sum().backward()
        return [o, *(t.grad for t in leaves)]

    t = inputs(dtype=dtype)
    ours, truth = run(by_document.attention, t), run(reference.attention, t)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-9
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if lengths == [1, 8, 12]:
        changed = [v.clone() for v in t]
        for v in changed:
            v[:, 9:] *= -30
        for a, b in zip(ours, run(by_document.attention, changed), strict=True):
            assert torch.equal(a[:, :9], b[:, :9])
            assert not torch.equal(a[:, 9:], b[:, 9:])


def loops(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """What varlen_attn computes, causal and with groups of heads, and what it asks for."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert query.dim() == key.dim() == value.dim() == 3
    bounds = cu_seq_q.tolist()
    assert bounds == cu_seq_k.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    assert max_q == max_k == max(lengths)
    assert type(max_q) is int
    parts = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    return torch.cat([reference.attention(*(t[None] for t in part))[0] for part in parts])


def of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, return_aux=None, scale=None, window_size=(-1, -1),
):  # fmt: skip
    assert window_size == (-1, 0)  # a tuple: a list would not be causal
    return loops(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def of_torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0)
    assert enable_gqa
    return loops(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def before_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    raise AssertionError("called")


STUBS = {"2.11": of_torch_2_11, "2.13": of_torch_2_13}


def test_stubs_have_the_signatures_of_torch():
    stub = STUBS.get(".".join(torch.__version__.split(".")[:2]))
    if stub is not None:
        found, known = (inspect.signature(f).parameters for f in (varlen_attn, stub))
        assert {n: (p.kind, p.default) for n, p in found.items()} == {
            n: (p.kind, p.default) for n, p in known.items()
        }


@pytest.mark.parametrize("version", STUBS)
def test_the_kernel_of_torch_is_given_what_it_takes(version):
    stub = mock.Mock(side_effect=STUBS[version])
    t = inputs(dtype=torch.bfloat16)
    documents = Documents.from_numbers(packed([1, 8, 12]))
    given = varlen.options(STUBS[version])
    with mock.patch.multiple(varlen, varlen_attn=stub, _OPTIONS=given):
        found = varlen.attention(*t, documents)
        assert stub.call_count == 1
        torch.testing.assert_close(found, reference.attention(*t, documents), rtol=1e-2, atol=1e-2)
        # A row that is one document, other dtypes and widths of heads go elsewhere.
        assert torch.equal(varlen.attention(*t), reference.attention(*t))
        wide, odd = [v.float() for v in t], [v[..., :7] for v in t]
        for other in (wide, odd):
            torch.testing.assert_close(
                varlen.attention(*other, documents).float(),
                reference.attention(*other, documents).float(),
                rtol=1e-2, atol=1e-2,
            )  # fmt: skip
        assert stub.call_count == 1


def test_an_older_kernel_of_torch_is_not_taken():
    with pytest.raises(ImportError, match="no argument window_size"):
        varlen.options(before_torch_2_11)


def test_self_check_of_documents_and_the_choice_of_paths():
    small = backend.Sizes(query_heads=4, key_heads=1, attention_dim=32, tokens=256)
    assert by_document.self_check("cpu", small) < backend.TOLERANCE
    with_one_document = by_document.checked(lambda q, k, v, _: attention(q, k, v), "cpu", small)
    assert not with_one_document <= backend.TOLERANCE
    assert backend.path("attention", "cpu").name == "reference"


def test_bad_input_is_named():
    q, k, v = inputs()
    with pytest.raises(
        ValueError, match=r"k_BSGP: expected shape \[2, 21, 2, 8\], got \[2, 20, 2,"
    ):
        attention(q, k[:, :20], v)
    with pytest.raises(ValueError, match=r"v_BSGP: expected torch.float32, got torch.bfloat16"):
        attention(q, k, v.bfloat16())
    with pytest.raises(ValueError, match=r"k_BSGP: expected a divisor of 3 \(heads\), got 2"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"documents.seq_idx_BS: expected shape \[2, 21\], got"):
        attention(q, k, v, Documents.from_numbers(packed([20])))
    with pytest.raises(ValueError, match=r"v_BSGP: expected a tensor on cpu, got meta"):
        attention(q, k, v.to("meta"))
