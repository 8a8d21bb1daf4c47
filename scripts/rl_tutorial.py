#!/usr/bin/env python3
"""The steps of scripts/rl_tutorial.sh for each seed, and what came of them.

Writes OUT/summary.json, a list with one object per seed, OUT/rewards.png, and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs/run"
TASKS = ("sort", "reverse")
SHOWN = 10  # steps whose mean is a run's reward
DRAFTS = 3


class Lengths(NamedTuple):
    """Steps of the stages."""

    rl: int = 120
    noise: int = 40
    teacher: int = 80
    student: int = 140
    healing: int = 150


QUICK = Lengths(rl=80, noise=25, teacher=40, student=58, healing=60)


def command(*words: str | Path, together: bool = True) -> None:
    """Run a command of nemo-hybrid, in two processes or in one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = [sys.executable, *(launcher if together else []), "-m", "nemo_hybrid", *map(str, words)]
    paths = os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    print(f"-- {' '.join(map(str, words))}", flush=True)
    subprocess.run(given, check=True, env=environment, cwd=ROOT)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reinforce(run: Path, from_: Path, task: Path, steps: int, *words: str) -> list[dict[str, Any]]:
    command(
        "rl", "--config", CONFIGS / "rl_tiny_cpu.yaml", "--run_dir", run, "--model.from_hf", from_,
        "--data.path", task / "train.jsonl", "--data.heldout_path", task / "heldout.jsonl",
        "--train.max_steps", str(steps), *words,
    )  # fmt: skip
    return rows_of(run)


def acceptance(model: Path, prompts: Path, out: Path) -> float:
    """Tokens per pass of the decoding loop at temperature 1."""
    command(
        "eval-mtp", "--from", model, "--data", prompts, "--depths", str(DRAFTS),
        "--max_new_tokens", "12", "--slots", "64", "--out", out, together=False,
    )  # fmt: skip
    runs = json.loads((out / "eval_mtp.json").read_text())["runs"]
    return next(
        r["acceptance_length"] for r in runs if r["temperature"] == 1 and r["drafts"] == DRAFTS
    )


