"""`eval`: losses of a trained model on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import CHECKED, CommandOptions, PositiveInt
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import DataOptions, TrainOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    from nemo_hybrid.data.loader import Blend
    from nemo_hybrid.data.packing import PackedSamples


@dataclass(config=CHECKED)
class EvalOptions(CommandOptions):
    """Measure a trained model's losses on held-out data."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    data: str
    """Prepared token store, or samples for fine-tuning, whose held-out part is used."""
    sequences: PositiveInt = 256
    """Sequences to evaluate (fewer if the store holds fewer)."""
    micro_batch_size: PositiveInt = 8
    """Sequences per forward pass."""
    sequence_length: PositiveInt = 256
    """Tokens per sequence."""


def _open(options: EvalOptions, shape: ModelConfig) -> Blend | PackedSamples:
    """A token store, or samples for fine-tuning in packs that hold the longest of them."""
    from nemo_hybrid.data.loader import open_blend
    from nemo_hybrid.data.packing import PackedSamples, open_stores
    from nemo_hybrid.data.prepare import TRAIN
    from nemo_hybrid.data.store import holds_samples

    if not holds_samples(Path(options.data) / TRAIN):
        data = DataOptions(path=options.data, sequence_length=options.sequence_length)
        return open_blend(data, shape)
    train, heldout = open_stores(Path(options.data))
    longest = max(int(store.lengths.max()) for store in (train, heldout) if store)
    length = max(longest, options.sequence_length)
    return PackedSamples(train, heldout, length, shape.pad_token_id)


def eval_command(options: EvalOptions) -> None:
    """Print the held-out losses of a checkpoint, as a table."""
    import torch

    from nemo_hybrid.checkpoint.adapter import locate
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.data.loader import require_tokenizer
    from nemo_hybrid.data.packing import PackedSamples
    from nemo_hybrid.parallel.world import World
    from nemo_hybrid.train.evaluate import evaluate
    from nemo_hybrid.train.losses import PretrainObjective

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


COMMANDS = {"eval": Command(eval_command, EvalOptions)}
