"""One global batch: forward, backward, the guard's judgement, and the update."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.precision.health import Shares
from nemo_hybrid.train.build import Run
from nemo_hybrid.train.losses import Normalizer, count_targets
from nemo_hybrid.train.optim import LoadCounter, update_router_bias


@dataclass
class Outcome:
    """What became of one global batch, over all ranks."""

    losses: list[float]  # cross-entropies: main, then each depth
    aux: float
    grad_norm: float
    counts: dict[str, Tensor]  # layer name -> routed slots per expert
    sample_hash: int
    objection: str | None  # why the guard passed the batch over; None: the weights were updated
    stop: bool  # a rank asked to stop
    low_precision: Shares | None = None  # where the step was sampled

    def loads(self) -> dict[str, list[int]]:
        return {name: counts_E.tolist() for name, counts_E in self.counts.items()}


def train_step(
    run: Run, batches: list[Batch], lr: float, stop: bool = False, per_document: bool = False
) -> Outcome:
    """Train on this rank's micro-batches, which are on the CPU as they were read.

    ``stop``: this rank wants to stop; all ranks learn of it with this step. ``per_document``: see
    `losses.Normalizer`.
    """
    world, engine, train = run.world, run.engine, run.config.train
    depths = run.objective.depths
    own = torch.tensor([_hash(batches), int(stop)])
    batches = [batch.to(world.device) for batch in batches]
    # Targets are counted over the whole global batch before the first backward pass, so that
    # every share of the loss has the right denominator.
    known = torch.stack([count_targets(batch, depths, per_document) for batch in batches]).sum(0)
    totals = world.sum(torch.cat([known, own.to(world.device)]))
    normalizer = Normalizer(totals[:-2], train.global_batch_size, per_document)

    sums = torch.zeros(3 + depths, device=world.device)
    counter = LoadCounter()
    for number, batch in enumerate(batches, 1):
        run.precision.start_micro_batch(number)
        parts = engine(batch, normalizer)
        engine.backward(parts.loss)
        sums[:-1] += torch.cat([parts.ce_sums_N, parts.aux_sum[None]])
        counter.add(parts.counts)
        if number < len(batches):
            engine.end_micro_batch()
    sums[-1] = engine.grad_norm() / world.size
    probe = run.probe
    health = probe.read(engine.gradients(), world.sum) if probe.active else None
    world.sum(sums)  # from here on the same numbers on every rank, to the last bit
    losses = (sums[:-2] / normalizer.targets_N.clamp(min=1)).tolist()
    grad_norm = float(sums[-1])
    counts = counter.total(world)
    objection = run.guard.judge(losses[0], grad_norm)
    if objection:
        engine.discard()
    else:
        engine.update(lr)
        update_router_bias(run.model, counts, train.router_bias_rate)
    aux = float(sums[-2]) / (train.global_batch_size * max(1, len(counts)))
    samples, stops = totals[-2:].tolist()
    return Outcome(losses, aux, grad_norm, counts, samples, objection, stops > 0, health)


def _hash(batches: list[Batch]) -> int:
    """Hash of this rank's sequences; summed over ranks it does not depend on the layout.

    ``batches`` are on the CPU still: reading them from a device would wait for it row by row.
    """
    total = 0
    for batch in batches:
        for row in batch.ids_BS.numpy():
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            total += int.from_bytes(digest, "little")
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total
