"""One process that goes on from a checkpoint in wrong ways: ``python seams.py RUN OUT``.

RUN is a finished run of one process; OUT gets, in JSON, the figures of the two steps behind its
checkpoint of step 9, by what was lost there, and the messages of resumes that are refused.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.corpus import write_corpus
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.data.loader import open_blend, steps
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.build import Run, build_run
from nemo_hybrid.train.optim import learning_rate
from nemo_hybrid.train.resume import Position, restore
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


def build(config: RunConfig, world: World) -> Run:
    hybrid = config.model.hybrid()
    return build_run(config, hybrid, world, open_blend(config.data, hybrid), 1)


def two_steps(run: Run, at: Position) -> list[dict[str, Any]]:
    config = run.config
    data = steps(
        run.data,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=0,
        world_size=1,
        start_step=at.batch,
        workers=0,
        seed=config.train.seed,
    )
    rows = []
    for step in (at.step, at.step + 1):
        done = train_step(run, next(data), learning_rate(step, config.train))
        loss, *depths = done.losses
        rows.append(
            {
                "loss": loss,
                "mtp_losses": depths,
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
    run = build(config, world)
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
    own = run.identity
    run.identity = replace(own, tokenizer="0123")
    messages["tokenizer"] = refusal(checkpoint, run)
    run.identity = own
    config.data.path = str(write_corpus(out.parent / "other_store", seed=1))
    messages["data"] = refusal(checkpoint, build(config, world))
    config.model.moe_latent_size = 24
    messages["shape"] = refusal(checkpoint, build(config, world))
    out.write_text(
        json.dumps({"figures": figures, "messages": messages, "tokenizer": own.tokenizer})
    )
    World.stop()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
