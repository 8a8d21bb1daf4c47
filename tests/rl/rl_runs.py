"""Runs of reinforcement learning: ``python rl_runs.py BASE OTHER QUESTIONS OUT``.

By one process: OUT/plain; OUT/rough_0 and OUT/rough_1, whose weights are rounded worse; OUT/twice,
where every rollout is learnt from twice, and OUT/resumed, which goes on from the middle of a
rollout of it; OUT/forgetful, which does not take its answers back; OUT/kept, towards a reference;
OUT/half, in bf16; OUT/alone, a step, and OUT/along, which trains the MTP block too; OUT/same,
taught by BASE, and OUT/swapped, by OTHER. Of PICKY beside BASE, whose routers choose: OUT/ahead,
which samples a rollout ahead and replays choices (OUT/generators.json: whether each generator of it
was asked for experts), OUT/ahead_resumed, and OUT/drifted, which takes
experts back wrongly; OUT/behind, which does not sample ahead, and OUT/still, which hardly learns.
By two: OUT/ahead_ep, and OUT/ahead_ep_resumed; OUT/world and OUT/ep; OUT/local, where a process
divides by its own count of tokens; OUT/idle, in which one process has no prompt; OUT/taught, by
both; OUT/adapted, of adapters; and OUT/failure_0 and OUT/failure_1, what each says when one cannot
evaluate. By four: OUT/four.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.bands import SAFETY, unit
from helpers.questions import ask
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.batched import Generator
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes import recipe_of, rollouts
from nemo_hybrid.recipes.reinforce import Reinforce
from nemo_hybrid.recipes.rollouts import Rollouts
from nemo_hybrid.train import loop

summed, loaded = World.sum, Reinforce._load

STEPS, DRAWS = 3, 2
TWICE, BETWEEN = 5, 3
Saved = dict[str, Callable[[], Tensor]]


def main(base: Path, other: Path, questions: Path, out: Path) -> None:
    torch.set_num_threads(1)
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]
    loop.write_plots = lambda run_dir: []  # type: ignore[assignment]

    def run(name: str, **changes: Any) -> None:
        loop.train(recipe_of(ask(base, questions, out / name, **changes)), os.getppid())

    def go_on(name: str, from_: str, last: int, **changes: Any) -> None:
        if os.environ.get("RANK", "0") == "0":
            shutil.copytree(out / from_, out / name)
            shutil.rmtree(out / name / f"checkpoints/step_{last:08d}")
        if dist.is_initialized():
            dist.barrier()
        run(name, **changes)

    one = out / "one.jsonl"
    one.write_text('{"prompt": "ab", "environment": "letters"}\n')
    teachers = {"a": str(base), "b": str(other)}
    picky = {"model__from_hf": str(base.with_name("picky")), "rl__updates": 2}
    ahead = {**picky, "rollout__lag": 1, "rl__router_replay": True, "train__max_steps": TWICE}
    ahead |= {"train__eval_sequences": 4, "data__heldout_path": str(questions)}
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 4:
        run("four", parallel__ep=2, train__micro_batch_size=1)
        return stop()
    if size > 1:
        run("world")
        run("ep", parallel__ep=2)
        with patch.object(World, "sum", own_counts):
            run("local")
        run("idle", parallel__ep=2, train__global_batch_size=4, data__path=str(one))
        routes = {"digits": "b", "default": "a"}
        run("taught", parallel__ep=2, teachers=teachers, routes=routes)
        ahead |= {"checkpoint__every": BETWEEN, "parallel__ep": 2, "train__micro_batch_size": 1}
        run("ahead_ep", **ahead)
        go_on("ahead_ep_resumed", "ahead_ep", TWICE, **ahead)
        run("adapted", parallel__ep=2, lora__rank=2, train__max_steps=2)
        rank = os.environ["RANK"]
        with patch.object(Rollouts, "_generate", fails) if rank == "1" else nullcontext():
            try:
                run("fails", train__eval_sequences=4, data__heldout_path=str(questions))
            except UserError as error:
                (out / f"failure_{rank}").write_text(str(error))
        return stop()
    run("plain", rollout__log_every=2)
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        with patch.object(Reinforce, "_load", rough):
            run(f"rough_{draw}")
    twice = {"train__max_steps": TWICE, "checkpoint__every": BETWEEN, "rl__updates": 2}
    run("twice", **twice)
    go_on("resumed", "twice", TWICE, **twice)
    restore = Rollouts.restore

    def forget(self: Rollouts, state: dict[str, Any], saved: Saved) -> None:
        turns = [[number, 4, agreement] for number, _, agreement in state["kept"]]
        restore(self, {**state, "kept": turns}, saved)

    with patch.object(Rollouts, "restore", forget):
        go_on("forgetful", "twice", TWICE, **twice)
    ahead["checkpoint__every"] = BETWEEN
    generators: list[bool] = []

    def watched(*given: Any, experts: bool, **more: Any) -> Generator:
        generators.append(experts)
        return Generator(*given, experts=experts, **more)

    with patch.object(rollouts, "Generator", watched):
        run("ahead", **ahead)
    (out / "generators.json").write_text(json.dumps(generators))
    go_on("ahead_resumed", "ahead", TWICE, **ahead)

    def drift(self: Rollouts, state: dict[str, Any], saved: Saved) -> None:
        restore(self, state, saved)
        for turn in self._turns:
            turn.experts = {n: np.roll(of, 1, 0) for n, of in turn.experts.items()}

    with patch.object(Rollouts, "restore", drift):
        go_on("drifted", "ahead", TWICE, **ahead)
    run("behind", **picky)
    run("still", **picky, train__lr=1e-12)
    run("half", precision__recipe="bf16", train__max_steps=2)
    free = {"train__max_steps": 1, "train__clip_grad_norm": 1e6}
    run("alone", **free)
    run("along", train__mtp_loss_weight=0.3, **free)
    run("kept", rl__kl=1000.0, train__max_steps=2)
    alone = {"data__path": str(one), "rollout__samples": 1, "train__max_steps": 2}
    run("same", teachers=teachers, routes={"letters": "a", "default": "b"}, **alone)
    run("swapped", teachers=teachers, routes={"letters": "b", "default": "a"}, **alone)
    stop()


def rough(recipe: Reinforce, model: HybridLM, world: World) -> dict[str, Tensor]:
    """Weights that are rounded worse before the first step."""
    weights = loaded(recipe, model, world)
    with torch.no_grad():
        for tensor in weights.values():
            reach = SAFETY * unit(tensor.dtype)
            tensor *= 1 + reach * (2 * torch.rand(tensor.shape) - 1)
    return weights


def own_counts(world: World, tensor: Tensor) -> Tensor:
    """What each process has itself, as if all had it, where numbers are counted."""
    return tensor * world.size if tensor.dtype == torch.int64 else summed(world, tensor)


def fails(*_: object) -> None:
    raise OSError("nothing can be said")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
