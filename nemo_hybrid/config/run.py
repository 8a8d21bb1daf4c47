"""Every option of a training run.

Field docstrings are the help texts of the command line, and field types declare bounds.
"""

from __future__ import annotations

import math
import re
from dataclasses import field, fields, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    GLOBS,
    NOT_NEGATIVE,
    PHASES,
    POSITIVE,
    SIZES,
    BelowOne,
    NotNegativeFloat,
    NotNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Seed,
    refuse,
)
from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig, check_pattern
from nemo_hybrid.config.parallel import ParallelOptions
from nemo_hybrid.config.short import ShortOptions
from nemo_hybrid.errors import UserError

Self = TypeVar("Self", bound="TrainingConfig")


@dataclass(config=CHECKED)
class ModelOptions(ModelConfig):
    """Model of a run: its shape, or a directory to take shape and weights from."""

    from_hf: str | None = None
    """Directory with config.json and safetensors to start from; the shape is the one it holds."""

    def hybrid(self) -> HybridConfig:
        return HybridConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@dataclass(config=CHECKED)
class SequenceOptions(Options):
    """Where training sequences come from, whatever they hold."""

    section: ClassVar[str] = "data."

    path: str | None = None
    """Prepared token store (made by `prepare`)."""
    sequence_length: PositiveInt = 256
    """Tokens per training sequence."""
    workers: NotNegativeInt = 0
    """Background threads that read ahead; the order of samples does not depend on it."""
    verify: Literal["full", "size"] = "full"
    """Check of the store's files at the start: every SHA-256, or only the sizes (for stores too
    large to read twice)."""


@dataclass(config=CHECKED)
class DataOptions(SequenceOptions):
    """Where tokens come from and how they are cut into sequences."""

    blend: dict[str, float] = field(default_factory=dict)
    """Several stores and their weights, instead of path; they must share one tokenizer."""
    phases: PHASES = field(default_factory=dict)
    """Later blends: number of the run's tokens from which on each is drawn -> stores and their
    weights. A store of several phases is read on where the phase before left it."""
    short: ShortOptions = field(default_factory=ShortOptions)
    default_corpus: str | None = None
    """Place of the default corpus (this Python's standard library): it is made here when data.path
    names this place and nothing is there."""


