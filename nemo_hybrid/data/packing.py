"""Samples of all lengths, packed into training sequences of one length.

Best-fit decreasing: the longest sample first, each into the fullest pack that still has room
(Johnson 1973; Ding et al. 2024, arXiv 2404.10830, for language models). No sample is cut. What a
pack holds depends on the samples' lengths alone, so every process and every start finds the same.

Shape suffixes: B rows, S tokens per row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Phase, Sampler, digest
from nemo_hybrid.data.store import HELDOUT, TRAIN, Store, Verify


@dataclass(frozen=True)
class Packs:
    """Samples in the order of their packs; pack i holds those from bounds[i] to bounds[i + 1]."""

    order: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def samples(self, pack: int) -> NDArray[np.int64]:
        """Numbers of the samples in a pack, ascending."""
        return self.order[self.bounds[pack] : self.bounds[pack + 1]]


def best_fit(lengths: NDArray[np.int64], capacity: int) -> Packs:
    """Pack samples of the given lengths. Raises ValueError for one longer than the capacity."""
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into {capacity}")
    pack_of = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[int]] = {}  # free tokens -> packs that have so many
    rooms: list[int] = []  # its keys, ascending
    packs = 0
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, pack, packs = capacity, packs, packs + 1
        pack_of[sample] = pack
        left = room - length
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(pack)
    order = np.argsort(pack_of, kind="stable")
    return Packs(order, np.searchsorted(pack_of[order], np.arange(packs + 1)))


def open_stores(root: Path, verify: Verify = "full") -> tuple[Store, Store | None]:
    """Training and held-out samples below a directory. Raises UserError."""
    heldout = root / HELDOUT
    held = Store.open(heldout, samples=True, verify=verify) if heldout.exists() else None
    return Store.open(root / TRAIN, samples=True, verify=verify), held


@dataclass(frozen=True)
class PackedSamples:
    """Samples of a run, packed: what fine-tuning reads (see `loader.Rows`)."""

    train: Store
    heldout: Store | None
    sequence_length: int
    pad_id: int

    @property
    def tokens(self) -> int:
        return len(self.train)

    @property
    def tokenizer_dir(self) -> Path:
        return self.train.tokenizer_dir

    @property
    def tokenizer_sha256(self) -> str:
        return self.train.info.tokenizer_sha256

    @property
    def digests(self) -> list[str]:
        return [digest(self.train)]

    @property
    def weights(self) -> list[float]:
        return [1.0]

    @property
    def later_weights(self) -> None:
        return None

    @cached_property
    def packs(self) -> Packs:
        """Of the training samples."""
        return best_fit(self.train.lengths, self.sequence_length)

    @cached_property
    def heldout_packs(self) -> Packs | None:
        if self.heldout is None:
            return None
        return best_fit(self.heldout.lengths, self.sequence_length)

    @property
    def efficiency(self) -> float:
        """Tokens of the training samples over slots of their packs."""
        return self.tokens / (len(self.packs) * self.sequence_length)

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        """Every pack is read once before any is read again, in another order each time."""
        sampler = Sampler((len(self.packs),), (Phase(0, (1.0,)),), seed)
        return self._batch(self.train, self.packs, [sampler(n)[1] for n in samples], samples)

    def heldout_windows(self, sequence_length: int) -> int:
        return 0 if self.heldout_packs is None else len(self.heldout_packs)

    def heldout_rows(
        self, windows: Sequence[int], samples: Sequence[int], sequence_length: int
    ) -> Batch:
        assert self.heldout is not None
        assert self.heldout_packs is not None
        return self._batch(self.heldout, self.heldout_packs, windows, samples)

    def _batch(
        self, store: Store, packs: Packs, numbers: Sequence[int], samples: Sequence[int]
    ) -> Batch:
        rows = [[store.sample(int(i)) for i in packs.samples(pack)] for pack in numbers]
        return Batch.from_packs(rows, self.sequence_length, self.pad_id, tuple(samples))
