"""Every option of a training run, as dataclasses; with `command_options` the only place that holds
defaults.

Field docstrings are the help texts of the command line, and field types declare bounds. Nothing
here imports torch, so that ``import nemo_hybrid`` and ``nemo-hybrid --help`` stay fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from nemo_hybrid.errors import UserError

LAYER_LETTERS = {"M": "Mamba-2", "E": "LatentMoE", "*": "attention", "-": "dense MLP"}
LAYER_NAMES = {
    "linear_attention": "M",
    "mamba": "M",
    "moe": "E",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
}
"""What config.json of either vocabulary calls the layers."""

FP32_NAMES = ("A_log", "D", "dt_bias", "e_score_correction_bias")
"""Last name parts of the parameters and buffers that stay fp32 in every model, run and file."""


class Bound(NamedTuple):
    """What a number must do, in words that follow "must", and whether it does."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Bound("be positive", lambda v: v > 0)
NOT_NEGATIVE = Bound("be 0 or more", lambda v: 0 <= v < float("inf"))
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NotNegativeInt = Annotated[int, NOT_NEGATIVE]
NotNegativeFloat = Annotated[float, NOT_NEGATIVE]
BelowOne = Annotated[float, Bound("lie in [0, 1)", lambda v: 0 <= v < 1)]
Seed = Annotated[int, Bound("lie in [0, 2**63)", lambda v: 0 <= v < 2**63)]
"""Some generators refuse others."""