@dataclass(config=CHECKED)
class TrainOptions(Options):
    """Optimization, losses, and what happens when."""

    section: ClassVar[str] = "train."

    max_steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    seed: Seed = 1234
    """Seed of initialization and sample order."""
    global_batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt = 8
    """Sequences per forward pass on one rank; the rest of the global batch is accumulated."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    min_lr_ratio: NotNegativeFloat = 0.01
    """Final learning rate over the peak."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm-up, stable, then decay by 1 - sqrt(fraction); cosine; or constant."""
    warmup_steps: NotNegativeInt = 100
    """Steps of linear warm-up."""
    decay_steps: NotNegativeInt = 200
    """Last steps over which the wsd schedule decays; fewer if the warm-up leaves fewer."""
    max_tokens: Annotated[float | None, POSITIVE] = None
    """Tokens of the whole run, in place of max_steps: as many steps as hold them, as for the
    following two."""
    warmup_tokens: Annotated[float | None, NOT_NEGATIVE] = None
    """Tokens of warm-up, in place of warmup_steps."""
    decay_tokens: Annotated[float | None, NOT_NEGATIVE] = None
    """Tokens of the wsd schedule's decay, in place of decay_steps."""
    weight_decay: NotNegativeFloat = 0.1
    """Decoupled weight decay of matrices (not of norms, biases, A_log, D and dt_bias)."""
    beta1: BelowOne = 0.9
    """AdamW beta 1."""
    beta2: BelowOne = 0.95
    """AdamW beta 2."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon."""
    clip_grad_norm: NotNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""
    mtp_loss_weight: NotNegativeFloat = 0.3
    """Weight lambda of the mean over depths of the multi-token-prediction losses."""
    aux_loss_weight: NotNegativeFloat = 1e-4
    """Weight of the sequence-wise load-balancing loss."""
    router_bias_rate: NotNegativeFloat = 1e-3
    """Step of the router bias update, once per global batch; 0 freezes the bias."""
    recompute: str = ""
    """Pattern letters whose layers recompute activations in the backward pass, such as "ME"; e: of
    LatentMoE layers the experts' inner activations alone."""
    tile: NotNegativeInt = 0
    """Tokens that MoE and MLP layers take at a time, being recomputed then; 0: all."""
    offload: bool = False
    """Inputs of recomputed layers wait in CPU memory."""
    deterministic: bool = False
    """Only deterministic algorithms (slower on GPUs), so that a resumed run is bit-identical there
    too. Not run on a GPU yet."""
    eval_every: NotNegativeInt = 0
    """Steps between evaluations on held-out data; 0: at the start and the end only."""
    eval_sequences: NotNegativeInt = 256
    """Held-out sequences per evaluation (fewer if the store holds fewer); 0: no evaluation."""
    eval_positions: bool = False
    """Measure the held-out loss also by position in the document, in bands that end at powers of
    two: whether more context helps."""
    log_every: PositiveInt = 10
    """Steps between plain log lines when the output is not a terminal."""
    hang_timeout_s: NotNegativeFloat = 1800
    """Seconds without a finished step after which a process prints its stacks and ends; 0: never.
    Evaluations and checkpoints count as part of their step."""

    def per_document(self, step: int) -> bool:
        """Whether the step after ``step`` averages documents' means instead of all targets."""
        return False

    def batch_sizes(self, sequence_length: int) -> BatchSizes:
        """Of every global batch."""
        return BatchSizes(self.global_batch_size)


IN_STEPS = {
    "max_tokens": "max_steps",
    "warmup_tokens": "warmup_steps",
    "decay_tokens": "decay_steps",
}
"""Options of training that are counted in tokens, and what they stand for."""


@dataclass(config=CHECKED)
class GuardOptions(Options):
    """Which steps are not made, and what follows."""

    section: ClassVar[str] = "guard."

    spike_band: NotNegativeFloat = 10.0
    """A loss or gradient norm this many robust standard deviations above the median of the last
    accepted ones is a spike; 0: only NaN and infinity are passed over."""
    window: PositiveInt = 128
    """Accepted steps that the median is taken of; none is judged a spike before 16."""
    rollback_after: PositiveInt = 4
    """Batches passed over in a row that send the run back to its last checkpoint; the data goes
    on behind them."""
    stop_after: PositiveInt = 3
    """Returns without a new checkpoint in between after which the run stops."""


