"""What docs/extending.md says of kinds of run is so: its code trains, logs and resumes, with the
training loop as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.once import once
from helpers.pages import PAGE, section
from helpers.processes import run_python
from nemo_hybrid.train.metrics import StepMetrics, read_metrics
from train.own_words import SAVED, STEPS


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    program = Path(__file__).with_name("own_words.py")
    return once(
        tmp_path_factory, "own_words", lambda out: run_python([program, store, out]) and None
    )


def rows(runs: Path, name: str) -> list[StepMetrics]:
    return read_metrics(runs / name / "metrics.jsonl")


def figures(row: StepMetrics) -> tuple[Any, ...]:
    return row.loss, row.loss_parts, row.grad_norm, row.sample_hash, row.further


def weights(runs: Path, name: str) -> dict[str, bytes]:
    last = runs / name / f"checkpoints/step_{STEPS:08d}"
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def test_a_run_that_writes_its_own_data_trains_and_logs(runs: Path) -> None:
    found = rows(runs, "plain")
    assert [row.step for row in found] == list(range(1, STEPS + 1))
    assert all(row.loss_parts.keys() == {"ce", "entropy"} for row in found)
    assert all(row.loss_parts["entropy"] > 0 for row in found)
    assert [row.further["tokens_written"] for row in found] == [8 * 16 * n for n in range(1, 5)]
    assert len({row.sample_hash for row in found}) == STEPS
    assert found[-1].heldout_loss is not None


def test_it_resumes_to_the_last_bit(runs: Path) -> None:
    plain, resumed = rows(runs, "plain"), rows(runs, "resumed")
    assert resumed[-1].step_seconds != plain[-1].step_seconds  # made again
    assert [figures(row) for row in resumed] == [figures(row) for row in plain]
    assert len(weights(runs, "plain")) >= 3
    assert weights(runs, "resumed") == weights(runs, "plain")


def test_state_that_is_not_taken_back_would_be_noticed(runs: Path) -> None:
    plain, forgetful = rows(runs, "plain"), rows(runs, "forgetful")
    assert [figures(row) for row in forgetful[:SAVED]] == [figures(row) for row in plain[:SAVED]]
    assert figures(forgetful[-1]) != figures(plain[-1])


@pytest.mark.slow
def test_its_objective_divides_rows(store: Path, tmp_path: Path) -> None:
    program = Path(__file__).with_name("divided_words.py")
    one, two = (
        json.loads(run_python([program, store, tmp_path / str(n)], n)[0].stdout.splitlines()[-1])
        for n in (1, 2)
    )
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_without_a_cut_it_says_so(store: Path, tmp_path: Path) -> None:
    program = Path(__file__).with_name("divided_words.py")
    for ended in run_python([program, store, tmp_path / "run", "without_cut"], 2):
        assert "Entropy learns from whole rows alone: set parallel.cp to 1" in ended.stdout
    assert not (tmp_path / "run/config.yaml").exists()


def test_pages_are_short() -> None:
    titles = [line[3:] for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    for title in titles:
        assert section(title).count("\n") <= 60, title
