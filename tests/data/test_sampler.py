from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.data.loader import BLOCK, Phase, Sampler, permute, quotas
from nemo_hybrid.errors import UserError


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 700), key=st.integers(0, 10**6))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_handles_huge_ranges() -> None:
    size = 10**12 + 7
    images = {permute(i, size, 1) for i in range(2000)}
    assert len(images) == 2000
    assert max(images) > size * 0.99


@pytest.mark.parametrize("size", [5, 16, 41])
def test_every_image_is_equally_likely(size: int) -> None:
    """Chi-square of where places 0 and size // 2, and the pair of the first two, go over keys."""
    trials = 400 * size
    for place in (0, size // 2):
        counts = Counter(permute(place, size, "t", k) for k in range(trials))
        chi2 = sum((counts[i] - 400) ** 2 / 400 for i in range(size))
        assert chi2 < size - 1 + 5 * (2 * (size - 1)) ** 0.5
    gaps = Counter((permute(1, size, k) - permute(0, size, k)) % size for k in range(trials))
    expected = trials / (size - 1)
    chi2 = sum((gaps[g] - expected) ** 2 / expected for g in range(1, size))
    assert chi2 < size - 2 + 5 * (2 * (size - 2)) ** 0.5


def test_one_store_is_read_once_per_epoch_in_a_new_order_each_time() -> None:
    sampler = Sampler((1234,), (Phase(0, (1.0,)),), seed=3)
    epochs = [[sampler(e * 1234 + i)[1] for i in range(1234)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1234))
    assert len({tuple(e) for e in epochs}) == 3
    other = Sampler((1234,), (Phase(0, (1.0,)),), seed=4)
    assert [other(i)[1] for i in range(1234)] != epochs[0]


def test_a_blend_keeps_its_weights_and_each_store_its_epochs() -> None:
    sampler = Sampler((50, 3000, 7), (Phase(0, (0.25, 0.70, 0.05)),), seed=1)
    drawn = [sampler(n) for n in range(4 * BLOCK)]
    for block in range(4):
        counts = Counter(s for s, _ in drawn[block * BLOCK : (block + 1) * BLOCK])
        assert counts == {0: 250, 1: 700, 2: 50}
    for store, size in enumerate(sampler.windows):
        windows = [w for s, w in drawn if s == store]
        for first in range(0, len(windows) - size + 1, size):
            assert sorted(windows[first : first + size]) == list(range(size))
    # Mixed throughout the block, not one store after another.
    first_hundred = Counter(s for s, _ in drawn[:100])
    assert 10 <= first_hundred[0] <= 40
    assert 50 <= first_hundred[1] <= 88


@pytest.mark.parametrize("border", [BLOCK, 2 * BLOCK + 137])
def test_a_phase_has_its_own_weights_and_goes_on_where_stores_were_left(border: int) -> None:
    one = Sampler((50, 3000, 7), (Phase(0, (3.0, 1.0, 0.0)),), seed=1)
    two = Sampler((50, 3000, 7), (*one.phases, Phase(border, (0.0, 0.4, 0.6))), seed=1)
    drawn = [two(n) for n in range(border + 2 * BLOCK)]
    assert drawn[:border] == [one(n) for n in range(border)]
    for block in range(2):
        begin = border + block * BLOCK
        assert Counter(s for s, _ in drawn[begin : begin + BLOCK]) == {1: 400, 2: 600}
    windows = [w for s, w in drawn if s == 1]
    assert len(set(windows)) == len(windows) > 800  # nothing twice before everything once
    # From whatever number on, and in another process.
    assert [Sampler(two.windows, two.phases, 1)(n) for n in range(border - 3, border + 3)] == drawn[
        border - 3 : border + 3
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=6))
def test_quotas_sum_to_a_block_and_stay_within_one_of_exact(weights: list[float]) -> None:
    try:
        counts = quotas(tuple(weights))
    except UserError:
        assert min(weights) / sum(weights) < 1 / BLOCK
        return
    assert sum(counts) == BLOCK
    for c, w in zip(counts, weights, strict=True):
        assert abs(c - w / sum(weights) * BLOCK) < 1


def test_a_weight_too_small_for_a_block_is_an_error() -> None:
    with pytest.raises(UserError, match="less than 1/1000"):
        quotas((1.0, 1e-5))


def test_the_order_never_changes() -> None:
    """Resuming a run with a newer version must continue the same order."""
    sampler = Sampler((1000, 37), (Phase(0, (3.0, 1.0)),), seed=1234)
    assert [sampler(n) for n in (0, 1, 2, 3, 999, 1000, 10**9)] == [
        (0, 989),
        (0, 36),
        (0, 56),
        (1, 31),
        (0, 972),
        (0, 180),
        (0, 736),
    ]
