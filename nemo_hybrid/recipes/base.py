"""What kinds of run that read stores have in common; see `train.run.Recipe`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from nemo_hybrid.checkpoint.adapter import base_digest, base_named, is_adapter
from nemo_hybrid.checkpoint.companions import Companions, read_companions, read_tokenizer
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import RUN_STATE
from nemo_hybrid.checkpoint.steps import keeps, list_steps, model_shape, resolve
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config.read import CHECKPOINTS
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.data.loader import Learnt, Rows, Stored, require_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.train.checks import check_precision
from nemo_hybrid.train.evaluate import heldout_losses, small_steps
from nemo_hybrid.train.guard import Bands
from nemo_hybrid.train.resume import WholeModel
from nemo_hybrid.train.run import Data, Run, Trained

C = TypeVar("C", bound=TrainingConfig)
R = TypeVar("R", bound=Learnt)


def _base_of(checkpoint: Path) -> str | None:
    """Digest of the weights that a run needs in all of its steps, as its checkpoint has it."""
    state = checkpoint / RUN_STATE
    return read_json(state).get("base") if state.is_file() else None


class StoreRecipe(Generic[C, R]):
    """Learns next tokens out of stores, from new weights or those of model.from_hf."""

    data: type[Stored] = Stored
    """What makes global batches of rows."""
    needs_origin = False
    """Whether the weights that the run began with have a part in all of its steps."""
    origin_is = "every start of this run reads"
    rows: R
    """Known from `open_data` on."""

    def __init__(self, config: C) -> None:
        """Raises UserError where model.from_hf cannot be read."""
        self.config = config.in_steps()
        self.shape = model_shape(config.model)
        self.origin: Path | None = None  # directory of the weights that the run began with
        self._base: str | None = None  # their digest at the start, if they are needed

    def check(self) -> None:
        self.config.validate(self.shape)
        check_precision(self.config, self.shape)

    def open_data(self, world: World, checkpoint: Path | None) -> Data:
        # Asked for once, because a run that it names may write a newer checkpoint meanwhile.
        if self.config.model.from_hf:
            self.origin = world.from_rank_0(self._find_origin, checkpoint)
            if self.needs_origin:
                self._base = world.from_rank_0(base_digest, self.origin)
        if checkpoint is not None:
            world.from_rank_0(self._check_base, checkpoint)
        self.rows = self._open_rows(world)
        return self._data()

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to continue the same sequence of samples, and to hold
        the rounding of its masters that this run makes."""
        config = self.config
        stages = config.train.batch_sizes(config.data.sequence_length).stages
        return {
            "data": self.rows.digests,
            "weights": list(self.rows.weights),
            "phases": self.rows.later_weights,
            "tokenizer": self.rows.tokenizer_sha256,
            "sequence_length": config.data.sequence_length,
            "global_batch_size": config.train.global_batch_size,
            "smaller_batches": [*map(list, stages)] or None,
            "seed": config.train.seed,
            "weight_dtype": str(policy.weight_dtype(config.precision)).removeprefix("torch."),
            "base": self._base,
        }

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        masters = {} if resumed else self._load(model, world)
        return Trained(WholeModel(model), masters)

    def objective(self, model: HybridLM) -> Objective:
        return NextToken(model, self.config.train)

    def begin(self, run: Run) -> None:
        run.data.begin(run.model, run.world)

    def guard(self) -> Bands:
        band = self.config.guard.spike_band
        return Bands(loss=band, grad_norm=band)

    def companions(self) -> Companions:
        """The data's tokenizer, and what travels with the weights that the run began with."""
        own = read_tokenizer(self.rows.tokenizer_dir)
        if self.origin is None:
            return own
        theirs = read_companions(self.origin)
        return replace(theirs, files={**own.files, **theirs.files})

    def describe(self, run: Run) -> list[str]:
        train = self.config.train
        return [
            *self._origin_warning(),
            f"data {self.rows.tokens:,} training tokens; {train.max_steps} steps of "
            f"{train.global_batch_size} x {self.config.data.sequence_length} tokens",
        ]

    def evaluate(self, run: Run) -> dict[str, float]:
        train = self.config.train
        with small_steps(run.model, run.world) as share:
            losses = heldout_losses(
                NextToken(run.model, train),
                run.data.heldout(run.share),
                run.world,
                train.eval_positions,
            )
            return losses | share()

    def publish(self, last: Path) -> None:
        """Nothing: a checkpoint is a model's directory."""

    def _open_rows(self, world: World) -> R:
        raise NotImplementedError

    def _data(self) -> Data:
        return self._stored(cast(Rows, self.rows), self.config.data.sequence_length)

    def _stored(self, rows: Rows, sequence_length: int) -> Stored:
        config = self.config
        return self.data(
            rows,
            sequence_length=sequence_length,
            seed=config.train.seed,
            limit=config.train.eval_sequences,
            workers=config.data.workers,
        )

    def _check_base(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that was trained beside other weights than those of this run."""
        saved = _base_of(checkpoint)
        if saved == self._base:
            return
        if not (saved and self._base):
            beside, alone = ("it", "this run") if saved else ("this run", "it")
            raise UserError(
                f"{checkpoint} is of another kind of run: {beside} needs the weights that it began "
                f"with in all steps, {alone} does not; use another run_dir or checkpoint"
            )
        named = base_named(checkpoint)
        why = f" (it names {named})" if named else ""
        if named == self.origin:
            why = " now: they were written anew since"
        elif named and not named.exists():
            why = f" (it names {named}, which is not there any more)"
        raise UserError(
            f"{checkpoint} was written with base weights that are not those in {self.origin}{why}; "
            "bring them back, or use another run_dir"
        )

    def _origin_warning(self) -> Iterator[str]:
        """Where the weights that the run began with may be gone when it starts again."""
        if self.origin is not None and (kept := keeps(self.origin)):
            config = self.config
            if config.continue_from == config.model.from_hf:  # moments too are read there
                copy = f"cp -r {self.origin} DIR, continue_from DIR"
            else:
                copy = f"nemo-hybrid import {self.origin} --out DIR, model.from_hf DIR"
            yield (
                f"warning: {self.origin}, which {self.origin_is}, is a checkpoint of a run that "
                f"keeps its {kept} newest alone and removes it when it goes on: begin with a copy "
                f"({copy}), or set checkpoint.keep 0 there"
            )

    def _find_origin(self, checkpoint: Path | None) -> Path:
        """The directory that model.from_hf means. Raises UserError where it holds no model."""
        directory = resolve(str(self.config.model.from_hf))
        if is_adapter(directory):
            raise UserError(
                f"{directory} holds an adapter: add it to its weights first (nemo-hybrid merge "
                f"--from {directory} --out DIR) and name the result"
            )
        if self.needs_origin and checkpoint is not None and directory.parent.name == CHECKPOINTS:
            # A run that is named may have gone on since.
            saved = _base_of(checkpoint)
            known = (d for d in list_steps(directory.parent) if base_digest(d) == saved)
            return next(known, directory)
        return directory

    def _load(self, model: HybridLM, world: World) -> dict[str, Tensor]:
        """Fill the model from `origin`, if there is one; return its parameters in fp32, before any
        cast rounds them."""
        if self.origin is None:
            return {}
        with world.agreed():
            require_tokenizer(self.rows, self.origin)
            experts = model.config.n_routed_experts
            plan = load_weights(
                self.origin, tensors_by_name(model), model.owned_experts, n_experts=experts
            )
        if world.rank == 0:
            print(plan.summary(), flush=True)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
