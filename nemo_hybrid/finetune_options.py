"""Options of `finetune`, beside and instead of those of `pretrain` (nemo_hybrid.config)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nemo_hybrid.config import (
    POSITIVE,
    Architecture,
    BelowOne,
    Bound,
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    SequenceOptions,
    TrainingConfig,
    TrainOptions,
    check_bounds,
)
from nemo_hybrid.errors import UserError


@dataclass
class SampleOptions:
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

    def validate(self, section: str = "") -> None:
        """Raise UserError for options that contradict each other."""
        check_bounds(self, section)
        if self.strip_reasoning + self.truncate_reasoning > 1:
            raise UserError(
                f"{section}strip_reasoning and {section}truncate_reasoning exceed 1 together"
            )
        if self.reasoning == "strip" and (self.strip_reasoning or self.truncate_reasoning):
            raise UserError(
                f"{section}reasoning strip leaves nothing for {section}strip_reasoning and "
                f"{section}truncate_reasoning"
            )


@dataclass
class LoraOptions:
    """Low-rank adapters (arXiv 2106.09685) beside frozen weights."""

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


@dataclass
class DistillOptions:
    """Quantization-aware distillation: train for an export (arXiv 2601.20088)."""

    preset: Literal["none", "conservative", "super", "nano", "ultra"] = "none"
    """Which modules compute in the formats of `export --preset`; they learn the probabilities of
    model.from_hf, which is held in memory beside the model. none: ordinary fine-tuning."""
    formats: dict[str, str] = field(default_factory=dict)
    """Formats of further modules, as for `export`: glob over module names -> bf16, fp8, nvfp4 or
    nvfp4_w4a16."""
    weight: Annotated[float, Bound("lie in (0, 1]", lambda v: 0 < v <= 1)] = 1.0
    """Share of the KL divergence from the unquantized model in the main loss; the rest is
    cross-entropy, as the held-out loss always is."""


@dataclass
class FinetuneDataOptions(SampleOptions, SequenceOptions):
    """What is learnt from."""

    path: str | None = None
    """Conversations and the like (.jsonl, .parquet, .txt, a directory of those, a Hugging Face
    dataset on disk), or samples made of them by `prepare --for finetune`."""
    heldout_path: str | None = None
    """The same for evaluation, instead of the share heldout of path."""


@dataclass
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
        """Whether the step after ``step`` averages samples' means instead of all targets."""
        first_stage = self.second_stage_step or 0
        return self.loss == "conversations" or (self.loss == "two_stage" and step >= first_stage)


@dataclass
class FinetuneConfig(TrainingConfig):
    """Fine-tune a checkpoint on conversations, or resume."""

    run_dir: str = "runs/finetune"
    """Directory of the run: resolved configuration, samples, metrics, checkpoints, and at the end
    the model."""
    data: FinetuneDataOptions = field(default_factory=FinetuneDataOptions)
    train: FinetuneTrainOptions = field(default_factory=FinetuneTrainOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)

    def validate(self, shape: Architecture | None = None) -> None:
        super().validate(shape)
        train, depths = self.train, (shape or self.model).mtp_num_depths
        self.data.validate("data.")
        if not self.model.from_hf:
            raise UserError("model.from_hf is missing: name the checkpoint to fine-tune")
        if not self.data.path:
            raise UserError("data.path is missing: name the conversations to learn from")
        if (train.loss == "two_stage") != (train.second_stage_step is not None):
            raise UserError(
                "train.loss two_stage and train.second_stage_step (the steps of its first stage) "
                "belong together"
            )
        if train.trained == "mtp":
            why = (
                "the model has no multi-token-prediction block"
                if not depths
                else "train.mtp_loss_weight is 0"
                if not train.mtp_loss_weight
                else "lora.rank asks for adapters: choose one of the two"
                if self.lora.rank
                else None
            )
            if why:
                raise UserError(f"train.trained mtp cannot be had: {why}")
        if self.lora.rank:
            if train.train_router:
                raise UserError(
                    "train.train_router cannot be had with lora.rank: weights are frozen"
                )
        elif self.lora != LoraOptions():
            raise UserError("lora options have no effect without lora.rank")
        if self.distill.preset != "none":
            why = (
                "precision.recipe asks for other formats"
                if self.precision.low
                else "lora.rank freezes the weights that would be quantized"
                if self.lora.rank
                else "train.trained mtp leaves them as they are"
                if train.trained == "mtp"
                else None
            )
            if why:
                raise UserError(f"distill.preset {self.distill.preset} cannot be had: {why}")
        elif self.distill != DistillOptions():
            raise UserError("distill options have no effect without distill.preset")
        if train.max_steps:
            self.validate_steps()

    def validate_steps(self) -> None:
        """What depends on the number of steps, once it is known. Raises UserError."""
        train = self.train
        self.precision.validate(train.max_steps)
        if train.second_stage_step is not None and train.second_stage_step >= train.max_steps:
            raise UserError(
                f"train.second_stage_step ({train.second_stage_step}) must be below the number of "
                f"steps ({train.max_steps}), or the second stage never comes"
            )
