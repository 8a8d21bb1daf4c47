"""`eval`: losses of a trained model on held-out data, or exact matches of its samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import CHECKED, POSITIVE, CommandOptions, PositiveInt, refuse
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import DataOptions, TrainOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import launched
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    from nemo_hybrid.data.loader import Blend
    from nemo_hybrid.data.packing import PackedSamples
    from nemo_hybrid.model.hybrid import HybridLM


@dataclass(config=CHECKED)
class EvalOptions(CommandOptions):
    """Measure a trained model's losses on held-out data, or how many of its samples are right."""

    data: str
    """Prepared token store, or samples for fine-tuning, whose held-out part is used; of --rollouts
    the prompts, rows that have the field answer."""
    from_: str | None = None
    """Run directory (its latest checkpoint) or checkpoint directory."""
    rollouts: str | None = None
    """File that `rollout` wrote, whose samples are compared with the answers; no model is read."""
    after: str = "</think>"
    """In samples of --rollouts what is said behind the last of these counts, if there is one."""
    json: bool = False
    """Print what --rollouts gives as JSON."""
    sequences: PositiveInt = 256
    """Sequences to evaluate (fewer if the store holds fewer)."""
    micro_batch_size: PositiveInt = 8
    """Sequences per forward pass."""
    sequence_length: Annotated[int | None, POSITIVE] = None
    """Tokens per sequence; null: as many as the run that wrote the checkpoint took, or 256."""

    def validate(self) -> None:
        refuse(
            (self.from_ and self.rollouts, "give --from or --rollouts, not both"),
            (not self.from_ and not self.rollouts, "missing: --from, or --rollouts"),
            (self.json and not self.rollouts, "--json is for --rollouts"),
            (self.after != "</think>" and not self.rollouts, "--after is for --rollouts"),
        )


def _open(
    options: EvalOptions, shape: ModelConfig, directory: Path
) -> tuple[Blend | PackedSamples, int]:
    """A token store, or samples for fine-tuning in packs that hold the longest of them; and the
    length of its rows."""
    from nemo_hybrid.checkpoint.companions import read_companions
    from nemo_hybrid.checkpoint.steps import remembered
    from nemo_hybrid.data.loader import open_blend, require_tokenizer
    from nemo_hybrid.data.packing import PackedSamples, open_stores
    from nemo_hybrid.data.store import TRAIN, holds_samples

    length = options.sequence_length or remembered(directory).get("data.sequence_length", 256)
    if not holds_samples(Path(options.data) / TRAIN):
        data = DataOptions(path=options.data, sequence_length=length)
        ends = read_companions(directory).ends
        return open_blend(data, shape, ends, directory / "config.json"), length
    train, heldout = open_stores(Path(options.data))
    length = max(length, *(int(store.lengths.max()) for store in (train, heldout) if store))
    rows = PackedSamples(train, heldout, length, shape.pad_token_id)
    require_tokenizer(rows, directory)
    return rows, length


def eval_command(options: EvalOptions) -> None:
    """Print the held-out losses of a checkpoint, or the exact matches of samples, as a table."""
    if options.from_ is None:
        from nemo_hybrid.commands.exact_match import print_exact_match

        rollouts = Path(options.rollouts or "")
        return print_exact_match(rollouts, options.data, options.after, options.json)
    launched()  # what cannot be is refused before anything is loaded
    import numpy as np

    from nemo_hybrid.checkpoint.adapter import locate
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.checkpoint.steps import reading
    from nemo_hybrid.data.loader import heldout_batches
    from nemo_hybrid.objectives.next_token import NextToken
    from nemo_hybrid.parallel.world import World
    from nemo_hybrid.train.evaluate import heldout_losses, small_steps

    def read(directory: Path) -> tuple[Path, HybridLM, Blend | PackedSamples, int]:
        rows, length = _open(options, HybridConfig.from_hf(str(directory)), directory)
        if not rows.heldout:
            raise UserError(
                f"{options.data} has no held-out part; prepare it with --heldout above 0"
            )
        return directory, load_model(directory), rows, length

    directory, model, rows, length = reading(options.from_, read, locate)
    world = World.start()
    if len(read_by := set(world.gather(directory))) > 1:
        raise UserError(
            f"processes read different checkpoints of a run that goes on ({min(read_by)}, "
            f"{max(read_by)}): name one of them"
        )
    batches = heldout_batches(
        rows,
        sequence_length=length,
        micro_batch_size=options.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        limit=options.sequences,
    )
    objective = NextToken(model.to(world.device), TrainOptions())
    with small_steps(model, world) as share:
        losses, small = heldout_losses(objective, batches, world), share()
    World.stop()
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise UserError(
                f"{directory}: the held-out {name} is {loss}, though the weights are finite: the "
                "model is broken"
            )
    if world.rank:
        return
    print(f"{options.data}: held-out sequences of {length} tokens")
    table = []
    for k, loss in enumerate(losses.values()):
        name = "next token" if k == 0 else f"token t + {1 + k} (MTP depth {k})"
        table.append((name, f"{loss:.4f}", f"{np.exp(loss):.1f}"))
    print_table(("target", "held-out loss (nats per token)", "perplexity"), table)
    if found := small.get("small_time_steps"):
        print(
            f"{found:.2%} of the Mamba-2 time steps lie below time_step_min "
            f"({model.config.time_step_min:g}): transformers, which raises them to it, computes "
            "other probabilities (compare-logprobs --backend transformers)"
        )


COMMANDS = {"eval": Command(eval_command, EvalOptions, reads="from_")}
