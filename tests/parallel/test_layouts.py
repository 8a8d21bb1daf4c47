"""Every layout trains the same: losses, gradients and weights equal those of plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bands import SABOTAGE, jittered
from parallel.comparing import TOLERANCES, distances, pooled_distances, read, relative
from parallel.conftest import BF16, BROKEN, FP32, STARVED_RANK
from parallel.equal import ALL_OF_RANK_1, OPTIMIZERS, STARVED, Outcome, reference

Results = Callable[[int], Path]
REAL_EPS = TOLERANCES | {"weights": 1e-4}
"""A gradient that is nothing but rounding moves its weight by a full step."""
BF16_BANDS = {"losses": 2e-3, "norms": 3e-2, "weights": 3e-2, "gradients": 0.35, "shares": 0.06}
"""Twice the distance of bf16 from fp32 at one layout, in which some tokens take other experts: bf16
rounds what ties within 1 % of each other. That is no fiftieth of what a mistake does to a gradient;
the same mistakes are made in fp32 too."""


def bands(optimizer: str) -> dict[str, float]:
    return REAL_EPS if optimizer == "adam-real-eps" else TOLERANCES


@pytest.fixture(scope="session")
def plain(store: Path) -> dict[str, tuple[Outcome, float]]:
    return {optimizer: reference(store, optimizer) for optimizer in OPTIMIZERS}


@pytest.fixture(scope="session")
def alone(results: Results) -> dict[str, Outcome]:
    """The bf16 recipe on one process."""
    return {s["optimizer"]: read(results(1), s["name"], 1, 1) for s in BF16[1]}


def sized(scenarios: dict[int, list[dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(size, scenario, id=scenario["name"],
                     marks=pytest.mark.slow if size == 4 else ())
        for size, some in scenarios.items() for scenario in some
    ]  # fmt: skip


def check(found: dict[str, float], bands: dict[str, float]) -> None:
    assert all(value < bands[kind] for kind, value in found.items()), found


@pytest.mark.parametrize(("size", "scenario"), sized(FP32))
def test_every_layout_equals_plain_pytorch(
    results: Results,
    plain: dict[str, tuple[Outcome, float]],
    size: int,
    scenario: dict[str, Any],
) -> None:
    expected = plain[scenario["optimizer"]][0]
    found = read(results(size), scenario["name"], size, scenario["ep"])
    check(distances(found, expected), bands(scenario["optimizer"]))
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours["loads"] == theirs["loads"]
        assert sum(ours["targets"]) == theirs["targets"]
        assert all(load[i] == 0 for load in ours["loads"].values() for i in STARVED)
    for name, weight in found[1].items():
        if "|" not in name:
            assert torch.equal(weight, found[1][f"master|{name}"]), f"{name} is not its master"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rounding_eight_times_as_badly_stays_within_the_tolerances(
    store: Path, plain: dict[str, tuple[Outcome, float]], optimizer: str
) -> None:
    """What the tolerances come from, and why they hold on every processor."""
    rough, _ = jittered(lambda: reference(store, optimizer))
    found = distances(rough, plain[optimizer][0])
    check(found, bands(optimizer))
    assert found["losses"] > TOLERANCES["losses"] / SABOTAGE  # it was jittered


def test_the_steps_move_the_weights(store: Path, plain: dict[str, tuple[Outcome, float]]) -> None:
    """A condition of the test above: all of them further than its tolerance."""
    before = reference(store, "sgd", steps=0)[0][1]
    for (_, tensors), _ in plain.values():
        moved = {name: relative(tensors[name], weight) for name, weight in before.items()}
        assert min(moved.values()) > 3 * TOLERANCES["weights"], moved
        assert max(moved.values()) > 1e4 * TOLERANCES["weights"], moved


def test_ranks_hold_unequal_numbers_of_targets(results: Results) -> None:
    """Another condition: else local means could not be told from the global one."""
    rows = json.loads((results(2) / "w2-ep2-zero2-acc1-sgd.json").read_text())
    assert all(max(row["targets"]) > 1.4 * min(row["targets"]) for row in rows)


@pytest.mark.slow
def test_a_rank_without_any_target(results: Results) -> None:
    rows = json.loads((results(4) / "w4-ep4-zero1-acc1-sgd.json").read_text())
    assert all(row["targets"][3] == 0 < min(row["targets"][:3]) for row in rows)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_routing_has_no_close_ties(plain: dict[str, tuple[Outcome, float]], optimizer: str) -> None:
    """Another condition: rounding must not change which experts are chosen, in any step."""
    assert plain[optimizer][1] > 1e-4


def test_a_rank_whose_experts_get_no_token_works_on(results: Results, store: Path) -> None:
    expected, gap = reference(store, "sgd", ALL_OF_RANK_1)
    assert gap > 1e-4
    found = read(results(2), STARVED_RANK["name"], 2, 2)
    check(distances(found, expected), TOLERANCES)
    for row in found[0]:
        assert all(load[i] == 0 for load in row["loads"].values() for i in ALL_OF_RANK_1)


@pytest.mark.parametrize(("size", "scenario"), sized({2: BF16[2], 4: BF16[4]}))
def test_bf16_layouts_agree_within_its_rounding(
    results: Results, alone: dict[str, Outcome], size: int, scenario: dict[str, Any]
) -> None:
    found = read(results(size), scenario["name"], size, scenario["ep"])
    check(pooled_distances(found, alone[scenario["optimizer"]]), BF16_BANDS)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_bf16_is_as_far_from_fp32(
    alone: dict[str, Outcome], plain: dict[str, tuple[Outcome, float]], optimizer: str
) -> None:
    """The bands hold against fp32 at the same layout, so it is rounding that they measure."""
    check(pooled_distances(alone[optimizer], plain[optimizer][0]), BF16_BANDS)


@pytest.mark.parametrize("scenario", BROKEN, ids=lambda s: s["name"])
def test_a_mistake_is_noticed(
    results: Results,
    plain: dict[str, tuple[Outcome, float]],
    alone: dict[str, Outcome],
    scenario: dict[str, Any],
) -> None:
    """Far outside the tolerances, by every number that the mistake touches."""
    optimizer, fault = scenario["optimizer"], scenario["fault"]
    found = read(results(2), scenario["name"], 2, 2)
    if scenario.get("recipe"):
        differences, factor = pooled_distances(found, alone[optimizer]), 1
        allowed = BF16_BANDS
    else:
        differences, factor = distances(found, plain[optimizer][0]), SABOTAGE
        allowed = bands(optimizer)
    noticed = {kind for kind, value in differences.items() if value > factor * allowed[kind]}
    touched = set(differences)
    if factor == 1:  # weights: rounding and mistakes move them alike in three steps
        touched -= {"weights"}
    if fault == "expert scale":  # losses follow later
        touched -= {"losses"} if factor > 1 else {"losses", "norms"}
        if optimizer == "adam-real-eps":  # AdamW takes no notice of a gradient's scale
            touched -= {"weights"}
    assert noticed >= touched, differences


@pytest.mark.slow
def test_reduction_over_the_wrong_group_is_noticed(results: Results) -> None:
    """Of expert gradients, over ranks that hold different experts."""
    with pytest.raises(AssertionError, match=r"experts\.\w+: replicas differ"):
        read(results(4), "w4-ep2-zero2-acc1-sgd-wrong-group", 4, 2)