@dataclass(config=CHECKED)
class PrecisionOptions(Options):
    """Number formats."""

    section: ClassVar[str] = "precision."

    recipe: Literal["bf16", "fp32", "nvfp4_super", "nvfp4_ultra", "nvfp4_all"] = "bf16"
    """bf16: bf16 weights and activations with fp32 masters and accumulation; fp32: all fp32;
    nvfp4_super, nvfp4_ultra: bf16 but for the products that these models were trained in NVFP4
    and MXFP8 with; nvfp4_all: every linear layer and expert in NVFP4."""
    formats: GLOBS = field(default_factory=dict)
    """Formats of further products, on top of the recipe: glob over module names -> FORMAT or
    FORWARD/DGRAD/WGRAD, each bf16, fp32, nvfp4 or mxfp8; of several globs the last counts."""
    last_layers_bf16: Annotated[int | None, NOT_NEGATIVE] = None
    """Last layers of the backbone that the recipe leaves in bf16; null: the recipe's share of the
    depth (super 14 of 88, ultra 16 of 108, at least one; all: none)."""
    rht: bool = True
    """Random Hadamard transform of both operands of NVFP4 weight gradients."""
    stochastic_rounding: bool = True
    """Of gradients that are rounded to NVFP4."""
    two_dimensional_weights: bool = True
    """One NVFP4 scale per 16x16 block of a weight, so that both passes see the same weights."""
    switch_step: Annotated[int | None, POSITIVE] = None
    """Optimizer steps after which low precision ends; null: never."""
    switch_passes: Literal["forward", "all"] = "all"
    """Passes that are in bf16 from then on."""
    health_every: NotNegativeInt = 100
    """Steps between samples of the health metrics of low precision; 0: never."""

    @property
    def low(self) -> bool:
        """Whether any product may run in low precision."""
        return self.recipe not in ("bf16", "fp32") or bool(self.formats)

    def validate(self, max_steps: int) -> None:
        """Raise UserError for options that contradict each other or have no effect in a run of so
        many steps."""
        idle = set[str]() if self.low else {*_OF_LOW}
        if self.recipe in ("bf16", "fp32"):
            idle.add("last_layers_bf16")
        refuse(
            (
                self.recipe == "fp32" and self.formats,
                "precision.formats has no effect with precision.recipe fp32: set the recipe to "
                "bf16, in which all other products then run",
            ),
            *(
                (
                    name in idle,
                    f"precision.{name} has no effect with precision.recipe {self.recipe}: leave "
                    "it out, or choose an nvfp4 recipe",
                )
                for name in self.changed()
            ),
            (
                self.switch_passes != "all" and self.switch_step is None,
                "precision.switch_passes has no effect without precision.switch_step",
            ),
            (
                (self.switch_step or 0) >= max_steps,
                f"precision.switch_step ({self.switch_step}) must be below train.max_steps "
                f"({max_steps}), or the switch never comes",
            ),
        )


_OF_LOW = ("rht", "stochastic_rounding", "two_dimensional_weights", "switch_step")


@dataclass(config=CHECKED)
class CheckpointOptions(Options):
    """When checkpoints are written and how many stay."""

    section: ClassVar[str] = "checkpoint."

    every: NotNegativeInt = 500
    """Steps between checkpoints; one is always written at the end. 0: at the end only."""
    keep: NotNegativeInt = 3
    """Newest checkpoints that stay; 0: all of them."""
    asynchronous: bool = True
    """Copy the state to CPU memory and write it while training goes on."""


@dataclass(config=CHECKED)
class KernelOptions(Options):
    """Which implementation each operation takes; `doctor` prints the choice and its reason."""

    section: ClassVar[str] = "kernels."

    ssd: Literal["auto", "reference", "triton", "mamba_ssm"] = "auto"
    """Mamba-2 scan."""
    conv1d: Literal["auto", "reference", "triton", "causal_conv1d"] = "auto"
    """Causal depthwise convolution."""
    attention: Literal["auto", "reference", "varlen", "flash_attn", "by_document"] = "auto"
    """Softmax attention (reference: torch's scaled_dot_product_attention, with a mask where a row
    holds several documents; varlen: torch's kernel for such rows)."""
    moe: Literal["auto", "reference", "triton", "grouped_mm"] = "auto"
    """Router, sorting of routed slots, and experts; triton: Hopper GPUs and newer."""
    norm: Literal["auto", "reference", "triton"] = "auto"
    """RMSNorm; triton: the gated one by this project's kernel, the plain one by torch's."""
    loss: Literal["auto", "reference", "triton"] = "auto"
    """Head with cross-entropy, or divergence from a teacher; triton: products in bf16."""
    nvfp4: Literal["auto", "reference", "triton", "transformer_engine"] = "auto"
    """Quantization to NVFP4 and products of it; transformer_engine: Blackwell GPUs."""


