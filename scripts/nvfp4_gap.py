"""How much worse a tiny hybrid learns in NVFP4 than in bf16, and what each ingredient is worth.

    python scripts/nvfp4_gap.py [--quick] [--out DIR] [--seeds N] [--tokens N] [--KEY VALUE ...]

Trains the model of configs/run/nvfp4_gap.yaml on the default corpus in bf16, in the NVFP4 recipe
of Nemotron 3 Super, in the recipe minus one ingredient, and with everything in NVFP4. Runs of one
seed start from the same weights and read the same samples, so their losses are compared in pairs.
Prints relative gaps, mean +- standard deviation over seeds, beside published figures, and writes
them to nvfp4_gap.{json,md,png}. Runs that a stopped experiment left in the work directory are used
again, or gone on with. --KEY VALUE is an option of `pretrain`, for every run.

Exit status: 0 done, 1 a run failed, 2 a mistake in options or files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.config.read import dump_config, load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import make_directories, naming, replace_file
from nemo_hybrid.terminal import print_table
from nemo_hybrid.train.metrics import METRICS_FILE, StepMetrics, read_metrics
from nemo_hybrid.train.plots import png, smooth, styled
from nemo_hybrid.train.progress import clock
from nemo_hybrid.train.run_dir import CONFIG_FILE

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "run" / "nvfp4_gap.yaml"
BASE, RECIPE = "bf16", "recipe"
_RECIPE = ("--precision.recipe", "nvfp4_super")
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: ("--precision.recipe", "bf16"),
    RECIPE: _RECIPE,
    "recipe-no-rht": (*_RECIPE, "--precision.rht", "false"),
    "recipe-no-sr": (*_RECIPE, "--precision.stochastic_rounding", "false"),
    "recipe-1d-weights": (*_RECIPE, "--precision.two_dimensional_weights", "false"),
    "all-nvfp4": ("--precision.recipe", "nvfp4_all"),
}
PUBLISHED = (
    ("Nemotron 3 Nano, 1T tokens, to BF16, training loss", "below 1 %", "arXiv 2512.20856, 2.4"),
    ("8B-active MoE hybrid, 1T tokens, the same", "below 0.6 %", "arXiv 2512.20856, 2.4"),
    ("Nemotron 3 Ultra, BF16 branches of 60B tokens", "0.30 to 0.34 %", "Ultra report"),
    ("12B hybrid, 10T tokens, to FP8, validation loss, stable phase", "below 1 %",
     "arXiv 2509.25149, 3"),
    ("the same, end of the decay", "slightly above 1.5 %", "arXiv 2509.25149, 3"),
)  # fmt: skip
"""What, gap, source."""
DONE = "done.json"
FULL, QUICK = (3, 1_000_000), (2, 500_000)
"""Seeds, and least tokens of a run."""
POLL_S, REPORT_S = 1.0, 30.0
POINTS = 100
"""Of a curve in the result."""


@dataclass(frozen=True)
class Gap:
    """Relative differences of paired losses, in per cent, over seeds."""

    per_seed: list[float]
    mean: float
    spread: float
    """Standard deviation over seeds (n - 1); NaN for one seed."""
    standard_error: float
    resolved: bool
    """Whether the mean is at least twice the spread."""

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} ± {self.spread:.2f} (s.e. {self.standard_error:.2f})"
        return text if self.resolved else f"{text} unresolved"


def paired_gap(losses: Sequence[float], base: Sequence[float]) -> Gap:
    """The gap of ``losses`` to ``base``, entry i of both from seed i."""
    if len(losses) != len(base) or not base:
        raise ValueError(f"losses: expected one per seed of base ({len(base)}), got {len(losses)}")
    gaps = [100 * (loss - other) / other for loss, other in zip(losses, base, strict=True)]
    finite = all(map(math.isfinite, gaps))
    mean = statistics.fmean(gaps)
    spread = statistics.stdev(gaps) if len(gaps) > 1 and finite else math.nan
    return Gap(gaps, mean, spread, spread / math.sqrt(len(gaps)), abs(mean) >= 2 * spread)


def last_tenth(losses: Sequence[float]) -> float:
    """Mean of the last tenth, of one entry at least."""
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def gap_over_training(losses: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread over seeds [steps] of the gap in per cent between losses [seeds][steps],
    smoothed over a tenth of the run first."""
    span = losses.shape[1] // 10
    ours, other = (np.stack([smooth(run, span) for run in runs]) for runs in (losses, base))
    gaps = 100 * (ours / other - 1)
    spread = gaps.std(axis=0, ddof=1) if len(gaps) > 1 else np.zeros(gaps.shape[1])
    return gaps.mean(axis=0), spread


