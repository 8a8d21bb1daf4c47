"""``nemo-hybrid eval``: losses of a checkpoint on held-out data."""

from __future__ import annotations

import math
from pathlib import Path

from nemo_hybrid.checkpoint.adapter import locate
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.command_options import EvalOptions
from nemo_hybrid.config import DataOptions, HybridConfig, TrainOptions
from nemo_hybrid.data.loader import Blend, heldout_batches, open_blend, require_tokenizer
from nemo_hybrid.data.packing import PackedSamples, open_stores
from nemo_hybrid.data.prepare import TRAIN
from nemo_hybrid.data.store import holds_samples
from nemo_hybrid.errors import UserError
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel.world import World
from nemo_hybrid.terminal import print_table
from nemo_hybrid.train.evaluate import heldout_losses


def _open(options: EvalOptions, shape: HybridConfig) -> tuple[Blend | PackedSamples, int]:
    """A token store, or samples for fine-tuning in packs that hold the longest of them; and the
    length of its rows."""
    length = options.sequence_length
    if not holds_samples(Path(options.data) / TRAIN):
        return open_blend(DataOptions(path=options.data, sequence_length=length), shape), length
    train, heldout = open_stores(Path(options.data))
    length = max(length, *(int(store.lengths.max()) for store in (train, heldout) if store))
    return PackedSamples(train, heldout, length, shape.pad_token_id), length


def eval_command(options: EvalOptions) -> None:
    """Print the held-out losses of a checkpoint, as a table."""
    directory = locate(options.from_)
    model = load_model(directory)
    rows, length = _open(options, model.config)
    require_tokenizer(rows, directory)
    if not rows.heldout:
        raise UserError(f"{options.data} has no held-out part; prepare it with --heldout above 0")
    world = World.start()
    batches = heldout_batches(
        rows,
        sequence_length=length,
        micro_batch_size=options.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        limit=options.sequences,
    )
    objective = NextToken(model.to(world.device), TrainOptions())
    losses = heldout_losses(objective, batches, world)
    World.stop()
    if world.rank:
        return
    table = []
    for k, loss in enumerate(losses.values()):
        name = "next token" if k == 0 else f"token t + {1 + k} (MTP depth {k})"
        table.append((name, f"{loss:.4f}", f"{math.exp(loss):.1f}"))
    print_table(("target", "held-out loss (nats per token)", "perplexity"), table)
