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


def sections_of(needle: Any, ids: list[int]) -> list[int | None]:
    """The name in force at every token; None before the first."""
    names = range(needle.VALUES + needle.KEYS, needle.VALUES + needle.KEYS + needle.SECTIONS)
    found: list[int | None] = [None]
    for token in ids:
        found.append(token if token in names else found[-1])
    return found[1:]


@pytest.mark.parametrize(
    ("length", "keys", "sections"), [(16, 2, 1), (32, 3, 2), (128, 8, 4), (129, 8, 4), (512, 16, 4)]
)
def test_every_question_has_one_answer_in_the_row(
    needle: Any, length: int, keys: int, sections: int
) -> None:
    row = needle.make_row(3, length, 7, keys, sections)
    ids, body = row.ids_S.tolist(), length - 3 * keys
    named = sections_of(needle, ids)
    assert len(set(named[:body]) - {None}) == sections
    asked = np.flatnonzero(row.asked_S)
    assert len({ids[at - 1] for at in asked}) == len(asked) == keys
    assert max(ids) < needle.MODEL["vocab_size"]
    for at in asked:
        name, key, value = ids[at - 2 : at + 1]
        assert key in range(needle.VALUES, needle.VALUES + needle.KEYS)
        assert value < needle.VALUES
        assert name == named[at]
        met = [i for i in range(body) if ids[i] == key]
        assert len(met) == len({named[i] for i in met}) == sections
        (place,) = (i for i in met if named[i] == name)
        assert ids[place + 1] == value
        assert place == at - 1 - row.distance_S[at]
    assert not np.array_equal(row.ids_S, needle.make_row(4, length, 7, keys, sections).ids_S)
    assert np.array_equal(row.ids_S, needle.make_row(3, length, 7, keys, sections).ids_S)


class Finder:
    """Answers as one who has read everything that it may see and forgets what is ``far``; where it
    has not read a section's name, it takes that for the one that it is asked for."""

    def __init__(self, needle: Any, far: float = np.inf) -> None:
        self.lm_head = torch.nn.Identity()
        self.needle, self.far = needle, far

    def forward_hidden(self, ids_BS: Tensor, packing: None) -> tuple[Tensor, None]:
        (ids,), guesses = ids_BS.tolist(), []
        named = sections_of(self.needle, ids)
        for at, key in enumerate(ids):
            before = [i for i in range(at) if ids[i] == key and named[i] in (named[at], None)]
            before = [i for i in before if at - i <= self.far]
            guesses.append(ids[before[-1] + 1] if before else 0)
        return F.one_hot(torch.tensor([guesses]), self.needle.MODEL["vocab_size"]).float(), None


def test_accuracy_is_that_of_who_answers(needle: Any) -> None:
    length, alone = 256, needle.Part(0, 1)
    whole = needle.answers(Finder(needle), length, 64, 1, alone)
    assert len(whole.right_Q) == 64
    assert whole.accuracy() == 1.0
    short = needle.answers(Finder(needle, far=100), length, 64, 1, alone)
    assert short.accuracy(far=100) == 1.0
    assert short.accuracy(near=100) < 0.2
    # With the border closed, what lies in the other half is not found, and what does not is.
    last = needle.answers(Finder(needle), length, 64, 1, needle.Part(1, 2), closed=True)
    assert len(last.right_Q) == 64
    assert last.accuracy(near=length / 2) < 0.2
    assert last.accuracy(far=length / 2 - 3 * needle.ASKED) == 1.0
    first = needle.answers(Finder(needle), length, 64, 1, needle.Part(0, 2), closed=True)
    assert not len(first.right_Q)


def test_bars_are_those_that_are_asked(needle: Any) -> None:
    def figures(
        long: float, quarter: float, control: float, closed: float, kept: float
    ) -> dict[str, Any]:
        after = {
            "long": {
                "by_length": {"16384": long, "512": kept}, "closed, beyond the border": closed,
                "by_distance": {"0/4 to 1/4": 1.0, "1/4 to 2/4": quarter},
            },
            "control": {"by_length": {"16384": control, "512": 1.0}},
        }  # fmt: skip
        return {"seeds": {"0": after}}

    def holds(**changed: float) -> list[bool]:
        good = {"long": 0.97, "quarter": 0.93, "control": 0.5, "closed": 0.03, "kept": 0.98}
        bars = needle.judged(figures(**good | changed), needle.WHOLE)
        held = [bar.holds for bar in bars]
        assert needle.verdict(bars) == (0 if all(held) else 1)
        return held

    assert holds() == [True] * 6
    assert holds(long=0.94) == [False, True, True, True, True, True]
    assert holds(long=0.85) == [False, False, True, True, True, True]
    assert holds(quarter=0.89) == [True, True, False, True, True, True]
    assert holds(control=0.7) == [True, True, True, False, True, True]
    assert holds(closed=0.2) == [True, True, True, True, False, True]
    assert holds(kept=0.9) == [True, True, True, True, True, False]


@pytest.mark.sweep
def test_it_runs_from_the_first_step_to_the_figures(
    needle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of everything, long rows over two processes, which also measure; of the long phase
    one at a time."""
    stage = needle.Stage
    begin, learning = (stage(128, 4, 2),), (stage(32, 4, 2, 3, 2),)
    sizes = needle.Sizes(learning, begin, stage(512, 1, 1), 128, (512,), 64)
    monkeypatch.setitem(needle.base_of.__globals__, "TRIES", 2)
    with pytest.raises(SystemExit, match="none of 2 seeds of weights"):
        needle.base_of(tmp_path, sizes)  # nothing is learnt in two steps
    monkeypatch.setitem(needle.base_of.__globals__, "LEARNT", 9.0)
    base = needle.base_of(tmp_path, sizes)
    needle.phases(tmp_path, sizes, base, seed=5, cp=2)
    sizes = sizes._replace(long=stage(512, 1, 2))  # which goes on from there
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
