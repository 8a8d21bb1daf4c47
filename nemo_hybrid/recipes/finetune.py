"""Fine-tuning: samples instead of text, parts that stay as they are, and a model directory at the
end."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.companions import Companions, read_companions, read_tokenizer
from nemo_hybrid.checkpoint.publish import about, card_head, code, origin_name, publish
from nemo_hybrid.checkpoint.steps import step_of
from nemo_hybrid.config.finetune import FinetuneConfig, FinetuneTrainOptions, SampleOptions
from nemo_hybrid.config.rl import RlTrainOptions
from nemo_hybrid.data.packing import PackedSamples, open_stores
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.data.store import RECORD, TRAIN, holds_samples
from nemo_hybrid.data.template import stop_rendering
from nemo_hybrid.data.template_files import read_sources
from nemo_hybrid.data.tokenizer import CHAT_TEMPLATE
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import parameter_count
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.recipes.base import StoreRecipe
from nemo_hybrid.train.metrics import METRICS_FILE, evaluations, read_metrics
from nemo_hybrid.train.run import Data, Run, Trained
from nemo_hybrid.train.run_dir import MODEL, SAMPLES

_LOOKED_AT = 20  # samples
_FEW = 10  # held-out samples
_ENDING = 3  # learnt tokens: a line break may follow the one that ends a turn


class Finetune(StoreRecipe[FinetuneConfig, PackedSamples]):
    """Weights of model.from_hf learn from conversations and the like."""

    loaded_by = "transformers"
    """What loads the model that a run leaves."""
    trained_words = "Weights that began as"

    def open_data(self, world: World, checkpoint: Path | None) -> Data:
        data = super().open_data(world, checkpoint)
        if not self.config.train.max_steps:
            self._count_steps()
        return data

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        trained = super().prepare(model, world, resumed)
        freeze(model, self.config.train)
        return trained

    def objective(self, model: HybridLM) -> Objective:
        return NextToken(model, self.config.train, self.config.train.per_document)

    def companions(self) -> Companions:
        """Another chat template may have come with the data."""
        assert self.origin is not None
        own, theirs = read_tokenizer(self.rows.tokenizer_dir), read_companions(self.origin)
        files = {**theirs.files, **own.files}
        if CHAT_TEMPLATE not in own.files and read_sources(self.rows.tokenizer_dir, own.files):
            files.pop(CHAT_TEMPLATE, None)  # it would hide those in the settings
        return replace(theirs, files=files)

    def describe(self, run: Run) -> list[str]:
        """Samples and their packs, the loss, and what is trained, experts of all ranks."""
        config, rows = self.config, self.rows
        total = parameter_count(run.model)
        trained = parameter_count(run.model, trained=True)
        train, loss = config.train, str(config.train.loss)
        if train.second_stage_step is not None:
            loss = f"tokens, after step {train.second_stage_step} conversations"
        return [
            *self._origin_warning(),
            *self._warnings(run),
            f"data {len(rows.train.lengths):,} samples of {rows.tokens:,} tokens in "
            f"{len(rows.packs):,} packs of {config.data.sequence_length} ({rows.efficiency:.1%} "
            f"full); {train.max_steps} steps of {train.global_batch_size} packs",
            *([f"held out: {self._heldout_words()}"] if rows.heldout else []),
            f"loss averaged over {loss}, MTP weight {train.mtp_loss_weight:g}; trained {trained:,} "
            f"of {total:,} parameters ({trained / total:.2%})",
        ]

    def publish(self, last: Path) -> None:
        """Make RUN_DIR/model of the last checkpoint: what transformers, PEFT and engines load."""
        publish(last, Path(self.config.run_dir) / MODEL, self._card(step_of(last)))

    # ---- data ----------------------------------------------------------------------------------

    def _open_rows(self, world: World) -> PackedSamples:
        world.from_rank_0(self._make_samples)
        with world.agreed():
            return self._open_samples()

    def _make_samples(self) -> None:
        """Turn data.path into samples in the run's directory, where it is not made of samples
        already. Raises UserError for records that cannot be learnt from."""
        data, out = self.config.data, Path(self.config.run_dir) / SAMPLES
        if is_prepared(data.path):
            self._no_sample_options()
            return
        if not (data.heldout or data.heldout_path):
            self._check_evaluation(None)
        if out.exists() and not (out / RECORD).is_file():
            raise UserError(
                f"{out} holds something else than the samples of a run: choose another run_dir"
            )
        if out.exists() and not Path(str(data.path)).exists():
            print(f"{data.path} is not there any more: the samples in {out} are used", flush=True)
            return
        summary = prepare_samples(
            data,
            [str(data.path)],
            str(self.origin),
            out,
            heldout_paths=[data.heldout_path] if data.heldout_path else [],
            seed=self.config.train.seed,
            vocab_size=self.shape.vocab_size,
            reuse=True,
        )
        stop_rendering()
        print(summary, flush=True)

    def _no_sample_options(self) -> None:
        """Raise UserError for options that would have no effect on samples that are there."""
        data, free = self.config.data, ("sequence_length",)
        given = [
            f.name
            for f in fields(SampleOptions)
            if f.name not in free and getattr(data, f.name) != f.default
        ]
        if data.heldout_path:
            given.append("heldout_path")
        if given:
            raise UserError(
                f"data.{given[0]} has no effect: {data.path} holds samples that are made already; "
                "give the option to `nemo-hybrid prepare --for finetune`"
            )

    def _open_samples(self) -> PackedSamples:
        """Open the samples. Raises UserError where they do not fit model or options."""
        config, shape, data = self.config, self.shape, self.config.data
        prepared = is_prepared(data.path)
        root = Path(str(data.path)) if prepared else Path(config.run_dir) / SAMPLES
        train, heldout = open_stores(root, data.verify)
        for store in filter(None, (train, heldout)):
            if store.info.vocab_size > shape.vocab_size:
                raise UserError(
                    f"{store.path} has token ids up to {store.info.vocab_size - 1}, the model's "
                    f"vocabulary has {shape.vocab_size} entries: prepare the samples with the "
                    "model's own tokenizer"
                )
            longest = int(store.lengths.max())
            if longest > data.sequence_length:
                raise UserError(
                    f"{store.path} holds a sample of {longest} tokens: set data.sequence_length "
                    f"({data.sequence_length}) to at least that"
                )
        self._check_evaluation(heldout)
        return PackedSamples(train, heldout, data.sequence_length, shape.pad_token_id)

    def _check_evaluation(self, heldout: object) -> None:
        if self.config.train.eval_sequences and heldout is None:
            raise UserError(
                "there are no held-out samples: set data.heldout above 0, name data.heldout_path, "
                "or set train.eval_sequences to 0"
            )

    def _count_steps(self) -> None:
        """Make the run as long as its epochs. Raises UserError where that does not fit other
        options."""
        train, packs = self.config.train, len(self.rows.packs)
        if packs < train.global_batch_size:
            raise UserError(
                f"the samples fill {packs} packs, fewer than train.global_batch_size "
                f"({train.global_batch_size}): lower it, or set train.max_steps to repeat packs "
                "within a step"
            )
        steps = math.ceil(packs * train.epochs / train.global_batch_size)
        self.config = replace(self.config, train=replace(train, max_steps=steps))
        self.config.validate_steps()

    # ---- words ---------------------------------------------------------------------------------

    def _warnings(self, run: Run) -> Iterator[str]:
        """What a user may not have meant."""
        config, rows = self.config, self.rows
        known = read_companions(self.origin) if self.origin else Companions()
        ends = known.stops(run.model.config.eos_token_id)
        samples = map(rows.train.sample, range(min(_LOOKED_AT, len(rows.train.lengths))))
        if not any(set(ids[targets][-_ENDING:].tolist()) & set(ends) for ids, targets in samples):
            yield (
                f"warning: none of the first samples ends with a token that ends generation "
                f"({ends}): text will go on behind an answer, unless eos_token_id in "
                f"generation_config.json of {config.model.from_hf} lists the token that ends a turn"
            )
        dtype = str(policy.weight_dtype(config.precision)).removeprefix("torch.")
        if config.train.trained == "mtp" and self.origin and dtype != "float32":
            settings = read_json(self.origin / "config.json")
            if settings.get("dtype", settings.get("torch_dtype")) == "float32":
                yield (
                    f"warning: {self.origin} has weights in float32, and this run rounds them to "
                    f"{dtype}, also those that it does not train: precision.recipe fp32 keeps them"
                )

    def _card(self, steps: int) -> str:
        """README.md of the model, in the form that the Hugging Face hub reads."""
        config, train = self.config, self.config.train
        origin = self.origin or Path(str(config.model.from_hf))
        base = code(origin_name(origin))
        lines = [
            card_head(["fine-tuned"], origin, self.loaded_by),
            f"# {base}, fine-tuned",
            "",
            f"{self.trained_words} {base}, "
            f"trained with nemo_hybrid {__version__} for {steps} steps of "
            f"{train.global_batch_size} packs of {config.data.sequence_length} tokens, learning "
            f"rate {train.lr:g}, in {config.precision.recipe}. The base model's licence and limits "
            "apply.",
            *self._further_card(base),
            "",
            about(self.shape, config.data.sequence_length),
        ]
        found = evaluations(list(read_metrics(Path(config.run_dir) / METRICS_FILE)))
        if len(found) > 1:
            before, after = found[0], found[-1]
            lines += [
                "",
                f"Held-out loss (nats per learnt token): {before[1][0]:.4f} after step "
                f"{before[0]}, {after[1][0]:.4f} after step {after[0]}; of "
                f"{self._heldout_words()}.",
            ]
        return "\n".join(lines) + "\n"

    def _heldout_words(self) -> str:
        """How many samples a held-out loss is of, and what that is worth."""
        store = self.rows.heldout
        samples = 0 if store is None else len(store.lengths)
        few = "; so few say little of other text" if samples < _FEW else ""
        return f"{samples:,} sample{'s' * (samples != 1)}{few}"

    def _further_card(self, base: str) -> list[str]:
        return []


def is_prepared(path: str | None) -> bool:
    """Whether a path names samples that `prepare --for finetune` made."""
    return holds_samples(Path(str(path)) / TRAIN)


def freeze(model: nn.Module, train: FinetuneTrainOptions | RlTrainOptions) -> None:
    """Leave out of the training what the options do not name. Raises UserError for adapters among
    it."""
    for name, parameter in model.named_parameters():
        mtp = name.startswith("mtp.")
        trained = mtp or train.trained == "all"
        trained &= not mtp or train.mtp_loss_weight > 0
        trained &= train.train_router or ".gate." not in name
        if parameter.requires_grad and not trained and "lora." in name:
            raise UserError(f"{name} would not be trained: train.mtp_loss_weight is 0")
        parameter.requires_grad_(parameter.requires_grad and trained)
