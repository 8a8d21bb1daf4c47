"""Which window a global sample number names: pure functions of seed and number, in O(1) memory.

Nothing here knows world size, workers or resume, so none of them can change the order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from nemo_hybrid.errors import UserError

BLOCK = 1000
"""Samples over which a blend keeps its weights exactly (to one part in BLOCK)."""
_ROUNDS = 6
_MASK = (1 << 64) - 1


@lru_cache(maxsize=256)
def _round_keys(*parts: int | str) -> tuple[int, ...]:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _mix(x: int) -> int:
    """Finalizer of SplitMix64 (Steele, Lea, Flood 2014): every output bit depends on every input
    bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def permute(index: int, size: int, *key: int | str) -> int:
    """Image of index under a pseudo-random permutation of range(size) chosen by key.

    A Feistel network permutes the smallest range 4^h that covers size; its output is fed back
    until it falls below size (cycle walking), which keeps it a permutation.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} lies outside range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = _round_keys(*key)
    while True:
        left, right = index >> half, index & low
        for k in keys:
            left, right = right, left ^ (_mix((right + k) & _MASK) & low)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=8)
def quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Samples of each store in a block of BLOCK, by largest remainder. Raises UserError if a
    weight is too small to get one."""
    total = sum(weights)
    exact = [w / total * BLOCK for w in weights]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        weight = weights[counts.index(0)]
        raise UserError(
            f"data.blend: weight {weight} is less than 1/{BLOCK} of the sum {total}; raise it or "
            "leave that store out"
        )
    return tuple(counts)


@lru_cache(maxsize=8)
def _block(quota: tuple[int, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """(store, how many earlier samples of this block are from it) for each place of a block."""
    stores = [i for i, q in enumerate(quota) for _ in range(q)]
    seen = [0] * len(quota)
    places = []
    for place in range(BLOCK):
        store = stores[permute(place, BLOCK, seed, "block", block)]
        places.append((store, seen[store]))
        seen[store] += 1
    return tuple(places)


@dataclass(frozen=True)
class Sampler:
    """Sample order over stores of windows[i] windows each, drawn with the given weights.

    Every store is read once in full, in an order of its own, before any of it is read again.
    """

    windows: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __call__(self, sample: int) -> tuple[int, int]:
        """(store, window) of a global sample number."""
        quota = quotas(self.weights)
        block, place = divmod(sample, BLOCK)
        store, earlier = _block(quota, self.seed, block)[place]
        number = block * quota[store] + earlier
        epoch, position = divmod(number, self.windows[store])
        return store, permute(position, self.windows[store], self.seed, "epoch", epoch, store)
