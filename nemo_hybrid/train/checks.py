"""What is checked of a run before its parts are there."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.model.recompute import pieces
from nemo_hybrid.precision import policy
from nemo_hybrid.train.flops import without_storage
from nemo_kernels.documents import divided


def check_precision(config: TrainingConfig, shape: HybridConfig) -> None:
    """Raise UserError where the formats do not fit the model; nothing is built for it."""
    if config.precision.low:
        model = without_storage(shape, config.parallel.ep)
        for tokens in sorted(set(_at_a_time(config))):
            policy.check(model, config.precision, shape, tokens)


def _at_a_time(config: TrainingConfig) -> Iterator[int]:
    """How many tokens layers take at a time, in all micro-batches that there are."""
    rows, cp, length = (
        config.train.micro_batch_size,
        config.parallel.cp,
        config.data.sequence_length,
    )
    micro_batches = [(rows, divided(length, cp))]
    short = getattr(config.data, "short", None)
    if short and short.sequence_length:
        micro_batches.append((short.rows(rows, length, cp), [short.sequence_length]))
    for rows, sizes in micro_batches:
        count = pieces(rows, sizes, config.train.tile)
        yield from (rows * piece for size in sizes for piece in divided(size, count))
