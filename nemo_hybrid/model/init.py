"""Initial weights, as Megatron-LM draws them for hybrid models.

Every tensor depends only on (seed, parameter name, global expert index): it is the same at every
parallel layout, and a process draws only the experts it owns.
"""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig

OUTPUT_SIDE = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
"""Projections that write into the residual stream: sigma / sqrt(layers)."""
_FEW = 1 << 24  # numbers
Model = TypeVar("Model", bound=nn.Module)


class Undrawn:
    """Of torch's modules: they do not draw weights of their own, which `initialize` would replace.
    That takes long, and on the meta device torch imports its compiler for it."""

    def reset_parameters(self) -> None:
        pass


class Embedding(Undrawn, nn.Embedding):
    pass


class Head(Undrawn, nn.Linear):
    pass


def with_memory(model: Model) -> Model:
    """A model built on the meta device, on the CPU; what its tensors hold is undefined. As
    `nn.Module.to_empty`, for which torch imports its compiler: a second of every command."""
    empty = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(empty, assign=True)
    return model


@torch.no_grad()
def initialize(model: nn.Module, cfg: ModelConfig, owned_experts: range, seed: int) -> None:
    """Draw all parameters of the model in place; buffers are left as built."""

    def draw(part: tuple[str, int, Tensor]) -> None:
        name, expert, tensor = part
        draw_parameter(tensor, name, cfg, generator_of(seed, name, expert))

    parts = []
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parts += [(name, *expert) for expert in zip(owned_experts, parameter, strict=True)]
        else:
            parts.append((name, 0, parameter))
    # Torch draws normal numbers by one thread; of few, others cost more than they save.
    if sum(p.numel() for p in model.parameters()) > _FEW:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(draw, parts))
    else:
        for part in parts:
            draw(part)


def generator_of(seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def draw_parameter(tensor: Tensor, name: str, cfg: ModelConfig, generator: torch.Generator) -> None:
    """In fp32 on the generator's device, for a model the CPU, so that the tensor's dtype and device
    do not change the stream."""
    parts = name.split(".")
    leaf, owner = parts[-1], parts[-2]
    draw = torch.empty(tensor.shape, dtype=torch.float32, device=generator.device)
    if leaf == "A_log":
        draw.uniform_(1, 16, generator=generator).log_()
    elif leaf == "D":
        draw.fill_(1.0)
    elif leaf == "dt_bias":
        low, high = math.log(cfg.time_step_min), math.log(cfg.time_step_max)
        dt = draw.uniform_(low, high, generator=generator).exp_().clamp_(min=cfg.time_step_floor)
        draw = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    elif owner == "conv1d":
        bound = 1 / math.sqrt(cfg.conv_kernel)  # Kaiming uniform, fan-in of a depthwise kernel
        draw.uniform_(-bound, bound, generator=generator)
    elif tensor.dim() == 1:
        draw.fill_(1.0)  # RMSNorm weights
    else:
        output_side = owner in OUTPUT_SIDE or leaf in OUTPUT_SIDE
        sigma = cfg.initializer_range
        if output_side:
            sigma /= math.sqrt(cfg.num_hidden_layers)
        draw.normal_(0, sigma, generator=generator)
    tensor.copy_(draw)
