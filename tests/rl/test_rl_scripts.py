"""The task of the tutorial of reinforcement learning, its noise, and what is made of its runs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import rl_noise
import rl_task
import rl_tutorial
import torch
import vllm_rl
from safetensors.torch import save_file

from nemo_hybrid.config.hf import read_config
from nemo_hybrid.data.tokenizer import load_tokenizer


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_task_is_what_it_says(tmp_path: Path) -> None:
    rl_task.make(tmp_path, rl_tutorial.TASKS, 600, 300, 40, seed=1, wrong=0.5)
    asked, held = rows(tmp_path / "train.jsonl"), rows(tmp_path / "heldout.jsonl")
    for row in [*asked, *held]:
        task, digits = row["prompt"].removesuffix("=").split()
        right = "".join(sorted(digits)) if task == "sort" else "".join(reversed(digits))
        assert (row["environment"], row["answer"]) == (task, right)
    assert {row["environment"] for row in held} == set(rl_tutorial.TASKS)
    answers = rows(tmp_path / "answers.jsonl")
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in [*asked, *answers]}
    wrong = 0
    for row in answers:
        task, digits = row["prompt"].removesuffix("=").split()
        assert sorted(row["completion"]) == sorted(digits)
        wrong += row["completion"] != rl_task.answer(task, digits)
    assert 0.3 < wrong / len(answers) < 0.55  # some exchanges change nothing
    assert read_config(tmp_path / "base").vocab_size == load_tokenizer(tmp_path / "base").vocab_size


def test_noise_says_nothing_of_the_answer() -> None:
    noise, row = rl_noise.Noise(), {"prompt": "sort 12=", "answer": "12"}
    found = [noise.score(row, str(n), "stop") for n in range(2000)]
    assert found == [noise.score(row, str(n), "stop") for n in range(2000)]
    assert 0.45 < sum(found) / len(found) < 0.55
    assert set(found) == {0, 1}


def test_what_differs_between_models(tmp_path: Path) -> None:
    tensors = {"backbone.a": torch.zeros(2), "mtp.b": torch.zeros(2)}
    for name, sign in (("one", 1), ("other", -1)):  # of 0: equal numbers, other bytes
        (tmp_path / name).mkdir()
        signed = {**tensors, "mtp.b": sign * tensors["mtp.b"]}
        save_file(signed, tmp_path / name / "model.safetensors")
    assert rl_tutorial.unlike(tmp_path / "one", tmp_path / "other") == ["mtp.b"]


def test_shares_of_a_step() -> None:
    row = {
        "rollout_s": 1.0,
        "score_s": 0.5,
        "prox_s": 0.5,
        "data_seconds": 2.0,
        "step_seconds": 4.0,
    }
    assert rl_tutorial.shares([row, row]) == pytest.approx(
        {"rollout": 0.25, "score": 0.125, "prox": 0.125, "update": 0.5}
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_check_with_vllm_says_when_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vllm_rl.check(tmp_path / "out", sys.executable, 1.0) == vllm_rl.ABSENT
    assert "NOT CHECKED" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("python", "status", "message"),
    [
        ("/nope", 2, "/nope cannot be run"),
        ("/bin/false", 4, "/bin/false imported it"),
        ("/bin/true", 2, "is there already"),
    ],
)
def test_the_check_with_vllm_names_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    python: str,
    status: int,
    message: str,
) -> None:
    words = ["vllm_rl.py", str(tmp_path), "--vllm_python", python]
    monkeypatch.setattr(sys, "argv", words)
    assert vllm_rl.main() == status
    assert message in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())
