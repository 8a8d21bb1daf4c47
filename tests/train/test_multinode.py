"""Two agents of torchrun, as on two nodes, train what two processes of one node train, and what
they do where one loses its worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.corpus import flip_byte
from helpers.launcher import differences, kill, steps_recorded
from helpers.processes import HANG_S, TESTS, free_port
from train.conftest import LAYOUT, Unbroken


@contextmanager
def two_agents(
    out: Path, program: list[str | Path], *torchrun: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """They have ended afterwards; each writes to ``out/NODE.log``."""
    endpoint = f"localhost:{free_port()}"
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={endpoint}"),
        *("--local-addr=localhost", *torchrun),
    ]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    agents = []
    for node in range(2):
        with (out / f"{node}.log").open("wb") as log:
            agents.append(
                subprocess.Popen(
                    [*launch, f"--node_rank={node}", *map(str, program)],
                    env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield agents
        for agent in agents:
            agent.wait(timeout=HANG_S)
    finally:
        for agent in agents:
            agent.terminate()  # the agent ends its process
            agent.wait()


def logs(out: Path) -> list[str]:
    return [(out / f"{node}.log").read_text(errors="replace") for node in range(2)]


def worker(run_dir: Path, rank: int) -> int:
    """Process id of a rank of the run."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().decode().split("\0")
            variables = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended meanwhile, or not ours
        if str(run_dir) in words and f"RANK={rank}" in variables:
            return int(directory.name)
    raise LookupError(f"no rank {rank} of {run_dir}")


@pytest.mark.slow
def test_a_worker_killed_on_one_node_is_replaced_on_both(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    """While the other is busy, so that it does not fail by itself: only one agent counts a
    restart, the other sees a new member. Before and after it two agents train as one node, bit for
    bit: weights, masters, moments, generators, and every row of metrics."""
    run_dir = tmp_path / "run"
    words = ["pretrain", "--config", unbroken.config, "--run_dir", run_dir, *LAYOUT]
    faulty = [TESTS / "helpers/faulty.py", json.dumps({"slow_step": 2.0, "until": 7})]
    with two_agents(tmp_path, [*faulty, *words], "--max-restarts=2") as agents:
        deadline = time.monotonic() + HANG_S
        while steps_recorded(run_dir) < 5:
            assert None in [agent.poll() for agent in agents], "\n".join(logs(tmp_path))
            assert time.monotonic() < deadline, "\n".join(logs(tmp_path))
            time.sleep(0.1)
        time.sleep(0.5)  # both sleep in the next step
        kill(worker(run_dir, 1))
    said = logs(tmp_path)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert sorted("2 processes on cpu, expert parallel 2" in log for log in said) == [False, True]
    assert "going on from" in "".join(said)
    assert differences(run_dir, unbroken.run_dir, 4) == []
    assert differences(run_dir, unbroken.run_dir, 12) == []
    # One bit would be seen.
    flip_byte(next(run_dir.glob("checkpoints/step_00000012/model-*.safetensors")), -1)
    assert len(differences(run_dir, unbroken.run_dir, 12)) == 1