def check_bounds(options: object, section: str = "") -> None:
    """Raise UserError for the first field that breaks a bound which its type declares."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for bound in getattr(hint, "__metadata__", ()):
            if value is not None and not bound.holds(value):
                raise UserError(f"{section}{name} must {bound.words}, got {value}")


@dataclass
class Architecture:
    """Shape of a model. Names are those of the Hugging Face ``nemotron_h`` configuration."""

    pattern: str = "MEM*EMEM*E"
    """One letter per layer: M Mamba-2, E LatentMoE, * attention, - dense MLP. From Python a list of
    such letters, or of the names in LAYER_NAMES, becomes that string."""
    vocab_size: PositiveInt = 4096
    """Number of token ids; must cover the tokenizer."""
    hidden_size: PositiveInt = 256
    """Width of the residual stream."""

    num_attention_heads: PositiveInt = 4
    """Query heads of an attention layer."""
    num_key_value_heads: PositiveInt = 2
    """Key/value heads of an attention layer (grouped-query attention)."""
    head_dim: PositiveInt = 64
    """Width of one attention head."""

    mamba_num_heads: PositiveInt = 8
    """Heads of a Mamba-2 layer."""
    mamba_head_dim: PositiveInt = 64
    """Width of one Mamba-2 head."""
    ssm_state_size: PositiveInt = 32
    """State size N of a Mamba-2 head."""
    n_groups: PositiveInt = 2
    """Groups that share B and C in a Mamba-2 layer."""
    conv_kernel: PositiveInt = 4
    """Width of the causal depthwise convolution."""
    chunk_size: PositiveInt = 64
    """Chunk length of the Mamba-2 scan. It changes speed, not results (up to rounding)."""
    time_step_min: PositiveFloat = 1e-3
    """Smallest initial Mamba-2 time step."""
    time_step_max: PositiveFloat = 0.1
    """Largest initial Mamba-2 time step."""
    time_step_floor: PositiveFloat = 1e-4
    """Floor of the initial Mamba-2 time step."""

    n_routed_experts: PositiveInt = 16
    """Routed experts of a MoE layer."""
    num_experts_per_tok: PositiveInt = 4
    """Routed experts that each token visits."""
    moe_intermediate_size: PositiveInt = 128
    """Inner width of one routed expert."""
    moe_latent_size: Annotated[int | None, POSITIVE] = 64
    """Width in which tokens are dispatched and experts work; null: the full hidden size."""
    moe_shared_expert_intermediate_size: NotNegativeInt = 256
    """Inner width of the shared expert, which works in the full hidden size; 0: none."""
    routed_scaling_factor: PositiveFloat = 2.5
    """Factor on the normalised routing weights."""
    norm_topk_prob: bool = True
    """Normalise the chosen experts' scores to sum to one before scaling."""
    intermediate_size: PositiveInt = 512
    """Inner width of a dense MLP layer (pattern letter -)."""

    mtp_pattern: str = "*E"
    """Layers of the multi-token-prediction block."""
    mtp_num_depths: NotNegativeInt = 2
    """How many tokens beyond the next one are predicted; 0: no multi-token-prediction block.
    One physical block is applied once per depth."""

    layer_norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial linear weights."""
    max_position_embeddings: PositiveInt = 262144
    """Longest sequence the model is declared for; nothing in the model depends on it."""
    bos_token_id: NotNegativeInt = 1
    """Id of the beginning-of-sequence token."""
    eos_token_id: NotNegativeInt = 2
    """Id of the end-of-sequence token."""
    pad_token_id: NotNegativeInt = 0
    """Id of the padding token."""

    def __post_init__(self) -> None:
        self.pattern = _letters(self.pattern, "model.pattern")
        self.mtp_pattern = _letters(self.mtp_pattern, "model.mtp_pattern")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_size(self) -> int:
        """Width in which routed experts work: the latent size, or the hidden size without one."""
        return self.moe_latent_size or self.hidden_size

    def validate(self) -> None:
        """Raise UserError for the first field that cannot work, naming it and what would."""
        check_pattern(self.pattern, "model.pattern")
        if self.mtp_num_depths:
            check_pattern(self.mtp_pattern, "model.mtp_pattern", allowed="*E")
        check_bounds(self, "model.")
        for name in ("time_step_min", "time_step_floor"):
            if getattr(self, name) > self.time_step_max:
                raise UserError(
                    f"model.{name} ({getattr(self, name)}) exceeds model.time_step_max "
                    f"({self.time_step_max})"
                )
        _divides("model.num_key_value_heads", self.num_key_value_heads,
                 "model.num_attention_heads", self.num_attention_heads)  # fmt: skip
        _divides("model.n_groups", self.n_groups, "model.mamba_num_heads", self.mamba_num_heads)
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"model.num_experts_per_tok ({self.num_experts_per_tok}) exceeds "
                f"model.n_routed_experts ({self.n_routed_experts})"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise UserError(f"model.{name} must be below model.vocab_size ({self.vocab_size})")


@dataclass
class HybridConfig(Architecture):
    """The configuration a :class:`nemo_hybrid.HybridLM` is built from."""

    @classmethod
    def from_hf(cls, path: str) -> HybridConfig:
        """Read config.json (or the directory that holds it). Raises UserError, naming fields."""
        from nemo_hybrid.hf_config import config_from_hf

        return config_from_hf(path)

    def to_hf(self) -> dict[str, Any]:
        """The contents of config.json for transformers and serving engines."""
        from nemo_hybrid.hf_config import config_to_hf

        return config_to_hf(self)


@dataclass
class ModelOptions(Architecture):
    """Model of a run: its shape, or a directory to take shape and weights from."""

    from_hf: str | None = None
    """Directory with config.json and safetensors to start from; the shape is the one it holds."""

    def hybrid(self) -> HybridConfig:
        return HybridConfig(**{f.name: getattr(self, f.name) for f in fields(Architecture)})


@dataclass
class SequenceOptions:
    """Where training sequences come from, whatever they hold."""

    path: str | None = None
    """Prepared token store (made by `prepare`)."""
    sequence_length: PositiveInt = 256
    """Tokens per training sequence."""
    workers: NotNegativeInt = 0
    """Background threads that read ahead; the order of samples does not depend on it."""
    verify: Literal["full", "size"] = "full"
    """Check of the store's files at the start: every SHA-256, or only the sizes (for stores too
    large to read twice)."""


@dataclass
class DataOptions(SequenceOptions):
    """Where tokens come from and how they are cut into sequences."""

    blend: dict[str, float] = field(default_factory=dict)
    """Several stores and their weights, instead of path; they must share one tokenizer."""
    default_corpus: str | None = None
    """Place of the default corpus (this Python's standard library): it is made here when data.path
    names this place and nothing is there."""


@dataclass
class TrainOptions:
    """Optimization, losses, and what happens when."""

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
    deterministic: bool = False
    """Only deterministic algorithms (slower on GPUs), so that a resumed run is bit-identical there
    too. Not run on a GPU yet."""
    eval_every: NotNegativeInt = 0
    """Steps between evaluations on held-out data; 0: at the start and the end only."""
    eval_sequences: NotNegativeInt = 256
    """Held-out sequences per evaluation (fewer if the store holds fewer); 0: no evaluation."""
    log_every: PositiveInt = 10
    """Steps between plain log lines when the output is not a terminal."""
    hang_timeout_s: NotNegativeFloat = 1800
    """Seconds without a finished step after which a process prints its stacks and ends; 0: never.
    Evaluations and checkpoints count as part of their step."""


@dataclass
class GuardOptions:
    """Which steps are not made, and what follows."""

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


ZERO_REFUSED = {
    0: "without ZeRO, bf16 weights have no fp32 masters, and clipping ignores expert parallelism",
    3: "DeepSpeed refuses ZeRO-3 for MoE layers whose experts are divided over processes",
}
"""Why the other stages cannot be had."""


@dataclass
class ParallelOptions:
    """How the work is divided over processes."""

    ep: PositiveInt = 1
    """Expert-parallel size: processes over which the routed experts are divided."""
    zero: int = 2
    """DeepSpeed ZeRO stage: 1 or 2."""


@dataclass
class PrecisionOptions:
    """Number formats."""

    recipe: Literal["bf16", "fp32", "nvfp4_super", "nvfp4_ultra", "nvfp4_all"] = "bf16"
    """bf16: bf16 weights and activations with fp32 masters and accumulation; fp32: all fp32;
    nvfp4_super, nvfp4_ultra: bf16 but for the products that these models were trained in NVFP4
    and MXFP8 with; nvfp4_all: every linear layer and expert in NVFP4."""
    formats: dict[str, str] = field(default_factory=dict)
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
        """Raise UserError for options that contradict each other or have no effect."""
        if self.recipe == "fp32" and self.formats:
            raise UserError(
                "precision.formats has no effect with precision.recipe fp32: set the recipe to "
                "bf16, in which all other products then run"
            )
        of_recipe = ("last_layers_bf16",) if self.recipe in ("bf16", "fp32") else ()
        of_low = ("rht", "stochastic_rounding", "two_dimensional_weights", "switch_step")
        for f in fields(self):
            idle = f.name in of_recipe or (f.name in of_low and not self.low)
            if idle and getattr(self, f.name) != f.default:
                raise UserError(
                    f"precision.{f.name} has no effect with precision.recipe {self.recipe}: leave "
                    "it out, or choose an nvfp4 recipe"
                )
        if self.switch_passes != "all" and self.switch_step is None:
            raise UserError("precision.switch_passes has no effect without precision.switch_step")
        if self.switch_step is not None and self.switch_step >= max_steps:
            raise UserError(
                f"precision.switch_step ({self.switch_step}) must be below train.max_steps "
                f"({max_steps}), or the switch never comes"
            )


@dataclass
class CheckpointOptions:
    """When checkpoints are written and how many stay."""

    every: NotNegativeInt = 500
    """Steps between checkpoints; one is always written at the end. 0: at the end only."""
    keep: NotNegativeInt = 3
    """Newest checkpoints that stay; 0: all of them."""
    asynchronous: bool = True
    """Copy the state to CPU memory and write it while training goes on."""


@dataclass
class KernelOptions:
    """Which implementation each operation takes; `doctor` prints the choice and its reason."""

    ssd: Literal["auto", "reference", "mamba_ssm"] = "auto"
    """Mamba-2 scan."""
    conv1d: Literal["auto", "reference", "causal_conv1d"] = "auto"
    """Causal depthwise convolution."""
    attention: Literal["auto", "reference", "flash_attn"] = "auto"
    """Softmax attention (reference: torch's scaled_dot_product_attention)."""
    moe: Literal["auto", "reference", "triton", "grouped_mm"] = "auto"
    """Router, sorting of routed slots, and experts; triton: Hopper GPUs and newer."""
    nvfp4: Literal["auto", "reference", "triton", "transformer_engine"] = "auto"
    """Quantization to NVFP4 and products of it; transformer_engine: Blackwell GPUs."""


@dataclass
class TrainingConfig:
    """What `pretrain` and `finetune` have in common."""

    run_dir: str = "runs/default"
    """Directory of the run: resolved configuration, metrics, plots, checkpoints."""
    resume: str = "auto"
    """auto: newest valid checkpoint of the same configuration, else a fresh start; never: the
    directory must be empty; or the path of a checkpoint."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: SequenceOptions = field(default_factory=SequenceOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    guard: GuardOptions = field(default_factory=GuardOptions)
    kernels: KernelOptions = field(default_factory=KernelOptions)

    def validate(self, shape: Architecture | None = None) -> None:
        """Check everything that needs neither data nor processes. Raises UserError.

        ``shape`` is that of the model, where it does not come from the options here.
        """
        m = shape or self.model
        m.validate()
        for f in fields(self):
            check_bounds(getattr(self, f.name), f"{f.name}.")
        if self.data.sequence_length <= m.mtp_num_depths:
            raise UserError(
                f"data.sequence_length ({self.data.sequence_length}) must exceed "
                f"model.mtp_num_depths ({m.mtp_num_depths})"
            )
        check_pattern(self.train.recompute, "train.recompute", "ME*-e", empty=True)
        if self.parallel.zero not in (1, 2):
            reason = ZERO_REFUSED.get(self.parallel.zero, "there is no other stage")
            raise UserError(f"parallel.zero must be 1 or 2, got {self.parallel.zero}: {reason}")
        if m.n_routed_experts % self.parallel.ep:
            raise UserError(
                f"model.n_routed_experts ({m.n_routed_experts}) is not divisible by "
                f"parallel.ep ({self.parallel.ep})"
            )

    def validate_world(self, world_size: int) -> int:
        """Check the layout against the number of processes; return the accumulation steps."""
        ep, t = self.parallel.ep, self.train
        if world_size % ep:
            raise UserError(
                f"parallel.ep ({ep}) does not divide the number of processes ({world_size})"
            )
        per_pass = t.micro_batch_size * world_size
        if t.global_batch_size % per_pass:
            raise UserError(
                f"train.global_batch_size ({t.global_batch_size}) is not divisible by "
                f"train.micro_batch_size ({t.micro_batch_size}) x processes ({world_size}) "
                f"= {per_pass}"
            )
        return t.global_batch_size // per_pass


@dataclass
class RunConfig(TrainingConfig):
    """Train a model from its first step, or resume."""

    data: DataOptions = field(default_factory=DataOptions)

    def validate(self, shape: Architecture | None = None) -> None:
        super().validate(shape)
        self.precision.validate(self.train.max_steps)
        if (shape or self.model).mtp_num_depths and not self.train.mtp_loss_weight:
            raise UserError(
                "train.mtp_loss_weight must be positive while model.mtp_num_depths is; set "
                "model.mtp_num_depths to 0 to train without multi-token prediction"
            )
        path, blend = self.data.path, self.data.blend
        if path and blend:
            raise UserError("give data.path or data.blend, not both")
        if not path and not blend:
            raise UserError(
                "data.path is missing: name a token store made by `nemo-hybrid prepare`"
            )
        for store, weight in blend.items():
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"data.blend: the weight of {store} must be positive and finite, got {weight}"
                )


def check_pattern(pattern: str, name: str, allowed: str = "ME*-", empty: bool = False) -> None:
    """Raise UserError unless every letter of pattern is one of allowed."""
    if not pattern and not empty:
        raise UserError(f"{name} is empty: give one letter per layer")
    if not isinstance(pattern, str):
        raise UserError(f"{name} must be a string of layer letters, got {pattern!r}")
    for i, letter in enumerate(pattern):
        if letter not in allowed:
            names = LAYER_LETTERS | {"e": "experts alone"}
            known = ", ".join(f"{a} ({names[a]})" for a in allowed)
            raise UserError(f"{name}: unknown layer letter {letter!r} at place {i}; known: {known}")


def _letters(pattern: object, name: str) -> str:
    """The pattern string that a string or a list of letters and layer names means."""
    if isinstance(pattern, str):
        return pattern
    if not isinstance(pattern, list | tuple):
        raise UserError(f"{name} must be a string of layer letters or a list, got {pattern!r}")
    known = {letter: letter for letter in LAYER_LETTERS} | LAYER_NAMES
    for i, layer in enumerate(pattern):
        if layer not in list(known):
            raise UserError(
                f"{name}: unknown layer {layer!r} at place {i}; known: {', '.join(known)}"
            )
    return "".join(known[layer] for layer in pattern)


def _divides(small_name: str, small: int, big_name: str, big: int) -> None:
    if big % small:
        raise UserError(f"{big_name} ({big}) is not divisible by {small_name} ({small})")
