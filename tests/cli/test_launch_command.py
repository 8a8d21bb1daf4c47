"""`launch`: several processes, one status, signals passed on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.processes import HANG_S, run_command
from nemo_hybrid.cli import main
from nemo_hybrid.commands import launch as module
from nemo_hybrid.commands.launch import launch
from nemo_hybrid.process import TOGETHER

STOPS = """
import os, signal, sys, time
def stop(number, frame):
    os.write(1, f"rank {os.environ['RANK']} got {signal.Signals(number).name}\\n".encode())
    sys.exit(4)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
open(sys.argv[1] + os.environ["RANK"], "w").close()
time.sleep(600)
"""


def test_a_mistake_is_told_once_with_its_status() -> None:
    words = ["launch", "--nproc", "2", "pretrain", "--data.path", "x", "--parallel.ep", "3"]
    (done,) = run_command(*words, succeed=False)
    assert done.status == 2
    assert done.stderr == "error: model.n_routed_experts (16) is not divisible by parallel.ep (3)\n"


def test_processes_are_those_of_torchrun(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = (
        f"import os; rank = os.environ['RANK']; "
        f"open({str(tmp_path)!r} + '/' + rank, 'w').write(' '.join(os.environ[n] for n in {names}))"
    )
    assert launch(3, [sys.executable, "-c", code]) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [own[:4] for own in found] == [[str(r), str(r), "3", "3"] for r in range(3)]
    assert len({tuple(own[4:]) for own in found}) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = [Path(f"{tmp_path}/ready{rank}") for rank in range(2)]

    def send() -> None:
        deadline = time.monotonic() + HANG_S
        while not all(path.exists() for path in ready) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert launch(2, [sys.executable, "-c", STOPS, f"{tmp_path}/ready"]) == 4
    sender.join()
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == [f"rank {rank} got {number.name}" for rank in range(2)]


def test_a_lost_process_is_named_and_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.2)
    # Rank 0 is lost, rank 1 does not listen to SIGTERM.
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.environ['RANK'] == '0' and (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL)); "
        "time.sleep(600)"
    )
    began = time.monotonic()
    assert launch(2, [sys.executable, "-c", code]) == 128 + signal.SIGKILL
    assert time.monotonic() - began < HANG_S
    assert capfd.readouterr().err == "process 0 ended by SIGKILL\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "missing: --nproc"),
        (["--nproc", "2"], f"launch needs a command: {', '.join(TOGETHER)}"),
        (["--nproc", "2", "pretrian"], "unexpected words on the command line: pretrian"),
        (["--nproc", "0", "pretrain"], "nproc must be positive, got 0"),
    ],
)
def test_mistakes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *words]) == 2
    assert expected in capsys.readouterr().err
