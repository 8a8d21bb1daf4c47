"""Runs of the kind that docs/extending.md invents: ``python own_words.py STORE OUT``.

Makes OUT/plain, a whole run; OUT/resumed, which goes on from the middle of it; and OUT/forgetful,
the same with data that does not take back its state.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.pages import code_of
from helpers.runs import tiny_run
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.loop import train

STEPS, SAVED = 4, 2


def main(store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    page = code_of("A new objective", "A new kind of run")
    own_words = page["OwnWords"]
    # All runs share the world that DeepSpeed joins once per process.
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]
    config = tiny_run(store, train={"max_steps": STEPS, "mtp_loss_weight": 0.3}, ep=_size())
    config.checkpoint.every = SAVED
    for name in ("plain", "resumed", "forgetful"):
        run_dir = out / name
        if name != "plain" and os.environ.get("RANK", "0") == "0":
            shutil.copytree(out / "plain", run_dir)
            shutil.rmtree(run_dir / f"checkpoints/step_{STEPS:08d}")
        if name == "forgetful":
            own_words.restore = lambda self, state, saved: None
        train(page["SelfTrain"](replace(config, run_dir=str(run_dir))), os.getppid())
    stop()


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
