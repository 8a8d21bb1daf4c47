"""Steps that would harm the weights: not finite, or far above what the run has just seen.

The guard judges before the optimizer's step, from numbers that are equal on every rank. A batch it
passes over counts as read and as nothing else: weights, moments, learning rate, router bias and the
guard's own memory stay as they were.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

_MIN_ACCEPTED = 16  # steps before spikes are judged
# Spreads are at least this share of the median: a run that is momentarily very even must not take
# an ordinary step for a spike. Gradient norms vary by their own size, losses do not.
_FLOORS = {"loss": 0.02, "gradient norm": 1.0}


class Bands(NamedTuple):
    """How many robust standard deviations above the median of the last accepted steps a value may
    lie; 0: it has to be finite, no more."""

    loss: float
    grad_norm: float


@dataclass
class Counters:
    """What the guard has done so far."""

    skipped: int = 0
    """Batches passed over since the run began."""
    in_a_row: int = 0
    """Batches passed over since the last accepted one."""
    rollbacks: int = 0
    """Returns to a checkpoint since the run began."""
    rollbacks_in_a_row: int = 0
    """Returns to a checkpoint since the last new one was written."""


class Guard:
    """Judges steps; keeps the losses and gradient norms of the last accepted ones, those of other
    rows apart: in one median of two populations spikes would hide."""

    def __init__(self, window: int, bands: Bands) -> None:
        """``window``: steps whose median counts."""
        self._bands = dict(zip(_FLOORS, bands, strict=True))
        self.counters = Counters()
        self._window = window
        self._accepted: dict[str, deque[float]] = {}

    def judge(self, loss: float, grad_norm: float, of: str = "") -> str | None:
        """None to accept a step, else why it must not be made. ``of``: words for other rows."""
        values = {"loss": loss, "gradient norm": grad_norm}
        reason = next(filter(None, (self._objection(n, v, of) for n, v in values.items())), None)
        if reason:
            self.counters.skipped += 1
            self.counters.in_a_row += 1
            return reason
        self.counters.in_a_row = 0
        for name, value in values.items():
            self._of(name + of).append(value)
        return None

    def _of(self, name: str) -> deque[float]:
        return self._accepted.setdefault(name, deque(maxlen=self._window))

    def _objection(self, name: str, value: float, of: str) -> str | None:
        if not math.isfinite(value):
            return f"{name}{of} is {value}"
        accepted, band = self._of(name + of), self._bands[name]
        if not band or len(accepted) < _MIN_ACCEPTED:
            return None
        median = statistics.median(accepted)
        # 1.4826 x the median absolute deviation estimates a normal distribution's sigma.
        spread = 1.4826 * statistics.median(abs(v - median) for v in accepted)
        limit = median + band * max(spread, _FLOORS[name] * abs(median))
        return f"{name}{of} is {value:.6g}, above the limit {limit:.6g}" if value > limit else None

    def state(self) -> dict[str, Any]:
        """JSON value from which ``restore`` goes on."""
        accepted = {name: list(values) for name, values in self._accepted.items()}
        return {"counters": asdict(self.counters), "accepted": accepted}

    def restore(self, state: dict[str, Any]) -> None:
        self.counters = Counters(**state["counters"])
        self._accepted.clear()
        for name, values in state["accepted"].items():
            self._of(name).extend(values)
