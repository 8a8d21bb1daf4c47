"""The nouns of training: a kind of run, what it reads, and what the loop works with.

Building, stepping, checkpoints and the loop know these protocols and no kind of run. A new kind is
one recipe (nemo_hybrid/recipes), one objective (nemo_hybrid/objectives) and its options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.parallel.engine import Engine
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision.health import Probe, Shares
from nemo_hybrid.precision.policy import Precision
from nemo_hybrid.train.guard import Bands, Guard


class Data(Protocol):
    """What a run reads, by the number of the global batch."""

    def begin(self, model: HybridLM, world: World) -> None:
        """Once, before the first step is asked for; the model's weights may still be replaced by a
        checkpoint's."""

    def step(self, number: int, share: Share) -> list[Batch]:
        """This process's micro-batches of global batch ``number``, on the CPU. Numbers ascend by
        one, from the one at which the run goes on. All processes ask together."""

    def heldout(self, share: Share) -> Iterator[Batch]:
        """This process's evaluation passes, the same at every call and equally many everywhere."""

    def state(self) -> dict[str, Any]:
        """JSON values, the same on every rank, with which `restore` makes the next step what it
        would have been; nothing where the number of the step says it all."""

    def tensors(self) -> dict[str, Tensor]:
        """What else it takes: this process's part, under names that no other has. They stay as they
        are."""

    def restore(self, state: dict[str, Any], saved: Mapping[str, Callable[[], Tensor]]) -> None:
        """Go on from a checkpoint's ``state``; ``saved`` reads the tensors of all processes, each
        by its name. Raises UserError."""

    def metrics(self) -> dict[str, float]:
        """Figures of the last step by name, for metrics.jsonl; asked for on rank 0."""


class HeldWeights(Protocol):
    """Those of a model's weights that the checkpoints of a run hold."""

    def tensors(self) -> dict[str, Tensor]:
        """This process's share, by the names of the model."""

    def read(self, directory: Path) -> None:
        """Fill them from a checkpoint. Raises UserError."""

    def written(self, world: World, own: Iterable[tuple[str, Tensor, int]]) -> dict[str, Any]:
        """What `checkpoint.state.save_checkpoint` takes for them: ``own`` is what this process
        writes, with the number of the first expert. All processes ask together."""


@dataclass(frozen=True)
class Trained:
    """What a run trains of its model."""

    weights: HeldWeights
    masters: Mapping[str, Tensor] = field(default_factory=dict)
    """fp32 values by name, of which the model's weights will be the rounding."""


class Recipe(Protocol):
    """A kind of run: what it learns from, what of the model it trains, and what it minimises.

    A recipe belongs to one run. Its methods are called in the order in which they stand here, on
    every rank, and raise UserError on every rank; `describe` and `publish` on rank 0 alone.
    """

    @property
    def config(self) -> TrainingConfig: ...

    @property
    def shape(self) -> HybridConfig: ...

    def check(self) -> None:
        """Whether options and model fit each other; before processes meet."""

    def open_data(self, world: World, checkpoint: Path | None) -> Data:
        """Open, or make, what is learnt from. May replace `config` by one that knows the number of
        steps. ``checkpoint``: the one to go on from."""

    def identity(self) -> dict[str, Any]:
        """JSON values that a run that goes on must share with the one that wrote the checkpoint."""

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        """Load, freeze, adapt: the model is on the CPU in fp32. If ``resumed``, a checkpoint fills
        what `Trained.weights` names later."""

    def objective(self, model: HybridLM) -> Objective:
        """The model has its dtype and device."""

    def begin(self, run: Run) -> None:
        """When the processes of expert parallelism are connected and all parts stand."""

    def guard(self) -> Bands:
        """From where on a step is a spike."""

    def companions(self) -> Companions:
        """Files that travel with the weights."""

    def describe(self, run: Run) -> list[str]:
        """What a person wants to read at the start."""

    def evaluate(self, run: Run) -> dict[str, float]:
        """Figures on held-out data; ``loss`` and ``mtp_K`` where they are cross-entropies."""

    def publish(self, last: Path) -> None:
        """What a finished run leaves beside its checkpoints, of which ``last`` is the last."""


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    batch: int = 0
    """Global batches read: steps done and batches passed over."""
    tokens: int = 0
    """Of the steps done."""


@dataclass
class Outcome:
    """What became of one global batch, over all ranks."""

    means: dict[str, float]
    """The parts of the loss, and ``loss``; see `Objective.means`."""
    grad_norm: float
    loads: dict[str, Tensor]
    """Layer name -> routed slots per expert, on the host."""
    tokens: int
    """Of all sequences, padding included."""
    sample_hash: int
    objection: str | None
    """Why the guard passed the batch over; None: the weights were updated."""
    stop: bool
    """A rank asked to stop."""
    low_precision: Shares | None = None
    """Where the step was sampled."""
    in_one: int = 1
    """See `Batch.in_one`."""


@dataclass
class Run:
    """What the loop works with."""

    recipe: Recipe
    world: World
    share: Share
    data: Data
    model: HybridLM
    weights: HeldWeights
    objective: Objective
    engine: Engine
    guard: Guard
    precision: Precision
    probe: Probe
    peak: float | None
    """Matmul FLOP/s of one process's device; None: unknown, or the formula does not fit."""

    @property
    def config(self) -> TrainingConfig:
        return self.recipe.config
