"""What the parts of a model are called, wherever they are summed up or chosen by kind.

Names are those of modules, of parameters, or of parameters without ``.weight``.
"""

from __future__ import annotations

from typing import NamedTuple

from nemo_hybrid.config.model import LAYER_LETTERS


class Group(NamedTuple):
    """What tables and files call a kind of module."""

    family: str
    """In an export's presets, its sensitivity and its card."""
    figures: str
    """In the metrics of low precision's health."""
    products: str
    """In a run's table of formats."""
    counted: str
    """In `inspect`'s table of parameters."""
    options: str = ""
    """Of the model, that its products' dimensions follow from."""


_MAMBA, _MOE, _ATTENTION, _MLP = (LAYER_LETTERS[letter] for letter in "ME*-")
_BESIDE_PRODUCTS = Group("mamba", "", "", _MAMBA)
_OF_ATTENTION = Group("attention", "attention", "attention", _ATTENTION,
    "hidden_size, num_attention_heads, num_key_value_heads or head_dim")  # fmt: skip
_LATENT = Group("latent", "latent_proj", "latent projections", f"{_MOE}: latent projections",
    "hidden_size or moe_latent_size")  # fmt: skip
_OF_MLP = "hidden_size or intermediate_size"
# By the name's part behind ``mixer``.
_OF_MIXER = {
    "in_proj": Group("mamba", "in_proj", "Mamba-2 in_proj", _MAMBA,
        "hidden_size, mamba_num_heads, mamba_head_dim, n_groups or ssm_state_size"),
    "out_proj": Group("mamba", "out_proj", "Mamba-2 out_proj", _MAMBA,
        "hidden_size, mamba_num_heads or mamba_head_dim"),
    **dict.fromkeys(("conv1d", "norm", "A_log", "D", "dt_bias"), _BESIDE_PRODUCTS),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), _OF_ATTENTION),
    **dict.fromkeys(("fc1_latent_proj", "fc2_latent_proj"), _LATENT),
    "experts": Group("experts", "experts", "routed experts", f"{_MOE}: routed experts",
        "moe_latent_size or moe_intermediate_size"),
    "shared_experts": Group("shared_experts", "shared_experts", "shared experts",
        f"{_MOE}: shared experts", "hidden_size or moe_shared_expert_intermediate_size"),
    "gate": Group("router", "gate", "router", f"{_MOE}: routers"),
    "up_proj": Group("mlp", "up_proj", "dense MLP", _MLP, _OF_MLP),
    "down_proj": Group("mlp", "down_proj", "dense MLP", _MLP, _OF_MLP),
}  # fmt: skip
# By the last part of other names.
_OUTSIDE = {
    "eh_proj": Group("mtp", "eh_proj", "MTP block", "MTP block", "hidden_size"),
    "lm_head": Group("head", "lm_head", "head", "head"),
    "embeddings": Group("embedding", "", "", "embedding"),
}
_NORM = Group("norm", "", "", "norms")
PRODUCTS = tuple(dict.fromkeys(g.products for g in (*_OF_MIXER.values(), *_OUTSIDE.values())))
"""The order of a run's table of formats."""


def group_of(name: str) -> Group:
    """The same in the backbone and in the MTP block (see `in_mtp`)."""
    before, mixer, behind = name.removesuffix(".weight").partition(".mixer.")
    if mixer:
        return _OF_MIXER[behind.partition(".")[0]]
    return _OUTSIDE.get(before.rpartition(".")[2], _NORM)


def in_mtp(name: str) -> bool:
    return name.startswith("mtp.")


def family(name: str) -> str:
    """experts, shared_experts, mamba, attention, latent, mlp, mtp, head, or of what is never
    quantized router, embedding or norm."""
    return "mtp" if in_mtp(name) else group_of(name).family


def figures(name: str) -> str:
    """The group of a product in the metrics of low precision's health."""
    return "mtp." * in_mtp(name) + group_of(name).figures


def component(name: str) -> str:
    """The row of a parameter in `inspect`'s table."""
    return "MTP block" if in_mtp(name) else group_of(name).counted


def is_stacked(name: str) -> bool:
    """Whether a tensor of ours holds one matrix per routed expert."""
    return name.endswith((".mixer.experts.up_proj", ".mixer.experts.down_proj"))
