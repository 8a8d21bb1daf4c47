"""eval --rollouts: which samples are right, and what share of prompts is passed."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from nemo_hybrid.cli import main

ANSWERS: list[Any] = ["4", 4, " Paris\n", "42"]
TEXTS = [
    ["4", " 4\n", "5", "</think>4"],
    ["2 is it</think>no</think> 4 ", "4</think>", "4.", "four"],
    ["Paris", "paris", "<think>hm</think>\n\nParis ", "Paris."],
    ["41", "", "4 2", "4242"],
]
RIGHT = [[1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(texts: list[list[str]] = TEXTS) -> list[dict[str, Any]]:
    return [
        {"prompt": n, "sample": k, "ids": [1], "text": text}
        for n, some in enumerate(texts)
        for k, text in enumerate(some)
    ]


def prompts(answers: list[Any] = ANSWERS) -> list[dict[str, Any]]:
    return [{"prompt": "a", "answer": answer} for answer in answers]


def run(place: Path, rollouts: list[Any], data: list[Any], *more: str) -> int:
    files = write(place / "rollouts.jsonl", rollouts), write(place / "data.jsonl", data)
    return main(["eval", "--rollouts", str(files[0]), "--data", str(files[1]), *more])


def test_pass_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, samples()[::-1], prompts(), "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["right"] for row in found["by_prompt"]] == [sum(right) for right in RIGHT]
    assert [row["rate"] for row in found["by_prompt"]] == [0.75, 0.25, 0.5, 0.0]
    assert (found["prompts"], found["samples"]) == (4, 16)
    assert list(found["pass_at"]) == ["1", "2", "4"]
    for k, share in found["pass_at"].items():  # by trying every choice of k samples
        tried = [[any(some) for some in combinations(right, int(k))] for right in RIGHT]
        assert share == pytest.approx(sum(sum(t) / len(t) for t in tried) / 4, abs=1e-12)

    assert run(tmp_path, samples(), prompts()) == 0
    said = capsys.readouterr().out
    assert "37.50%" in said
    assert "75.00%" in said


def test_prompts_may_have_ids_and_other_numbers_of_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"id": f"q{n}", **row} for n, row in enumerate(prompts())]
    rows = [{**row, "prompt": f"q{row['prompt']}"} for row in samples()][:-1]
    assert run(tmp_path, rows, data, "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in found["by_prompt"]] == ["q0", "q1", "q2", "q3"]
    assert list(found["pass_at"]) == ["1", "2", "3"]
    assert found["pass_at"]["1"] == pytest.approx((0.75 + 0.25 + 0.5) / 4)


def test_other_ends_of_thinking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [["<a> 4</a>4", "</think> 4", "</a>5", "4"]]
    for more, right in (((), 2), (("--after", "</a>"), 2), (("--after", ""), 1)):
        assert run(tmp_path, samples(texts), prompts(["4"]), "--json", "true", *more) == 0
        assert json.loads(capsys.readouterr().out)["by_prompt"][0]["right"] == right
    assert main(["eval", "--from", "x", "--data", "y", "--after", "</a>"]) == 2
    assert capsys.readouterr().err == "error: --after is for --rollouts\n"


@pytest.mark.parametrize(
    ("rollouts", "data", "why"),
    [
        (samples(), prompts(["4", None, None, "4"]), "2 of 4 prompts have no field answer to "
         "compare with, such as prompt 1"),
        (samples(), prompts(["4", ["4"], "4", "4"]), "is neither text nor a whole number"),
        (samples(), prompts()[:3], "line 13 is of prompt 3, which --data lacks"),
        ([], prompts(), "is empty: it holds no samples"),
        (samples()[:12], prompts(), "holds no samples of 1 prompts"),
        ([*samples(), samples()[0]], prompts(), "line 17 is sample 0 of 0 once more"),
        ([{**samples()[0], "text": None}], prompts(), "line 1 has no text"),
        ([{"prompt": 0, "text": "4"}], prompts(), "line 1 is no sample"),
        ([[1]], prompts(), "line 1 is no sample"),
        ([{**samples()[0], "text": 4}], prompts(), "line 1 is no sample"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    rollouts: list[Any],
    data: list[Any],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, rollouts, data) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.splitlines()) == 1
