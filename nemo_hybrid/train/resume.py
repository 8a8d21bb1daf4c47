"""Between the run and the checkpoint files: what a rank writes, and what it takes back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import DATA
from nemo_hybrid.checkpoint.state import (
    Fragment,
    check_masters,
    check_resumable,
    load_rank_state,
    load_state,
    save_checkpoint,
)
from nemo_hybrid.checkpoint.steps import saying_if_removed
from nemo_hybrid.checkpoint.tensors import opened
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.run import Position, Recipe, Run

_ALIGNED = 64  # bytes, at which copies begin


class WholeModel:
    """Checkpoints that hold all of a model's weights."""

    def __init__(self, model: HybridLM) -> None:
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        return tensors_by_name(self._model)

    def read(self, directory: Path) -> None:
        model = self._model
        experts = model.config.n_routed_experts
        load_weights(directory, self.tensors(), model.owned_experts, n_experts=experts)

    def written(self, world: World, own: Iterable[tuple[str, Tensor, int]]) -> dict[str, Any]:
        frozen = [name for name, p in self._model.named_parameters() if not p.requires_grad]
        return {"weights": own, "frozen": frozen}


@dataclass
class Snapshot:
    """All that a rank knows of a checkpoint, as it was at one moment."""

    position: Position
    run_state: dict[str, Any]
    rank_state: dict[str, Any]
    data: dict[str, Tensor]
    weights: list[tuple[str, Tensor, int]]
    fragments: list[Fragment]

    @staticmethod
    def of(run: Run, position: Position) -> Snapshot:
        parallel, data_state = run.config.parallel, run.data.state()
        run_state = {
            **run.recipe.identity(),
            "batches": position.batch,
            "tokens": position.tokens,
            "guard": run.guard.state(),
            "optimizer_steps": run.engine.optimizer_steps,
            "layout": {
                "world_size": run.world.size,
                "ep": parallel.ep,
                "cp": parallel.cp,
                "zero": parallel.stage(run.world.size),
            },
            **({"data_state": data_state} if data_state else {}),
        }
        return Snapshot(
            position=replace(position),  # the loop moves its own on
            run_state=run_state,
            rank_state={"torch_rng": torch.get_rng_state()},
            data=run.data.tensors(),
            weights=list(owned(run)),
            fragments=list(run.engine.fragments()),
        )


class Saver:
    """Writes checkpoints, one after the other.

    Asynchronously: the state is copied to memory and a thread writes the copy, with a channel of
    its own between the processes, while training goes on. ``wait`` before anything that needs the
    last one. All processes make the same calls.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._world = run.world.side()
        with run.world.agreed():
            self._companions = run.recipe.companions() if run.world.rank == 0 else Companions()
        self._room: list[Tensor] | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint being written could not be; ``wait`` then raises why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(self, checkpoints: Path, position: Position, keep: int, wait: bool = False) -> None:
        """Write ``checkpoints/step_NNNNNNNN``; with ``wait`` it is there on return.

        Raises UserError on every rank if this one (with ``wait``) or the last one could not be
        written.
        """
        self.wait()
        snapshot = Snapshot.of(self._run, position)
        if wait or not self._run.config.checkpoint.asynchronous:
            self._write(snapshot, checkpoints, keep, self._run.world)
        else:
            copied = self._copied(snapshot)
            self._writing = self._beside.submit(self._write, copied, checkpoints, keep, self._world)

    def wait(self) -> None:
        """Until the last checkpoint stands. Raises UserError on every rank if it does not, and on
        one rank alone what only a defect of the program raises."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, snapshot: Snapshot, checkpoints: Path, keep: int, world: World) -> None:
        run = self._run
        save_checkpoint(
            checkpoints,
            snapshot.position.step,
            world,
            config=run.model.config,
            fragments=snapshot.fragments,
            run_state=snapshot.run_state,
            rank_state=snapshot.rank_state,
            data=snapshot.data,
            companions=self._companions,
            resolved_config=dump_config(run.config),
            keep=keep,
            **run.weights.written(world, snapshot.weights),
        )

    def _copied(self, snapshot: Snapshot) -> Snapshot:
        """In memory that stays for the next checkpoint: fresh memory costs page faults."""
        tensors = [t for _, t, _ in snapshot.weights]
        tensors += [t for f in snapshot.fragments for t in f.tensors.values()]
        if self._room is None:
            with self._run.world.agreed():
                self._room = room_for(tensors, self._run.world.device.type == "cuda")
        pairs = zip(self._room, tensors, strict=True)
        copies = iter([room.copy_(tensor.detach()) for room, tensor in pairs])
        return replace(
            snapshot,
            weights=[(name, next(copies), first) for name, _, first in snapshot.weights],
            fragments=[
                replace(f, tensors={k: next(copies) for k in f.tensors}) for f in snapshot.fragments
            ],
        )


