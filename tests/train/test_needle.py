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

SCRIPT = Path(__file__).parents[2] / "scripts/needle.py"


@pytest.fixture(scope="module")
def needle() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize("length", [32, 65, 512])
def test_every_question_has_one_answer_in_the_row(needle: Any, length: int) -> None:
    row = needle.make_row(3, length, seed=7)
    keys = range(needle.VALUES, needle.VALUES + needle.KEYS)
    asked = np.flatnonzero(row.asked_S)
    assert len(asked) == needle.PAIRS
    assert row.ids_S.max() < needle.MODEL["vocab_size"]
    for at in asked:
        key, value = row.ids_S[at - 1 : at + 1]
        assert key in keys
        assert value < needle.VALUES
        place = at - row.distance_S[at]
        assert place < length - 2 * needle.PAIRS
        assert row.ids_S[place - 1 : place + 1].tolist() == [key, value]
        assert (row.ids_S == key).sum() == 2
    assert not np.array_equal(row.ids_S, needle.make_row(4, length, seed=7).ids_S)
    assert np.array_equal(row.ids_S, needle.make_row(3, length, seed=7).ids_S)


class Finder:
    """Answers as one who has read everything that it may see and forgets what is ``far``."""

    def __init__(self, vocabulary: int, far: float = np.inf) -> None:
        self.lm_head = torch.nn.Identity()
        self.vocabulary, self.far = vocabulary, far

    def forward_hidden(self, ids_BS: Tensor, packing: Any) -> tuple[Tensor, None]:
        (ids,), guesses = ids_BS.tolist(), []
        number = [0] * len(ids) if packing is None else packing.seq_idx_BS[0].tolist()
        for at, key in enumerate(ids):
            before = [i for i in range(at) if ids[i] == key and number[i] == number[at]]
            before = [i for i in before if at - i <= self.far]
            guesses.append(ids[before[-1] + 1] if before else 0)
        return F.one_hot(torch.tensor([guesses]), self.vocabulary).float(), None


def test_accuracy_is_that_of_who_answers(needle: Any) -> None:
    vocabulary, length = needle.MODEL["vocab_size"], 256
    whole = needle.answers(Finder(vocabulary), length, 64, seed=1)
    assert len(whole.right_Q) == 64
    assert whole.accuracy() == 1.0
    short = needle.answers(Finder(vocabulary, far=100), length, 64, seed=1)
    assert short.accuracy(far=100) == 1.0
    assert short.accuracy(near=100) < 0.2
    # With the border closed, what lies in the other half is not found, and what does not is.
    closed = needle.answers(Finder(vocabulary), length, 64, seed=1, closed=True)
    assert closed.accuracy(near=length / 2) < 0.2
    assert closed.accuracy(far=length / 2 - 2 * needle.PAIRS) == 1.0


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
        return [bar[-1] for bar in needle.judged(figures(**good | changed), needle.WHOLE)]

    assert holds() == [True] * 5
    assert holds(long=0.94) == [False, True, True, True, True]
    assert holds(long=0.85) == [False, False, True, True, True]
    assert holds(control=0.7) == [True, True, False, True, True]
    assert holds(closed=0.2) == [True, True, True, False, True]
    assert holds(kept=0.9) == [True, True, True, True, False]


@pytest.mark.sweep
def test_it_runs_from_the_first_step_to_the_figures(needle: Any, tmp_path: Path) -> None:
    """Two steps of everything, long rows over two processes."""
    stage = needle.Stage
    sizes = needle.Sizes((stage(32, 4, 2),), stage(128, 1, 2), 32, (32, 128), 16)
    base = needle.base_of(tmp_path, sizes)
    found = needle.phases(tmp_path, sizes, base, seed=5, cp=2)
    figures = {"base": needle.measure(base, sizes, 1), "seeds": {"5": found}}
    text = "\n".join(needle.lines(figures, sizes))
    for name in ("base", "long 5", "control 5"):
        assert text.count(f"\n{name:12} ") == 3
    assert found["long"]["by_length"].keys() == {"32", "128"}
    assert (tmp_path / "long_5/checkpoints/step_00000002").is_dir()
