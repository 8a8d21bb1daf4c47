"""Runs of reinforcement learning: ``python rl_runs.py BASE OTHER QUESTIONS OUT``.

By one process: OUT/plain, whole; OUT/resumed, which goes on from the middle of it; OUT/twice and
OUT/twice_resumed, the same where every rollout is learnt from twice and the checkpoint lies
between; OUT/forgetful, which does not take its answers back; OUT/kept, towards a reference;
OUT/same, taught by BASE, and OUT/swapped, by OTHER. By two: OUT/world, OUT/ep and OUT/idle, in
which one process has no prompt, and OUT/taught, by both.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.questions import ask
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes import recipe_of
from nemo_hybrid.recipes.rollouts import Rollouts
from nemo_hybrid.train.loop import train

STEPS, SAVED = 4, 3
TWICE, BETWEEN = 4, 3


def main(base: Path, other: Path, questions: Path, out: Path) -> None:
    torch.set_num_threads(1)
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]

    def run(name: str, **changes: Any) -> None:
        train(recipe_of(ask(base, questions, out / name, **changes)), os.getppid())

    def go_on(name: str, from_: str, last: int, **changes: Any) -> None:
        shutil.copytree(out / from_, out / name)
        shutil.rmtree(out / name / f"checkpoints/step_{last:08d}")
        run(name, **changes)

    one = out / "one.jsonl"
    one.write_text('{"prompt": "ab", "environment": "letters"}\n')
    teachers = {"a": str(base), "b": str(other)}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        run("world")
        run("ep", parallel__ep=2)
        run("idle", parallel__ep=2, train__global_batch_size=4, data__path=str(one))
        routes = {"digits": "b", "default": "a"}
        run("taught", parallel__ep=2, teachers=teachers, routes=routes)
        return stop()
    plain = {"train__max_steps": STEPS, "checkpoint__every": SAVED, "rollout__log_every": 2}
    run("plain", **plain)
    go_on("resumed", "plain", STEPS, **plain)
    twice = {"train__max_steps": TWICE, "checkpoint__every": BETWEEN, "rl__updates": 2}
    run("twice", **twice)
    go_on("twice_resumed", "twice", TWICE, **twice)
    restore = Rollouts.restore
    Rollouts.restore = (
        lambda self, state: restore(  # type: ignore[method-assign]
            self, {**state, "answers": state["answers"][:4]}
        )
    )
    go_on("forgetful", "twice", TWICE, **twice)
    Rollouts.restore = restore  # type: ignore[method-assign]
    run("kept", rl__kl=1000.0, train__max_steps=2)
    alone = {"data__path": str(one), "rollout__samples": 1, "train__max_steps": 2}
    run("same", teachers=teachers, routes={"letters": "a", "default": "b"}, **alone)
    run("swapped", teachers=teachers, routes={"letters": "b", "default": "a"}, **alone)
    stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
