"""Budgets of thinking: what a sample thinks is counted, and the marker that ends it comes in time.

What stands between an opening and a closing marker is thought. Once a sample has thought as many
tokens as its budget, those of the closing marker follow, whatever the model would have drawn; where
it had begun to write them, the rest. Whoever opens the thinking again goes on with what is left.

A machine reads the tokens of each row. Its states say how much of the opening marker the last ones
were, or in thinking how much of the closing one (Knuth, Morris and Pratt 1977), so that a marker
may be of several tokens, and nothing waits for a GPU.

Shapes: B rows, N rows that begin, K tokens, S = K + 1, M states, C tokens of markers and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FREE = -1
"""In place of a token's id: none is forced."""
_NO_BUDGET = 2**62


@dataclass(frozen=True)
class Markers:
    """Token ids that open the thinking, and that close it; at least one each."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


class Thinking:
    """Where the thinking of each row stands, and what may still be thought."""

    def __init__(self, markers: Markers, rows: int, device: torch.device) -> None:
        self._markers, self._device = markers, device
        known = sorted({*markers.opening, *markers.closing})
        self._known_C = torch.tensor(known, device=device)
        next_MC, costs_MC = zip(*(zip(*row, strict=True) for row in _machine(markers)), strict=True)
        self._next_MC, self._costs_MC = (
            torch.tensor(table, device=device) for table in (next_MC, costs_MC)
        )
        self._first = len(markers.opening)  # of the states in thinking
        ends = [FREE] * self._first + list(markers.closing)
        self._ends_M = torch.tensor(ends, device=device)
        self._state_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._left_B = torch.full_like(self._state_B, _NO_BUDGET)

    def begin(self, to_N: Tensor, thinks: Sequence[bool], budgets: Sequence[int | None]) -> None:
        """Rows begin anew: whether their prompts end in thinking, and the most tokens of it."""
        states = [self._first * inside for inside in thinks]
        left = [_NO_BUDGET if b is None else min(b, _NO_BUDGET) for b in budgets]
        self._state_B[to_N] = torch.tensor(states, device=self._device)
        self._left_B[to_N] = torch.tensor(left, device=self._device)

    def of_rows(self, rows_N: Tensor) -> Thinking:
        """The same of some rows alone."""
        some = Thinking(self._markers, 0, self._device)
        some._state_B, some._left_B = self._state_B[rows_N], self._left_B[rows_N]
        return some

    def due(self, ahead_BK: Tensor) -> Tensor:
        """Ids [B, S] that have to come next, and after each of the tokens ahead if these are read;
        FREE where the model decides."""
        at, due = (self._state_B, self._left_B), []
        for ids_B in [None, *ahead_BK.unbind(1)]:
            at = at if ids_B is None else self._after(*at, ids_B)
            state_B, left_B = at
            due.append(self._ends_M[state_B].masked_fill(left_B > 0, FREE))
        return torch.stack(due, 1)

    def decide(self, ids_B: Tensor, real_B: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens, of those that the model would have, and whether they are these. Where
        they are real they are read."""
        due_B = self.due(ids_B[:, None][:, :0])[:, 0]
        ids_B = torch.where(due_B == FREE, ids_B, due_B)
        self.read(ids_B[:, None], real_B.long())
        return ids_B, due_B == FREE

    def read(self, ids_BK: Tensor, counts_B: Tensor) -> None:
        """Read the first tokens of every row."""
        for place, ids_B in enumerate(ids_BK.unbind(1)):
            real_B = place < counts_B
            state_B, left_B = self._after(self._state_B, self._left_B, ids_B)
            self._state_B = torch.where(real_B, state_B, self._state_B)
            self._left_B = torch.where(real_B, left_B, self._left_B)

    def _after(self, state_B: Tensor, left_B: Tensor, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        is_BC = ids_B[:, None] == self._known_C
        number_B = torch.where(is_BC.any(1), is_BC.long().argmax(1), len(self._known_C))
        return self._next_MC[state_B, number_B], left_B - self._costs_MC[state_B, number_B]


def _machine(markers: Markers) -> list[list[tuple[int, int]]]:
    """For every state and every token of the markers, in the order of ids, and last any other: the
    next state, and what that takes of the budget. Markers themselves take nothing."""
    known = [*sorted({*markers.opening, *markers.closing}), FREE]
    rows = []
    for inside, marker in enumerate((markers.opening, markers.closing)):
        here, there = inside * len(markers.opening), (1 - inside) * len(markers.opening)
        for matched in range(len(marker)):
            row = []
            for token in known:
                seen = (*marker[:matched], token)
                if seen == marker:
                    row.append((there, -inside * matched))
                else:
                    fits = [n for n in range(len(marker)) if seen[len(seen) - n :] == marker[:n]]
                    row.append((here + max(fits), inside))
            rows.append(row)
    return rows
