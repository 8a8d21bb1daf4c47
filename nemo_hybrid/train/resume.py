"""Between the engine and the checkpoint files: what a rank writes, and what it takes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.directory import together
from nemo_hybrid.checkpoint.files import step_of
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.state import (
    check_masters,
    check_resumable,
    load_rank_state,
    load_state,
    save_checkpoint,
)
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config import RunConfig
from nemo_hybrid.config_load import dump_config
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.engine import Engine

__all__ = ["Identity", "restore", "save", "step_of"]


@dataclass(frozen=True)
class Identity:
    """What must be equal for a checkpoint to continue the same sequence of samples."""

    data: list[str]  # digests of the token stores
    weights: list[float]  # with which they are drawn
    tokenizer: str  # digest
    sequence_length: int
    global_batch_size: int
    seed: int


def save(
    checkpoints: Path,
    step: int,
    engine: Engine,
    model: HybridLM,
    identity: Identity,
    config: RunConfig,
    tokenizer_dir: Path,
) -> None:
    """Write the checkpoint after ``step`` steps; all ranks call this together."""
    world = engine.world
    save_checkpoint(
        checkpoints,
        step,
        world,
        config=model.config,
        weights=_owned(engine, model),
        fragments=engine.fragments(),
        run_state={
            **asdict(identity),
            "optimizer_steps": engine.optimizer_steps,
            "layout": {
                "world_size": world.size,
                "ep": config.parallel.ep,
                "zero": config.parallel.zero,
                "precision": config.precision.recipe,
            },
        },
        rank_state={"torch_rng": torch.get_rng_state()},
        tokenizer_files=tokenizer_dir,
        resolved_config=dump_config(config),
        keep=config.checkpoint.keep,
    )


def restore(directory: Path, engine: Engine, model: HybridLM, identity: Identity) -> int:
    """Load weights, masters, moments, router biases and RNG; return the steps already done.

    Raises UserError if the checkpoint belongs to another model, data store, tokenizer, sequence
    length, batch size or seed, or if its weights are not the rounding of their masters.
    """

    def read() -> int:
        state = check_resumable(directory, model.config, asdict(identity))
        targets, experts = tensors_by_name(model), model.owned_experts
        load_weights(directory, targets, experts, n_experts=model.config.n_routed_experts)
        engine.allocate_state(int(state["optimizer_steps"]))
        fragments = list(engine.fragments())
        load_state(directory, fragments)
        weights = [(name, tensor, _first_expert(name, model)) for name, tensor in targets.items()]
        check_masters(weights, fragments)
        return int(state["step"])

    steps = together(engine.world, read)
    engine.publish_masters()
    own = load_rank_state(directory, engine.world.rank)
    if own is not None:
        torch.set_rng_state(own["torch_rng"])
    return steps[0]


def _owned(engine: Engine, model: HybridLM) -> Iterator[tuple[str, Tensor, int]]:
    """What this rank writes: rank 0 what every rank holds alike, and of several ranks with the
    same experts the first."""
    rank, ep = engine.world.rank, engine.dispatcher.ep_size if engine.dispatcher else 1
    for name, tensor in tensors_by_name(model).items():
        if rank == 0 or (".experts." in name and rank < ep):
            yield name, tensor, _first_expert(name, model)


def _first_expert(name: str, model: HybridLM) -> int:
    return model.owned_experts.start if ".experts." in name else 0