def room_for(tensors: list[Tensor], pinned: bool) -> list[Tensor]:
    """Tensors of these shapes and dtypes in one block of host memory, of the size that `plan` says:
    torch's own pinned memory comes in powers of two. Raises UserError where it cannot be pinned.
    """
    sizes = (math.ceil(t.nbytes / _ALIGNED) * _ALIGNED for t in tensors)
    *starts, end = accumulate(sizes, initial=0)
    block = torch.empty(end, dtype=torch.uint8)
    if pinned and end and int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), end, 0)):
        raise UserError(
            f"the copy of a checkpoint takes {end / 1e9:.1f} GB of host memory, which "
            "cannot be pinned: set checkpoint.asynchronous to false"
        )
    return [
        block[start : start + t.nbytes].view(t.dtype).view(t.shape)
        for start, t in zip(starts, tensors, strict=True)
    ]


def restore(directory: Path, run: Run, rolled_back: bool = False) -> Position:
    """Load weights, masters, moments, router biases, RNG and the memory of guard and data.

    ``rolled_back``: of a run that goes on, so that its data goes on where it is. Raises UserError
    if the checkpoint belongs to another run (see `Recipe.identity`), or if its weights are not the
    rounding of their masters.
    """
    with run.world.agreed():
        state = check_resumable(directory, run.model.config, run.recipe.identity())
        _read(directory, run, state)
        own = load_rank_state(directory, run.world.rank)
    run.engine.publish_masters()
    run.guard.restore(state["guard"])
    if not rolled_back:
        with run.world.agreed(), opened(directory.glob(DATA.format("*"))) as saved:
            run.data.restore(state.get("data_state", {}), saved)
    if own is not None:
        torch.set_rng_state(own["torch_rng"])
    train, step = run.config.train, int(state["step"])
    each = train.global_batch_size * run.config.data.sequence_length  # of older checkpoints
    return Position(step, int(state["batches"]), int(state.get("tokens", step * each)))


def check_phase(directory: Path, recipe: Recipe) -> dict[str, Any]:
    """The run state of a checkpoint whose weights and moments ``recipe`` may begin with. Raises
    UserError where they mean something else there."""
    ours = recipe.identity()
    same = {name: ours[name] for name in ("tokenizer", "weight_dtype", "base")}
    return check_resumable(directory, recipe.shape, same, otherwise="")


def begin_phase(directory: Path, run: Run) -> Position:
    """Load weights, masters, moments and router biases of a checkpoint of another run, and nothing
    else of it. Raises UserError as `restore` does."""
    with run.world.agreed(), saying_if_removed(directory):  # by that run, which may go on
        _read(directory, run, check_phase(directory, run.recipe))
    run.engine.publish_masters()
    return Position()


def _read(directory: Path, run: Run, state: dict[str, Any]) -> None:
    """Fill weights, masters and moments."""
    run.weights.read(directory)
    run.engine.optimizer_steps = int(state["optimizer_steps"])  # to which Adam's moments belong
    fragments = list(run.engine.fragments())
    load_state(directory, fragments)
    tensors = run.weights.tensors().items()
    check_masters([(name, t, first_expert(name, run.model)) for name, t in tensors], fragments)


def owned(run: Run) -> Iterator[tuple[str, Tensor, int]]:
    """What this rank writes: rank 0 what every rank holds alike, and of several ranks with the
    same experts the first."""
    rank, ep = run.world.rank, run.config.parallel.ep
    for name, tensor in run.weights.tensors().items():
        if rank == 0 or (".experts." in name and rank < ep):
            yield name, tensor, first_expert(name, run.model)


def first_expert(name: str, model: HybridLM) -> int:
    """Number of the first expert in a tensor of ``model``; 0 where there are none in it."""
    return model.owned_experts.start if ".experts." in name else 0
