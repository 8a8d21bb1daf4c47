"""Processes that share experts generate together, and none waits for ever for one that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generation.lockstep import CONFIG, DIVISIONS, DRAFTS, PROMPTS, requests, texts
from helpers.processes import run_python
from helpers.tiny_models import loud_model


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("lockstep")
    run_python([Path(__file__).with_name("lockstep.py"), out], size=2)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("drafts", DRAFTS)
def test_divided_experts_give_the_same_texts_however_prompts_are_divided(
    by_rank: list[dict[str, Any]], drafts: int
) -> None:
    expected = texts(loud_model(CONFIG), requests(), drafts=drafts)
    assert len(expected) == 2 * PROMPTS
    assert sum(not all(chosen) for _, chosen in expected.values()) > PROMPTS / 2
    for name in DIVISIONS:
        ours, others = (found[f"{name} {drafts}"] for found in by_rank)
        assert {key: tuple(text) for key, text in (ours | others).items()} == expected
    assert by_rank[1][f"one alone {drafts}"] == {}
    assert len(by_rank[1][f"unequal {drafts}"]) == 2


def test_where_one_process_fails_both_end_and_say_why(by_rank: list[dict[str, Any]]) -> None:
    """At the first token, which with drafts is drawn before others' experts are needed again."""
    for found in by_rank:
        assert len(found["failures"]) == len(DRAFTS)
        assert all(said.startswith("the logits of new token 1 are") for said in found["failures"])
