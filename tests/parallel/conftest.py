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
from parallel.equal import ALL_OF_RANK_1

WORKER = Path(__file__).with_name("worker.py")
FAULTS = ("local means", "expert scale", "first micro-batch")


def layout(size: int, ep: int, zero: int, accumulation: int, optimizer: str) -> dict[str, Any]:
    """One cell of the matrix."""
    name = f"w{size}-ep{ep}-zero{zero}-acc{accumulation}-{optimizer}"
    return {"name": name, "ep": ep, "zero": zero, "accumulation": accumulation,
            "optimizer": optimizer}  # fmt: skip


def bf16(size: int, zero: int, accumulation: int, optimizer: str) -> dict[str, Any]:
    """A layout of the bf16 recipe, its experts divided over all processes."""
    given = layout(size, size, zero, accumulation, optimizer)
    return given | {"name": f"bf16-{given['name']}", "recipe": "bf16"}


def broken(scenario: dict[str, Any], fault: str) -> dict[str, Any]:
    """The scenario with a deliberate mistake."""
    return scenario | {"name": f"{scenario['name']}-{fault.replace(' ', '-')}", "fault": fault}


FP32 = {
    size: [
        layout(size, ep, zero, accumulation, optimizer)
        for ep, zero, accumulation, optimizer in product(
            eps, (1, 2), (1, 2), ("sgd", "adam", "adam-real-eps")
        )
        # All ways by the gradients, which sgd shows as they are. Adam computes element by element,
        # so that both values of each option suffice; with its real eps, one. Four processes are
        # slow on two cores.
        if (zero == accumulation or (optimizer == "sgd" and size < 4))
        and (optimizer != "adam-real-eps" or (zero == 2 and size < 4))
    ]
    for size, eps in ((1, (1,)), (2, (1, 2)), (4, (1, 2, 4)))
}
BF16 = {
    size: [
        bf16(size, zero, accumulation, optimizer)
        for zero, accumulation in ways
        for optimizer in ("sgd", "adam")
    ]
    for size, ways in ((1, [(2, 1)]), (2, [(1, 2), (2, 1)]), (4, [(2, 1)]))
}
BROKEN = [
    *(
        broken(layout(2, 2, 2, 2, optimizer), fault)
        for optimizer, fault in product(("sgd", "adam", "adam-real-eps"), FAULTS)
    ),
    *(broken(bf16(2, 2, 2, optimizer), "local means") for optimizer in ("sgd", "adam")),
    broken(bf16(2, 2, 2, "sgd"), "expert scale"),
]
STARVED_RANK = layout(2, 2, 2, 1, "sgd") | {"name": "starved-rank", "starved": ALL_OF_RANK_1}
PRECISION = [
    {"kind": "precision", "zero": zero, "rounded": rounded}
    for zero in (1, 2)
    for rounded in ("", "communication", "accumulation")
]
SCENARIOS: dict[int, list[dict[str, Any]]] = {
    1: [*FP32[1], *BF16[1]],
    2: [*FP32[2], *BF16[2], *BROKEN, STARVED_RANK, *PRECISION],
    4: [*FP32[4], *BF16[4], broken(layout(4, 2, 2, 1, "sgd"), "wrong group")],
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "corpus", lambda out: write_corpus(out / "store")) / "store"


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[[int], Path]:
    """results(1 | 2 | 4): the directory of what that many processes left."""

    def run(size: int) -> Path:
        scenarios = json.dumps(SCENARIOS[size])
        return once(
            tmp_path_factory,
            f"world{size}",
            lambda out: run_python([WORKER, store, out, scenarios], size),
        )

    return run
