"""From stores to each rank's micro-batches: training steps in a fixed global order, and
evaluation passes.

Shape suffixes: B rows, W = sequence length + 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path

import numpy as np
import torch

from nemo_hybrid.config import Architecture, DataOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.prepare import HELDOUT, TRAIN
from nemo_hybrid.data.sampler import Sampler, quotas
from nemo_hybrid.data.store import TOKENIZER, TokenStore
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import hash_file


@dataclass(frozen=True)
class Blend:
    """Open stores of a run; train[i] is drawn with weights[i]."""

    train: tuple[TokenStore, ...]
    weights: tuple[float, ...]
    heldout: tuple[TokenStore, ...]
    tokenizer_dir: Path

    @property
    def tokens(self) -> int:
        """Training tokens of all stores."""
        return sum(len(s) for s in self.train)


def open_blend(data: DataOptions, model: Architecture) -> Blend:
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


def require_tokenizer(blend: Blend, directory: Path) -> None:
    """Raise UserError if a checkpoint's tokenizer is another one than that of the data: the same
    ids would mean other text. A checkpoint without tokenizer.json says nothing."""
    tokenizer, info = directory / TOKENIZER, blend.train[0].info
    if tokenizer.is_file() and hash_file(tokenizer) != info.tokenizer_sha256:
        raise UserError(
            f"{blend.train[0].path} was made with another tokenizer than that of {directory}: "
            f"prepare the data with --tokenizer {directory}"
        )


def steps(
    blend: Blend,
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
    sampler = Sampler(
        windows=tuple(s.windows(sequence_length) for s in blend.train),
        weights=blend.weights,
        seed=seed,
    )

    def micro_batch(first: int) -> Batch:
        samples = tuple(range(first, first + micro_batch_size))
        places = [sampler(n) for n in samples]
        return _batch([(blend.train[i], w) for i, w in places], sequence_length, samples)

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
    stores: Sequence[TokenStore],
    *,
    sequence_length: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    limit: int,
) -> Iterator[Batch]:
    """This rank's evaluation passes, the same on every call: at most limit windows, evenly spaced
    over all stores, in order.

    Every rank gets the same number of batches (expert parallelism needs that); rows beyond the
    last window are padding, fully masked, with sample id -1. Raises UserError if the stores do
    not hold one window.
    """
    ends = list(accumulate(s.windows(sequence_length) for s in stores))
    total = ends[-1] if ends else 0
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
        places = []
        for row in rows:
            window = min(row, used - 1) * total // used
            store = bisect_right(ends, window)
            places.append((stores[store], window - (ends[store - 1] if store else 0)))
        yield _batch(places, sequence_length, tuple(r if r < used else -1 for r in rows))


def _batch(
    places: Sequence[tuple[TokenStore, int]], sequence_length: int, samples: tuple[int, ...]
) -> Batch:
    windows = [store.window(number, sequence_length) for store, number in places]
    tokens_BW, starts_BW = (torch.from_numpy(np.stack(part)) for part in zip(*windows, strict=True))
    return Batch.from_windows(tokens_BW, starts_BW, samples, torch.tensor(samples) >= 0)
