"""Two agents of torchrun, as on two nodes, train what two processes of one node train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.corpus import flip_byte
from helpers.launcher import differences
from helpers.processes import free_port
from train.conftest import LAYOUT, Unbroken


def test_two_agents_train_as_one_node(unbroken: Unbroken, tmp_path: Path) -> None:
    """Bit for bit: weights, masters, moments, generators, and every row of metrics."""
    run_dir = tmp_path / "run"
    endpoint = f"localhost:{free_port()}"
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={endpoint}"),
        "--local-addr=localhost",
    ]
    words = ["pretrain", "--config", unbroken.config, "--run_dir", run_dir, *LAYOUT]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    agents = []
    for node in range(2):
        with (tmp_path / f"{node}.log").open("wb") as log:
            agents.append(
                subprocess.Popen(
                    [*launch, f"--node_rank={node}", "-m", "nemo_hybrid", *map(str, words)],
                    env=kept | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        ended = [agent.wait(timeout=180) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # the agent ends its process
            agent.wait()
    logs = [(tmp_path / f"{node}.log").read_text() for node in range(2)]
    assert ended == [0, 0], "\n".join(logs)
    assert sorted("2 processes on cpu, expert parallel 2" in log for log in logs) == [False, True]
    assert differences(run_dir, unbroken.run_dir, 12) == []
    # One bit would be seen.
    flip_byte(next(run_dir.glob("checkpoints/step_00000012/model-*.safetensors")), -1)
    assert len(differences(run_dir, unbroken.run_dir, 12)) == 1
