"""Runs that begin with another run's weights and moments: ``python phases.py STORE OUT``.

Makes OUT/unbroken, 4 steps on the same 2 global batches twice; OUT/phase, a phase of 2 steps from
the middle of it; OUT/moments, the same without the moments; OUT/longer, on longer rows; and
OUT/refused.json, what wrong beginnings are answered.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from helpers.runs import tiny_run
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share, Stored
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.loop import train

SAVED = 2


class Twice(Stored):
    """The first global batches, again and again."""

    def step(self, number: int, share: Share) -> list[Batch]:
        return super().step(number % SAVED, share)


class Repeating(Pretrain):
    data = Twice


def main(store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    # All runs share the world that DeepSpeed joins once per process.
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]
    steps = {"max_steps": 2 * SAVED, "lr": 1e-2, "eval_sequences": 0}
    ep = int(os.environ["WORLD_SIZE"])
    config = tiny_run(store, train=steps, recipe="bf16", ep=ep)
    config.checkpoint.every = SAVED
    run(config, out / "unbroken")
    # No model is named: it is that of the checkpoint.
    phase = tiny_run(store, train=steps | {"max_steps": SAVED}, recipe="bf16", ep=ep)
    middle = str(out / f"unbroken/checkpoints/step_{SAVED:08d}")
    phase = replace(phase, continue_from=middle)
    run(phase, out / "phase")
    run(replace(phase, continue_from=None), out / "moments")
    longer = replace(phase, data=replace(phase.data, sequence_length=64))
    longer.train = replace(longer.train, eval_sequences=8, eval_positions=True)
    run(replace(longer, continue_from=str(out / "unbroken")), out / "longer")
    run(replace(longer, continue_from=str(out / "unbroken")), out / "longer")  # as if started again

    fp32 = replace(phase, precision=replace(phase.precision, recipe="fp32"))
    changed = replace(phase, model=replace(phase.model, from_hf=None, hidden_size=128))
    with mock.patch.dict(os.environ):
        refused = {
            "dtype": refusal(fp32, out / "fp32"),
            "shape": refusal(changed, out / "changed"),
            "model": refusal(replace(phase, continue_from=str(store)), out / "model"),
        }
    if os.environ["RANK"] == "0":
        (out / "refused.json").write_text(json.dumps(refused))
    stop()


def run(config: RunConfig, run_dir: Path) -> None:
    train(Repeating(replace(config, run_dir=str(run_dir))), os.getppid())


def refusal(config: RunConfig, run_dir: Path) -> str:
    try:
        run(config, run_dir)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
