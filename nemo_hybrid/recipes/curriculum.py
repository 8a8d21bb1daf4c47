"""Which prompts come when: each environment's share of a step, and easy ones first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from nemo_hybrid.config.rl import PromptOptions
from nemo_hybrid.data.loader import permute
from nemo_hybrid.data.prompts import Prompt
from nemo_hybrid.errors import UserError


class Asked(NamedTuple):
    """A prompt, and how often it was asked before."""

    prompt: Prompt
    before: int


class _Group:
    """Prompts of which a step asks so many."""

    def __init__(self, prompts: Sequence[Prompt], each: int, easy_first: bool, seed: int) -> None:
        self.prompts, self.each = prompts, each
        self._easy_first, self._seed = easy_first, seed
        self._order = lru_cache(2)(self._ordered)

    def turn(self, number: int) -> list[Asked]:
        places = range(number * self.each, (number + 1) * self.each)
        times = (divmod(place, len(self.prompts)) for place in places)
        return [Asked(self.prompts[self._order(epoch)[index]], epoch) for epoch, index in times]

    def _ordered(self, epoch: int) -> list[int]:
        count = len(self.prompts)
        order = [permute(i, count, self._seed, "prompts", epoch) for i in range(count)]
        if self._easy_first:
            order.sort(key=lambda i: -self.prompts[i].row["pass_rate"])  # is stable
        return order


class Curriculum:
    """Prompts by turns: every one of a group is asked once before any is asked again. A turn
    depends on its number alone. Raises UserError where options and prompts do not fit."""

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, options: PromptOptions, seed: int
    ) -> None:
        unrated = (prompt for prompt in prompts if prompt.row.get("pass_rate") is None)
        if options.easy_first and (first := next(unrated, None)):
            raise UserError(f"{first.where}: data.easy_first needs the field pass_rate")
        if not options.shares:
            self._groups = [_Group(prompts, per_step, options.easy_first, seed)]
            return
        by_name: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            by_name[str(prompt.environment)].append(prompt)
        each = quotas(options.shares, per_step)
        for name in sorted(by_name.keys() | each.keys()):
            if name not in each:
                raise UserError(f"data.shares gives environment {name} none: 0 leaves it out")
            if options.shares[name] and not (each[name] and by_name[name]):
                why = "has no prompts" if each[name] else f"would get none of {per_step} prompts"
                raise UserError(f"data.shares: environment {name} {why}")
        self._groups = [
            _Group(by_name[name], count, options.easy_first, seed)
            for name, count in sorted(each.items())
            if count
        ]

    def turn(self, number: int) -> list[Asked]:
        return [asked for group in self._groups for asked in group.turn(number)]


def quotas(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers of that sum, as near to the shares as can be (largest remainders)."""
    total = sum(shares.values())
    exact = {name: count * share / total for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    for name in by_rest[: count - sum(found.values())]:
        found[name] += 1
    return found
