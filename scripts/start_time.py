"""How long the quick start's training takes from torchrun to the end of its first step.

    python scripts/start_time.py [--rounds N] [--out FILE]

In turns with what no such run can do without: torchrun with as many processes that import DeepSpeed
and end. The first evaluation comes before the first step and is part of the time. A first round,
which also makes the corpus where it is missing, does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.files import replace_file

ROOT = Path(__file__).parents[1]
CONFIG = "configs/run/pretrain_tiny_cpu.yaml"
BAR = 1.6


def torchrun(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as scripts/quickstart.sh sets it
    return subprocess.Popen(
        [*command, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def imports(place: Path) -> float:
    script = place / "imports.py"
    script.write_text("import deepspeed\n")
    began = time.perf_counter()
    if torchrun(str(script)).wait():
        raise SystemExit("importing deepspeed failed")
    return time.perf_counter() - began


def first_step(place: Path) -> float:
    with tempfile.TemporaryDirectory(dir=place) as run_dir:
        words = f"-m nemo_hybrid pretrain --config {CONFIG} --parallel.ep 2 --run_dir {run_dir}/run"
        rows = Path(run_dir) / "run" / "metrics.jsonl"
        began = time.perf_counter()
        process = torchrun(*words.split())
        try:
            while not (rows.is_file() and rows.stat().st_size):
                if process.poll() is not None:
                    raise SystemExit("the run ended before its first step")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.terminate()  # which writes a checkpoint
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"first step": [], "imports": []}
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(given.rounds + 1):
            row = {"first step": first_step(Path(directory)), "imports": imports(Path(directory))}
            for name, value in row.items() if turn else ():
                seconds[name].append(value)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = middle["first step"] / middle["imports"]
    print(
        f"median of {given.rounds}: {middle['first step']:.2f} s to the end of the first step, "
        f"{middle['imports']:.2f} s to import DeepSpeed alone: {ratio:.2f} x (bar {BAR} x)"
    )
    if given.out:
        result = {"seconds": seconds, "ratio": ratio, "environment": environment()}
        replace_file(given.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
