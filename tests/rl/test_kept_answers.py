"""Answers that a checkpoint holds come back as they were."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_hybrid.checkpoint.tensors import opened, safetensors_parts
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import write_file
from nemo_hybrid.recipes.answers import Answer, from_tensors, to_tensors
from nemo_hybrid.recipes.rollouts import Rollouts

ANSWER = Answer(
    prompt="q\n7", sample=3, environment="own", ids=[0, 2**31 - 1, 5], new=2,
    logprobs=[-0.1 - 0.2, -1e-310], chosen=[True, False], ended="stop", reward=1 / 3,
    advantage=-2 / 3, parts={"format": 0.1}, note="\u00e9 \U0001f600",
)  # fmt: skip
ANSWERS = [
    ANSWER,
    replace(ANSWER, prompt=7, prox=[-1 / 7, -2.5], note=None),
    replace(ANSWER, parts={}),
]


def test_to_the_last_bit_out_of_files(tmp_path: Path) -> None:
    for number, answer in enumerate([*ANSWERS, replace(ANSWER, reward=nan)]):
        tensors = {f"{number}.{name}": tensor for name, tensor in to_tensors(answer).items()}
        write_file(tmp_path / f"{number}", safetensors_parts(tensors, {}))
    with opened(tmp_path.iterdir()) as saved:
        found = [
            from_tensors(partial(lambda n, what: saved[f"{n}.{what}"](), number))
            for number in range(4)
        ]
    assert found[:3] == ANSWERS
    assert isnan(found[3].reward)
    assert found[3] == replace(ANSWER, reward=found[3].reward)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"kept": [[1, 2, {}]]}, "damaged checkpoint: it holds no 1.0.ids of the answers"),
        ({"turns": [{"number": 1, "answers": []}]}, "holds answers as an older version kept them"),
    ],
)
def test_what_is_not_there_is_named(state: dict[str, Any], message: str) -> None:
    rollouts = SimpleNamespace(_world=SimpleNamespace(rank=0, size=1))
    with pytest.raises(UserError, match=message):
        Rollouts.restore(rollouts, {"disagreed": 0, **state}, {})  # type: ignore[arg-type]