@dataclass(config=CHECKED)
class TrainingConfig(Options):
    """What `pretrain` and `finetune` have in common."""

    run_dir: str = "runs/default"
    """Directory of the run: resolved configuration, metrics, plots, checkpoints."""
    resume: str = "auto"
    """auto: newest valid checkpoint of the same configuration, else a fresh start; never: the
    directory must be empty; or the path of a checkpoint."""
    continue_from: str | None = None
    """Checkpoint of a run, from which a new phase of training takes weights, fp32 masters and
    moments; steps, schedule, data and guard begin anew. It is model.from_hf where none is named."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Service that gets the curves too, beside TensorBoard: Weights & Biases, or trackio; none:
    nowhere."""
    profile: str | None = None
    """Steps that torch.profiler records in RUN_DIR/profile, as STEP or STEP:COUNT, such as 20:3."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: SequenceOptions = field(default_factory=SequenceOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    kernels: KernelOptions = field(default_factory=KernelOptions)

    def __post_init__(self) -> None:
        if self.continue_from and not self.model.from_hf:
            self.model = replace(self.model, from_hf=self.continue_from)

    def in_steps(self: Self) -> Self:
        """The same with numbers of steps where tokens are counted."""
        length = self.data.sequence_length
        sizes = self.train.batch_sizes(length)
        tokens = {steps: getattr(self.train, name) for name, steps in IN_STEPS.items()}
        changes: dict[str, Any] = dict.fromkeys(IN_STEPS)
        for name, n in tokens.items():
            # The decay comes last, when no batch is small any more.
            of = BatchSizes(sizes.full) if name == "decay_steps" else sizes
            changes |= {} if n is None else {name: of.holding(n, length)}
        return replace(self, train=replace(self.train, **changes))

    def profiled_steps(self) -> range:
        """What ``profile`` means, counted from 1. Raises UserError."""
        if self.profile is None:
            return range(0)
        found = re.fullmatch(r"([1-9]\d{0,8})(?::([1-9]\d{0,4}))?", self.profile)
        if found is None:
            raise UserError(
                f"profile must be STEP or STEP:COUNT, such as 20 or 20:3, got {self.profile}"
            )
        first, last = int(found[1]), self.train.max_steps
        if 0 < last < first:
            raise UserError(f"profile names step {first}, the run has {last} (train.max_steps)")
        after = first + int(found[2] or 1)
        return range(first, min(after, last + 1) if last else after)

    def validate(self, shape: ModelConfig | None = None) -> None:
        """Check everything that needs neither data nor processes. Raises UserError.

        ``shape`` is that of the model, where it does not come from the options here.
        """
        m = shape or self.model
        m.validate()
        self.profiled_steps()
        check_pattern(self.train.recompute, "train.recompute", "ME*-e", empty=True)
        letters = {*m.pattern, *(m.mtp_pattern * m.mtp_num_depths)}
        refuse(
            (
                self.continue_from and self.resume not in ("auto", "never"),
                "continue_from begins a new phase and resume goes on with the old one: name one",
            ),
            (
                self.train.tile and not letters & {"E", "-"},
                f"train.tile has no effect: no layer of {m.pattern} is E or -",
            ),
            (
                self.train.offload
                and not self.train.tile
                and not letters & {*self.train.recompute},
                "train.offload has no effect without layers that are recomputed: name their "
                "letters in train.recompute, or set train.tile",
            ),
            (
                self.data.sequence_length <= m.mtp_num_depths,
                f"data.sequence_length ({self.data.sequence_length}) must exceed "
                f"model.mtp_num_depths ({m.mtp_num_depths})",
            ),
            *self.parallel.stage_refused(),
            (
                m.n_routed_experts % self.parallel.ep,
                f"model.n_routed_experts ({m.n_routed_experts}) is not divisible by "
                f"parallel.ep ({self.parallel.ep})",
            ),
            *self.parallel.parts_refused(
                m, self.data.sequence_length, self.train.micro_batch_size, self.kernels.ssd
            ),
        )

    def validate_world(self, world_size: int) -> int:
        """Check the layout against the number of processes; return the accumulation steps."""
        t, readers = self.train, f"processes ({world_size})"
        if self.parallel.cp > 1:
            readers = f"readers ({world_size} processes / parallel.cp {self.parallel.cp})"
        refuse(
            *(
                (
                    world_size % parts,
                    f"parallel.{name} ({parts}) does not divide the number of processes "
                    f"({world_size})",
                )
                for name, parts in (("ep", self.parallel.ep), ("cp", self.parallel.cp))
            )
        )
        per_pass = t.micro_batch_size * (world_size // self.parallel.cp)
        stages = t.batch_sizes(self.data.sequence_length).stages
        refuse(
            (
                t.global_batch_size % per_pass,
                f"train.global_batch_size ({t.global_batch_size}) is not divisible by "
                f"train.micro_batch_size ({t.micro_batch_size}) x {readers} = {per_pass}",
            ),
            *(
                (
                    size % per_pass,
                    f"train.batch_warmup: {size} sequences are not divisible by "
                    f"train.micro_batch_size ({t.micro_batch_size}) x {readers} = {per_pass}",
                )
                for _, size in stages
            ),
        )
        return t.global_batch_size // per_pass


@dataclass(config=CHECKED)
class PretrainOptions(TrainOptions):
    """Optimization, losses, and what happens when."""

    batch_warmup: SIZES = field(default_factory=dict)
    """Smaller global batches at first, in rising order: number of the run's tokens up to which ->
    sequences per optimizer step; then global_batch_size. Each is accumulated of micro-batches."""

    def batch_sizes(self, sequence_length: int) -> BatchSizes:
        return BatchSizes.of(self.global_batch_size, self.batch_warmup, sequence_length)


@dataclass(config=CHECKED)
class RunConfig(TrainingConfig):
    """Train a model from its first step, or resume."""

    data: DataOptions = field(default_factory=DataOptions)
    train: PretrainOptions = field(default_factory=PretrainOptions)

    def validate(self, shape: ModelConfig | None = None) -> None:
        super().validate(shape)
        self.precision.validate(self.train.max_steps)
        path, blend, phases = self.data.path, self.data.blend, self.data.phases
        warmup, full = self.train.batch_warmup, self.train.global_batch_size
        sizes = [*(size for _, size in sorted(warmup.items())), full]
        short = self.data.short
        short.validate(self.data.sequence_length, self.parallel.cp)
        refuse(
            (
                (shape or self.model).mtp_num_depths and not self.train.mtp_loss_weight,
                "train.mtp_loss_weight must be positive while model.mtp_num_depths is; set "
                "model.mtp_num_depths to 0 to train without multi-token prediction",
            ),
            (path and blend, "give data.path or data.blend, not both"),
            (
                not path and not blend,
                "data.path is missing: name a token store made by `nemo-hybrid prepare`",
            ),
            *(
                (
                    weight <= 0,
                    f"data.{name}: the weight of {store} must be positive, got {weight}",
                )
                for name, stores in [
                    ("blend", blend),
                    ("short.blend", short.blend),
                    *(("phases", p) for p in phases.values()),
                ]
                for store, weight in stores.items()
            ),
            *(
                (
                    not 0 < tokens < math.inf or not stores,
                    f"data.phases: {tokens:g} must be a number of tokens above 0, with a blend: "
                    "the first one is data.blend or data.path",
                )
                for tokens, stores in phases.items()
            ),
            (
                warmup and not all(a < b for a, b in pairwise(sizes)),
                f"train.batch_warmup: the sizes ({', '.join(map(str, sizes[:-1]))}) must rise "
                f"to train.global_batch_size ({full})",
            ),
            *(
                (
                    given and short.sequence_length,
                    f"{name} and data.short cannot be had together: see continue_from",
                )
                for name, given in (("data.phases", phases), ("train.batch_warmup", warmup))
            ),
        )
