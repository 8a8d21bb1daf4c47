"""Packs of samples, and the batches they become."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.packing import PackedSamples, best_fit

PAD = 7


def naive_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """What is left of each pack, by looking at all of them every time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_packs_are_those_of_the_definition(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, np.int64)
    packs = best_fit(array, capacity)
    rooms = []
    seen: Counter[int] = Counter()
    for i in range(len(packs)):
        samples = packs.samples(i)
        assert (np.diff(samples) > 0).all()
        seen.update(samples.tolist())
        rooms.append(capacity - int(array[samples].sum()))
    assert seen == Counter(range(len(lengths)))
    assert sorted(rooms) == naive_best_fit(lengths, capacity)


def test_a_skewed_distribution_is_packed_almost_full() -> None:
    """Most samples short, few as long as the pack: rows of one sample each would be 12 % full."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.0, 1.0, 20_000).astype(np.int64), 1, 2048)
    packs = best_fit(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) > 0.99
    assert lengths.mean() / 2048 < 0.13


def test_a_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="33 tokens does not fit into 32"):
        best_fit(np.array([3, 33]), 32)


Sample = tuple[NDArray[np.int64], NDArray[np.bool_]]


def sample(length: int, learnt: set[int], first: int) -> Sample:
    return np.arange(first, first + length), np.isin(np.arange(length), list(learnt))


def test_a_batch_of_packs() -> None:
    """Every learnt token is a label once, at the place before it, and never across samples."""
    rows = [
        [sample(4, {0, 2, 3}, 10), sample(3, {1}, 20)],  # one token of padding
        [sample(8, {7}, 30)],  # full
        [sample(1, {0}, 40), sample(2, {0, 1}, 50)],  # five tokens of padding
    ]
    batch = Batch.from_packs(rows, 8, PAD, (5, 6, -1))
    assert batch.ids_BS.tolist() == [
        [10, 11, 12, 13, 20, 21, 22, PAD],
        [30, 31, 32, 33, 34, 35, 36, 37],
        [40, 50, 51, PAD, PAD, PAD, PAD, PAD],
    ]
    labels = [
        [0, 12, 13, 0, 21, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 37, 0],
        [0] * 8,  # a row for evaluation alone, which is padding there
    ]
    assert batch.labels_BS.tolist() == labels
    assert batch.loss_mask_BS.tolist() == [[label > 0 for label in row] for row in labels]
    assert batch.documents.seq_idx_BS.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 2],
        [0] * 8,
        [0, 1, 1, 2, 2, 2, 2, 2],
    ]
    assert batch.positions_BS[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    real_BS = batch.documents.real_BS
    assert real_BS is not None
    assert real_BS.sum(1).tolist() == [7, 8, 3]
    assert batch.to("cpu").documents.real_BS is not None
    whole = Batch.from_packs(rows[1:2], 8, PAD)
    assert whole.documents.real_BS is None
    assert whole.packing is None


def test_documents_without_padding_are_all_real() -> None:
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    starts = torch.zeros(1, 5, dtype=torch.bool)
    assert Batch.from_windows(tokens, starts).documents.real_BS is None


class _Store:
    """Samples of which every token says whose it is."""

    lengths = np.array([5, 3, 8, 2, 6, 4, 7], np.int64)

    def sample(self, number: int) -> Sample:
        length = int(self.lengths[number])
        return np.full(length, number), np.ones(length, np.bool_)


def test_every_pack_is_read_once_in_an_order_of_seed_and_epoch() -> None:
    data = PackedSamples(_Store(), None, 9, PAD)  # type: ignore[arg-type]
    count = len(data.packs)
    assert count == 4

    def epoch(seed: int, number: int) -> list[tuple[int, ...]]:
        batch = data.rows(range(number * count, (number + 1) * count), 9, seed)
        return [tuple(sorted(set(row.tolist()) - {PAD})) for row in batch.ids_BS]

    orders = [epoch(seed, number) for seed in (1, 2) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) > 2
    for order in orders:
        assert sorted(sample for row in order for sample in row) == list(range(7))
    assert epoch(1, 0) == orders[0]
    assert data.heldout_windows(9) == 0
