"""Processes that share experts generate together, and none waits for ever for one that is done."""

from __future__ import annotations

import json
from pathlib import Path

from generation.lockstep import CONFIG, DIVISIONS, DRAFTS, PROMPTS, requests, texts
from helpers.processes import run_python
from helpers.tiny_models import loud_model


def test_divided_experts_give_the_same_texts_however_prompts_are_divided(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("lockstep.py")
    run_python([worker, tmp_path], size=2)
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model = loud_model(CONFIG)
    for drafts in DRAFTS:
        expected = texts(model, requests(), drafts=drafts)
        assert len(expected) == 2 * PROMPTS
        for name in DIVISIONS:
            ours, others = (found[f"{name} {drafts}"] for found in by_rank)
            assert ours | others == expected
        assert by_rank[1][f"one alone {drafts}"] == {}
        assert len(by_rank[1][f"unequal {drafts}"]) == 2
