"""Options of `finetune`, beside and instead of those of `pretrain`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    GLOBS,
    POSITIVE,
    BelowOne,
    NotNegativeFloat,
    NotNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Share,
    refuse,
)
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import SequenceOptions, TrainingConfig, TrainOptions


@dataclass(config=CHECKED)
class SampleOptions(Options):
    """How records become samples: token ids, and which of them are learnt."""

    sequence_length: PositiveInt = 2048
    """Tokens per training sequence, into which samples are packed; no sample may be longer."""
    chat_template: str | None = None
    """Jinja file to render conversations with, instead of the tokenizer's own; it is saved with
    the model."""
    reasoning: Literal["keep", "mask", "strip"] = "keep"
    """Reasoning of assistant turns: keep: learnt like the answer; mask: seen, not learnt; strip:
    left out."""
    strip_reasoning: BelowOne = 0.0
    """Share of the conversations that lose their reasoning: the model learns to answer without."""
    truncate_reasoning: BelowOne = 0.0
    """Share of the conversations whose reasoning is cut at a random place; the end of thinking that
    follows there is not learnt."""
    text_field: str = "text"
    """Field or column that holds the text of records that are plain text."""
    packed_mask: Literal["labels", "tokens"] = "labels"
    """What loss_mask of pre-tokenized packs speaks of: the label that a token predicts (as NVIDIA's
    packing tools write it), or the token itself."""
    truncate: bool = False
    """Cut samples that are longer than sequence_length, instead of refusing them."""
    heldout: BelowOne = 0.03
    """Share of the records that is held out for evaluation."""
    skip_bad: bool = False
    """Skip (and count) records that cannot be learnt from, instead of stopping."""

    def validate(self) -> None:
        """Raise UserError for options that contradict each other."""
        strip, cut = f"{self.section}strip_reasoning", f"{self.section}truncate_reasoning"
        refuse(
            (
                self.strip_reasoning + self.truncate_reasoning > 1,
                f"{strip} and {cut} exceed 1 together",
            ),
            (
                self.reasoning == "strip" and (self.strip_reasoning or self.truncate_reasoning),
                f"{self.section}reasoning strip leaves nothing for {strip} and {cut}",
            ),
        )


@dataclass(config=CHECKED)
class LoraOptions(Options):
    """Low-rank adapters (arXiv 2106.09685) beside frozen weights."""

    section: ClassVar[str] = "lora."

    rank: NotNegativeInt = 0
    """Rank of the adapters; 0: none, the weights themselves are trained."""
    alpha: Annotated[float | None, POSITIVE] = None
    """Adapters count alpha / rank times; null: twice the rank."""
    target_modules: list[str] | None = None
    """Linear layers with an adapter: names, their endings, or globs (q_proj, *.shared_experts.*);
    null: every linear layer of the backbone but the router and Mamba-2's out_proj, which PEFT
    refuses to load. MTP layers only if named."""
    target_parameters: list[str] = field(default_factory=list)
    """Stacked expert weights with an adapter per expert, such as experts.up_proj."""

    @property
    def scale(self) -> float:
        return (2.0 * self.rank if self.alpha is None else self.alpha) / max(1, self.rank)

    def mistakes(self, train_router: bool) -> list[tuple[object, str]]:
        """For `refuse`."""
        return [
            (
                self.rank and train_router,
                "train.train_router cannot be had with lora.rank: weights are frozen",
            ),
            (not self.rank and self.changed(), "lora options have no effect without lora.rank"),
        ]


@dataclass(config=CHECKED)
class DistillOptions(Options):
    """Quantization-aware distillation: train for an export (arXiv 2601.20088)."""

    section: ClassVar[str] = "distill."

    preset: Literal["none", "conservative", "super", "nano", "ultra"] = "none"
    """Which modules compute in the formats of `export --preset`; they learn the probabilities of
    model.from_hf, which is held in memory beside the model. none: ordinary fine-tuning."""
    formats: GLOBS = field(default_factory=dict)
    """Formats of further modules, as for `export`: glob over module names -> bf16, fp8, nvfp4 or
    nvfp4_w4a16."""
    weight: Share = 1.0
    """Share of the KL divergence from the unquantized model in the main loss; the rest is
    cross-entropy, as the held-out loss always is."""


@dataclass(config=CHECKED)
class BoostOptions(Options):
    """Train the multi-token-prediction block alone to draft what the model would say, best on
    answers of its own (`rollout`)."""

    section: ClassVar[str] = "boost."

    loss: Literal["none", "kl", "lk", "ce"] = "none"
    """What every depth learns: kl: the model's own probabilities, by the divergence from them; lk:
    that drafts stay, by minus the logarithm of that probability; ce: the tokens. none: ordinary
    fine-tuning."""
    depths: PositiveInt = 7
    """How many tokens ahead; drafts are as good as the depths that were trained."""
    temperature: PositiveFloat = 2.0
    """What divides the logits of both sides of the divergence, kl."""
    mixing: bool = True
    """Let every depth read the state of any depth before it, drawn by token, as drafting does."""


@dataclass(config=CHECKED)
class FinetuneDataOptions(SampleOptions, SequenceOptions):
    """What is learnt from."""

    section: ClassVar[str] = "data."

    path: str | None = None
    """Conversations and the like (.jsonl, .parquet, .txt, a directory of those, a Hugging Face
    dataset on disk), or samples made of them by `prepare --for finetune`."""
    heldout_path: str | None = None
    """The same for evaluation, instead of the share heldout of path."""


@dataclass(config=CHECKED)
class FinetuneTrainOptions(TrainOptions):
    """Optimization, losses, what is trained, and what happens when."""

    max_steps: NotNegativeInt = 0
    """Optimizer steps of the whole run; 0: as many as the epochs take."""
    epochs: PositiveFloat = 1.0
    """Passes over the training samples, where max_steps is 0."""
    global_batch_size: PositiveInt = 64
    """Sequences (packs of samples) per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass on one rank; the rest of the global batch is accumulated."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate; adapters take about ten times the rate of full fine-tuning."""
    schedule: Literal["wsd", "cosine", "constant"] = "constant"
    """wsd: warm-up, stable, then decay by 1 - sqrt(fraction); cosine; or constant."""
    warmup_steps: NotNegativeInt = 20
    """Steps of linear warm-up."""
    mtp_loss_weight: NotNegativeFloat = 0.3
    """Weight lambda of the mean over depths of the multi-token-prediction losses; 0: that block
    stays as it is."""
    aux_loss_weight: NotNegativeFloat = 0.0
    """Weight of the sequence-wise load-balancing loss."""
    loss: Literal["tokens", "conversations", "two_stage"] = "tokens"
    """What is averaged over the global batch: all learnt tokens; every sample's own mean; or
    first the one, then the other, as Nemotron 3 Super was."""
    second_stage_step: Annotated[int | None, POSITIVE] = None
    """Steps of the first stage of two_stage."""
    trained: Literal["all", "mtp"] = "all"
    """mtp: the multi-token-prediction block alone, everything else stays as it is."""
    train_router: bool = False
    """Train the routers too: their weights, and the bias that balances experts."""

    def per_document(self, step: int) -> bool:
        first_stage = self.second_stage_step or 0
        return self.loss == "conversations" or (self.loss == "two_stage" and step >= first_stage)


