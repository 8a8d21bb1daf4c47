"""scripts/needle.py: its rows ask what they say, its measures tell who can answer, and it runs."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_hybrid.checkpoint.load import load_model

SCRIPT = Path(__file__).parents[2] / "scripts/needle.py"


@pytest.fixture(scope="module")
def needle() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize(("length", "pairs"), [(16, 4), (32, 8), (65, 8), (512, 8)])
def test_every_question_has_one_answer_in_the_row(needle: Any, length: int, pairs: int) -> None:
    row = needle.make_row(3, length, 7, pairs)
    keys = range(needle.VALUES, needle.VALUES + needle.KEYS)
    asked = np.flatnonzero(row.asked_S)
    assert len(asked) == pairs
    assert row.ids_S.max() < needle.MODEL["vocab_size"]
    for at in asked:
        key, value = row.ids_S[at - 1 : at + 1]
        assert key in keys
        assert value < needle.VALUES
        place = at - row.distance_S[at]
        assert place < length - 2 * pairs
        assert row.ids_S[place - 1 : place + 1].tolist() == [key, value]
        assert (row.ids_S == key).sum() == 2
    assert not np.array_equal(row.ids_S, needle.make_row(4, length, 7, pairs).ids_S)
    assert np.array_equal(row.ids_S, needle.make_row(3, length, 7, pairs).ids_S)


class Finder:
    """Answers as one who has read everything that it may see and forgets what is ``far``."""

    def __init__(self, vocabulary: int, far: float = np.inf) -> None:
        self.lm_head = torch.nn.Identity()
        self.vocabulary, self.far = vocabulary, far

    def forward_hidden(self, ids_BS: Tensor, packing: None) -> tuple[Tensor, None]:
        (ids,), guesses = ids_BS.tolist(), []
        for at, key in enumerate(ids):
            before = [i for i in range(at) if ids[i] == key]
            before = [i for i in before if at - i <= self.far]
            guesses.append(ids[before[-1] + 1] if before else 0)
        return F.one_hot(torch.tensor([guesses]), self.vocabulary).float(), None


def test_accuracy_is_that_of_who_answers(needle: Any) -> None:
    vocabulary, length, alone = needle.MODEL["vocab_size"], 256, needle.Part(0, 1)
    whole = needle.answers(Finder(vocabulary), length, 64, 1, alone)
    assert len(whole.right_Q) == 64
    assert whole.accuracy() == 1.0
    short = needle.answers(Finder(vocabulary, far=100), length, 64, 1, alone)
    assert short.accuracy(far=100) == 1.0
    assert short.accuracy(near=100) < 0.2
    # With the border closed, what lies in the other half is not found, and what does not is.
    last = needle.answers(Finder(vocabulary), length, 64, 1, needle.Part(1, 2), closed=True)
    assert len(last.right_Q) == 64
    assert last.accuracy(near=length / 2) < 0.2
    assert last.accuracy(far=length / 2 - 2 * needle.PAIRS) == 1.0
    first = needle.answers(Finder(vocabulary), length, 64, 1, needle.Part(0, 2), closed=True)
    assert not len(first.right_Q)


def test_bars_are_those_that_are_asked(needle: Any) -> None:
    def figures(long: float, control: float, closed: float, kept: float) -> dict[str, Any]:
        after = {
            "long": {
                "by_length": {"16384": long, "512": kept}, "closed, beyond the border": closed,
            },
            "control": {"by_length": {"16384": control, "512": 1.0}},
        }  # fmt: skip
        return {"seeds": {"0": after}}

    def holds(**changed: float) -> list[bool]:
        good = {"long": 0.97, "control": 0.5, "closed": 0.03, "kept": 0.98}
        bars = needle.judged(figures(**good | changed), needle.WHOLE)
        held = [bar.holds for bar in bars]
        assert needle.verdict(bars) == (0 if all(held) else 1)
        return held

    assert holds() == [True] * 5
    assert holds(long=0.94) == [False, True, True, True, True]
    assert holds(long=0.85) == [False, False, True, True, True]
    assert holds(control=0.7) == [True, True, False, True, True]
    assert holds(closed=0.2) == [True, True, True, False, True]
    assert holds(kept=0.9) == [True, True, True, True, False]


@pytest.mark.sweep
def test_it_runs_from_the_first_step_to_the_figures(needle: Any, tmp_path: Path) -> None:
    """Two steps of everything, long rows over two processes, which also measure."""
    stage = needle.Stage
    sizes = needle.Sizes((stage(16, 4, 2, 4), stage(32, 4, 2)), stage(512, 1, 2), 32, (512,), 64)
    base = needle.base_of(tmp_path, sizes)
    runs = needle.phases(tmp_path, sizes, base, seed=5, cp=2)
    found = {name: needle.measured(run, True, 1, 2) for name, run in runs.items()}
    text = "\n".join(needle.lines({"base": found["control"], "seeds": {"5": found}}, needle.QUICK))
    for name in ("base", "long 5", "control 5"):
        assert text.count(f"\n{name:12} ") == 3
    assert (tmp_path / "long_5/checkpoints/step_00000002").is_dir()
    # Divided rows are read as whole ones are.
    model = load_model(runs["long"])
    whole = needle.answers(model, 512, 64, 1, needle.Part(0, 1))
    assert found["long"]["by_length"]["512"] == whole.accuracy()
    assert found["long"]["questions"]["512"] == 64
