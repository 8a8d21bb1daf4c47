"""Reinforcement learning: a model learns from its own answers and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.adapter import base_digest
from nemo_hybrid.checkpoint.companions import Companions, read_companions
from nemo_hybrid.checkpoint.publish import about, card_head, code, origin_name, publish
from nemo_hybrid.checkpoint.steps import resolve, step_of
from nemo_hybrid.checkpoint.writing import save_weights
from nemo_hybrid.config.base import refuse
from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.data.prompts import Prompt, PromptReader
from nemo_hybrid.data.template import stop_rendering
from nemo_hybrid.data.tokenizer import load_tokenizer, tokenizer_sha256
from nemo_hybrid.environments.pool import Pool
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.remote import Remote
from nemo_hybrid.generation.thinking import Markers
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LatentMoE
from nemo_hybrid.model.lora import parameter_count
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.objectives.next_token import DetachedMTP
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.base import StoreRecipe
from nemo_hybrid.recipes.curriculum import Curriculum
from nemo_hybrid.recipes.distill import frozen_teacher
from nemo_hybrid.recipes.finetune import freeze
from nemo_hybrid.recipes.rollouts import Prompts, Rollouts
from nemo_hybrid.train.guard import Bands
from nemo_hybrid.train.resume import owned
from nemo_hybrid.train.run import Run, Trained
from nemo_hybrid.train.run_dir import MODEL


class Reinforce(StoreRecipe[RlConfig, Prompts]):
    """Weights of model.from_hf, and a policy gradient."""

    loaded_by = "transformers"
    """What loads the model that a run leaves."""
    trained_words = "Weights that began as"
    _rollouts: Rollouts
    _pool: Pool
    _teachers: dict[str, Path]

    def __init__(self, config: RlConfig) -> None:
        super().__init__(config)
        self.needs_origin = self.needs_origin or config.rl.kl > 0

    def identity(self) -> dict[str, Any]:
        config = self.config
        return {
            **super().identity(),
            "environments": config.environments,
            "teachers": {n: [str(d), base_digest(d)] for n, d in self._teachers.items()},
            "routes": config.routes,
            "curriculum": [config.data.easy_first, dict(config.data.shares)],
            "rollout": {
                "samples": config.rollout.samples,
                "response_tokens": config.rollout.response_tokens,
                "updates": config.rl.updates,
                "lag": config.rollout.lag,
                "router_replay": config.rl.router_replay,
            },
        }

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        trained = super().prepare(model, world, resumed)
        freeze(model, self.config.train)
        layers = (m for m in model.modules() if isinstance(m, LatentMoE))
        dispatcher = next((layer.dispatcher for layer in layers), None)
        with world.agreed():
            if self.config.rl.kl:
                assert self.origin is not None
                self._rollouts.reference = frozen_teacher(self.origin, self.shape, dispatcher)
            self._rollouts.teachers = {
                name: frozen_teacher(place, self._teacher_shape(name, place), dispatcher)
                for name, place in self._teachers.items()
            }
        return trained

    def _teacher_shape(self, name: str, directory: Path) -> HybridConfig:
        """Raises UserError where a teacher reads other tokens, or its experts cannot be divided as
        the model's are."""
        shape, ours = read_config(directory), self.shape
        refuse(
            (
                shape.vocab_size != ours.vocab_size
                or tokenizer_sha256(directory) != self.rows.tokenizer_sha256,
                f"teachers.{name}: {directory} has another tokenizer than {self.origin}: a "
                "teacher reads the same token ids",
            ),
            (
                self.config.parallel.ep > 1 and shape.n_routed_experts != ours.n_routed_experts,
                f"teachers.{name}: {directory} has {shape.n_routed_experts} experts, the model "
                f"{ours.n_routed_experts}: with parallel.ep they have to be as many",
            ),
        )
        return shape

    def objective(self, model: HybridLM) -> Objective:
        head, by_samples = model.lm_head.weight, self.config.rl.average == "samples"
        if self._rollouts.reference is not None:
            self._rollouts.reference.to(head.device, head.dtype)
        for teacher in self._rollouts.teachers.values():
            teacher.to(dtype=head.dtype)
        return DetachedMTP(model, self.config.train, lambda step: by_samples)

    def begin(self, run: Run) -> None:
        super().begin(run)
        if run.engine.dispatcher is not None:
            self._rollouts.most = run.engine.dispatcher.most
        rollout = self.config.rollout
        if rollout.engine != "local":
            self._rollouts.engine = Remote(
                rollout.engine, rollout.slots, self.config.train.seed, rollout.engine_timeout_s,
                self.shape.vocab_size,
            )  # fmt: skip
            self._rollouts.write = partial(self._write, run)

    def _write(self, run: Run, out: Path) -> None:
        """The model as it is. All processes call this together."""
        save_weights(
            out, self.shape, owned(run), world=run.world, companions=self.companions()
        )  # fmt: skip

    def guard(self) -> Bands:
        """The loss is near 0 and changes its sign: no band."""
        return Bands(loss=0.0, grad_norm=self.config.guard.spike_band)

    def companions(self) -> Companions:
        assert self.origin is not None
        return read_companions(self.origin)

    def describe(self, run: Run) -> list[str]:
        config, rows = self.config, self.rows
        total, trained = parameter_count(run.model), parameter_count(run.model, trained=True)
        why = {"left out": rows.left_out, "always or never solved left out": rows.solved}
        left_out = "".join(f" ({count} {what})" for what, count in why.items() if count)
        engine = config.rollout.engine
        return [
            *self._origin_warning(),
            *([f"rollouts by {engine}"] if engine != "local" else []),
            f"data {len(rows.train):,} prompts{left_out} for {', '.join(config.environments)}; "
            f"{config.train.max_steps} steps of {config.prompts_per_step} prompts x "
            f"{config.rollout.samples} answers, {config.rl.updates} update"
            f"{'s' * (config.rl.updates > 1)} each",
            *(f"learns from {place} what {name} knows" for name, place in self._teachers.items()),
            f"trained {trained:,} of {total:,} parameters ({trained / total:.2%})",
        ]

    def evaluate(self, run: Run) -> dict[str, float]:
        return self._rollouts.evaluate()

    def publish(self, last: Path) -> None:
        """Make RUN_DIR/model of the last checkpoint."""
        publish(last, Path(self.config.run_dir) / MODEL, self._card(step_of(last)))

    # ---- data ----------------------------------------------------------------------------------

    def _open_rows(self, world: World) -> Prompts:
        with world.agreed():
            config = self.config
            self._teachers = {name: resolve(d) for name, d in sorted(config.teachers.items())}
            self._pool = Pool(config.environments, config.rl.verifiers, config.rl.deadline_s)
            return self._open_prompts()

    def _data(self) -> Rollouts:
        assert self.origin is not None
        stops = frozenset(read_companions(self.origin).stops(self.shape.eos_token_id))
        self._rollouts = Rollouts(
            self.config, self.rows, self._pool, stops, self.shape.pad_token_id
        )
        return self._rollouts

    def _open_prompts(self) -> Prompts:
        """Raises UserError for the first row that cannot be asked or judged, unless it may be left
        out."""
        assert self.origin is not None
        config, longest = self.config, self.shape.max_position_embeddings
        tokenizer = load_tokenizer(self.origin)
        reader = PromptReader(
            self.origin,
            tokenizer,
            self.shape.vocab_size,
            min(config.data.sequence_length, longest),
            config.rollout.response_tokens,
            limits=(
                "rollout.response_tokens",
                f"of data.sequence_length (or the model's {longest})",
            ),
        )
        faults: list[str] | None = [] if config.data.skip_bad else None
        read = [
            self._with_environments(reader.read_file(path, faults), faults) if path else []
            for path in (config.data.path, config.data.heldout_path)
        ]
        stop_rendering()
        if not read[0]:
            raise UserError(f"{config.data.path} holds no prompts that can be asked and judged")
        train, seed = read[0], config.train.seed
        if config.data.skip_solved:
            if all(prompt.row.get("pass_rate") is None for prompt in train):
                raise UserError(
                    f"{config.data.path}: data.skip_solved needs the field pass_rate, and no row "
                    "has it"
                )
            train = [prompt for prompt in train if prompt.row.get("pass_rate") not in (0, 1)]
            if not train:
                raise UserError(f"{config.data.path}: every pass_rate is 0 or 1")
        limited = any(prompt.budget is not None for prompts in read for prompt in prompts)
        if limited and config.rollout.engine != "local":
            raise UserError("rollout.engine: a server does not say which tokens a budget forced")
        return Prompts(
            train=train,
            curriculum=Curriculum(train, config.prompts_per_step, config.data, seed),
            heldout=read[1],
            tokenizer=tokenizer,
            tokenizer_dir=self.origin,
            tokenizer_sha256=tokenizer_sha256(self.origin),
            markers=Markers(*map(tuple, reader.marker_ids)) if limited else None,
            left_out=len(faults or []),
            solved=len(read[0]) - len(train),
        )

    def _with_environments(
        self, prompts: Sequence[Prompt], faults: list[str] | None
    ) -> list[Prompt]:
        """Those whose environment is there and has what it needs. Where there is but one
        environment, rows need not name it."""
        known, found = self._pool.fields, []
        only = next(iter(known)) if len(known) == 1 else None
        for prompt in prompts:
            name = prompt.environment or only
            why = _unfit(name, prompt.row, known)
            if why is None:
                found.append(replace(prompt, row={**prompt.row, "environment": name}))
            elif faults is None:
                raise UserError(f"{prompt.where}: {why}")
            else:
                faults.append(f"{prompt.where}: {why}")
        return found

    # ---- words ---------------------------------------------------------------------------------

    def _card(self, steps: int) -> str:
        config = self.config
        origin = self.origin or Path(str(config.model.from_hf))
        base = code(origin_name(origin))
        lines = [
            card_head(["reinforcement-learning"], origin, self.loaded_by),
            f"# {base}, after reinforcement learning",
            "",
            f"{self.trained_words} {base}, trained with nemo_hybrid {__version__} for {steps} "
            f"steps of {config.train.global_batch_size} sampled answers, judged by "
            f"{', '.join(map(code, config.environments))}; learning rate {config.train.lr:g}, in "
            f"{config.precision.recipe}. The base model's licence and limits apply.",
            "",
            about(self.shape, config.data.sequence_length),
        ]
        return "\n".join(lines) + "\n"


def _unfit(
    name: str | None, row: Mapping[str, Any], known: Mapping[str, Sequence[str]]
) -> str | None:
    """Why a row cannot be judged; None: it can."""
    if name is None:
        return f"the row names no environment: give one of {', '.join(known)}"
    if name not in known:
        return f"there is no environment {name!r} in environments, only {', '.join(known)}"
    rate = row.get("pass_rate", 0)
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        return f"pass_rate is {rate!r}, not a number from 0 to 1"
    missing = [field for field in known[name] if row.get(field) is None]
    return f"environment {name} needs the field {missing[0]}" if missing else None
