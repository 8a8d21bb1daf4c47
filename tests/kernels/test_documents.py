"""Documents against a token-by-token construction."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from nemo_kernels.documents import Documents, to_device


def naive(starts_BS):
    """The same four facts, one token at a time."""
    numbers, spans = [], []
    for row, starts in enumerate(starts_BS.tolist()):
        number, column = -1, []
        for position, start in enumerate(starts):
            if start or position == 0:
                number += 1
                spans.append([row, position, position])
            spans[-1][2] = position + 1
            column.append(number)
        numbers.append(column)
    length = starts_BS.shape[1]
    bounds = [row * length + start for row, start, _ in spans] + [starts_BS.numel()]
    longest = max(end - start for _, start, end in spans)
    return numbers, bounds, longest, tuple(map(tuple, spans))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_equals_a_token_by_token_construction(seed, rate):
    gen = torch.Generator().manual_seed(seed)
    starts_BS = torch.rand(int(torch.randint(1, 5, (), generator=gen)), 9, generator=gen) < rate
    documents = Documents.from_starts(starts_BS)
    numbers, bounds, longest, spans = naive(starts_BS)
    assert documents.seq_idx_BS.tolist() == numbers
    assert documents.cu_seqlens.tolist() == bounds
    assert documents.max_seqlen == longest
    assert documents.spans == spans
    assert documents.seq_idx_BS.dtype == documents.cu_seqlens.dtype == torch.int32


def test_any_numbers_that_change_make_the_same_documents():
    numbers_BS = torch.tensor([[5, 5, 2, 5], [1, 0, 0, 0]])
    documents = Documents.from_numbers(numbers_BS)
    assert documents.seq_idx_BS.tolist() == [[0, 0, 1, 2], [0, 1, 1, 1]]
    assert documents.spans == ((0, 0, 2), (0, 2, 3), (0, 3, 4), (1, 0, 1), (1, 1, 4))


def test_a_gpu_fetches_from_pinned_memory():
    """Else the host would wait, whether it is told to or not."""
    tensor = mock.Mock(is_cpu=True)
    assert to_device(tensor, "cuda:1") is tensor.pin_memory().to.return_value
    tensor.pin_memory().to.assert_called_once_with("cuda:1", non_blocking=True)
    tensor.to.assert_not_called()
    there = mock.Mock(is_cpu=False)
    assert to_device(there, "cuda") is there.to.return_value
    assert to_device(torch.ones(2), "cpu").eq(1).all()
    assert to_device(torch.ones(2, dtype=torch.int32), "meta").dtype == torch.int32
