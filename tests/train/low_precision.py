"""Runs in low precision, one after the other in one process: ``python low_precision.py STORE OUT``.

Makes OUT/NAME/run and OUT/NAME/said (its standard output) for every entry of RUNS.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.runs import tiny_run
from nemo_hybrid import cli
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision.policy import Precision
from nemo_hybrid.train import loop

DIVISIBLE = {"mamba_num_heads": 16, "mamba_head_dim": 4, "moe_intermediate_size": 32}
"""By 16, and the inner width of Mamba-2 layers by 32."""
STEPS, SAVED = 4, 2
SHORT = ("--train.max_steps", "2", "--train.eval_sequences", "0", "--checkpoint.every", "1")


def low_run(store: Path) -> RunConfig:
    train = {"max_steps": STEPS, "eval_every": SAVED, "eval_sequences": 5}
    config = tiny_run(store, model=DIVISIBLE, recipe="nvfp4_super", train=train)
    config.checkpoint.every = SAVED
    return config


@contextmanager
def forgetful() -> Iterator[None]:
    """Rounding streams that start anew with every start of the run."""
    start_step, batches = Precision.start_step, itertools.count(-1)  # the first call: when built

    def start(self: Precision, step: int, batch: int) -> None:
        start_step(self, step, next(batches))

    with mock.patch.object(Precision, "start_step", start):
        yield


@contextmanager
def poisoned(where: str) -> Iterator[None]:
    """One NaN in the second batch, in what meets a product in low precision."""
    step, calls = loop.train_step, itertools.count(1)

    def spoil(module: Any, inputs: Any, y: Any) -> None:
        y.register_hook(lambda dy: dy.index_fill(-1, torch.tensor([3]), math.nan))

    def spoiled(run: Any, *args: Any, **options: Any) -> Any:
        if next(calls) != 2:
            return step(run, *args, **options)
        layer = run.model.backbone.layers[0]
        if where == "gradient":
            with layer.mixer.in_proj.register_forward_hook(spoil):
                return step(run, *args, **options)
        target = (layer.mixer.in_proj if where == "weight" else layer.norm).weight.data.view(-1)
        kept = target[5].item()
        target[5] = math.nan
        outcome = step(run, *args, **options)
        target[5] = kept
        return outcome

    with mock.patch.object(loop, "train_step", spoiled):
        yield


RUNS: dict[str, tuple[str | None, tuple[str, ...], Callable[[], Any] | None]] = {
    # name: run that it goes on from after SAVED steps, words, fault
    "plain": (None, (), None),
    "resumed": ("plain", (), None),
    "forgetful": ("plain", (), forgetful),
    "recomputed": (None, ("--train.recompute", "ME*-"), None),
    "experts recomputed": (None, ("--train.recompute", "e"), None),
    "bf16": (None, ("--precision.recipe", "bf16"), None),
    "switched": (None, ("--precision.switch_step", "2"), None),
    "forward switched": (
        None,
        ("--precision.switch_step", "2", "--precision.switch_passes", "forward"),
        None,
    ),
    "branch": ("plain", ("--precision.recipe", "bf16"), None),
    "formats": (None, (*SHORT, "--precision.formats", "{'*.o_proj': nvfp4}"), None),
    "all": (None, (*SHORT, "--precision.recipe", "nvfp4_all"), None),
    "all recomputed": (
        None,
        (*SHORT, "--precision.recipe", "nvfp4_all", "--train.recompute", "ME*-"),
        None,
    ),
    **{
        f"nan in {where}": (None, SHORT, lambda where=where: poisoned(where))  # type: ignore[misc]
        for where in ("activation", "weight", "gradient")
    },
}


def main(store: Path, out: Path) -> int:
    torch.set_num_threads(1)
    (out / "run.yaml").write_text(dump_config(low_run(store)))
    for name, (origin, words, fault) in RUNS.items():
        run_dir = out / name / "run"
        if origin is None:
            run_dir.parent.mkdir()
        else:
            shutil.copytree(out / origin / "run", run_dir)
            shutil.rmtree(run_dir / f"checkpoints/step_{STEPS:08d}")
        command = ["pretrain", "--config", str(out / "run.yaml"), "--run_dir", str(run_dir)]
        with (out / name / "said").open("w") as said, redirect_stdout(said):
            if fault is None:
                status = cli.main([*command, *words])
            else:
                with fault():
                    status = cli.main([*command, *words])
        if status:
            return status
    return 0


if __name__ == "__main__":
    # DeepSpeed joins one world per process, which the runs share.
    stop, World.stop = World.stop, lambda: None  # type: ignore[method-assign,assignment]
    ended = main(*map(Path, sys.argv[1:]))
    stop()
    sys.exit(ended)
