"""A run that changes its layout at every stop trains as the one that never stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers.bands import SABOTAGE
from helpers.corpus import ALL_EXPERTS
from helpers.once import once
from helpers.processes import run_command, run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.train.metrics import read_metrics

STEPS = 12
TOLERANCE = 2e-6
"""Relative, of losses and gradient norms in fp32, in every step: twice what ``bands.jittered``
moves them. (With a choice of experts it moves them by 1e-3: in 12 steps some choices are close.)"""
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
Row = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """Some steps at one layout; every micro-batch size makes the same 8 sequences a step."""

    until: int
    size: int
    ep: int
    zero: int
    micro_batch_size: int
    cp: int = 1

    def words(self) -> list[str]:
        given = {
            "train.max_steps": self.until,
            "parallel.ep": self.ep,
            "parallel.zero": self.zero,
            "parallel.cp": self.cp,
            "train.micro_batch_size": self.micro_batch_size,
        }
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]


CHAIN = [
    Segment(3, size=4, ep=2, zero=2, micro_batch_size=1),
    Segment(6, size=2, ep=1, zero=1, micro_batch_size=4, cp=2),
    Segment(9, size=1, ep=1, zero=2, micro_batch_size=2),
    Segment(12, size=4, ep=4, zero=1, micro_batch_size=2, cp=4),
]
"""4 -> 2 -> 1 -> 4 processes, expert parallel 2 -> 1 -> 4, context parallel 1 -> 2 -> 1 -> 4."""


@dataclass(frozen=True)
class Alone:
    """The run that never stopped: one process, all sequences of a step at once."""

    config: Path
    run_dir: Path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Alone:
    def make(out: Path) -> None:
        train = {"max_steps": STEPS, "micro_batch_size": 8, "eps": 1e-4, "eval_sequences": 0}
        config = tiny_run(store, model=ALL_EXPERTS | HEADS, train=train | {"warmup_steps": 5})
        config.checkpoint.every = 3
        config.checkpoint.keep = 0
        (out / "run.yaml").write_text(dump_config(config))
        run_command("pretrain", "--config", out / "run.yaml", "--run_dir", out / "run")

    made = once(tmp_path_factory, "alone", make)
    return Alone(made / "run.yaml", made / "run")


def rows(run_dir: Path) -> list[Row]:
    return [asdict(row) for row in read_metrics(run_dir / "metrics.jsonl")]


def distances(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """Largest relative difference of every step: main loss, depths' losses, gradient norm."""

    def figures(row: Row) -> list[float]:
        return [row["loss"], *row["mtp_losses"], row["grad_norm"]]

    return [
        max(abs(x - y) / abs(y) for x, y in zip(figures(a), figures(b), strict=True))
        for a, b in zip(ours, theirs, strict=True)
    ]


@pytest.mark.slow
def test_layouts_may_change_at_every_stop(alone: Alone, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words: list[str | Path] = ["pretrain", "--config", alone.config, "--run_dir", run_dir]
    for number, segment in enumerate(CHAIN):
        stdout = run_command(*words, *segment.words(), size=segment.size)[0].stdout
        before = f"step_{CHAIN[number - 1].until:08d}" if number else "fresh start"
        assert before in stdout
        assert f"{segment.size} processes on cpu, " in stdout
        assert f"expert parallel {segment.ep}" in stdout
        rows_at_once = segment.micro_batch_size * segment.size // segment.cp
        said = f"{rows_at_once} rows at a time, each over {segment.cp} processes"
        assert (said in stdout) == (segment.cp > 1)
    ours, theirs = rows(run_dir), rows(alone.run_dir)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for same in ("sample_hash", "lr", "tokens_total"):
        assert [row[same] for row in ours] == [row[same] for row in theirs]
    # At the seams (steps 4, 7 and 10) as anywhere else.
    assert max(distances(ours, theirs)) < TOLERANCE
    # Conditions: samples and losses differ from step to step.
    assert len({row["sample_hash"] for row in theirs}) == STEPS
    assert all(abs(b["loss"] / a["loss"] - 1) > SABOTAGE * TOLERANCE for a, b in pairwise(theirs))


@pytest.fixture(scope="module")
def seams(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make(out: Path) -> None:
        worker = Path(__file__).with_name("seams.py")
        run_python([worker, alone.run_dir, out / "found.json"])

    found: dict[str, Any] = json.loads(
        (once(tmp_path_factory, "seams", make) / "found.json").read_text()
    )
    return found


@pytest.mark.parametrize("lost", ["first_moments", "step_count", "position", "schedule"])
def test_a_jump_at_the_seam_is_noticed(alone: Alone, seams: dict[str, Any], lost: str) -> None:
    """Within two steps: the first has the losses of the weights, which were not lost."""
    theirs = rows(alone.run_dir)[9:11]
    assert max(distances(seams["figures"]["nothing"], theirs)) == 0
    ours = seams["figures"][lost]
    assert distances(ours, theirs)[1] > SABOTAGE * TOLERANCE
    samples, right = (
        [row["sample_hash"] for row in seams["figures"][x]] for x in (lost, "nothing")
    )
    assert (samples == right) == (lost != "position")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shape", ["model.moe_latent_size 16", "this run has 24", "use the same model"]),
        ("data", ["was written with data ['", "this run has ['", "use the same"]),
        ("tokenizer", ["was written with tokenizer '", "this run has '0123'"]),
        ("newer format", ["checkpoint format 99", "reads up to 1", "newer nemo_hybrid"]),
        ("no checkpoint", ["is not a training checkpoint", "run_state.json"]),
    ],
)
def test_resuming_something_else_names_both_sides(
    seams: dict[str, Any], what: str, said: list[str]
) -> None:
    message = seams["messages"][what]
    assert all(part in message for part in said), message
    if what != "no checkpoint":
        assert "step_00000009" in message
    if what == "tokenizer":
        assert seams["tokenizer"] in message
