"""From stores to each rank's micro-batches: training steps in a fixed global order, and
evaluation passes.

Which window a global sample number names is a pure function of seed and number, in O(1) memory. It
does not know world size, workers or resume, so none of them can change the order.

Shape suffixes: B rows, W = sequence length + 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, chain, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import DataOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.store import HELDOUT, TOKENIZER, TRAIN, Store
from nemo_hybrid.data.tokenizer import tokenizer_sha256
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
    weight above zero is too small to get one."""
    total = sum(weights)
    exact = [w / total * BLOCK for w in weights]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: BLOCK - sum(counts)]:
        counts[i] += 1
    for weight, n in zip(weights, counts, strict=True):
        if weight and not n:
            raise UserError(
                f"data.blend: weight {weight} is less than 1/{BLOCK} of the sum {total}; raise it "
                "or leave that store out"
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


class Phase(NamedTuple):
    """Samples that are drawn with the same weights."""

    first: int
    """Global number of the first of them."""
    weights: tuple[float, ...]
    """Of every store; 0: not drawn."""


class _Begun(NamedTuple):
    """A phase, and what was read before it."""

    first: int
    quota: tuple[int, ...]
    before: tuple[int, ...]
    """Samples of each store."""


@lru_cache(maxsize=8)
def _begun(phases: tuple[Phase, ...], seed: int) -> tuple[_Begun, ...]:
    before = [0] * len(phases[0].weights)
    out = []
    for phase, after in zip_longest(phases, phases[1:]):
        quota = quotas(phase.weights)
        out.append(_Begun(phase.first, quota, tuple(before)))
        if after is not None:
            blocks, rest = divmod(after.first - phase.first, BLOCK)
            for store, share in enumerate(quota):
                before[store] += blocks * share
            for store, _ in _block(quota, seed, blocks)[:rest]:
                before[store] += 1
    return tuple(out)


@dataclass(frozen=True)
class Sampler:
    """Sample order over stores of windows[i] windows each, drawn with the weights of phases, of
    which the first begins at 0.

    Every store is read once in full, in an order of its own, before any of it is read again.
    """

    windows: tuple[int, ...]
    phases: tuple[Phase, ...]
    seed: int

    def __call__(self, sample: int) -> tuple[int, int]:
        """(store, window) of a global sample number."""
        begun = _begun(self.phases, self.seed)
        first, quota, before = begun[bisect_right(begun, sample, key=itemgetter(0)) - 1]
        block, place = divmod(sample - first, BLOCK)
        store, earlier = _block(quota, self.seed, block)[place]
        number = before[store] + block * quota[store] + earlier
        epoch, position = divmod(number, self.windows[store])
        return store, permute(position, self.windows[store], self.seed, "epoch", epoch, store)


class Share(NamedTuple):
    """What part of every global batch a process reads, in micro-batches. Processes that divide
    rows, and read the same ones, have one rank here."""

    rank: int
    world_size: int
    sizes: BatchSizes
    micro_batch_size: int
    cp: int = 1
    """How many divide a row."""
    part: int = 0
    """Which of them this is."""

    def samples(self, number: int) -> list[range]:
        """Global sample numbers of this process's micro-batches of a global batch: row b of
        micro-batch m on rank r is its (m * world_size + r) * micro_batch_size + b th sequence."""
        all_B = self.sizes.sequences(number)
        first = all_B.start + self.rank * self.micro_batch_size
        begins = range(first, all_B.stop, self.micro_batch_size * self.world_size)
        return [range(begin, begin + self.micro_batch_size) for begin in begins]


class Learnt(Protocol):
    """What a run learns from."""

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
        """With which it is drawn at first."""

    @property
    def later_weights(self) -> list[list[float]] | None:
        """With which it is drawn later: tokens from which on, and then the weights."""


class Rows(Learnt, Protocol):
    """Rows of token sequences by number, the same whoever asks."""

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
    """Open stores of a run; train[i] is drawn with weights[i] of a phase, from as many tokens on
    as stand before them."""

    train: tuple[Store, ...]
    phases: tuple[tuple[float, tuple[float, ...]], ...]
    heldout: tuple[Store, ...]
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

    @property
    def weights(self) -> Sequence[float]:
        return self.phases[0][1]

    @property
    def later_weights(self) -> list[list[float]] | None:
        return [[tokens, *weights] for tokens, weights in self.phases[1:]] or None

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        windows = tuple(s.windows(sequence_length) for s in self.train)
        phases = (Phase(math.ceil(n / sequence_length), weights) for n, weights in self.phases)
        sampler = Sampler(windows, tuple(phases), seed)
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


def digest(store: Store) -> str:
    """One checksum for all files of a store."""
    files = {name: asdict(record) for name, record in store.info.files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def open_blend(
    data: DataOptions,
    model: ModelConfig,
    ends: Collection[int] = (),
    config: Path | None = None,
) -> Blend:
    """Open and check what data.path or data.blend names. Raises UserError.

    All stores must share one tokenizer, whose ids and end-of-sequence token fit the model, and
    hold at least one training sequence. ``ends``: ids that end a text beside model.eos_token_id;
    ``config``: the file that the model's ids are written in, beside its tokenizer, which has to be
    theirs; None for options.
    """
    blends = {0.0: dict(data.blend) or {str(data.path): 1.0}, **dict(sorted(data.phases.items()))}
    paths = list(dict.fromkeys(chain.from_iterable(blends.values())))
    train = [Store.open(Path(p) / TRAIN, verify=data.verify) for p in paths]
    heldout = [
        Store.open(Path(p) / HELDOUT, verify=data.verify)
        for p in paths
        if (Path(p) / HELDOUT).exists()
    ]
    phases = [(tokens, tuple(b.get(path, 0.0) for path in paths)) for tokens, b in blends.items()]
    blend = Blend(tuple(train), tuple(phases), tuple(heldout), train[0].tokenizer_dir)
    if config is not None:  # first: the numbers of another tokenizer mean nothing
        require_tokenizer(blend, config.parent)
    first = train[0].info
    for store in train + heldout:
        info = store.info
        if (info.tokenizer_sha256, info.eos_id) != (first.tokenizer_sha256, first.eos_id):
            raise UserError(
                f"{store.path} and {train[0].path} were made with different tokenizers; prepare "
                "one with the tokenizer of the other (--tokenizer DIR)"
            )
        if info.vocab_size > model.vocab_size:
            mend = f"set model.vocab_size ({model.vocab_size}) to at least {info.vocab_size}"
            if config is not None:
                mend = (
                    f"the model of {config.parent} knows {model.vocab_size}: prepare the data with "
                    "that model's tokenizer (--tokenizer DIR)"
                )
            raise UserError(f"{store.path} has token ids up to {info.vocab_size - 1}: {mend}")
        if info.eos_id not in (model.eos_token_id, *ends):
            known = ", ".join(map(str, dict.fromkeys((model.eos_token_id, *ends))))
            mend = f"add it to eos_token_id in {config}" if config else "set model.eos_token_id"
            raise UserError(
                f"{store.path} ends documents with token {info.eos_id}, the model ends them with "
                f"{known}: {mend}, or prepare the data with a tokenizer whose "
                "tokenizer_config.json names another eos_token"
            )
    for store in train:
        if not store.windows(data.sequence_length):
            raise UserError(
                f"{store.path} holds {len(store)} tokens, too few for one sequence of "
                f"sequence_length ({data.sequence_length}) + 1"
            )
    for _, weights in blend.phases:
        quotas(weights)
    return blend


def require_tokenizer(data: Learnt, directory: Path) -> None:
    """Raise UserError if a checkpoint's tokenizer is another one than that of the data: the same
    ids would mean other text. A checkpoint without tokenizer.json says nothing."""
    there = (directory / TOKENIZER).is_file()
    if there and tokenizer_sha256(directory) != data.tokenizer_sha256:
        raise UserError(
            f"{data.tokenizer_dir} was made with another tokenizer than that of {directory}: "
            f"prepare the data with --tokenizer {directory}"
        )


class ByNumber:
    """What is alike in all data whose steps depend on their number alone: no state, no figures."""

    def begin(self, model: object, world: object) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Any], saved: Mapping[str, Callable[[], Tensor]]) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}