class Job:
    """One run of a variant: its directory, its command, and its process while there is one."""

    def __init__(self, variant: str, seed: int, work: Path, config: Path, words: Sequence[str]):
        self.variant, self.seed = variant, seed
        name = f"{variant}-{seed}"
        self.run_dir, self.log = work / name, work / "logs" / f"{name}.log"
        own = ("--run_dir", str(self.run_dir), "--train.seed", str(seed))
        self.words = ("--config", str(config), *words, *VARIANTS[variant], *own)
        self.config: RunConfig = load_config([config], self.words[2:])
        self.process: subprocess.Popen[bytes] | None = None
        saved = self.run_dir / CONFIG_FILE
        if saved.is_file() and saved.read_text() != dump_config(self.config, in_run_dir=True):
            raise UserError(
                f"{self.run_dir} holds a run of another configuration; choose another --work, or "
                "remove it"
            )

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return (self.run_dir / DONE).is_file()

    def steps(self) -> int:
        metrics = self.run_dir / METRICS_FILE
        return sum(1 for _ in metrics.open("rb")) if metrics.is_file() else 0

    def rows(self) -> list[StepMetrics]:
        return read_metrics(self.run_dir / METRICS_FILE)

    def start(self) -> None:
        with naming("write", self.log):
            make_directories(self.log.parent)
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "nemo_hybrid", "pretrain", *self.words],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip

    def ended(self) -> bool:
        """Whether its process has ended well. Raises ChildProcessError if it failed."""
        if self.process is None or (status := self.process.poll()) is None:
            return False
        if status:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ChildProcessError(f"{self} failed with status {status}; {self.log} ends:\n{tail}")
        replace_file(self.run_dir / DONE, json.dumps(environment(), indent=1))
        return True


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Bring every run to its end. Raises ChildProcessError when one fails, with the others stopped;
    what is interrupted goes on from its last checkpoint the next time."""
    waiting, running = [job for job in jobs if not job.done], []
    total = sum(job.config.train.max_steps for job in jobs)
    began, reported, before = time.monotonic(), 0.0, sum(job.steps() for job in jobs)
    print(f"{len(jobs)} runs, of which {len(jobs) - len(waiting)} are complete", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL_S)
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                print(f"  {job}: held-out loss {job.rows()[-1].heldout_loss:.4f}", flush=True)
            if time.monotonic() - reported > REPORT_S:
                reported, made = time.monotonic(), sum(job.steps() for job in jobs)
                rate = (made - before) / (reported - began)
                left = clock((total - made) / rate) if made > before else "?"
                now = "; ".join(f"{job} at step {job.steps()}" for job in running)
                print(f"{made / total:4.0%}, about {left} left: {now}", flush=True)
    finally:
        for job in running:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)  # it writes a checkpoint
        for job in running:
            if job.process is not None:
                job.process.wait()


def prepare_corpus(config: RunConfig) -> None:
    """Make the default corpus where it is missing. Raises UserError, ChildProcessError."""
    path = config.data.path
    if path is None or Path(path).exists():
        return
    words = ["prepare", "--out", path, "--vocab_size", str(config.model.vocab_size)]
    if status := subprocess.run([sys.executable, "-m", "nemo_hybrid", *words]).returncode:
        raise ChildProcessError(f"preparing the corpus failed with status {status}")


def analyse(jobs: Mapping[str, Sequence[Job]]) -> dict[str, Any]:
    """Losses and gaps of the finished runs, by variant and in the order of seeds. Raises UserError
    where two runs of one seed did not read the same samples."""
    rows = {name: [job.rows() for job in own] for name, own in jobs.items()}
    for name, runs in rows.items():
        for job, run, base in zip(jobs[name], runs, rows[BASE], strict=True):
            if [m.sample_hash for m in run] != [m.sample_hash for m in base]:
                raise UserError(
                    f"{job}: not trained on the samples of {BASE}; batches passed over: "
                    f"{run[-1].skipped_batches}, by {BASE}: {base[-1].skipped_batches}"
                )
    curves = {
        name: np.array([[m.loss for m in run] for run in runs]) for name, runs in rows.items()
    }
    losses = {
        name: {
            "held_out": [float(run[-1].heldout_loss or "nan") for run in runs],
            "training": [last_tenth(curve.tolist()) for curve in curves[name]],
        }
        for name, runs in rows.items()
    }
    result: dict[str, Any] = {}
    for name, own in jobs.items():
        result[name] = {
            "options": list(VARIANTS[name]),
            "runs": [
                {
                    "seed": job.seed,
                    **{f"{kind}_loss": found[i] for kind, found in losses[name].items()},
                    "seconds": sum(m.step_seconds for m in rows[name][i]),
                    "low_precision": next(
                        (m.low_precision for m in reversed(rows[name][i]) if m.low_precision), None
                    ),  # the last sample
                    "environment": json.loads((job.run_dir / DONE).read_text()),
                }
                for i, job in enumerate(own)
            ],
        }
        for base in (BASE, RECIPE):
            if name not in (BASE, base) and base in jobs:
                result[name][f"to {base}"] = {
                    kind: asdict(paired_gap(found, losses[base][kind]))
                    for kind, found in losses[name].items()
                }
        if name != BASE:
            m = rows[name][0]
            points = np.unique(np.linspace(0, len(m) - 1, POINTS).astype(int))
            mean, spread = gap_over_training(curves[name], curves[BASE])
            result[name]["gap over training"] = {
                "tokens": [m[i].tokens_total for i in points],
                "mean": mean[points].tolist(),
                "spread": spread[points].tolist(),
            }
    return result


def tables(variants: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of results."""
    head = ["variant", "held-out loss", "gap to bf16, %", "training loss, last tenth: gap, %",
            "held-out, to the recipe, %"]  # fmt: skip
    rows = []
    for name, found in variants.items():
        mean = statistics.fmean(run["held_out_loss"] for run in found["runs"])
        base, recipe = found.get(f"to {BASE}"), found.get(f"to {RECIPE}")
        gaps = [base and base["held_out"], base and base["training"], recipe and recipe["held_out"]]
        rows.append([name, f"{mean:.4f}", *(str(Gap(**gap)) if gap else "" for gap in gaps)])
    return head, rows


