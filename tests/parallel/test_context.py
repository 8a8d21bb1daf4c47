"""Rows divided over processes train as whole rows do: losses, gradients and weights equal those of
plain PyTorch, whatever the layout, the model and the length."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from helpers.bands import SABOTAGE, jittered
from helpers.once import once
from helpers.processes import run_python
from parallel.comparing import TOLERANCES, distances, pooled_distances, read
from parallel.conftest import WORKER
from parallel.equal import STARVED, Outcome, reference
from parallel.test_layouts import BF16_BANDS

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LONG_ROWS = {"length": 19, "train": {"seed": 27}}
"""Seeds where no routing is close to a tie."""
AT_THE_CUT = {"train": {"seed": 27}}
"""A document begins with the second part of a row."""


def case(
    name: str, cp: int, *, model: dict[str, Any] | None = None, length: int = 16,
    train: dict[str, Any] | None = None, **layout: Any,
) -> dict[str, Any]:  # fmt: skip
    """One way to train; ``model`` and ``train``: options that differ."""
    options = {"model": HEADS | (model or {}), "length": length, "train": train or {}}
    return {"name": name, "cp": cp, "options": options, **layout}


def mistaken(size: int, fault: str) -> dict[str, Any]:
    return case(fault, size, fault=fault, **AT_THE_CUT)


CASES = {
    2: [
        case("experts divided too", 2, ep=2, zero=1, accumulation=2),
        case("adam, other lengths", 2, optimizer="adam", **LONG_ROWS),
        case("a document begins with a part", 2, **AT_THE_CUT),
        case("M alone", 2, model={"pattern": "MM", "mtp_num_depths": 0}),
        case("* alone", 2, model={"pattern": "**", "mtp_num_depths": 0, "num_key_value_heads": 4}),
        case("E alone", 2, model={"pattern": "E", "mtp_num_depths": 0}, train={"seed": 19}),
        case("- alone", 2, model={"pattern": "-", "mtp_num_depths": 3, "mtp_pattern": "*"}),
        case("bf16 whole", 1, recipe="bf16"),
        case("bf16", 2, recipe="bf16", ep=2),
        case("tiles, inputs elsewhere", 2, ep=2, length=19,
             train={"seed": 27, "tile": 40, "offload": True, "recompute": "M"}),
        case("recomputed, one key", 2, ep=2, model={"num_key_value_heads": 1},
             train={"seed": 4, "recompute": "ME*-"}),
    ],
    4: [
        case("four parts", 4, ep=2),
        case("two readers", 2, ep=4, zero=1, **LONG_ROWS),
    ],
}  # fmt: skip
SWEEP = [
    case(f"sweep {'-'.join(map(str, at))}", at[0], ep=at[1], zero=at[2], accumulation=at[3],
         optimizer=at[4], **(LONG_ROWS if at[5] == 19 else {}))
    for at in product((2, 4), (1, 2, 4), (1, 2), (1, 2), ("sgd", "adam"), (16, 19))
]  # fmt: skip
BROKEN = {
    2: ["no state", "no halo", "halo of another document", "state of another document",
        "local balance counts", "labels shifted after the cut", "share divided by cp",
        "M ignores its sequence", "* ignores its sequence"],
    4: ["no chain", "keys in another order"],
}  # fmt: skip
MISTAKES = [(size, fault) for size, faults in BROKEN.items() for fault in faults]
SCENARIOS = {
    size: cases + [mistaken(size, fault) for fault in BROKEN[size]] for size, cases in CASES.items()
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[[int, str], Path]:
    """trained(2 | 4, "" | "sweep"): the directory of what that many processes left."""

    def run(size: int, lane: str = "") -> Path:
        scenarios = json.dumps(SWEEP if lane else SCENARIOS[size])
        return once(
            tmp_path_factory,
            f"parts{size}{lane}",
            lambda out: run_python([WORKER, store, out, scenarios], size),
        )

    return run


@cache
def plain(store: Path, optimizer: str, options: str) -> tuple[Outcome, float]:
    return reference(store, optimizer, **json.loads(options))


def compared(directory: Path, store: Path, size: int, given: dict[str, Any]) -> dict[str, float]:
    """Distances over their tolerances, after what must be equal is compared."""
    optimizer = given.get("optimizer", "sgd")
    expected, _ = plain(store, optimizer, json.dumps(given["options"]))
    found = read(directory, given["name"], size, given.get("ep", 1))
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours["hash"] == theirs["hash"]
        if not given.get("fault"):
            assert ours["loads"] == theirs["loads"]
            assert sum(ours["targets"]) == theirs["targets"]
    steps = list(zip(found[0], expected[0], strict=True))
    aux = max(abs(a["aux"] - b["aux"]) / max(b["aux"], 1e-9) for a, b in steps)
    return {
        "aux": aux / TOLERANCES["losses"],
        **{kind: value / TOLERANCES[kind] for kind, value in distances(found, expected).items()},
    }


@pytest.mark.parametrize(
    ("size", "given"),
    [
        pytest.param(size, given, id=given["name"], marks=pytest.mark.slow if size == 4 else ())
        for size, cases in CASES.items() for given in cases if "recipe" not in given
    ],
)  # fmt: skip
def test_divided_rows_equal_plain_pytorch(
    trained: Callable[..., Path], store: Path, size: int, given: dict[str, Any]
) -> None:
    found = compared(trained(size), store, size, given)
    assert max(found.values()) < 1, found


def test_bf16_divided_rows_agree_within_its_rounding(trained: Callable[..., Path]) -> None:
    whole, divided = (
        read(trained(2), name, 2, ep) for name, ep in (("bf16 whole", 1), ("bf16", 2))
    )
    found = pooled_distances(divided, whole)
    assert all(value < BF16_BANDS[kind] for kind, value in found.items()), found


@pytest.mark.sweep
@pytest.mark.parametrize("given", SWEEP, ids=lambda given: given["name"])
def test_every_layout_of_divided_rows(
    trained: Callable[..., Path], store: Path, given: dict[str, Any]
) -> None:
    found = compared(trained(4, "sweep"), store, 4, given)
    assert max(found.values()) < 1, found


@pytest.mark.parametrize(
    ("size", "fault"),
    [pytest.param(*m, id=m[1], marks=pytest.mark.slow if m[0] == 4 else ()) for m in MISTAKES],
)
def test_a_mistake_is_noticed(
    trained: Callable[..., Path], store: Path, size: int, fault: str
) -> None:
    found = compared(trained(size), store, size, mistaken(size, fault))
    # Clipping takes the scale out of gradients.
    touched = "norms" if fault == "share divided by cp" else "gradients"
    assert found[touched] > SABOTAGE, found


@pytest.mark.parametrize(
    "given", [CASES[2][i] for i in (0, 1, 2, -1)], ids=lambda given: given["name"]
)
def test_the_tolerances_hold_for_these_models(store: Path, given: dict[str, Any]) -> None:
    """And routing is nowhere close to a tie."""
    optimizer = given.get("optimizer", "sgd")
    expected, gap = plain(store, optimizer, json.dumps(given["options"]))
    assert gap > 2e-5
    rough, _ = jittered(lambda: reference(store, optimizer, STARVED, **given["options"]))
    for kind, value in distances(rough, expected).items():
        assert value < TOLERANCES[kind], kind


def test_a_process_may_have_no_target(trained: Callable[..., Path]) -> None:
    """A condition of the tests above: the second halves of some rows have none."""
    name = CASES[2][0]["name"]
    rows = json.loads((trained(2) / f"{name}.json").read_text())
    assert all(row["targets"][1] == 0 < row["targets"][0] for row in rows)
