"""Leftover variables of launchers, and signals to a process that waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.processes import HANG_S, free_port, run_python
from helpers.runs import tiny_run
from nemo_hybrid import cli
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import launched

MET = {"MASTER_ADDR": "host", "MASTER_PORT": "1234"}
TWO = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, (0, 1)),
        (MET, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        (TWO | MET, (1, 2)),
        (TWO | MET | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (1, 2)),
        # One agent on each of several nodes, and one process on each.
        (TWO | MET | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, (1, 2)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (0, 1)),
        # A batch script, or a shell in an allocation.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),
    ],
)
def test_what_a_launcher_says(environment: dict[str, str], found: tuple[int, int]) -> None:
    assert launched(environment) == found


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TWO, "process 1 of 2, which cannot meet without MASTER_ADDR and MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "host"},
            "process 0 of 4, which cannot meet without MASTER_PORT",
        ),
        ({"WORLD_SIZE": "2"}, "process 0 of 2, which cannot meet without MASTER_ADDR"),
        ({"RANK": "1"}, "process 1 of 1"),
        (TWO | MET | {"RANK": "2"}, "process 2 of 2"),
        (TWO | MET | {"RANK": "x"}, "RANK is 'x'"),
        (TWO | MET | {"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        (TWO | MET | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (TWO | MET | {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, which is no port"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        (MET | {"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, "SLURM_PROCID"),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        launched(environment)
    assert "torchrun" in str(caught.value)


@pytest.fixture
def leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MET:
        monkeypatch.delenv(name, raising=False)
    for name, value in (TWO | {"OMPI_COMM_WORLD_SIZE": "2", "LOCAL_RANK": "5"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "OTHER_RANKS_WAIT_S", 0.0)


@pytest.mark.usefixtures("leftover")
def test_training_refuses_and_other_commands_do_not_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_run(tmp_path / "store")))
    assert cli.main(["pretrain", "--config", str(config)]) == 2
    assert "cannot meet without MASTER_ADDR and MASTER_PORT" in capsys.readouterr().err
    assert cli.main(["eval", "--from", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "cannot meet without MASTER_ADDR and MASTER_PORT" in capsys.readouterr().err
    assert cli.main(["prepare", str(config), "--out", str(tmp_path / "out"), "--heldout", "0",
                     "--vocab_size", "259"]) == 0  # fmt: skip
    assert cli.main(["inspect", str(config)]) == 0
    assert cli.main(["inspect", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def python(program: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A shell's background job ignores Ctrl-C, and so would its children.
    first = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", first + program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip


MEET = """
from nemo_hybrid.parallel.world import World
from nemo_hybrid.process import ended_when_asked
with ended_when_asked():
    print("ready", flush=True)
    World.start()
"""
COLLECTIVE = """
import os, sys, time
from nemo_hybrid.parallel.watch import Watch
from nemo_hybrid.parallel.world import World
from nemo_hybrid.process import ended_when_asked
with ended_when_asked(), Watch(0, os.getppid()):
    world = World.start()
    print("ready", flush=True)
    world.gather(1) if world.rank == 0 else time.sleep(3000)
"""


def asked_to_end(process: subprocess.Popen[bytes], number: int, times: int) -> int:
    """Its status after so many signals, with more than the pause between that makes them two."""
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    for _ in range(times):
        time.sleep(1.2)
        process.send_signal(number)
    return process.wait(HANG_S)


@pytest.mark.slow
def test_who_waits_in_a_library_ends() -> None:
    """Who waits for others to appear at the first signal, who waits in a collective of a run at the
    second; all at the same time."""
    started = []
    cases = ((MEET, [1], signal.SIGINT, 1), (COLLECTIVE, [0, 1], signal.SIGTERM, 2))
    for program, ranks, number, times in cases:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        both = [python(program, place | {"RANK": str(rank)}) for rank in ranks]
        started.append((both, number, times))
    try:
        for (process, *_), number, times in started:
            # Python's own status of a signal, where it came before the wait began.
            assert asked_to_end(process, number, times) in (128 + number, -number)
    finally:
        for process in (process for both, *_ in started for process in both):
            process.kill()
            process.communicate()


SWALLOWED = """
import time
from nemo_hybrid.process import ended_when_asked, ending
ending.leaving_s = 1.0
with ended_when_asked():
    print("ready", flush=True)
    try:
        time.sleep(3000)
    except BaseException:
        pass
    while True:
        (lambda: time.sleep(0.01))()
"""


def test_who_does_not_leave_is_ended(tmp_path: Path) -> None:
    """What swallows the exception of a signal, such as a library's import, does not go on."""
    process = python(SWALLOWED, {})
    try:
        assert asked_to_end(process, signal.SIGINT, 1) == 130
        assert process.stderr
        assert process.stderr.read().endswith(b"interrupted\n")
    finally:
        process.kill()
        process.communicate()


ALONE = """
from nemo_hybrid.parallel.engine import prepare_deepspeed
from nemo_hybrid.parallel.world import World
world = World.start()
prepare_deepspeed(world)
print(world.size, world.gather(3))
World.stop()
"""


def test_a_process_of_its_own_meets_nobody(tmp_path: Path) -> None:
    program = tmp_path / "alone.py"
    program.write_text(ALONE)
    leftover = {"MASTER_ADDR": "192.0.2.1", "LOCAL_RANK": "7", "RANK": "", "WORLD_SIZE": "1",
                "OMPI_COMM_WORLD_SIZE": "1"}  # fmt: skip
    assert run_python([program], environment=leftover)[0].stdout == "1 [3]\n"
