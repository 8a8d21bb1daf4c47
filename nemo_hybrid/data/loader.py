"""From stores to each rank's micro-batches: training steps in a fixed global order, and
evaluation passes.

Which window a global sample number names is a pure function of seed and number, in O(1) memory. It
does not know world size, workers or resume, so none of them can change the order.

Shape suffixes: B rows, W = sequence length + 1.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import DataOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.prepare import HELDOUT, TRAIN
from nemo_hybrid.data.store import TOKENIZER, TokenStore
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import hash_file

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


class Data(Protocol):
    """What a run reads: rows of token sequences by number, the same whoever asks."""

    @property
    def tokens(self) -> int:
        """Training tokens."""

    @property
    def tokenizer_dir(self) -> Path: ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def digests(self) -> list[str]:
        """Identity of what is trained on."""

    @property
    def weights(self) -> Sequence[float]:
        """With which it is drawn."""

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        """Training rows of global sample numbers."""

    def heldout_windows(self, sequence_length: int) -> int:
        """Rows that there are for evaluation."""

    def heldout_rows(
        self, windows: Sequence[int], samples: Sequence[int], sequence_length: int
    ) -> Batch:
        """Some of them; where the sample number is -1 the row is padding."""


@dataclass(frozen=True)
class Blend:
    """Open stores of a run; train[i] is drawn with weights[i]."""

    train: tuple[TokenStore, ...]
    weights: tuple[float, ...]
    heldout: tuple[TokenStore, ...]
    tokenizer_dir: Path

    @property
    def tokens(self) -> int:
        return sum(len(s) for s in self.train)

    @property
    def tokenizer_sha256(self) -> str:
        return self.train[0].info.tokenizer_sha256

    @property
    def digests(self) -> list[str]:
        return [digest(store) for store in self.train]

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        windows = tuple(s.windows(sequence_length) for s in self.train)
        sampler = Sampler(windows, self.weights, seed)
        places = [(self.train[i], window) for i, window in map(sampler, samples)]
        return _batch(places, sequence_length, tuple(samples))

    def heldout_windows(self, sequence_length: int) -> int:
        return sum(s.windows(sequence_length) for s in self.heldout)

    def heldout_rows(
        self, windows: Sequence[int], samples: Sequence[int], sequence_length: int
    ) -> Batch:
        ends = list(accumulate(s.windows(sequence_length) for s in self.heldout))
        places = []
        for window in windows:
            store = bisect_right(ends, window)
            places.append((self.heldout[store], window - (ends[store - 1] if store else 0)))
        return _batch(places, sequence_length, tuple(samples))


def digest(store: TokenStore) -> str:
    """One checksum for all files of a store."""
    return hashlib.sha256(json.dumps(store.info.files, sort_keys=True).encode()).hexdigest()


def open_blend(data: DataOptions, model: ModelConfig) -> Blend:
    """Open and check what data.path or data.blend names. Raises UserError.

    All stores must share one tokenizer, whose ids and end-of-sequence token fit the model, and
    hold at least one training sequence.
    """
    weights = dict(data.blend) or {str(data.path): 1.0}
    train = [TokenStore.open(Path(p) / TRAIN, data.verify) for p in weights]
    heldout = [
        TokenStore.open(Path(p) / HELDOUT, data.verify)
        for p in weights
        if (Path(p) / HELDOUT).exists()
    ]
    first = train[0].info
    for store in train + heldout:
        info = store.info
        if (info.tokenizer_sha256, info.eos_id) != (first.tokenizer_sha256, first.eos_id):
            raise UserError(
                f"{store.path} and {train[0].path} were made with different tokenizers; prepare "
                "one with the tokenizer of the other (--tokenizer DIR)"
            )
        if info.vocab_size > model.vocab_size:
            raise UserError(
                f"{store.path} has token ids up to {info.vocab_size - 1}: set model.vocab_size "
                f"({model.vocab_size}) to at least {info.vocab_size}"
            )
        if info.eos_id != model.eos_token_id:
            raise UserError(
                f"{store.path} ends documents with token {info.eos_id}, model.eos_token_id is "
                f"{model.eos_token_id}"
            )
    for store in train:
        if not store.windows(data.sequence_length):
            raise UserError(
                f"{store.path} holds {len(store)} tokens, too few for one sequence of "
                f"sequence_length ({data.sequence_length}) + 1"
            )
    quotas(tuple(weights.values()))
    return Blend(tuple(train), tuple(weights.values()), tuple(heldout), train[0].tokenizer_dir)


def require_tokenizer(data: Data, directory: Path) -> None:
    """Raise UserError if a checkpoint's tokenizer is another one than that of the data: the same
    ids would mean other text. A checkpoint without tokenizer.json says nothing."""
    tokenizer = directory / TOKENIZER
    if tokenizer.is_file() and hash_file(tokenizer) != data.tokenizer_sha256:
        raise UserError(
            f"{data.tokenizer_dir} was made with another tokenizer than that of {directory}: "
            f"prepare the data with --tokenizer {directory}"
        )


def steps(
    data: Data,
    *,
    sequence_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    start_step: int,
    workers: int,
    seed: int,
) -> Iterator[list[Batch]]:
    """Endless training steps from start_step on: this rank's micro-batches of each.

    Row b of micro-batch m of step s on rank r is global sample
    s * global_batch_size + (m * world_size + r) * micro_batch_size + b.

    workers: threads that read ahead. Reading a window is a copy out of a memory map, during which
    Python's lock is mostly free, and threads need neither fork nor shared memory.
    """
    if global_batch_size % (micro_batch_size * world_size):
        raise ValueError("global_batch_size must be a multiple of micro_batch_size x world_size")

    def micro_batch(first: int) -> Batch:
        return data.rows(range(first, first + micro_batch_size), sequence_length, seed)

    def step(number: int) -> list[Batch]:
        begin = number * global_batch_size + rank * micro_batch_size
        stride = micro_batch_size * world_size
        return [micro_batch(begin + d) for d in range(0, global_batch_size, stride)]

    if not workers:
        yield from map(step, count(start_step))
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    ahead: deque[Future[list[Batch]]] = deque()
    try:
        for number in count(start_step):
            ahead.append(pool.submit(step, number))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def heldout_batches(
    data: Data,
    *,
    sequence_length: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    limit: int,
) -> Iterator[Batch]:
    """This rank's evaluation passes, the same on every call: at most limit windows, evenly spaced
    over all held-out data, in order.

    Every rank gets the same number of batches (expert parallelism needs that); rows beyond the
    last window are padding, fully masked, with sample id -1. Raises UserError if the data does
    not hold one window.
    """
    total = data.heldout_windows(sequence_length)
    if not total:
        raise UserError(
            f"the held-out data is too small for one sequence of {sequence_length} tokens: prepare "
            "with a larger --heldout, choose a smaller sequence_length, or train without "
            "evaluation (train.eval_sequences 0)"
        )
    used = min(limit, total)
    per_pass = micro_batch_size * world_size
    for first in range(rank * micro_batch_size, -(-used // per_pass) * per_pass, per_pass):
        rows = range(first, first + micro_batch_size)
        windows = [min(row, used - 1) * total // used for row in rows]
        samples = [row if row < used else -1 for row in rows]
        yield data.heldout_rows(windows, samples, sequence_length)


def _batch(
    places: Sequence[tuple[TokenStore, int]], sequence_length: int, samples: tuple[int, ...]
) -> Batch:
    windows = [store.window(number, sequence_length) for store, number in places]
    tokens_BW, starts_BW = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
    return Batch.from_windows(tokens_BW, starts_BW, samples, torch.tensor(samples) >= 0)
