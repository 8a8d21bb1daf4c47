"""One global batch: forward, backward, the guard's judgement, and the update."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.train.optim import update_router_bias
from nemo_hybrid.train.run import Outcome, Run


def train_step(
    run: Run,
    batches: list[Batch],
    lr: float,
    step: int = 0,
    number: int = 0,
    stop: bool = False,
) -> Outcome:
    """Train on this rank's micro-batches, which are on the CPU as they were read.

    ``step``: optimizer steps done before. ``number``: of the global batch. ``stop``: this rank
    wants to stop; all ranks learn of it with this step.
    """
    world, engine, train = run.world, run.engine, run.config.train
    tokens, samples = sum(batch.ids_BS.numel() for batch in batches), _hash(batches)
    in_one, whole = batches[0].in_one, batches
    divided = world.cp > 1 and in_one == 1  # a short row is in one process
    if divided:
        batches = [run.objective.cut(batch, world.part, world.cp, step) for batch in whole]
    batches = [batch.to(world.device) for batch in batches]
    # Counted over the whole global batch before the first backward pass, so that every share of
    # the loss has the right denominator; of processes that divide rows, by the first.
    counted = whole if divided else batches
    known = torch.stack([run.objective.count(batch, step) for batch in counted]).sum(0)
    own = torch.tensor([tokens, samples, int(stop)])
    if divided and world.part:
        known, own[:2] = torch.zeros_like(known), 0
    totals = world.sum(torch.cat([known.to(world.device), own.to(world.device)]))
    rows = len(run.share.sizes.sequences(number)) * in_one
    normalizer = Normalizer(totals[:-3], rows, step)

    sums: dict[str, Tensor] = {}
    loads: dict[str, Tensor] = {}
    engine.start(len(batches))
    for number, batch in enumerate(batches, 1):
        run.precision.start_micro_batch(number)
        parts = engine(batch, normalizer)
        engine.backward(parts.loss)
        sums = {name: sums.get(name, 0) + part for name, part in parts.sums.items()}
        loads = {layer: loads.get(layer, 0) + counts_E for layer, counts_E in parts.loads.items()}
        if number < len(batches):
            engine.end_micro_batch()
    norm = engine.grad_norm() / world.size
    probe = run.probe
    health = probe.read(engine.gradients(), world.sum) if probe.active else None
    # From here on the same numbers on every rank, to the last bit.
    *summed, norm = world.sum(torch.stack([*sums.values(), norm]))
    means = run.objective.means(dict(zip(sums, summed, strict=True)), normalizer)
    if loads:
        loads = dict(zip(loads, world.sum(torch.stack([*loads.values()])), strict=True))
    grad_norm = float(norm)
    of = " of short rows" if in_one > 1 else ""
    objection = run.guard.judge(means["loss"], grad_norm, of)
    if objection:
        engine.discard()
    else:
        engine.update(lr)
        update_router_bias(run.model, loads, train.router_bias_rate)
    if loads:  # by one transfer: each waits for the device
        loads = dict(zip(loads, torch.stack([*loads.values()]).cpu(), strict=True))
    tokens, samples, stops = totals[-3:].tolist()
    return Outcome(means, grad_norm, loads, tokens, samples, objection, stops > 0, health, in_one)


def _hash(batches: list[Batch]) -> int:
    """Hash of this rank's sequences; summed over ranks it does not depend on the layout.

    ``batches`` are on the CPU still: reading them from a device would wait for it row by row.
    """
    total = 0
    for batch in batches:
        rows = batch.ids_BS.numpy()
        for row, number in zip(rows, batch.sample_ids or [0] * len(rows), strict=True):
            if number < 0:
                continue  # padding
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            total += int.from_bytes(digest, "little")
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total
