"""Losses on held-out data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.command_options import EvalOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import DataOptions, TrainOptions
from nemo_hybrid.data.loader import Blend, Data, heldout_batches, open_blend, require_tokenizer
from nemo_hybrid.data.packing import PackedSamples, open_stores
from nemo_hybrid.data.prepare import TRAIN
from nemo_hybrid.data.store import holds_samples
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.terminal import print_table
from nemo_hybrid.train.losses import Normalizer, PretrainObjective, count_targets


@torch.no_grad()
def evaluate(
    objective: PretrainObjective,
    data: Data,
    world: World,
    *,
    sequences: int,
    sequence_length: int,
    micro_batch_size: int,
) -> list[float]:
    """Mean cross-entropy in nats per target, [main, depth 1, ...], over the same held-out windows
    on every call and at every number of processes. Raises UserError without held-out data."""
    losses = 1 + objective.depths
    sums_N = torch.zeros(losses, dtype=torch.float64, device=world.device)
    targets_N = torch.zeros(losses, dtype=torch.int64, device=world.device)
    unit = Normalizer(torch.ones(losses, dtype=torch.int64, device=world.device), 1)
    for batch in heldout_batches(
        data,
        sequence_length=sequence_length,
        micro_batch_size=micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        limit=sequences,
    ):
        batch = batch.to(world.device)
        sums_N += objective(batch, unit).ce_sums_N
        targets_N += count_targets(batch, objective.depths)
    mean_N: Tensor = world.sum(sums_N) / world.sum(targets_N).clamp(min=1)
    return mean_N.tolist()


def _open(options: EvalOptions, shape: HybridConfig) -> Blend | PackedSamples:
    """A token store, or samples for fine-tuning in packs that hold the longest of them."""
    if not holds_samples(Path(options.data) / TRAIN):
        data = DataOptions(path=options.data, sequence_length=options.sequence_length)
        return open_blend(data, shape)
    train, heldout = open_stores(Path(options.data))
    longest = max(int(store.lengths.max()) for store in (train, heldout) if store)
    length = max(longest, options.sequence_length)
    return PackedSamples(train, heldout, length, shape.pad_token_id)


def eval_command(options: EvalOptions) -> None:
    """``nemo-hybrid eval``: print the held-out losses of a checkpoint, as a table."""
    from nemo_hybrid.checkpoint.adapter import locate
    from nemo_hybrid.checkpoint.load import load_model

    directory = locate(options.from_)
    model = load_model(directory)
    length, data = options.sequence_length, _open(options, model.config)
    if isinstance(data, PackedSamples):
        length = data.sequence_length
    require_tokenizer(data, directory)
    if not data.heldout:
        raise UserError(f"{options.data} has no held-out part; prepare it with --heldout above 0")
    world = World.start()
    losses = evaluate(
        PretrainObjective(model.to(world.device), TrainOptions()),
        data,
        world,
        sequences=options.sequences,
        sequence_length=length,
        micro_batch_size=options.micro_batch_size,
    )
    World.stop()
    if world.rank:
        return
    rows = []
    for k, loss in enumerate(losses):
        name = "next token" if k == 0 else f"token t + {1 + k} (MTP depth {k})"
        rows.append((name, f"{loss:.4f}", f"{torch.tensor(loss).exp():.1f}"))
    print_table(("target", "held-out loss (nats per token)", "perplexity"), rows)
