"""A model's products: what they are called, what their sizes follow from, and the table of their
formats that a run shows at its start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from nemo_hybrid.config import Architecture
from nemo_hybrid.precision.operands import BLOCKS, PassFormats
from nemo_kernels import nvfp4


class Product(NamedTuple):
    """A module whose matrix products can take low precision."""

    name: str
    module: Any
    formats: PassFormats


class Group(NamedTuple):
    """Products that the table shows together."""

    glob: str
    words: str
    options: str
    """Of the model, that its dimensions follow from."""


# The first that matches counts.
GROUPS = (
    Group("*.mixer.in_proj", "Mamba-2 in_proj",
           "hidden_size, mamba_num_heads, mamba_head_dim, n_groups or ssm_state_size"),
    Group("*.mixer.out_proj", "Mamba-2 out_proj",
           "hidden_size, mamba_num_heads or mamba_head_dim"),
    Group("*.mixer.[qkvo]_proj", "attention",
           "hidden_size, num_attention_heads, num_key_value_heads or head_dim"),
    Group("*.fc?_latent_proj", "latent projections", "hidden_size or moe_latent_size"),
    Group("*.experts", "routed experts", "moe_latent_size or moe_intermediate_size"),
    Group("*.shared_experts.*", "shared experts",
           "hidden_size or moe_shared_expert_intermediate_size"),
    Group("*.gate", "router", ""),
    Group("*.mixer.*", "dense MLP", "hidden_size or intermediate_size"),
    Group("mtp.*", "MTP block", "hidden_size"),
    Group("lm_head", "head", ""),
)  # fmt: skip


def is_linear(module: nn.Module) -> bool:
    """The other products are experts."""
    return hasattr(module, "in_features")


def low_formats(formats: Iterable[str]) -> str:
    """Those of the formats that have blocks, in words."""
    return "/".join(dict.fromkeys(f for f in formats if BLOCKS[f] > 1))


def group_of(name: str) -> Group:
    return next(group for group in GROUPS if fnmatchcase(name, group.glob))


def glob_of(name: str) -> str:
    """The glob for the same product of every layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def table_of(
    model: nn.Module, products: Sequence[Product], shape: Architecture, device_type: str
) -> list[tuple[str, ...]]:
    """Rows below `policy.HEADER`. Counted are multiply-adds of all weight matrices per token;
    attention scores and the scan are no products with weights."""
    work: dict[tuple[str, str], list[int]] = {}
    for name, words, macs in work_of(model, products, shape):
        in_mtp, group = name.startswith("mtp."), group_of(name).words
        group = "MTP block" if in_mtp and group != "router" else group
        work.setdefault((group, words), []).append(macs * (shape.mtp_num_depths if in_mtp else 1))
    total = sum(map(sum, work.values()))
    order = [group.words for group in GROUPS]
    return [
        (group, str(len(macs)), words, f"{sum(macs) / total:.1%}", _runs(words, device_type))
        for (group, words), macs in sorted(work.items(), key=lambda item: order.index(item[0][0]))
    ]


def work_of(
    model: nn.Module, products: Sequence[Product], shape: Architecture
) -> Iterator[tuple[str, str, int]]:
    """Name, format and multiply-adds per token and pass of all modules with weight matrices."""
    for name, module in model.named_modules():
        if name == "lm_head":
            yield name, "bf16", module.weight.numel() * (1 + shape.mtp_num_depths)
        elif name.endswith(".gate"):
            yield name, "fp32", module.weight.numel()
    for name, module, formats in products:
        if is_linear(module):
            macs = module.in_features * module.out_features
        else:
            macs = 2 * shape.num_experts_per_tok * module.up_proj[0].numel()
        yield name, formats[0] if len(set(formats)) == 1 else "/".join(formats), macs


def _runs(words: str, device_type: str) -> str:
    """Natively or emulated; empty for what is in no low precision."""
    low = low_formats(words.split("/"))
    return low and ("native" if low == "nvfp4" and nvfp4.native(device_type) else "emulated")
