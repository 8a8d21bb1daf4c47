"""The few steps that every layout must train alike: their configuration, their optimizers, and the
same steps in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.parts import ce_sums
from helpers.runs import read_steps, tiny_run
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.router import Router
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_hybrid.train.optim import parameter_groups, update_router_bias
from nemo_hybrid.train.step import _hash

State = dict[str, Tensor]
Outcome = tuple[list[dict[str, Any]], State]
"""Numbers of every step, and global tensors: ``NAME`` for a weight, ``KIND|NAME`` for the rest."""

STEPS = 3
STARVED = (3, 6, 7)
"""Experts that no token chooses: one beside others, and all of rank 3 at expert-parallel size 4."""
ALL_OF_RANK_1 = (4, 5, 6, 7)
"""Every expert that rank 1 owns at expert-parallel size 2."""
MODEL = {
    "chunk_size": 8,
    # Long time steps, as late in a training: else the gradients of A_log and dt_bias are small
    # sums of large terms, whose rounding says nothing about layouts.
    "time_step_min": 0.1,
    "time_step_max": 0.5,
}
TRAIN = {"clip_grad_norm": 0.5, "aux_loss_weight": 1e-2, "seed": 18}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "adam": {"lr": 2e-3, "eps": 1e-4},
    "adam-real-eps": {"lr": 2e-3},
}
"""AdamW's usual epsilon makes steps of full size of gradients that are nothing but rounding; with a
larger one equal gradients give equal weights."""


class PlainSGD(torch.optim.Optimizer):
    """``p -= lr * grad``. Keeps the gradient, untouched, where AdamW has its first moment."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["exp_avg"] = parameter.grad.clone()
                state["exp_avg_sq"] = torch.zeros_like(parameter)
                parameter.add_(parameter.grad, alpha=-group["lr"])


@contextmanager
def optimizer_of(name: str) -> Iterator[None]:
    """What is built inside takes PlainSGD for AdamW where ``name`` is sgd."""
    if name != "sgd":
        yield
        return
    from deepspeed.runtime.zero import utils

    known = [*utils.ZERO_SUPPORTED_OPTIMIZERS, PlainSGD]
    with (
        patch.object(torch.optim, "AdamW", PlainSGD),
        patch.object(utils, "ZERO_SUPPORTED_OPTIMIZERS", known),
    ):
        yield


def equal_run(
    store: Path,
    optimizer: str,
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    length: int = 16,
    **layout: Any,
) -> RunConfig:
    """The run, of 8 sequences of 16 tokens a step, several documents in most."""
    given = TRAIN | OPTIMIZERS[optimizer] | {"micro_batch_size": 8} | (train or {})
    config = tiny_run(store, model=MODEL | (model or {}), train=given, **layout)
    config.data.sequence_length = length
    return config


def masked(batch: Batch) -> Batch:
    """The batch with few targets in two sequences of each step and none in two others, so that
    ranks hold unequal numbers, and the last of four ranks none."""
    kept = {3: 5, 5: 5, 6: 0, 7: 0}
    length = batch.ids_BS.shape[1]
    kept_B = torch.tensor([kept.get(sample % 8, length) for sample in batch.sample_ids])
    keep_BS = torch.arange(length) < kept_B[:, None]
    return replace(batch, loss_mask_BS=batch.loss_mask_BS & keep_BS)


def starve(model: HybridLM, experts: tuple[int, ...]) -> None:
    """Set the router biases so that no token chooses these experts."""
    for name, bias_E in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias_E[list(experts)] = -100.0


def reference(
    store: Path,
    optimizer: str,
    starved: tuple[int, ...] = STARVED,
    steps: int = STEPS,
    **options: Any,
) -> tuple[Outcome, float]:
    """The same steps without DeepSpeed and without processes, the whole batch at once; and how far
    the closest routing decision was from a tie. ``options``: of `equal_run`."""
    config = equal_run(store, optimizer, **options)
    hybrid = config.model.hybrid()
    model = HybridLM(hybrid, seed=config.train.seed)
    starve(model, starved)
    gaps: list[float] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda m, _, output: gaps.append(_closest(m, output[2])))
    objective = NextToken(model, config.train)
    with optimizer_of(optimizer):
        stepper = torch.optim.AdamW(parameter_groups(model, config.train))
    named = dict(model.named_parameters())
    data = read_steps(config, open_blend(config.data, hybrid))
    rows: list[dict[str, Any]] = []
    tensors: State = {}
    for step in range(steps):
        batch = masked(next(data)[0])
        normalizer = Normalizer(count_targets(batch, objective.depths), 8)
        parts = objective(batch, normalizer)
        stepper.zero_grad()
        parts.loss.backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        assert gradients.keys() == named.keys()
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        scale = min(1.0, float(config.train.clip_grad_norm / norm))
        for gradient in gradients.values():
            gradient *= scale
        stepper.step()
        update_router_bias(model, parts.loads, config.train.router_bias_rate)
        mean_N = ce_sums(parts) / count_targets(batch, objective.depths)
        if optimizer == "sgd":
            tensors |= {f"grad{step}|{name}": g.clone() for name, g in gradients.items()}
        rows.append(
            {
                "losses": mean_N.tolist(),
                "grad_norm": float(norm),
                "targets": int(count_targets(batch, 0)),
                "loads": {name: c.tolist() for name, c in parts.loads.items()},
                "aux": objective.means(parts.sums, normalizer)["aux"],
                "hash": _hash([batch]),
            }
        )
    return (rows, tensors | {name: p.detach() for name, p in named.items()}), min(gaps, default=1.0)


def _closest(router: Router, scores_TE: Tensor) -> float:
    ranked_TE = (scores_TE.detach() + router.e_score_correction_bias).sort(-1, descending=True)[0]
    return float((ranked_TE[:, router.top_k - 1] - ranked_TE[:, router.top_k]).min())
