"""The distributed scenarios, run once per number of processes; tests read what they left."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from helpers.corpus import write_corpus
from helpers.once import once
from helpers.processes import run_python
from helpers.runs import ALL_OF_RANK_1

WORKER = Path(__file__).with_name("worker.py")

WORLD_1: list[dict[str, Any]] = [
    *(
        {"name": f"w1-zero{zero}-acc{acc}", "zero": zero, "accumulation": acc}
        for zero, acc in product((1, 2), (1, 2))
    ),
    {"name": "w1-bf16", "recipe": "bf16"},
]
WORLD_2: list[dict[str, Any]] = [
    *(
        {"name": f"w2-ep{ep}-zero{zero}-acc{acc}", "ep": ep, "zero": zero, "accumulation": acc}
        for ep, zero, acc in product((1, 2), (1, 2), (1, 2))
    ),
    {"name": "w2-starved-rank", "ep": 2, "starved": ALL_OF_RANK_1},
    {"name": "w2-local-means", "ep": 2, "fault": "local means"},
    {"name": "w2-expert-scale", "ep": 2, "fault": "expert scale"},
    {"name": "w2-bf16-zero1", "ep": 2, "zero": 1, "recipe": "bf16"},
    {"name": "w2-bf16-zero2", "ep": 2, "zero": 2, "recipe": "bf16"},
    {"kind": "precision", "zero": 1},
    {"kind": "precision", "zero": 2},
]
WORLD_4: list[dict[str, Any]] = [
    {"name": "w4-ep2-zero1", "ep": 2, "zero": 1},
    {"name": "w4-ep2-zero2-acc2", "ep": 2, "zero": 2, "accumulation": 2},
]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "corpus", lambda out: write_corpus(out / "store")) / "store"


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[[int], Path]:
    """results(1 | 2 | 4): the directory of what that many processes left."""

    def run(size: int) -> Path:
        scenarios = json.dumps({1: WORLD_1, 2: WORLD_2, 4: WORLD_4}[size])
        return once(
            tmp_path_factory,
            f"world{size}",
            lambda out: run_python([WORKER, store, out, scenarios], size),
        )

    return run
