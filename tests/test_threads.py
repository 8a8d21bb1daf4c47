"""Threads of `side_by_side` and those of torch's operations."""

import os
from threading import Barrier

import torch

from nemo_hybrid.files import side_by_side


def threads_of(workers: int) -> list[int]:
    """What torch takes in each thread, all of which run at once."""
    together = Barrier(workers, timeout=30)

    def work(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    return side_by_side(work, range(workers))


def test_threads_share_the_cores(monkeypatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert [threads_of(n) for n in (1, 2, 3, 4)] == [[4], [2, 2], [1] * 3, [1] * 4]
        assert torch.get_num_threads() == 4
        assert threads_of(1) == [4], "later threads do not get what the last ones had"
    finally:
        torch.set_num_threads(before)


def test_nothing_to_do() -> None:
    assert side_by_side(str, []) == []
