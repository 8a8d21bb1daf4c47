"""Which of the operations in ``nemo_kernels`` a model takes, and at which sizes."""

from __future__ import annotations

from nemo_hybrid.config.model import ModelConfig
from nemo_kernels.backend import Sizes

_OF_LAYERS = {"M": ("ssd", "conv1d"), "*": ("attention",), "E": ("moe",)}


def operations(cfg: ModelConfig, low_precision: bool = False) -> list[str]:
    """Names of those that a model trains with."""
    letters = dict.fromkeys(cfg.pattern + cfg.mtp_pattern * bool(cfg.mtp_num_depths))
    of_layers = [op for letter in letters for op in _OF_LAYERS.get(letter, ())]
    return [*of_layers, "norm", "loss", *["nvfp4"] * low_precision]


def sizes(cfg: ModelConfig) -> Sizes:
    """For self-checks."""
    return Sizes(
        heads=cfg.mamba_num_heads,
        head_dim=cfg.mamba_head_dim,
        groups=cfg.n_groups,
        state=cfg.ssm_state_size,
        chunk=cfg.chunk_size,
        query_heads=cfg.num_attention_heads,
        key_heads=cfg.num_key_value_heads,
        attention_dim=cfg.head_dim,
        expert_width=cfg.expert_size,
        expert_inner=cfg.moe_intermediate_size,
        vocabulary=cfg.vocab_size,
    )
