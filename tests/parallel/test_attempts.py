"""Processes of a restarted job find each other, whoever was started how often."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from nemo_hybrid.parallel.world import attempt_name


def names(store: dist.Store, size: int, late: dict[int, float] | None = None) -> list[str]:
    """The name on which each rank of a new attempt settles; some come late by seconds."""

    def rank(number: int) -> str:
        time.sleep((late or {}).get(number, 0))
        return attempt_name(store, number, size)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_every_attempt_has_one_name_of_its_own() -> None:
    store = dist.HashStore()
    found = [names(store, 3), names(store, 3, {0: 0.3}), names(store, 3, {2: 0.3}), names(store, 1)]
    assert [len(set(attempt)) for attempt in found] == [1, 1, 1, 1]
    assert len({attempt[0] for attempt in found}) == 4


def test_nobody_settles_before_all_are_there() -> None:
    store = dist.HashStore()
    names(store, 3)
    settled: list[str] = []
    early = [
        threading.Thread(target=lambda r=r: settled.append(attempt_name(store, r, 3)), daemon=True)
        for r in (0, 1)
    ]
    for thread in early:
        thread.start()
    time.sleep(0.5)
    assert settled == []
    settled.append(attempt_name(store, 2, 3))
    for thread in early:
        thread.join(10)
    assert len(settled) == 3
    assert len(set(settled)) == 1