def markdown(result: Mapping[str, Any]) -> str:
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]

    where, model = result["environment"], result["config"]["model"]
    found = {run["environment"]["commit"] for v in result["variants"].values() for run in v["runs"]}
    return "\n".join([
        "# NVFP4 against bf16 on a tiny hybrid", "",
        f"Pattern {model['pattern']}, hidden size {model['hidden_size']}, {result['tokens']:,} "
        f"tokens per run, seeds {', '.join(map(str, result['seeds']))}. {result['arithmetic']}",
        "Gaps are means over seeds of the relative difference of two runs of one seed, ± standard "
        "deviation over seeds (s.e.: standard error of the mean); unresolved: smaller than twice "
        "the standard deviation. Held-out losses are those of the model as it trains: forward "
        "products are in the variant's formats.", "",
        *table(*tables(result["variants"])), "", "Published, for models that are far larger:", "",
        *table(("what", "gap", "source"), PUBLISHED), "",
        f"{where['cpu']}, torch {where['torch']}, commit {', '.join(sorted(found))}"
        f"{' with uncommitted changes' if where['uncommitted_changes'] else ''}, {where['date']}: "
        f"`{result['command']}`", "",
    ])  # fmt: skip


def plot(variants: Mapping[str, Any]) -> bytes:
    """PNG of the gap of the training loss over training, one line per variant."""
    figure, (axes,) = styled(1, 5.0, grid=False)
    axes.axhline(0, color="#333333", lw=1, label=BASE)
    for name, found in variants.items():
        if name != BASE:
            tokens, mean, spread = map(np.array, found["gap over training"].values())
            (line,) = axes.plot(tokens, mean, lw=1.6, label=name)
            band = mean - spread, mean + spread
            axes.fill_between(tokens, *band, alpha=0.1, color=line.get_color(), lw=0)
    axes.set_title("Training loss relative to bf16, mean ± spread over seeds", loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylabel("gap in per cent, smoothed over a tenth of the run")
    axes.legend(frameon=False)
    return png(figure)


def _quoted(result: Mapping[str, Any]) -> Any:
    """With NaN and infinities as texts, which JSON lacks."""
    return json.loads(json.dumps(result), parse_constant=str)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK[0]} seeds of {QUICK[1]:,} tokens")
    add("--work", type=Path, default=ROOT / "runs" / "nvfp4_gap", help="directory of the runs")
    add("--out", type=Path, help="directory of the result; absent: --work")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--seeds", type=int, help=f"how many; absent: {FULL[0]}")
    add("--tokens", type=int, help=f"of each run; absent: {FULL[1]:,}")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"some of: {', '.join(VARIANTS)}; bf16 is always made")  # fmt: skip
    add("--config", type=Path, default=CONFIG, help="configuration of the runs")
    given, words = parser.parse_known_args(arguments)
    try:
        experiment(given, words, sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ChildProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def experiment(given: argparse.Namespace, words: list[str], command: Sequence[str]) -> None:
    seeds, tokens = QUICK if given.quick else FULL
    seeds, tokens = given.seeds or seeds, given.tokens or tokens
    for option, number in (("seeds", seeds), ("tokens", tokens), ("jobs", given.jobs)):
        if number < 1:
            raise UserError(f"--{option} must be positive, got {number}")
    words = ["--data.path", str(given.work.resolve() / "corpus"), *words]
    plain: RunConfig = load_config([given.config], words)
    per_step = plain.train.global_batch_size * plain.data.sequence_length
    steps = -(-tokens // per_step)
    # One schedule for every length: 5 % warm-up, decay over the last 30 %.
    length = {"max_steps": steps, "warmup_steps": steps // 20, "decay_steps": 3 * steps // 10}
    words += [word for name, n in length.items() for word in (f"--train.{name}", str(n))]
    work = given.work.resolve() / f"{steps * per_step}-tokens"
    names = [name for name in VARIANTS if name == BASE or name in given.variants]
    jobs = {
        name: [Job(name, seed, work, given.config, words) for seed in range(1, seeds + 1)]
        for name in names
    }
    prepare_corpus(plain)
    # Seed by seed: a stopped experiment has whole pairs.
    run_all([own[i] for i in range(seeds) for own in jobs.values()], given.jobs)
    variants = analyse(jobs)
    emulated = any("emulated" in job.log.read_text() for own in jobs.values() for job in own)
    result = {
        "command": shlex.join(["python", "scripts/nvfp4_gap.py", *command]),
        "arithmetic": "NVFP4 and MXFP8 are emulated here: the values that FP4 units would compute, "
        "with fp32 sums, and nothing of their speed."
        if emulated
        else "",
        "environment": environment(),
        "config": asdict(jobs[BASE][0].config),
        "tokens": steps * per_step,
        "seeds": list(range(1, seeds + 1)),
        "variants": variants,
        "published": [dict(zip(("what", "gap", "source"), row, strict=True)) for row in PUBLISHED],
    }
    content: dict[str, str | bytes] = {
        # Without the place of this checkout, which says nothing.
        "json": json.dumps(_quoted(result), indent=1, ensure_ascii=False).replace(f"{ROOT}/", ""),
        "md": markdown(result),
        "png": plot(variants),
    }
    out = (given.out or given.work).resolve()
    with naming("write", out):
        make_directories(out)
    for ending, text in content.items():
        replace_file(out / f"nvfp4_gap.{ending}", text)
    head, rows = tables(variants)
    print_table(head, rows, f"{steps * per_step:,} tokens per run, {seeds} seeds")
    print_table(("what", "gap", "source"), PUBLISHED, "Published, for far larger models")
    print(f"{result['arithmetic']}\n{out}/nvfp4_gap.json, .md and .png".strip())


if __name__ == "__main__":
    sys.exit(main())