class Stored(ByNumber):
    """A run's data out of ``rows``.

    ``limit``: held-out rows of an evaluation, at most. ``workers``: threads that read ahead.
    Reading a window is a copy out of a memory map, during which Python's lock is mostly free, and
    threads need neither fork nor shared memory.
    """

    def __init__(
        self, rows: Rows, *, sequence_length: int, seed: int, limit: int = 0, workers: int = 0
    ) -> None:
        self.rows, self.sequence_length, self.seed = rows, sequence_length, seed
        self.limit, self.workers = limit, workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()

    def step(self, number: int, share: Share) -> list[Batch]:
        if self._pool is None:
            return self._read(number, share)
        while self._ahead and self._ahead[0][0] != number:
            self._ahead.popleft()[1].cancel()
        next_one = self._ahead[-1][0] + 1 if self._ahead else number
        for ahead in range(next_one, number + 2 * self.workers + 1):
            self._ahead.append((ahead, self._pool.submit(self._read, ahead, share)))
        return self._ahead.popleft()[1].result()

    def _read(self, number: int, share: Share) -> list[Batch]:
        return [self.rows.rows(s, self.sequence_length, self.seed) for s in share.samples(number)]

    def heldout(self, share: Share) -> Iterator[Batch]:
        return heldout_batches(
            self.rows,
            sequence_length=self.sequence_length,
            micro_batch_size=share.micro_batch_size,
            rank=share.rank,
            world_size=share.world_size,
            limit=self.limit,
        )


def heldout_batches(
    data: Rows,
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
    places: Sequence[tuple[Store, int]], sequence_length: int, samples: tuple[int, ...]
) -> Batch:
    windows = [store.window(number, sequence_length) for store, number in places]
    tokens_BW, starts_BW = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
    return Batch.from_windows(tokens_BW, starts_BW, samples, torch.tensor(samples) >= 0)
