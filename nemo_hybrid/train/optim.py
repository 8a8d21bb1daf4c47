"""Parameter groups of the optimizer."""

from typing import Any

from torch import nn

from nemo_hybrid.config import FP32_NAMES, TrainOptions


def parameter_groups(model: nn.Module, train: TrainOptions) -> list[dict[str, Any]]:
    """Groups by weight decay, dtype, and whether the parameters are routed experts.

    Matrices decay (embedding and head included); norms, biases, A_log, D and dt_bias do not.
    """
    grouped: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() > 1 and name.rsplit(".", 1)[-1] not in FP32_NAMES
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
