"""Kill training runs at random instants and damage checkpoints; count what survived and was lost.

    python scripts/fault_sweep.py --kills 50 [--seed 0] [--out results.json]

A run of a tiny model (two processes under torchrun, expert parallel 2, bf16, MTP, packed documents,
accumulation, asynchronous checkpoints) is made once unbroken. Then it is made again and killed with
-9 (a random worker, the agent, or all processes at once) at a random instant: anywhere from its
launch, while it trains, or while a checkpoint is written and renamed. Each time it is started again
with the same command. A kill is survived if all processes end within seconds, no row of metrics
comes after them, and the next start goes on from the newest checkpoint but for one that was being
written: at most one is lost. When a run is finished it must equal the unbroken one: weights,
optimizer state and generators of its last checkpoints and all rows of metrics, bit for bit. Runs
follow each other until the kills are used up.

Then every kind of damage is done to every file of a checkpoint: each must be detected and named,
and the checkpoint before it taken.

Exit status: 0 when nothing was lost, 1 when something was. The directory of a lost run is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.corpus import write_corpus
from helpers.corruption import cases, undetected
from helpers.launcher import Job, differences, kill, steps_recorded
from helpers.runs import tiny_run
from nemo_hybrid.checkpoint.steps import find_latest, list_steps, step_of
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.files import replace_file

STEPS, EVERY = 64, 4
INSTANTS = {"any time": 0.25, "while training": 0.35, "while saving": 0.4}
TARGETS = ("a worker", "the agent", "all")
TRAINING_S = 3.0
"""Kills while training come up to so long after the first step."""
END_S = {"a worker": 15.0, "the agent": 5.0, "all": 5.0}
"""Within which every process must have ended; it is torchrun that ends those beside a worker."""


@dataclass
class Kill:
    """One kill, and what came of it."""

    instant: str
    target: str
    seconds: float
    """After the launch."""
    step: int
    """Last row of metrics when all processes had ended."""
    rows_after: int
    """Rows of metrics written after the kill."""
    checkpoint: int
    """Step of the newest valid checkpoint then; 0: none."""
    saving: bool
    """Whether an unfinished checkpoint was left."""
    seconds_to_end: float
    """Until all processes had ended."""
    lost: str = ""
    """Why the kill was not survived; empty if it was."""

    def judge(self, patience: float = 1.0) -> None:
        """See ``--patience``."""
        due, most = self.step // EVERY * EVERY, patience * END_S[self.target]
        if self.seconds_to_end > most:
            self.lost = f"processes were there after {most:.0f} s"
        elif self.target != "a worker" and self.rows_after > patience:  # a step may have been made
            self.lost = f"{self.rows_after} rows were written after the kill"
        elif self.checkpoint < due - EVERY:
            self.lost = f"at step {self.step} the newest checkpoint is {self.checkpoint}"


class Sweep:
    """All runs of one sweep, below one directory."""

    def __init__(self, directory: Path, seed: int, patience: float) -> None:
        self.directory, self.draw = directory, random.Random(seed)
        self.patience = patience
        self.kills: list[Kill] = []
        self.runs = 0
        self.different: list[str] = []
        write_corpus(directory / "store")
        train = {
            "max_steps": STEPS, "micro_batch_size": 2, "eval_sequences": 0,
            "schedule": "wsd", "warmup_steps": 8, "decay_steps": 16,
        }  # fmt: skip
        model = {"pattern": "ME*E", "mtp_num_depths": 1}
        config = tiny_run(directory / "store", model=model, train=train, ep=2, recipe="bf16")
        config.checkpoint.every = EVERY
        replace_file(directory / "run.yaml", dump_config(config))
        self.reference = directory / "unbroken"
        self.duration, self.saving_s = self._unbroken()

    def _unbroken(self) -> tuple[float, float]:
        """Make the run to compare with; the seconds it and the writing of a checkpoint took."""
        writing: list[float] = []
        with self._job(self.reference) as job:
            began = time.monotonic()
            while job.agent.poll() is None:
                _wait(job, lambda: unfinished(self.reference))
                seen = time.monotonic()
                _wait(job, lambda: not unfinished(self.reference))
                writing.append(time.monotonic() - seen)
            if job.wait():
                raise SystemExit(f"the unbroken run failed:\n{job.text()}")
            return time.monotonic() - began, statistics.median(writing)

    def _job(self, run_dir: Path) -> Job:
        words = ["pretrain", "--config", self.directory / "run.yaml", "--run_dir", run_dir]
        return Job(["-m", "nemo_hybrid", *words], run_dir.with_suffix(".log"))

    def run(self, kills: int) -> None:
        """One run to its end, with at most so many kills."""
        self.runs += 1
        run_dir = self.directory / f"run_{self.runs}"
        last: Kill | None = None
        while True:
            with self._job(run_dir) as job:
                start = len(job.text())
                last_before, last = last, self._deal(job, run_dir, start) if kills else None
                status = job.wait(600) if last is None else None
            self._judge_start(last_before, job.text()[start:])
            if last is None:
                break
            kills -= 1
            last.judge(self.patience)
            self.kills.append(last)
            print(
                f"kill {len(self.kills):3}  {last.instant:14}  {last.target:9}  "
                f"step {last.step:3}  checkpoint {last.checkpoint:3}  "
                f"ended in {last.seconds_to_end:.1f} s  {last.lost or 'survived'}",
                flush=True,
            )
        found = [f"status {status}"] if status else []
        for step in sorted(step_of(d) for d in list_steps(self.reference / "checkpoints")):
            names = differences(run_dir, self.reference, step)
            found += [f"checkpoint {step}, {name}" for name in names]
        self.different += [f"run {self.runs}: {name}" for name in found]
        print(
            f"run {self.runs} finished, {len(found)} differences from the unbroken one", flush=True
        )

    def _judge_start(self, before: Kill | None, said: str) -> None:
        """A start that came so far must have taken the newest checkpoint."""
        match = re.search(r"going on from \S*step_(\d+)|fresh start", said)
        if before and match and int(match[1] or 0) != before.checkpoint:
            before.lost = f"the next start took {match[0]}, not {before.checkpoint}"

    def _deal(self, job: Job, run_dir: Path, start: int) -> Kill | None:
        """Kill at a random instant. None if the run ended before."""
        draw, began = self.draw, time.monotonic()
        (instant,) = draw.choices(list(INSTANTS), list(INSTANTS.values()))
        target = draw.choice(TARGETS)
        if instant == "any time":
            _sleep(job, draw.uniform(0, self.duration))
        else:
            _wait(job, lambda: re.search(r"^(going on|fresh)", job.text()[start:], re.M), 0.02)
            if instant == "while training":
                _sleep(job, draw.uniform(0, TRAINING_S))
            else:
                for _ in range(draw.randint(1, 4)):
                    _wait(job, lambda: not unfinished(run_dir))
                    _wait(job, lambda: unfinished(run_dir))
                _sleep(job, draw.uniform(0, 1.3 * self.saving_s))
        if job.agent.poll() is not None:
            return None
        struck = time.monotonic()
        workers = [pid for _, pid in sorted(job.workers().items())]
        if target == "a worker" and workers:
            kill(draw.choice(workers))
        elif target == "all":
            for pid in (job.agent.pid, *workers):
                kill(pid)
        else:
            kill(job.agent.pid)
        rows = steps_recorded(run_dir)
        while job.processes() and time.monotonic() < struck + 2 * self.patience * END_S[target]:
            job.agent.poll()
            time.sleep(0.01)
        ended = time.monotonic()
        newest = find_latest(run_dir / "checkpoints")
        return Kill(
            instant, target, struck - began, steps_recorded(run_dir),
            steps_recorded(run_dir) - rows, step_of(newest) if newest else 0,
            bool(unfinished(run_dir)), ended - struck,
        )  # fmt: skip


def unfinished(run_dir: Path) -> bool:
    """Whether a checkpoint is being written, or was when its writer was killed."""
    return any((run_dir / "checkpoints").glob(".tmp-step*"))


def _wait(job: Job, condition: Callable[[], object], every: float = 0.001) -> None:
    """Until the condition holds or the job has ended."""
    while job.agent.poll() is None and not condition():
        time.sleep(every)


def _sleep(job: Job, seconds: float) -> None:
    until = time.monotonic() + seconds
    _wait(job, lambda: time.monotonic() >= until)


def damage(checkpoints: Path, scratch: Path, seed: int) -> tuple[Counter[str], list[str]]:
    """The corruption matrix: how many cases of each kind, and those that were not detected."""
    done: Counter[str] = Counter()
    missed = []
    for case in cases(checkpoints, seed):
        done[case.kind] += 1
        wrong = undetected(case, checkpoints, scratch)
        if wrong:
            missed.append(f"{case.kind} {case.detail}: {wrong}")
    return done, missed


def table(sweep: Sweep, done: Counter[str], missed: list[str]) -> str:
    """Markdown: the kills by instant and target, then the damage by kind."""
    lines = ["| killed with -9 | kills | survived | lost | most steps lost | slowest end |"]
    lines += ["|---|---|---|---|---|---|"]
    groups = [(i, t) for i in INSTANTS for t in TARGETS]
    for instant, target in [*groups, ("all kills", "")]:
        met = [k for k in sweep.kills if not target or (k.instant, k.target) == (instant, target)]
        if not met:
            continue
        lost = sum(bool(k.lost) for k in met)
        label = f"{instant}, {target}" if target else instant
        lines.append(
            f"| {label} | {len(met)} | {len(met) - lost} | {lost} "
            f"| {max(k.step - k.checkpoint for k in met)} "
            f"| {max(k.seconds_to_end for k in met):.1f} s |"
        )
    beyond = sum(k.step - k.checkpoint > EVERY for k in sweep.kills)
    saving = sum(k.saving for k in sweep.kills)
    lines += [
        "",
        f"{EVERY} steps between checkpoints. {saving} kills left an unfinished checkpoint; "
        f"{beyond} lost more than {EVERY} steps, because the newest checkpoint was still being "
        f"written. {sweep.runs} runs of {STEPS} steps finished, {len(sweep.different)} differences "
        "from the unbroken run.",
        "",
        "| damage to the newest checkpoint | cases | detected, named, passed by | not |",
        "|---|---|---|---|",
    ]
    for kind, count in done.items():
        bad = sum(text.startswith(kind) for text in missed)
        lines.append(f"| {kind} | {count} | {count - bad} | {bad} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill runs and damage checkpoints; count.")
    parser.add_argument("--kills", type=int, default=50, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and targets")
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="factor on the seconds in which processes must end, and on the rows "
        "that they may still write: for a machine that has other work",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="fault_sweep_"))
    sweep = Sweep(directory, options.seed, options.patience)
    print(
        f"unbroken run: {sweep.duration:.0f} s, {sweep.saving_s * 1e3:.0f} ms per checkpoint",
        flush=True,
    )
    while len(sweep.kills) < options.kills:
        sweep.run(options.kills - len(sweep.kills))
    done, missed = damage(sweep.reference / "checkpoints", directory / "scratch", options.seed)
    lost = [f"kill {n}: {k.lost}" for n, k in enumerate(sweep.kills, 1) if k.lost]
    lost += sweep.different + missed
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    print(f"\n{date.today()}, {machine}, seed {options.seed}\n\n{table(sweep, done, missed)}")
    if options.out:
        result = {
            "date": str(date.today()), "machine": machine, "seed": options.seed,
            "steps": STEPS, "every": EVERY, "runs": sweep.runs, "lost": lost,
            "kills": [asdict(k) for k in sweep.kills], "damage": done,
            "seconds": round(time.monotonic() - began),
        }  # fmt: skip
        replace_file(options.out, json.dumps(result, indent=1) + "\n")
    if lost:
        print(f"\nLOST (files are in {directory}):", *lost, sep="\n")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
