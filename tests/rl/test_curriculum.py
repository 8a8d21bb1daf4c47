"""Which prompts come when, and where pass rates come from."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pass_rates
import pytest

from nemo_hybrid.config.rl import PromptOptions, RlConfig
from nemo_hybrid.data.prompts import Prompt
from nemo_hybrid.errors import UserError
from nemo_hybrid.recipes.curriculum import Curriculum, quotas

ENVIRONMENTS = ["a"] * 6 + ["b"] * 3


def prompts(rated: bool = True) -> list[Prompt]:
    return [
        Prompt(i, [1], where=f"line {i}", row={"environment": name, "pass_rate": i % 4 / 3}
               if rated else {"environment": name})
        for i, name in enumerate(ENVIRONMENTS)
    ]  # fmt: skip


def asked(turns: int, per_step: int, **options: Any) -> list[list[tuple[int, int]]]:
    made = Curriculum(prompts(), per_step, PromptOptions(**options), seed=1)
    return [[(int(a.prompt.number), a.before) for a in made.turn(t)] for t in range(turns)]


def test_every_prompt_once_before_any_again() -> None:
    found = [one for turn in asked(6, 3) for one in turn]
    assert sorted(found[:9]) == [(i, 0) for i in range(9)]
    assert sorted(found[9:]) == [(i, 1) for i in range(9)]
    assert [i for i, _ in found[:9]] != [i for i, _ in found[9:]] != list(range(9))
    made = Curriculum(prompts(), 3, PromptOptions(), seed=1)
    assert [(a.prompt.number, a.before) for a in made.turn(4)] == found[12:15]


def test_easy_ones_first() -> None:
    for start in (0, 9):
        rates = [prompts()[i].row["pass_rate"] for i, _ in chain(*asked(6, 3, easy_first=True))]
        assert rates[start : start + 9] == sorted(rates[start : start + 9], reverse=True)
    plain = [prompts()[i].row["pass_rate"] for i, _ in chain(*asked(6, 3))]
    assert plain[:9] != sorted(plain[:9], reverse=True)


def test_shares_of_every_step() -> None:
    for turn in asked(5, 4, shares={"a": 1, "b": 3}):
        assert Counter(ENVIRONMENTS[i] for i, _ in turn) == {"a": 1, "b": 3}
    alone = list(chain(*asked(3, 4, shares={"a": 0.5, "b": 0})))
    assert {ENVIRONMENTS[i] for i, _ in alone} == {"a"}
    assert Counter(i for i, _ in alone) == dict.fromkeys(range(6), 2)


def test_quotas_are_largest_remainders() -> None:
    assert quotas({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}
    assert quotas({"a": 0.62, "b": 0.38}, 10) == {"a": 6, "b": 4}
    for count in range(20):
        found = quotas({"a": 0.1, "b": 2.3, "c": 0.7}, count)
        assert sum(found.values()) == count
        assert all(abs(found[n] - count * s / 3.1) < 1 for n, s in (("a", 0.1), ("b", 2.3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {"a": 1}}, "gives environment b none: 0 leaves it out"),
        ({"shares": {"a": 1, "b": 1, "c": 1}}, "environment c has no prompts"),
        ({"shares": {"a": 100, "b": 1}}, "environment b would get none of 3 prompts"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Curriculum(prompts(), 3, PromptOptions(**options), seed=1)


def test_prompts_without_a_rate_have_no_order() -> None:
    with pytest.raises(UserError, match=r"line 0: data\.easy_first needs the field pass_rate"):
        Curriculum(prompts(rated=False), 3, PromptOptions(easy_first=True), seed=1)


def test_pass_rates_of_rollouts() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4", "id": "x"},
        {"prompt": "3+3=", "answer": "6"},
    ]  # fmt: skip
    said = [(0, "2"), (0, "3"), ("x", "4"), (0, "2"), (0, "2")]
    rollouts = [{"prompt": number, "text": text, "ended": "stop"} for number, text in said]
    config = RlConfig(environments={"arithmetic": {}})
    found = pass_rates.rated(rows, rollouts, config)
    assert [row.get("pass_rate") for row in found] == [0.75, 1.0, None]
    assert [row["answer"] for row in found] == ["2", "4", "6"]
