"""One process that goes on from a checkpoint in wrong ways: ``python seams.py RUN OUT``.

RUN is a finished run of one process; OUT gets, in JSON, the figures of the two steps behind its
checkpoint of step 9, by what was lost there, and the messages of resumes that are refused.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from helpers.corpus import write_corpus
from helpers.runs import built
from nemo_hybrid.config.read import load_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.objectives.base import mtp_losses
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.optim import learning_rate
from nemo_hybrid.train.resume import restore
from nemo_hybrid.train.run import Position, Run
from nemo_hybrid.train.step import train_step


def nothing(run: Run, at: Position) -> None:
    """A condition of the others: the resume itself is right."""


def first_moments(run: Run, at: Position) -> None:
    for fragment in run.engine.fragments():
        fragment.tensors["exp_avg"].zero_()


def step_count(run: Run, at: Position) -> None:
    """Of the optimizer's bias correction."""
    for state in run.engine.zero.state.values():
        state["step"] = torch.tensor(0.0)


def position(run: Run, at: Position) -> None:
    at.batch -= 1


def schedule(run: Run, at: Position) -> None:
    at.step = 0


LOSSES: list[Callable[[Run, Position], None]] = [
    nothing,
    first_moments,
    step_count,
    position,
    schedule,
]


def two_steps(run: Run, at: Position) -> list[dict[str, Any]]:
    config = run.config
    rows = []
    for i, step in enumerate((at.step, at.step + 1)):
        batches = run.data.step(at.batch + i, run.share)
        done = train_step(run, batches, learning_rate(step, config.train))
        rows.append(
            {
                "loss": done.means["loss"],
                "mtp_losses": mtp_losses(done.means),
                "grad_norm": done.grad_norm,
                "sample_hash": done.sample_hash,
            }
        )
    return rows


def refusal(checkpoint: Path, run: Run) -> str:
    try:
        restore(checkpoint, run)
    except UserError as error:
        return str(error)
    return "not refused"


def main(run_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    world = World.start()
    checkpoint = run_dir / "checkpoints/step_00000009"
    config = load_config([run_dir / "config.yaml"])
    run = built(config, world)
    figures = {}
    for lose in LOSSES:
        at = restore(checkpoint, run)
        lose(run, at)
        figures[lose.__name__] = two_steps(run, at)

    newer = Path(shutil.copytree(checkpoint, out.parent / "newer" / checkpoint.name))
    state = json.loads((newer / "run_state.json").read_text())
    (newer / "run_state.json").write_text(json.dumps(state | {"format_version": 99}))
    foreign = out.parent / "foreign" / checkpoint.name
    foreign.mkdir(parents=True)
    messages = {"newer format": refusal(newer, run), "no checkpoint": refusal(foreign, run)}
    own = run.recipe.identity()
    with mock.patch.object(Pretrain, "identity", return_value={**own, "tokenizer": "0123"}):
        messages["tokenizer"] = refusal(checkpoint, run)
    config.data.path = str(write_corpus(out.parent / "other_store", seed=1))
    messages["data"] = refusal(checkpoint, built(config, world))
    config.model.moe_latent_size = 24
    messages["shape"] = refusal(checkpoint, built(config, world))
    out.write_text(
        json.dumps({"figures": figures, "messages": messages, "tokenizer": own["tokenizer"]})
    )
    World.stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