@dataclass(config=CHECKED)
class FinetuneConfig(TrainingConfig):
    """Fine-tune a checkpoint on conversations, or resume."""

    run_dir: str = "runs/finetune"
    """Directory of the run: resolved configuration, samples, metrics, checkpoints, and at the end
    the model."""
    data: FinetuneDataOptions = field(default_factory=FinetuneDataOptions)
    train: FinetuneTrainOptions = field(default_factory=FinetuneTrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    boost: BoostOptions = field(default_factory=BoostOptions)

    def validate(self, shape: ModelConfig | None = None) -> None:
        super().validate(shape)
        self.data.validate()
        train, rank, preset = self.train, self.lora.rank, self.distill.preset
        mtp, distils, boost = train.trained == "mtp", preset != "none", self.boost
        no_mtp, no_distilling = (
            "train.trained mtp cannot be had",
            f"distill.preset {preset} cannot be had",
        )
        refuse(
            (not self.model.from_hf, "model.from_hf is missing: name the checkpoint to fine-tune"),
            (not self.data.path, "data.path is missing: name the conversations to learn from"),
            (
                (train.loss == "two_stage") != (train.second_stage_step is not None),
                "train.loss two_stage and train.second_stage_step (the steps of its first stage) "
                "belong together",
            ),
            (
                mtp and not (shape or self.model).mtp_num_depths,
                f"{no_mtp}: the model has no multi-token-prediction block",
            ),
            (mtp and not train.mtp_loss_weight, f"{no_mtp}: train.mtp_loss_weight is 0"),
            (mtp and rank, f"{no_mtp}: lora.rank asks for adapters: choose one of the two"),
            *self.lora.mistakes(train.train_router),
            (
                distils and self.precision.low,
                f"{no_distilling}: precision.recipe asks for other formats",
            ),
            (
                distils and rank,
                f"{no_distilling}: lora.rank freezes the weights that would be quantized",
            ),
            (distils and mtp, f"{no_distilling}: train.trained mtp leaves them as they are"),
            (
                boost.loss != "none" and not mtp,
                f"boost.loss {boost.loss} trains the MTP block alone: set train.trained mtp",
            ),
            (
                boost.loss != "none" and self.parallel.cp > 1,
                f"boost.loss {boost.loss} cannot be had with parallel.cp ({self.parallel.cp}): it "
                "compares predictions across the borders of parts",
            ),
            (
                boost.loss == "none" and boost.changed(),
                "boost options have no effect without boost.loss",
            ),
            (
                boost.loss in ("lk", "ce") and "temperature" in boost.changed(),
                f"boost.temperature has no effect with boost.loss {boost.loss}",
            ),
            (
                not distils and self.distill.changed(),
                "distill options have no effect without distill.preset",
            ),
        )
        if train.max_steps:
            self.validate_steps()

    def validate_steps(self) -> None:
        """What depends on the number of steps, once it is known. Raises UserError."""
        steps, second = self.train.max_steps, self.train.second_stage_step
        self.precision.validate(steps)
        refuse(
            (
                (second or 0) >= steps,
                f"train.second_stage_step ({second}) must be below the number of steps ({steps}), "
                "or the second stage never comes",
            )
        )