def heal(run: Path, from_: Path, task: Path, steps: int) -> Path:
    """Train the MTP block alone, on answers of the model. Returns the model."""
    answers = run.with_name("rollouts.jsonl")
    command(
        "rollout", "--from", from_, "--data", task / "train.jsonl", "--out", answers,
        "--max_new_tokens", "12", "--slots", "256", "--ep", "2",
    )  # fmt: skip
    command(
        "finetune", "--config", CONFIGS / "finetune_digits_cpu.yaml", "--run_dir", run,
        "--model.from_hf", from_, "--data.path", answers, "--train.trained", "mtp",
        "--boost.loss", "kl", "--boost.depths", str(DRAFTS), "--train.max_steps", str(steps),
        "--train.decay_steps", str(steps // 3), "--train.eval_sequences", "0",
    )  # fmt: skip
    return run / "model"


def unlike(before: Path, after: Path) -> list[str]:
    """Names of the tensors of which not every byte is the same in two models."""
    from safetensors.torch import load_file

    of = [
        {name: t for path in d.glob("*.safetensors") for name, t in load_file(path).items()}
        for d in (before, after)
    ]
    assert of[0].keys() == of[1].keys()
    return [n for n, t in of[0].items() if t.numpy().tobytes() != of[1][n].numpy().tobytes()]


def by_task(row: dict[str, Any]) -> dict[str, float]:
    return {task: row[f"heldout_reward_of_{task}"] for task in TASKS}


def one_seed(out: Path, seed: int, steps: Lengths) -> dict[str, Any]:
    began, task = time.monotonic(), out / "digits"
    subprocess.run(
        [sys.executable, ROOT / "scripts/rl_task.py", task, "--seed", str(seed)], check=True
    )
    answers = out / "answers"
    command(
        "finetune", "--config", CONFIGS / "finetune_digits_cpu.yaml", "--run_dir", answers,
        "--model.from_hf", task / "base", "--data.path", task / "answers.jsonl",
    )  # fmt: skip
    start = answers / "model"
    learnt = reinforce(out / "rl", start, task, steps.rl)
    noise = reinforce(
        out / "noise", start, task, steps.noise,
        "--environments", "{sort: {kind: 'rl_noise:Noise'}, reverse: {kind: 'rl_noise:Noise'}}",
    )  # fmt: skip
    teachers = {}
    for name in TASKS:
        own = out / f"{name}.jsonl"
        rows = (task / "train.jsonl").read_text().splitlines(keepends=True)
        own.write_text("".join(row for row in rows if json.loads(row)["environment"] == name))
        found = reinforce(out / name, start, task, steps.teacher, "--data.path", str(own))
        teachers[name] = by_task(found[-1])
    student = reinforce(
        out / "student", start, task, steps.student, "--rollout.samples", "1",
        "--train.lr", "8e-4", "--train.schedule", "wsd",
        "--train.decay_steps", str(2 * steps.student // 5),
        "--teachers", json.dumps({name: str(out / name / "model") for name in TASKS}),
        "--routes", json.dumps({name: name for name in TASKS}),
    )  # fmt: skip
    healed = heal(out / "healed", out / "rl/model", task, steps.healing)
    changed = [name for name in unlike(out / "rl/model", healed) if not name.startswith("mtp.")]
    assert not changed, f"healing changed {changed}"
    models = {"before": start, "after_rl": out / "rl/model", "after_healing": healed}
    summary = {
        "seed": seed,
        "reward_before": learnt[0]["reward"],
        "reward_after": mean(row["reward"] for row in learnt[-SHOWN:]),
        "noise_reward_gain": mean(r["reward"] for r in noise[-SHOWN:])
        - mean(r["reward"] for r in noise[:SHOWN]),
        "mopd": {"student": by_task(student[-1]), "teachers": teachers},
        "acceptance": {
            name: acceptance(model, task / "heldout.jsonl", out / f"acceptance_{name}")
            for name, model in models.items()
        },
        "mismatch_mean": mean(row["mismatch"] for row in learnt),
        "shares": shares(learnt),
        "seconds": time.monotonic() - began,
    }
    plot({"reward": learnt, "noise": noise, "student": student}, out / "rewards.png")
    return summary


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the time of a step."""
    total = sum(row["step_seconds"] for row in rows)
    found = {
        name: sum(row[f"{name}_s"] for row in rows) / total for name in ("rollout", "score", "prox")
    }
    update = sum(row["step_seconds"] - row["data_seconds"] for row in rows) / total
    return {**found, "update": update}


def plot(runs: dict[str, Sequence[dict[str, Any]]], out: Path) -> None:
    from nemo_hybrid.files import replace_file
    from nemo_hybrid.train.plots import png, styled

    figure, (axes,) = styled(1, 5.0)
    for name, rows in runs.items():
        axes.plot([row["step"] for row in rows], [row["reward"] for row in rows], label=name)
    axes.set(xlabel="step", ylabel="mean reward of a step's answers", ylim=(0, 1))
    axes.legend()
    replace_file(out, png(figure))


def show(summaries: Sequence[dict[str, Any]]) -> None:
    print()
    for s in summaries:
        student, teachers, kept = s["mopd"]["student"], s["mopd"]["teachers"], s["acceptance"]
        print(f"seed {s['seed']}: reward {s['reward_before']:.3f} -> {s['reward_after']:.3f}; "
              f"noise {s['noise_reward_gain']:+.3f}; mismatch {s['mismatch_mean']:.7f}; "
              f"{s['seconds']:.0f} s")  # fmt: skip
        for task in TASKS:
            of = ", ".join(f"teacher of {name} {t[task]:.3f}" for name, t in teachers.items())
            print(f"  {task}: student {student[task]:.3f}, {of}")
        regained = (kept["after_healing"] - kept["after_rl"]) / (kept["before"] - kept["after_rl"])
        print(
            "  tokens per pass: " + ", ".join(f"{name} {kept[name]:.2f}" for name in kept),
            f"({regained:.0%} of the loss regained; all bytes of the backbone as they were)",
        )
        print("  time of a step: " + ", ".join(f"{n} {x:.0%}" for n, x in s["shares"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/rl_tutorial")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, and fewer steps")
    options = parser.parse_args()
    seeds, steps = (options.seeds[:1], QUICK) if options.quick else (options.seeds, Lengths())
    summaries = []
    for seed in seeds:
        place = (options.out / f"seed_{seed}").absolute()
        place.mkdir(parents=True, exist_ok=True)
        summaries.append(one_seed(place, seed, steps))
        (options.out / "summary.json").write_text(json.dumps(summaries, indent=1))
    show(summaries)


if __name__ == "__main__":
    main()
