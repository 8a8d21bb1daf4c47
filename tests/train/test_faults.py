"""Signals, full disks, killed processes and hangs: real runs of two processes, compared with the
unbroken one bit for bit."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.corpus import flip_byte
from helpers.launcher import Job, differences, kill, steps_recorded
from helpers.once import once
from helpers.processes import TESTS, Finished, run_python
from nemo_hybrid.checkpoint.steps import find_latest
from train.conftest import LAYOUT, Unbroken

FAULTY = TESTS / "helpers/faulty.py"
SWEEP = TESTS.parent / "scripts/fault_sweep.py"


def program(unbroken: Unbroken, run_dir: Path, faults: dict[str, Any], *words: str) -> list[Any]:
    pretrain = ["pretrain", "--config", unbroken.config, "--run_dir", run_dir]
    return [FAULTY, json.dumps(faults), *pretrain, *LAYOUT, *words]


# ---- one run that meets one misfortune after the other ------------------------------------------

MISFORTUNES: dict[str, dict[str, Any]] = {
    "disk full": {"file_size": [8, 65536]},
    "SIGTERM to one": {"signal": [6, int(signal.SIGTERM)], "rank": 1},
    "SIGUSR1 to all": {"signal": [9, int(signal.SIGUSR1)]},
    "none": {},
}


@pytest.fixture(scope="session")
def unlucky(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, and in ``out.json`` for each start its processes and the newest checkpoint after."""

    def make(out: Path) -> None:
        met = {}
        for name, faults in MISFORTUNES.items():
            finished = run_python(program(unbroken, out / "run", faults), size=2, succeed=False)
            newest = find_latest(out / "run/checkpoints")
            stale = [p.name for p in (out / "run/checkpoints").glob(".tmp-step*")]
            met[name] = [[vars(f) for f in finished], str(newest and newest.name), stale]
        (out / "out.json").write_text(json.dumps(met))

    return once(tmp_path_factory, "unlucky", make)


def met(unlucky: Path, name: str) -> tuple[list[Finished], str]:
    finished, newest, stale = json.loads((unlucky / "out.json").read_text())[name]
    assert stale == []
    return [Finished(**f) for f in finished], newest


def test_a_full_disk_ends_every_process_with_one_message(unlucky: Path) -> None:
    """Writing fails in the background, on both ranks; the checkpoint before it stays."""
    finished, newest = met(unlucky, "disk full")
    assert [f.status for f in finished] == [2, 2]
    messages = [f.stderr.partition("error")[2].partition(": ")[2].strip() for f in finished]
    assert messages[0] == messages[1]
    assert "step_00000008/model-r00000-00001.safetensors: File too large" in messages[0]
    assert "step_00000008/optimizer-r00001-master.safetensors: File too large" in messages[0]
    assert all("Traceback" not in f.stderr for f in finished)
    assert newest == "step_00000004"


@pytest.mark.parametrize(
    ("name", "before", "step"),
    [("SIGTERM to one", 4, 7), ("SIGUSR1 to all", 7, 10)],
)
def test_a_signal_ends_every_process_with_a_checkpoint(
    unlucky: Path, name: str, before: int, step: int
) -> None:
    """With the step after the one that it met: processes agree on it when a step begins."""
    finished, newest = met(unlucky, name)
    assert [f.status for f in finished] == [4, 4]
    assert f"going on from {unlucky / 'run/checkpoints'}/step_{before:08d}" in finished[0].stdout
    assert newest == f"step_{step:08d}"
    assert f"stopped by a signal after step {step}, checkpoint written" in finished[0].stderr
    assert "Traceback" not in finished[0].stderr + finished[1].stderr


def test_a_run_that_met_all_of_it_equals_the_unbroken_one(
    unlucky: Path, unbroken: Unbroken
) -> None:
    finished, _ = met(unlucky, "none")
    assert [f.status for f in finished] == [0, 0]
    assert differences(unlucky / "run", unbroken.run_dir, 12) == []


def test_differences_are_noticed(unbroken: Unbroken, tmp_path: Path) -> None:
    """One bit of one moment, one digit of one row."""
    copy = unbroken.copy(tmp_path / "run")
    assert differences(copy, unbroken.run_dir, 12) == []
    flip_byte(copy / "checkpoints/step_00000012/optimizer-r00001-master.safetensors", -1)
    rows = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(rows.replace('"step":7,"loss":', '"step":7,"loss":1'))
    assert differences(copy, unbroken.run_dir, 12) == [
        "optimizer-r00001-master.safetensors",
        "row 7",
    ]
    shutil.rmtree(copy / "checkpoints/step_00000012")
    assert len(differences(copy, unbroken.run_dir, 12)) > 10


# ---- under torchrun -----------------------------------------------------------------------------


def train_until(job: Job, run_dir: Path, step: int) -> None:
    """Wait until this step was recorded and a checkpoint before it stands."""

    def there() -> bool:
        return steps_recorded(run_dir) >= step and (run_dir / "checkpoints/latest").exists()

    job.until(lambda: there() or job.agent.poll() is not None)
    assert there(), job.text()


