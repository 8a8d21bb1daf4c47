"""What averaging checkpoints gains and takes.

    python scripts/average_figures.py gain [--run DIR] [--out FILE]    # minutes: trains a model
    python scripts/average_figures.py speed [--dir /path/on/the/disk] [--out FILE]

gain: the quick start's run as far as its rate stays high (in DIR; one that is finished is taken),
and the held-out loss of its last checkpoint beside those of averages of the last ones. speed: an
average of five checkpoints with fp32 masters against a copy of the files that it reads, in turns,
from the disk and from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkpoint_speed import build, forget, seconds

from nemo_hybrid.checkpoint.average import SCHEDULES, average
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.checkpoint.steps import list_steps
from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.config.read import load_config
from nemo_hybrid.data.loader import heldout_batches, open_blend
from nemo_hybrid.files import replace_file
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.evaluate import heldout_losses
from nemo_hybrid.train.resume import Saver
from nemo_hybrid.train.run import Position

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 230, 10
"""The quick start's rate decays from step 230 on."""
CHECKPOINTS = 5


def gain(run_dir: Path) -> dict[str, Any]:
    """Held-out losses by what was evaluated."""
    words = "launch --nproc 2 pretrain --config configs/run/pretrain_tiny_cpu.yaml --parallel.ep 2 "
    words += f"--train.schedule constant --train.max_steps {STEPS} --checkpoint.every {EVERY} "
    words += f"--checkpoint.keep 0 --run_dir {run_dir}"
    subprocess.run([sys.executable, "-m", "nemo_hybrid", *words.split()], cwd=ROOT, check=True)
    steps = list_steps(run_dir / "checkpoints")
    losses = {"last checkpoint": heldout(run_dir, steps[0])}
    with tempfile.TemporaryDirectory() as directory:
        for count in (3, 5, 10):
            for weights in SCHEDULES:
                out = Path(directory) / f"{count}-{weights}"
                average(steps[count - 1 :: -1], weights, out, show_progress=False)
                losses[f"{weights} of {count}"] = heldout(run_dir, out)
    return {"steps": STEPS, "every": EVERY, "heldout_loss": losses, "environment": environment()}


def heldout(run_dir: Path, model_dir: Path) -> float:
    """Loss of a model on the sequences that the run evaluates."""
    config, model = load_config([run_dir / "config.yaml"]), load_model(model_dir)
    batches = heldout_batches(
        open_blend(config.data, model.config),
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        rank=0, world_size=1, limit=config.train.eval_sequences,
    )  # fmt: skip
    return heldout_losses(NextToken(model, config.train), batches, World.start())["loss"]


def speed(directory: Path, gib: float, repeat: int, pause: float) -> dict[str, Any]:
    run = build(directory, gib)
    saver, checkpoints = Saver(run), directory / "checkpoints"
    for step in range(1, CHECKPOINTS + 1):
        saver.save(checkpoints, Position(step, step), keep=0, wait=True)
    steps = list_steps(checkpoints)[::-1]
    files = [f for step in steps for f in step.glob("*master.safetensors")]
    mean, copies = directory / "mean", directory / "copies"

    def copy() -> None:
        copies.mkdir()
        for number, file in enumerate(files):
            to = copies / str(number)
            shutil.copyfile(file, to)
            with to.open("rb") as written:
                os.fsync(written.fileno())

    actions = {"average": lambda: average(steps, "minus_sqrt", mean, False), "copy": copy}
    times: dict[str, dict[str, list[float]]] = {
        where: {name: [] for name in actions} for where in ("disk", "cache")
    }
    for turn in range(repeat):
        for where, rows in times.items():
            for name in sorted(actions, reverse=bool(turn % 2)):
                os.sync()
                if where == "disk":
                    forget(*(f for step in steps for f in step.iterdir()))
                    time.sleep(pause)
                rows[name].append(seconds(actions[name]))
            shutil.rmtree(mean)
            shutil.rmtree(copies)
    ratios = {
        where: statistics.median(rows["copy"]) / statistics.median(rows["average"])
        for where, rows in times.items()
    }
    size = sum(f.stat().st_size for f in files)
    return {"bytes_read": size, "seconds": times, "ratio": ratios, "environment": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("gain", "speed"))
    parser.add_argument("--run", type=Path, default=ROOT / "runs/average_figures")
    parser.add_argument("--dir", help="directory on the disk to measure; default: temporary files")
    parser.add_argument("--gib", type=float, default=1.1, help="training state of a checkpoint")
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--pause", type=float, default=5, help="seconds of rest for the disk")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    if given.what == "gain":
        result = gain(given.run)
        last = result["heldout_loss"]["last checkpoint"]
        for name, loss in result["heldout_loss"].items():
            print(f"{name:20} {loss:.4f} {loss - last:+.4f}")
    else:
        with tempfile.TemporaryDirectory(dir=given.dir) as directory:
            result = speed(Path(directory), given.gib, given.repeat, given.pause)
        gib = result["bytes_read"] / 2**30
        for where, rows in result["seconds"].items():
            rates = (f"{n} {gib / statistics.median(found):.2f} GiB/s" for n, found in rows.items())
            print(
                f"from the {where}: {', '.join(rates)} of {gib:.2f} GiB read: "
                f"{result['ratio'][where]:.2f} times as fast as a copy (bar 0.7)"
            )
    if given.out:
        replace_file(given.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
