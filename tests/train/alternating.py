"""Runs that alternate between long and short rows: ``python alternating.py STORE OUT``.

Makes OUT/whole, of 4 steps; OUT/resumed, which goes on from its third; and OUT/refused.json, how
another share and none is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.corpus import ALL_EXPERTS
from helpers.runs import tiny_run
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.config.short import ShortOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.loop import train

STEPS, SAVED, SHORT = 4, 3, 8


def run_of(store: Path, size: int) -> RunConfig:
    """In fp32, with a large enough epsilon that Adam does not divide by what rounding left."""
    options = {"max_steps": STEPS, "micro_batch_size": 2, "aux_loss_weight": 0.05, "eps": 1e-3}
    options |= {"eval_sequences": 0, "router_bias_rate": 0.0}
    config = tiny_run(store, model=ALL_EXPERTS, train=options, ep=size)
    config.checkpoint.every = SAVED
    config.data.short = ShortOptions(sequence_length=SHORT, path=str(store))
    return config


def main(store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    # All runs share the world that DeepSpeed joins once per process.
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]
    config = run_of(store, int(os.environ["WORLD_SIZE"]))
    train(Pretrain(replace(config, run_dir=str(out / "whole"))), os.getppid())
    if os.environ["RANK"] == "0":
        shutil.copytree(out / "whole", out / "resumed")
        shutil.rmtree(out / f"resumed/checkpoints/step_{STEPS:08d}")
    train(Pretrain(replace(config, run_dir=str(out / "resumed"))), os.getppid())

    refused = []
    checkpoint = str(out / f"whole/checkpoints/step_{SAVED:08d}")
    for short in (replace(config.data.short, share=0.25), ShortOptions()):
        changed = replace(config, data=replace(config.data, short=short), resume=checkpoint)
        try:
            train(Pretrain(replace(changed, run_dir=str(out / "other"))), os.getppid())
        except UserError as error:
            refused.append(str(error))
    if os.environ["RANK"] == "0":
        (out / "refused.json").write_text(json.dumps({"refused": refused}))
    stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