@pytest.mark.sweep
def test_a_killed_worker_ends_the_job_within_seconds(unbroken: Unbroken, tmp_path: Path) -> None:
    """Without restarts."""
    run_dir = tmp_path / "run"
    go_on = tmp_path / "go on"
    with Job(program(unbroken, run_dir, {"hold": [6, str(go_on)]}), tmp_path / "log") as job:
        train_until(job, run_dir, 5)
        kill(job.workers()[1])
        go_on.touch()
        job.until(lambda: not job.processes())
        assert job.wait() == 1
    assert find_latest(run_dir / "checkpoints") == run_dir / "checkpoints/step_00000004"


@pytest.mark.sweep
def test_a_killed_worker_is_replaced(unbroken: Unbroken, tmp_path: Path) -> None:
    """By an agent that counts the restart. In test_multinode one of two does."""
    run_dir, now = tmp_path / "run", tmp_path / "now"
    words = program(unbroken, run_dir, {"hold": [11, str(now)]})
    with Job(words, tmp_path / "log", torchrun=["--max-restarts=1"]) as job:
        train_until(job, run_dir, 10)
        job.until(lambda: (run_dir / "checkpoints/step_00000008").exists())
        kill(job.workers()[1])
        now.touch()
        assert job.wait() == 0
    assert job.text().count(f"going on from {run_dir / 'checkpoints/step_00000008'}") == 1
    assert differences(run_dir, unbroken.run_dir, 12) == []


@pytest.mark.slow
def test_a_killed_agent_takes_its_workers_along_and_the_run_recovers(
    unbroken: Unbroken, tmp_path: Path, pretrain: Callable[..., int], capsys: Any
) -> None:
    """A second run meanwhile is refused; after the kill -9 the next takes the directory. (A killed
    worker that is replaced: test_multinode.)"""
    import nemo_hybrid.train.loop  # noqa: F401  what takes seconds at the first refusal

    run_dir, log, never = (tmp_path / name for name in ("run", "log", "never"))
    with Job(program(unbroken, run_dir, {"hold": [10, str(never)]}), log) as job:
        train_until(job, run_dir, 5)
        assert pretrain("--config", unbroken.config, "--run_dir", run_dir, *LAYOUT[2:]) == 2
        message = capsys.readouterr().err
        assert f"run_dir {run_dir} is in use by another run" in message
        assert f"process {job.workers()[0]} on " in message
        train_until(job, run_dir, 9)
        kill(job.agent.pid)
        job.until(lambda: not job.workers())
        assert steps_recorded(run_dir) == 9
    assert "the launcher of this process is gone: stopping" in job.text()

    finished = run_python(program(unbroken, run_dir, {}), size=2)
    assert f"going on from {run_dir / 'checkpoints/step_00000008'}" in finished[0].stdout
    assert differences(run_dir, unbroken.run_dir, 12) == []


@pytest.mark.slow
def test_workers_of_an_agent_that_dies_while_they_start_end_too(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    with Job(program(unbroken, tmp_path / "run", {}), tmp_path / "log") as job:
        job.until(lambda: len(job.workers()) == 2)
        time.sleep(0.5)  # Python and the command line are there, the libraries are not
        kill(job.agent.pid)
        job.until(lambda: not job.workers())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hang_ends_the_job_with_the_stacks_of_its_threads(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    # Both hang: whichever ends first prints its stacks, and the other may not come to it.
    words = program(unbroken, tmp_path / "run", {"hang": 4}, "--train.hang_timeout_s", "8")
    with Job(words, tmp_path / "log") as job:
        assert job.wait() == 1
        job.until(lambda: not job.processes())
    assert "Timeout (0:00:08)!" in job.text()
    assert "in before_step" in job.text()  # where they sleep
    assert steps_recorded(tmp_path / "run") == 3


# ---- the sweep ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fault_sweep", SWEEP)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("target", "step", "rows_after", "checkpoint", "seconds", "lost"),
    [
        ("all", 3, 0, 0, 0.1, ""),
        ("all", 9, 0, 8, 0.1, ""),
        ("all", 9, 0, 4, 0.1, ""),  # that of step 8 was being written
        ("all", 9, 0, 0, 0.1, "the newest checkpoint is 0"),
        ("the agent", 9, 1, 8, 1.1, ""),
        ("the agent", 10, 2, 8, 1.1, "2 rows were written after the kill"),
        ("a worker", 10, 2, 8, 1.1, ""),  # the other worker may well finish its step
        ("the agent", 9, 0, 8, 6.0, "processes were there after 5 s"),
    ],
)
def test_the_sweep_counts_what_is_lost(
    sweep: ModuleType,
    target: str,
    step: int,
    rows_after: int,
    checkpoint: int,
    seconds: float,
    lost: str,
) -> None:
    kill = sweep.Kill("any time", target, 1.0, step, rows_after, checkpoint, False, seconds)
    kill.judge()
    assert lost in kill.lost
    assert bool(kill.lost) == bool(lost)


@pytest.mark.sweep
def test_kills_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    words = [SWEEP, "--kills", "2", "--seed", "1", "--patience", "20", "--out", out]
    (finished,) = run_python(words)
    result = json.loads(out.read_text())
    assert result["lost"] == []
    assert len(result["kills"]) == 2
    assert sum(result["damage"].values()) > 50
    assert "| all kills | 2 | 2 | 0 |" in finished.stdout
