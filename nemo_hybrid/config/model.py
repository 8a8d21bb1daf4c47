"""The shape of a model. Names are those of the Hugging Face ``nemotron_h`` configuration."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ValidationInfo
from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    POSITIVE,
    NotNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
)
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


def _letters(pattern: object, info: ValidationInfo) -> object:
    """The pattern string that a list of letters and layer names means."""
    if not isinstance(pattern, list | tuple):
        return pattern
    known = {letter: letter for letter in LAYER_LETTERS} | LAYER_NAMES
    for i, layer in enumerate(pattern):
        if layer not in list(known):
            raise UserError(
                f"model.{info.field_name}: unknown layer {layer!r} at place {i}; known: "
                f"{', '.join(known)}"
            )
    return "".join(known[layer] for layer in pattern)


Pattern = Annotated[str, BeforeValidator(_letters)]


@dataclass(config=CHECKED)
class ModelConfig(Options):
    """Shape of a model."""

    section: ClassVar[str] = "model."

    pattern: Pattern = "MEM*EMEM*E"
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

    mtp_pattern: Pattern = "*E"
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
        """Raise UserError for fields that do not fit each other, naming them."""
        check_pattern(self.pattern, "model.pattern")
        if self.mtp_num_depths:
            check_pattern(self.mtp_pattern, "model.mtp_pattern", allowed="*E")
        for small, large in _NO_LARGER:
            if getattr(self, small) > getattr(self, large):
                raise UserError(
                    f"model.{small} ({getattr(self, small)}) exceeds model.{large} "
                    f"({getattr(self, large)})"
                )
        for part, whole in _DIVIDES:
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"model.{whole} ({getattr(self, whole)}) is not divisible by model.{part} "
                    f"({getattr(self, part)})"
                )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise UserError(f"model.{name} must be below model.vocab_size ({self.vocab_size})")


_NO_LARGER = (
    ("time_step_min", "time_step_max"),
    ("time_step_floor", "time_step_max"),
    ("num_experts_per_tok", "n_routed_experts"),
)
_DIVIDES = (("num_key_value_heads", "num_attention_heads"), ("n_groups", "mamba_num_heads"))


def check_pattern(pattern: str, name: str, allowed: str = "", empty: bool = False) -> None:
    """Raise UserError unless every letter of pattern is one of ``allowed``, or of all there are."""
    allowed = allowed or "".join(LAYER_LETTERS)
    if not pattern and not empty:
        raise UserError(f"{name} is empty: give one letter per layer")
    if not isinstance(pattern, str):
        raise UserError(f"{name} must be a string of layer letters, got {pattern!r}")
    for i, letter in enumerate(pattern):
        if letter not in allowed:
            names = LAYER_LETTERS | {"e": "experts alone"}
            known = ", ".join(f"{a} ({names[a]})" for a in allowed)
            raise UserError(f"{name}: unknown layer letter {letter!r} at place {i}; known: {known}")
