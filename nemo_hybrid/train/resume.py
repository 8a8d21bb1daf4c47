"""Between the run and the checkpoint files: what a rank writes, and what it takes back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.adapter import BASE, read_adapter, write_adapter
from nemo_hybrid.checkpoint.companions import Companions, read_companions, read_tokenizer
from nemo_hybrid.checkpoint.directory import Writer, each
from nemo_hybrid.checkpoint.files import to_json
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.state import (
    Fragment,
    check_masters,
    check_resumable,
    load_rank_state,
    load_state,
    save_checkpoint,
)
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.checkpoint.writing import describe_model
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import adapters
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.train.build import Run


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    batch: int = 0
    """Global batches read: steps done and batches passed over."""


class Saver:
    """Writes checkpoints, one after the other.

    Asynchronously: the state is copied to memory and a thread writes the copy, with a channel of
    its own between the processes, while training goes on. ``wait`` before anything that needs the
    last one. All processes make the same calls.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._world = run.world.side()
        first = run.world.rank == 0
        self._companions = each(run.world, lambda: _companions(run) if first else Companions())
        self._copies: dict[str, Tensor] = {}
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
        run, position = self._run, replace(position)  # the loop moves its own on meanwhile
        state = {
            **asdict(run.identity),
            "batches": position.batch,
            "guard": run.guard.state(),
            "optimizer_steps": run.engine.optimizer_steps,
            "layout": {
                "world_size": run.world.size,
                "ep": run.config.parallel.ep,
                "zero": run.config.parallel.zero,
            },
        }
        weights, fragments = _owned(run), run.engine.fragments()
        rank_state = {"torch_rng": torch.get_rng_state()}
        asynchronous = run.config.checkpoint.asynchronous and not wait
        if asynchronous:
            weights, fragments = iter(self._copied(weights)), iter(self._copied_state(fragments))

        def write(world: World) -> None:
            adapter = _adapter(run, world, weights) if run.adapted else None
            save_checkpoint(
                checkpoints,
                position.step,
                world,
                config=run.model.config,
                weights=weights if adapter is None else (),
                fragments=fragments,
                run_state=state,
                rank_state=rank_state,
                companions=self._companions,
                resolved_config=dump_config(run.config),
                keep=keep,
                frozen=() if run.adapted else run.frozen,
                adapter=adapter,
            )

        if asynchronous:
            self._writing = self._beside.submit(write, self._world)
        else:
            write(run.world)

    def wait(self) -> None:
        """Until the last checkpoint stands. Raises UserError on every rank if it does not, and on
        one rank alone what only a defect of the program raises."""
        if self._writing is not None:
            self._writing.result()

    def _copied(self, weights: Iterator[tuple[str, Tensor, int]]) -> list[tuple[str, Tensor, int]]:
        return [(name, self._copy(f"weight {name}", t), first) for name, t, first in weights]

    def _copied_state(self, fragments: Iterator[Fragment]) -> list[Fragment]:
        return [
            replace(
                f,
                tensors={k: self._copy(f"{k} {f.name} {f.start}", t) for k, t in f.tensors.items()},
            )
            for f in fragments
        ]

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        """A copy in memory that stays for the next checkpoint: fresh memory costs page faults."""
        held = self._copies.get(key)
        if held is None:
            pin = tensor.is_cuda
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
            self._copies[key] = held
        return held.copy_(tensor.detach())


def restore(directory: Path, run: Run) -> Position:
    """Load weights, masters, moments, router biases, RNG and the guard's memory.

    Raises UserError if the checkpoint belongs to another model, data store, tokenizer, sequence
    length, batch size or seed, or if its weights are not the rounding of their masters.
    """
    engine, model = run.engine, run.model

    def read() -> tuple[dict[str, Any], dict[str, Any] | None]:
        state = check_resumable(directory, model.config, asdict(run.identity))
        targets = _trained_tensors(run)
        if run.adapted:
            _fill_adapters(directory, targets, run)
        else:
            experts = model.config.n_routed_experts
            load_weights(directory, targets, model.owned_experts, n_experts=experts)
        engine.optimizer_steps = int(state["optimizer_steps"])
        fragments = list(engine.fragments())
        load_state(directory, fragments)
        weights = [(name, tensor, _first_expert(name, model)) for name, tensor in targets.items()]
        check_masters(weights, fragments)
        return state, load_rank_state(directory, engine.world.rank)

    state, own = each(engine.world, read)
    engine.publish_masters()
    run.guard.restore(state["guard"])
    if own is not None:
        torch.set_rng_state(own["torch_rng"])
    return Position(int(state["step"]), int(state["batches"]))


