"""What low precision really does in a run, over ranks, batches, micro-batches and layers: which
products it quantizes, and that stochastic rounding never draws the same bits twice."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.once import once
from helpers.processes import run_python
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision import policy
from parallel.equal import ALL_OF_RANK_1
from parallel.seeds import ACCUMULATION, BATCHES, PASSED_OVER, seeded_run

Batches = list[dict[str, Any]]
Ranks = Callable[[int, str], list[Batches]]
PASSES = {
    # What each pass takes: (operand, blocks along its rows).
    "forward": [("x", False), ("w", False)],
    "dgrad": [("dy", False), ("w", True)],
    "wgrad": [("dy", True), ("x", True)],
}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Ranks:
    """ranks(processes, run): the batches of each rank."""
    program = Path(__file__).with_name("seeds.py")

    def read(size: int, name: str) -> list[Batches]:
        found = once(
            tmp_path_factory, f"seeds{size}", lambda out: run_python([program, store, out], size)
        )
        return [json.loads((found / f"{name}-{rank}.json").read_text()) for rank in range(size)]

    return read


def seeds(batches: Batches) -> list[int]:
    return [seed for batch in batches for _, _, seed in batch["asked"]]


@pytest.mark.parametrize(("size", "name"), [(1, "plain"), (2, "plain"), (2, "starved")])
def test_products_that_work_are_those_that_the_options_choose(
    ranks: Ranks, store: Path, size: int, name: str
) -> None:
    config = seeded_run(store, size)
    hybrid = config.model.hybrid()
    with torch.device("meta"):
        chosen = policy.resolve(HybridLM(hybrid), config.precision, hybrid)
    asked: Counter[tuple[str, str]] = Counter()
    quantized: Counter[tuple[Any, ...]] = Counter()
    for product in chosen:
        formats, experts = product.formats, product.name.endswith(".experts")
        if set(formats) == {"bf16"}:
            continue
        uses = ACCUMULATION * (hybrid.mtp_num_depths if product.name.startswith("mtp.") else 1)
        operands = [f"dy {p}" for p in ("dgrad", "wgrad")]
        asked.update({(product.name, o): uses * (1 + experts) for o in operands})
        for which, format in formats._asdict().items():
            if format == "nvfp4":
                for role, columnwise in PASSES[which]:
                    quantized[product.name, role, columnwise] += uses * (1 + experts)
    assert sum(name.endswith(".experts") for name, *_ in quantized) == 3 * 6  # of all its operands
    for batches in ranks(size, name):
        assert len(batches) == BATCHES
        for batch in batches:
            assert Counter((layer, operand) for layer, operand, _ in batch["asked"]) == asked
            assert Counter((n, r, c) for n, r, c, _ in batch["quantized"]) == quantized


@pytest.mark.parametrize(("size", "name"), [(1, "plain"), (2, "plain"), (2, "starved")])
def test_no_two_gradients_are_rounded_by_the_same_seed(ranks: Ranks, size: int, name: str) -> None:
    """Over ranks, batches, micro-batches, layers, uses in a pass, and operands."""
    found = ranks(size, name)
    asked = [seed for batches in found for seed in seeds(batches)]
    assert len(set(asked)) == len(asked) > 100 * size
    used = [
        (role, seed)
        for batches in found
        for batch in batches
        for _, role, _, seed in batch["quantized"]
    ]
    assert all((seed is not None) == (role == "dy") for role, seed in used)
    gradients = [seed for role, seed in used if role == "dy"]
    assert len(set(gradients)) == len(gradients) > 50 * size
    assert set(gradients) < set(asked)  # other gradients are in MXFP8 or bf16


@pytest.mark.parametrize("size", [1, 2])
def test_batch_behind_one_passed_over_draws_other_bits(ranks: Ranks, size: int) -> None:
    """Though its step is the same."""
    for batches in ranks(size, "plain"):
        assert [bool(b["objection"]) for b in batches] == [
            number == PASSED_OVER for number in range(1, BATCHES + 1)
        ]
        assert [b["step"] for b in batches] == [0, 1, 1]
        before, after = (set(seeds([batches[i]])) for i in (PASSED_OVER - 1, PASSED_OVER))
        assert before
        assert not before & after


def test_seed_of_the_run_counts(ranks: Ranks) -> None:
    one, other = (ranks(1, name)[0] for name in ("plain", "other seed"))
    assert len(seeds(one)) == len(seeds(other))
    assert not set(seeds(one)) & set(seeds(other))


def test_rank_whose_experts_get_no_token_trains_on(ranks: Ranks) -> None:
    for batches in ranks(2, "starved"):
        for number, batch in enumerate(batches, 1):
            assert bool(batch["objection"]) == (number == PASSED_OVER)
            assert all(math.isfinite(loss) for loss in batch["losses"])
            assert all(load[i] == 0 for load in batch["loads"].values() for i in ALL_OF_RANK_1)
