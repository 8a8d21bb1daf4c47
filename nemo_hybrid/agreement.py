"""What processes decide together: one that fails lets none of the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from nemo_hybrid.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


class Agreement:
    """Processes that can send each other objects, of which this is number ``rank``."""

    rank: int
    size: int

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks, in rank order, on every rank."""
        raise NotImplementedError

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Inside, every rank does its part; all leave together.

        A UserError, OSError or MemoryError on any rank is raised on every rank as a UserError. What
        else is raised is a defect of the program, and ends its rank alone.
        """
        failure = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            failure = str(error)
        except (OSError, MemoryError) as error:
            who = f"rank {self.rank}: " if self.size > 1 else ""
            failure = f"{who}{str(error) or 'out of memory'}"
        messages = dict.fromkeys(m for m in self.gather(failure) if m is not None)
        if messages:
            raise UserError("; ".join(messages))

    def from_rank_0(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``action`` gives on rank 0, which alone runs it, on every rank; failures as in
        `agreed`."""
        result = None
        with self.agreed():
            if self.rank == 0:
                result = action(*args, **kwargs)
        return self.gather(result)[0]


class OneProcess(Agreement):
    """A process that works alone."""

    rank = 0
    size = 1

    def gather(self, item: Any) -> list[Any]:
        return [item]


ALONE = OneProcess()