def _companions(run: Run) -> Companions:
    """The data's tokenizer, and what travels with the weights that the run began with."""
    own = read_tokenizer(run.data.tokenizer_dir)
    if run.origin is None:
        return own
    theirs = read_companions(run.origin)
    if isinstance(run.config, FinetuneConfig):  # another chat template may have come with the data
        return replace(theirs, files={**theirs.files, **own.files})
    return replace(theirs, files={**own.files, **theirs.files})


def _trained_tensors(run: Run) -> dict[str, Tensor]:
    """What a checkpoint of the run holds by name: the whole model, or its adapters alone."""
    tensors = tensors_by_name(run.model)
    if not run.adapted:
        return tensors
    beginnings = tuple(f"{name}." for name, _ in adapters(run.model))
    return {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings)}


def _owned(run: Run) -> Iterator[tuple[str, Tensor, int]]:
    """What this rank writes: rank 0 what every rank holds alike, and of several ranks with the
    same experts the first."""
    rank, ep = run.world.rank, run.config.parallel.ep
    for name, tensor in _trained_tensors(run).items():
        if rank == 0 or (".experts." in name and rank < ep):
            yield name, tensor, _first_expert(name, run.model)


def _adapter(
    run: Run, world: World, owned: Iterable[tuple[str, Tensor, int]]
) -> Callable[[Writer, HybridConfig, Companions], Collection[str]]:
    """What writes the adapters, which PEFT wants in one file: rank 0 gets the experts' of all."""
    config = run.config
    assert isinstance(config, FinetuneConfig)
    own = [(name, first, tensor.detach().cpu()) for name, tensor, first in owned]
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, first, tensor in chain(own, *world.gather([] if world.rank == 0 else own)):
        parts[name].append((first, tensor))
    full = {
        name: torch.cat([t for _, t in sorted(found, key=itemgetter(0))])
        for name, found in parts.items()
    }
    options, base = config.lora, str(run.origin)

    def write(writer: Writer, shape: HybridConfig, companions: Companions) -> Collection[str]:
        describe_model(writer, shape, policy.weight_dtype(config.precision), companions)
        writer.write_text(BASE, to_json({"digest": run.identity.base}))
        return write_adapter(writer, options, base, full)

    return write


def _fill_adapters(directory: Path, targets: Mapping[str, Tensor], run: Run) -> None:
    """Raises UserError unless the directory holds an adapter for each of the targets."""
    assert isinstance(run.config, FinetuneConfig)
    stored_options, _, tensors, _ = read_adapter(directory)
    owned, scales = run.model.owned_experts, (stored_options.scale, run.config.lora.scale)
    if scales[0] != scales[1]:
        raise UserError(
            f"{directory} holds adapters that count {scales[0]:g} times (lora.alpha / lora.rank), "
            f"this run's count {scales[1]:g} times"
        )
    if tensors.keys() != targets.keys():
        name = min(tensors.keys() ^ targets.keys())
        raise UserError(f"{directory} and this run have different adapters: {name} is in one alone")
    for name, target in targets.items():
        stored = tensors[name]
        part = stored if stored.dim() == 2 else stored[owned.start : owned.stop]
        if part.shape != target.shape or part.dtype != target.dtype:
            raise UserError(
                f"{directory} has {name} as {part.dtype} {list(part.shape)}, this run as "
                f"{target.dtype} {list(target.shape)}"
            )
        target.detach().copy_(part)


def _first_expert(name: str, model: HybridLM) -> int:
    return model.owned_experts.start if ".experts." in name else 0
