"""Bad steps are not made, and leave no trace; a run that stays bad goes back, and then gives up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.once import once
from helpers.processes import TESTS, Finished, run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.train.guard import Bands, Guard
from nemo_hybrid.train.metrics import read_metrics

FAULTY = TESTS / "helpers/faulty.py"
STEPS, EVERY = 8, 4


def fresh(window: int = 128, loss: float = 10.0, grad_norm: float = 10.0) -> Guard:
    return Guard(window, Bands(loss, grad_norm))


def settled(losses: list[float], norm: float = 1.0, **options: Any) -> Guard:
    guard = fresh(**options)
    assert all(guard.judge(loss, norm) is None for loss in losses)
    return guard


EVEN = [4.0 + 0.05 * (-1) ** i for i in range(20)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_passed_over_from_the_first_step(value: float) -> None:
    assert "loss is" in (fresh().judge(value, 1.0) or "")
    assert "gradient norm is" in (fresh().judge(1.0, value) or "")


def test_a_spike_is_one_above_the_band() -> None:
    # Median 4.05 or 3.95, deviation 0.05 or 0.1: spread 0.08 (the floor) to 0.15, band 10.
    guard = settled(EVEN)
    assert guard.judge(4.5, 1.0) is None
    assert "loss is 6" in (guard.judge(6.0, 1.0) or "")
    assert guard.judge(1.0, 1.0) is None, "falling far is no spike"
    assert guard.judge(4.0, 9.0) is None
    assert "gradient norm is 12" in (guard.judge(4.0, 12.0) or "")
    assert guard.counters.skipped == 2


def test_no_spike_before_sixteen_steps_nor_with_band_zero() -> None:
    assert settled(EVEN[:15]).judge(100.0, 100.0) is None
    assert settled(EVEN, loss=0.0, grad_norm=0.0).judge(100.0, 100.0) is None


def test_each_of_the_two_values_has_a_band_of_its_own() -> None:
    """A surrogate loss that changes its sign has none, its gradient has."""
    guard = settled(EVEN, loss=0.0)
    assert guard.judge(100.0, 1.0) is None
    assert "gradient norm is 100" in (guard.judge(4.0, 100.0) or "")


def test_a_spike_does_not_widen_the_band() -> None:
    guard = settled(EVEN)
    for _ in range(200):
        assert guard.judge(50.0, 1.0)
    assert (guard.counters.in_a_row, guard.counters.skipped) == (200, 200)
    assert guard.judge(4.0, 1.0) is None
    assert guard.counters.in_a_row == 0


def test_the_band_forgets_what_is_older_than_the_window() -> None:
    guard = settled([50.0] * 20 + [4.0] * 16, window=16)
    assert guard.judge(50.0, 1.0)


def test_state_goes_through_json() -> None:
    guard = settled(EVEN)
    guard.judge(math.nan, 1.0)
    other = fresh()
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.counters == guard.counters
    assert other.state() == guard.state()
    assert other.judge(6.0, 1.0) == guard.judge(6.0, 1.0) is not None


# ---- in whole runs, two processes, bf16, expert parallel, accumulation, MTP, packing -----------


@pytest.fixture(scope="session")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """run(name, faults, *options): a run directory and its processes; each name runs once."""

    def start(name: str, faults: dict[str, Any], *words: str, succeed: bool = True) -> Any:
        def make(out: Path) -> None:
            train = {"max_steps": STEPS, "micro_batch_size": 2, "eval_sequences": 0}
            config = tiny_run(store, recipe="bf16", ep=2, train=train)
            config.checkpoint.every = EVERY
            config.guard.rollback_after = 3
            (out / "run.yaml").write_text(dump_config(config))
            finished = run_python(
                [FAULTY, json.dumps(faults), "pretrain", "--config", out / "run.yaml",
                 "--run_dir", out / "run", *words],
                size=2, succeed=succeed,
            )  # fmt: skip
            (out / "out.json").write_text(json.dumps([vars(f) for f in finished]))

        made = once(tmp_path_factory, name, make)
        outputs = json.loads((made / "out.json").read_text())
        return made / "run", [Finished(**output) for output in outputs]

    return start


def tensors(run_dir: Path, step: int = STEPS) -> dict[str, bytes]:
    """Weights, router biases, masters, moments and generators, as bytes by file."""
    directory = run_dir / f"checkpoints/step_{step:08d}"
    return {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        (r.step, r.loss, r.mtp_losses, r.lr, r.grad_norm, r.max_vio, r.sample_hash) for r in rows
    ]


def test_a_passed_over_batch_leaves_no_trace(run: Callable[..., Any]) -> None:
    """As if it had never been in the data, though NaN came from one rank alone."""
    with_nan, finished = run("nan", {"nan": [3], "rank": 1})
    without, _ = run("deleted", {"delete": [3]})
    plain, _ = run("plain", {})
    assert "batch 3 passed over: gradient norm is nan (1 in a row, 1 in all)" in finished[0].stdout
    assert "passed over" not in finished[1].stdout
    assert len(tensors(with_nan)) >= 5
    assert tensors(with_nan) == tensors(without)
    assert trace(with_nan) == trace(without)
    skipped = [row.skipped_batches for row in read_metrics(with_nan / "metrics.jsonl")]
    assert skipped == [0, 0, 1, 1, 1, 1, 1, 1]
    # The comparison notices a batch that is trained on, and one that only moves the data.
    assert trace(plain)[:2] == trace(without)[:2]
    assert trace(plain)[2] != trace(without)[2]
    assert tensors(plain) != tensors(without)


@pytest.mark.slow
def test_bad_batches_in_a_row_send_the_run_back(run: Callable[..., Any]) -> None:
    """Batches 6 to 8 are bad: back to step 4, and on with batch 9; what 5 taught is forgotten."""
    back, finished = run("back", {"nan": [6, 7, 8]})
    without, _ = run("deleted_5_to_8", {"delete": [5, 6, 7, 8]})
    assert "back to step_00000004; the data goes on behind batch 8" in finished[0].stdout
    assert tensors(back) == tensors(without)
    assert trace(back) == trace(without)
    rows = read_metrics(back / "metrics.jsonl")
    assert [row.rollbacks for row in rows] == [0] * 4 + [1] * 4
    assert [row.step for row in rows] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_stays_bad_gives_up_with_what_replays_it(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    stuck, finished = run(
        "stuck", {"nan": list(range(6, 60))}, "--guard.stop_after", "2", succeed=False
    )
    assert [f.status for f in finished] == [3, 3]
    message = finished[0].stderr.splitlines()[-1]
    assert "batch 14 after step 4" in message  # 6, 7, 8 | 9, 10, 11 | 12, 13, 14
    assert "2 returns to a checkpoint did not help" in message
    (dump,) = (stuck / "diagnosis").glob("step_*")
    assert str(stuck / "diagnosis") in message
    # The state before the last batch, which comes first again.
    words = ["pretrain", "--config", stuck.parent / "run.yaml", "--run_dir", tmp_path / "again",
             "--resume", dump]  # fmt: skip
    again = run_python([FAULTY, json.dumps({"nan": [14]}), *words], size=2)
    assert "batch 14 passed over: gradient norm is nan" in again[0].stdout
    # From the weights of step 4, as if the batches up to 14 had not been there.
    assert [row.step for row in read_metrics(tmp_path / "again/metrics.jsonl")] == [5, 6, 7, 8]


def test_a_run_that_is_bad_from_the_start_gives_up_too(store: Path, tmp_path: Path) -> None:
    """Before its first update, and so without a checkpoint of its own; one that it went on from
    is gone back to."""
    config = tiny_run(store, train={"max_steps": 4, "micro_batch_size": 8, "eval_sequences": 0})
    config.guard.rollback_after, config.guard.stop_after = 2, 1
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ["pretrain", "--config", tmp_path / "run.yaml", "--run_dir"]
    bad = json.dumps({"nan": [1, 2, 3]})
    (finished,) = run_python([FAULTY, bad, *words, tmp_path / "run"], succeed=False)
    assert finished.status == 3, finished.stderr
    assert "batch 2 after step 0" in finished.stderr
    assert "there is no checkpoint to go back to" in finished.stderr
    assert "Lower train.lr" not in finished.stderr  # no step has been taken at any rate
    assert "The weights are those that the run began with" in finished.stderr
    dump = tmp_path / "run/diagnosis/step_00000000"
    assert f"The state before that batch is in {dump.parent}" in finished.stderr
    again = [FAULTY, json.dumps({"nan": [2, 3]}), *words, tmp_path / "again", "--resume", dump]
    (finished,) = run_python(again)
    assert "batch 2 passed over" in finished.stdout
    assert "back to step_00000000; the data goes on behind batch 3" in finished.stdout
    assert [row.step for row in read_metrics(tmp_path / "again/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_spike_is_passed_over_in_a_run(store: Path, tmp_path: Path) -> None:
    config = tiny_run(store, train={"max_steps": 18, "micro_batch_size": 8, "eval_sequences": 0})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ["pretrain", "--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run"]
    (finished,) = run_python([FAULTY, json.dumps({"scale": {"17": 1e3}}), *words])
    assert "batch 17 passed over: gradient norm is" in finished.stdout
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row.skipped_batches for row in rows] == [0] * 16 + [1] * 2
