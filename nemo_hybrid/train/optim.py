"""What moves the weights: the optimizer's parameter groups, the learning rate, the router bias.

Shapes: E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.model.fp32 import keeps_fp32
from nemo_hybrid.model.hybrid import HybridLM


def parameter_groups(model: nn.Module, train: TrainOptions) -> list[dict[str, Any]]:
    """Groups by weight decay, dtype, and whether the parameters are routed experts.

    Matrices decay (embedding and head included); norms, biases, A_log, D and dt_bias do not.
    """
    grouped: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() > 1 and not keeps_fp32(name)
        key = (decays, str(parameter.dtype), ".experts." in name)
        grouped.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": train.weight_decay if decays else 0.0,
            "lr": train.lr,
            "betas": (train.beta1, train.beta2),
            "eps": train.eps,
            "fused": True,
            "experts": experts,
            "name": f"{'decay' if decays else 'no_decay'}-{dtype}",
        }
        for (decays, dtype, experts), parameters in grouped.items()
    ]


def learning_rate(step: int, train: TrainOptions) -> float:
    """Learning rate that optimizer step ``step`` (0 = the first) uses; needs no state.

    Warm-up is linear, (step + 1) / (warmup_steps + 1) of the peak, so that the first step already
    moves and step ``warmup_steps`` has the peak. Afterwards, with min = min_lr_ratio * lr:

    - ``wsd``: the peak, then min + (lr - min) * (1 - sqrt(f)) over the last ``decay_steps`` steps,
      f = 1 / decay_steps at the first of them and 1 at the run's last step. This is the
      minus-sqrt decay that the Nemotron 3 models were trained with (Megatron-LM's
      optimizer_param_scheduler.py).
    - ``cosine``: min + (lr - min) * (1 + cos(pi f)) / 2, f = 0 at the end of the warm-up and 1 at
      the last step.
    - ``constant``: the peak.

    A run too short for its warm-up and decay decays over the steps that the warm-up leaves.
    Steps beyond the last one have the last one's rate.
    """
    last = train.max_steps - 1
    step = min(step, last)
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "wsd":
        decay_steps = min(train.decay_steps, train.max_steps - train.warmup_steps)
        into_decay = step + 1 - (train.max_steps - decay_steps)
        if into_decay <= 0:
            return train.lr
        coefficient = 1 - math.sqrt(into_decay / decay_steps)
    else:
        span = last - train.warmup_steps
        fraction = (step - train.warmup_steps) / span if span else 1.0
        coefficient = (1 + math.cos(math.pi * fraction)) / 2
    min_lr = train.min_lr_ratio * train.lr
    return min_lr + (train.lr - min_lr) * coefficient


def describe_schedule(train: TrainOptions) -> list[str]:
    """What `learning_rate` will do, and a warning where a run never leaves its warm-up."""
    peak = f"learning rate {train.lr:g} after {train.warmup_steps} steps of warm-up"
    lowest = f"{train.min_lr_ratio * train.lr:g}"
    later = {
        "constant": "then constant",
        "cosine": f"then down to {lowest} by a cosine",
        "wsd": f"then constant, and over the last "
        f"{min(train.decay_steps, max(0, train.max_steps - train.warmup_steps))} steps down to "
        f"{lowest}",
    }
    if train.max_steps > train.warmup_steps:
        return [f"{peak}, {later[train.schedule]}"]
    reached = learning_rate(train.max_steps - 1, train)
    return [
        f"warning: {peak}, but the run ends after {train.max_steps}, at {reached:g}: "
        "lower train.warmup_steps"
    ]


@torch.no_grad()
def update_router_bias(model: HybridLM, counts: dict[str, Tensor], rate: float) -> None:
    """bias += rate * sign(mean load - load), in fp32, for every layer counted whose router trains.

    Once per global batch (arXiv 2408.15664): it balances expert load without a loss, and is never
    part of the weights that mix experts.
    """
    for name, counts_E in counts.items():
        if not model.get_parameter(f"{name}.mixer.gate.weight").requires_grad:
            continue  # a frozen router keeps its bias too
        load_E = counts_E.float()
        bias_E = model.get_buffer(f"{name}.mixer.gate.e_score_correction_bias")
        bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=rate)


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: (largest load - mean load) / mean load; 0 is perfect balance."""
    load_E = counts_E.float()
    mean = load_E.mean()
    return float((load_E.max() - mean) / mean) if mean > 0 else 0.0
