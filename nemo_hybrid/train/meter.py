"""Turns what a step did into its row of metrics."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import torch

from nemo_hybrid.train.balance import max_violation
from nemo_hybrid.train.build import Run
from nemo_hybrid.train.flops import train_flops_per_token, utilization
from nemo_hybrid.train.metrics import StepMetrics
from nemo_hybrid.train.step import Outcome


class Timing(NamedTuple):
    """Wall time of a step in seconds, and the evaluations around it."""

    seconds: float
    waited: float
    """Part of it that was spent waiting for data."""
    before: list[float] | None
    """Held-out losses before the first step."""
    heldout: list[float] | None
    """Held-out losses after this step."""


class Meter:
    """For rank 0 alone."""

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.config
        self.tokens = config.train.global_batch_size * config.data.sequence_length
        self.flops = train_flops_per_token(run.model.config, config.data.sequence_length)

    def metrics(self, done: int, lr: float, outcome: Outcome, timing: Timing) -> StepMetrics:
        """The row of step ``done``."""
        violations = {name: max_violation(c) for name, c in outcome.counts.items()}
        rate = self.tokens / timing.seconds
        before, heldout = timing.before, timing.heldout
        counters = self.run.guard.counters
        return StepMetrics(
            step=done,
            loss=outcome.losses[0],
            mtp_losses=outcome.losses[1:],
            aux_loss=outcome.aux,
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens=self.tokens,
            tokens_total=self.tokens * done,
            tokens_per_s=rate,
            step_seconds=timing.seconds,
            data_seconds=timing.waited,
            mfu=utilization(rate, self.flops, self.run.peak, self.run.world.size),
            memory_gb=_peak_memory(self.run.world.device) / 1e9,
            max_vio=max(violations.values(), default=0.0),
            max_vio_per_layer=violations,
            dead_experts=sum(int((c == 0).sum()) for c in outcome.counts.values()),
            skipped_batches=counters.skipped,
            rollbacks=counters.rollbacks,
            heldout_loss=heldout[0] if heldout else None,
            heldout_mtp_losses=heldout[1:] if heldout else None,
            heldout_loss_before=before[0] if before else None,
            heldout_mtp_losses_before=before[1:] if before else None,
            sample_hash=f"{outcome.sample_hash & (2**64 - 1):016x}",
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
