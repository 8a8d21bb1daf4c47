"""Options of how a run is divided over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED, Options, PositiveInt
from nemo_hybrid.config.model import ModelConfig

REDUCE_BUCKET = 100_000_000
"""Least elements of DeepSpeed's reduction buffer: 400 MB, an all-reduce of which takes two
milliseconds over 450 GB/s, beside which it does not matter how long one takes to begin."""
_REFUSED = {
    0: "without ZeRO, bf16 weights have no fp32 masters, and clipping ignores expert parallelism",
    3: "DeepSpeed refuses ZeRO-3 for MoE layers whose experts are divided over processes",
}
"""Why the other stages cannot be had."""


@dataclass(config=CHECKED)
class ParallelOptions(Options):
    """How the work is divided over processes."""

    section: ClassVar[str] = "parallel."

    ep: PositiveInt = 1
    """Expert-parallel size: processes over which the routed experts are divided."""
    cp: PositiveInt = 1
    """Context-parallel size: processes over which every sequence is divided."""
    zero: int | None = None
    """DeepSpeed ZeRO stage: 1 or 2; null: 2, and 1 for a single process."""

    def stage(self, processes: int) -> int:
        """A single process owns all gradients, and with 2 would hold them twice while they add up:
        4 bytes per parameter more, for nothing."""
        return self.zero or (1 if processes == 1 else 2)

    def stage_refused(self) -> Iterator[tuple[object, str]]:
        """Whether there is no such stage, and why."""
        why = _REFUSED.get(self.zero or 0, "there is no other stage")
        yield self.zero not in (None, 1, 2), f"parallel.zero must be 1 or 2, got {self.zero}: {why}"

    def parts_refused(
        self, m: ModelConfig, length: int, rows: int, ssd: str
    ) -> Iterator[tuple[object, str]]:
        """Where sequences of so many tokens, so many at a time, cannot be divided, and why.
        ``ssd``: the path of the scan."""
        cp, letters = self.cp, m.pattern + m.mtp_pattern * bool(m.mtp_num_depths)
        channels = m.conv_channels * rows * -(-length // cp)
        yield (
            ssd == "mamba_ssm" and "M" in letters and channels >= 2**31,
            f"kernels.ssd mamba_ssm: rows x tokens x channels ({channels}) reaches 2**31, where "
            "the library's offsets wrap: raise parallel.cp or take auto",
        )
        if cp == 1:
            return
        heads, groups, part = m.num_attention_heads, m.num_key_value_heads, length // cp
        if "*" in letters:
            possible = [n for n in range(1, heads + 1) if not heads % n and _nested(n, groups)]
            yield (
                heads % cp,
                f"model.num_attention_heads ({heads}) is not divisible by parallel.cp ({cp}): "
                "attention trades tokens for heads, so parallel.cp can be one of "
                f"{', '.join(map(str, possible))}",
            )
            yield (
                not _nested(cp, groups),
                f"neither of model.num_key_value_heads ({groups}) and parallel.cp ({cp}) divides "
                "the other: change parallel.cp",
            )
        reach = max(1, m.conv_kernel - 1 if "M" in letters else 1)
        yield (
            part < reach,
            f"data.sequence_length / parallel.cp ({part} tokens) is below "
            f"{'model.conv_kernel - 1' if reach > 1 else 'one'} ({reach}): lower parallel.cp",
        )


def _nested(a: int, b: int) -> bool:
    """Whether one of the two divides the other."""
    return not a % b or not b % a
