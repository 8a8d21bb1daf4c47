"""Whole runs of reinforcement learning: metrics, resumption, layouts, and what users get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.bands import SABOTAGE
from helpers.chats import write_base
from helpers.commands import Commands, commands_in_one_process
from helpers.corpus import ALL_EXPERTS
from helpers.launcher import MEASURED
from helpers.once import once
from helpers.processes import run_python
from helpers.questions import ENVIRONMENTS, ask, write_questions
from nemo_hybrid.checkpoint.manifest import read_manifest
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.data.samples import ROLLOUT, SampleMaker
from nemo_hybrid.data.sources import find_samples
from nemo_hybrid.train.metrics import read_metrics
from rl.rl_runs import BETWEEN, DRAWS, STEPS, TWICE


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        write_base(out / "hf", **ALL_EXPERTS)
        write_base(out / "other", **ALL_EXPERTS, pattern="ME*")
        write_base(out / "picky")

    return once(tmp_path_factory, "rl_base", make)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    program = Path(__file__).with_name("rl_runs.py")

    def make(out: Path) -> None:
        questions = write_questions(out / "questions.jsonl")
        for size in (1, 2):
            run_python([program, base / "hf", base / "other", questions, out], size)

    return once(tmp_path_factory, "rl_runs", make)


def rows(runs: Path, name: str) -> list[dict[str, Any]]:
    """Of metrics, without what was measured."""
    found = []
    for row in read_metrics(runs / name / "metrics.jsonl"):
        content = {**vars(row), **row.further}
        del content["further"]
        times = {name for name in content if name.endswith("_s")}
        found.append({k: v for k, v in content.items() if k not in {*MEASURED, *times}})
    return found


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return tensors(run / f"checkpoints/step_{step:08d}")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("model*.safetensors"):
        found |= load_file(path)
    assert found
    return found


def test_a_run_measures_its_answers(runs: Path) -> None:
    found = rows(runs, "plain")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row in found:
        assert 0 <= row["reward"] <= 1
        assert 1 <= row["mismatch"] < 1.00001
        assert row["mismatch_max"] < 1.0001
        assert row["filtered"] == row["clipped_share"] == 0
        assert 0 < row["response_tokens"] <= 8
        assert row["entropy"] > 0
        assert row["grad_norm"] > 0
        assert row["tokens"] % 128 == 0
        assert row["tokens"] < 20 * 64  # packed
    assert {row["verifier_failures"] for row in found} == {0, 4}  # of one prompt, where it is asked
    assert found[-1]["tokens_total"] == sum(row["tokens"] for row in found)
    assert len({row["sample_hash"] for row in found}) == STEPS
    assert "Context length: declared for " in (runs / "plain/model/README.md").read_text()


def test_answers_are_written(runs: Path) -> None:
    assert [p.name for p in sorted((runs / "plain/rollouts").iterdir())] == [
        f"turn_{turn:08d}.jsonl" for turn in (1, 3)
    ]
    lines = (runs / "plain/rollouts/turn_00000001.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 20
    for answer in answers:
        assert len(answer["logprobs"]) == len(answer["ids"]) <= 8
        if answer["environment"] == "own":
            assert answer["reward"] is None
            assert answer["advantage"] == 0
            assert answer["note"] == "RuntimeError: a defect"
        else:
            assert answer["reward"] in (0, 1)


def test_written_answers_are_rollouts_to_finetuning(runs: Path, base: Path) -> None:
    path = runs / "plain/rollouts/turn_00000001.jsonl"
    made = list(SampleMaker(SampleOptions(), base / "hf", 0).read(find_samples([path]).sources))
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    known = sum(one.kind == ROLLOUT for one in made)
    assert known > len(answers) / 2
    for one, answer in zip(made, answers, strict=True):
        if one.unusable:  # the model has a few more tokens than the tokenizer
            assert "lies outside the vocabulary" in one.unusable[0].why
            continue
        (sample,) = one.samples
        assert sample.ids.tolist() == answer["prompt_ids"] + answer["ids"]
        assert sample.learnt == len(answer["ids"])
        assert "reward" in one.unread or answer["reward"] is None


def test_only_what_is_to_be_trained_moves(runs: Path, base: Path) -> None:
    before, after = tensors(base / "hf"), weights(runs / "plain", STEPS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        frozen = ".gate." in name or name.startswith("mtp.")
        assert torch.equal(tensor, after[name]) == frozen, name


def test_resumes_to_the_last_bit(runs: Path) -> None:
    """In the middle of a rollout, and with another one after it."""
    assert rows(runs, "resumed") == rows(runs, "twice")
    ours, theirs = (weights(runs / name, TWICE) for name in ("resumed", "twice"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_answers_that_are_not_taken_back_would_be_noticed(runs: Path) -> None:
    twice, forgetful = rows(runs, "twice"), rows(runs, "forgetful")
    assert BETWEEN % 2
    assert forgetful[:BETWEEN] == twice[:BETWEEN]
    assert forgetful[BETWEEN:] != twice[BETWEEN:]
    # The second update learns from the same answers by other weights.
    assert twice[0]["reward"] == twice[1]["reward"]
    assert twice[0]["grad_norm"] != twice[1]["grad_norm"]
    assert twice[1]["reward"] != twice[2]["reward"] or twice[1]["entropy"] != twice[2]["entropy"]


def test_a_rollout_ahead_is_of_the_weights_before(runs: Path) -> None:
    """Those of the second one are of the first weights, as where these hardly move, and mismatch is
    measured by weights that sampled."""
    ahead, behind, still = (rows(runs, name) for name in ("ahead", "behind", "still"))
    hashes = [[row["sample_hash"] for row in found] for found in (ahead, behind, still)]
    assert hashes[0][0] == hashes[1][0] == hashes[2][0]
    assert hashes[0][2] == hashes[2][2] != hashes[1][2]
    for row in [*ahead, *rows(runs, "ahead_ep")]:
        assert 1 <= row["mismatch"] < 1.00001
        later = row["step"] > 2
        assert (row["off_policy"] > 1.001) == later
        assert (row["off_policy"] < 1.00001) != later
    assert "off_policy" not in behind[0]


def test_nothing_is_sampled_that_no_step_learns_from(runs: Path) -> None:
    """Two updates of each rollout; before and after them an evaluation, which needs no experts."""
    assert json.loads((runs / "generators.json").read_text()) == [False, *[True] * 3, False]
    assert TWICE == 5


@pytest.mark.parametrize("name", ["ahead", "ahead_ep"])
def test_what_was_sampled_ahead_is_resumed_to_the_last_bit(runs: Path, name: str) -> None:
    """Out of files of tensors, of which each process writes one."""
    assert rows(runs, f"{name}_resumed") == rows(runs, name)
    ours, theirs = (weights(runs / run, TWICE) for run in (f"{name}_resumed", name))
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    step = runs / name / f"checkpoints/step_{BETWEEN:08d}"
    of_ranks = [load_file(path) for path in sorted(step.glob("data-r*.safetensors"))]
    assert len(of_ranks) == (2 if name == "ahead_ep" else 1)
    experts = [{n for n in found if n.endswith(".experts")} for found in of_ranks]
    assert sum(map(len, experts)) == len(set().union(*experts)) == 2 * 20  # of two rollouts
    assert (step / "run_state.json").stat().st_size < 10_000
    assert not [*runs.glob("plain/checkpoints/*/data-r*")]  # where nothing is learnt from later on
    assert {path.name for path in step.iterdir()} - {"manifest.json"} == read_manifest(step).keys()


def test_a_wrong_expert_that_is_resumed_would_be_noticed(runs: Path) -> None:
    ahead, drifted = (rows(runs, n) for n in ("ahead", "drifted"))
    assert drifted[:BETWEEN] == ahead[:BETWEEN]
    assert drifted[BETWEEN]["grad_norm"] > 1.1 * ahead[BETWEEN]["grad_norm"]
    assert drifted[-1]["off_policy"] > ahead[-1]["off_policy"] + 0.5


def distances(runs: Path, base: Path, name: str) -> dict[str, float]:
    """Of a run from the plain one: gradient norms, losses, and how far weights have moved."""
    alone, other = rows(runs, "plain"), rows(runs, name)
    assert len(alone) == len(other) == STEPS
    pairs = list(zip(other, alone, strict=True))
    before, a, b = tensors(base / "hf"), *(weights(runs / n, STEPS) for n in (name, "plain"))
    moved = sum(float((b[n] - before[n]).norm() ** 2) for n in a) ** 0.5
    return {
        "norms": max(abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in pairs),
        "losses": max(abs(x["loss"] - y["loss"]) for x, y in pairs),
        "weights": sum(float((a[n] - b[n]).norm() ** 2) for n in a) ** 0.5 / moved,
    }


def layout_bands(runs: Path, base: Path) -> dict[str, float]:
    """Twice of what weights change that are rounded eight times as badly."""
    rough = [distances(runs, base, f"rough_{draw}") for draw in range(DRAWS)]
    return {name: 2 * max(found[name] for found in rough) for name in rough[0]}


def check_alike(runs: Path, base: Path, name: str, bands: dict[str, float]) -> None:
    """The same answers, and the same learnt of them, as in the plain run."""
    for same in ("reward", "sample_hash"):
        assert [row[same] for row in rows(runs, name)] == [row[same] for row in rows(runs, "plain")]
    found = distances(runs, base, name)
    assert all(found[kind] < bands[kind] for kind in bands), (name, found, bands)


@pytest.mark.sweep
def test_four_processes_learn_the_same(runs: Path, base: Path, tmp_path: Path) -> None:
    program, questions = Path(__file__).with_name("rl_runs.py"), runs / "questions.jsonl"
    run_python([program, base / "hf", base / "other", questions, tmp_path], 4)
    (tmp_path / "plain").symlink_to(runs / "plain")
    check_alike(tmp_path, base, "four", layout_bands(runs, base))


def test_mismatch_in_bf16(runs: Path) -> None:
    """More than in fp32, which it is measured by, and below the bound that stops a run."""
    for row in rows(runs, "half"):
        assert 1 + 10 * (rows(runs, "plain")[0]["mismatch"] - 1) < row["mismatch"] <= 1.05


def test_layouts_learn_the_same(runs: Path, base: Path) -> None:
    bands = layout_bands(runs, base)
    for layout in ("world", "ep"):
        check_alike(runs, base, layout, bands)
    mistaken = distances(runs, base, "local")
    assert all(mistaken[name] > SABOTAGE * bands[name] for name in bands), (mistaken, bands)


def test_all_say_what_one_cannot_do(runs: Path) -> None:
    said = {(runs / f"failure_{rank}").read_text() for rank in range(2)}
    assert said == {"rank 1: nothing can be said"}


def test_a_process_without_prompts_waits_for_nobody(runs: Path) -> None:
    found = rows(runs, "idle")
    assert len(found) == 3
    assert all(row["tokens"] == 2 * 64 for row in found)  # a row on each of the two


def test_adapters_learn_alone(runs: Path) -> None:
    found = rows(runs, "adapted")
    assert all(1 <= row["mismatch"] < 1.00001 and row["grad_norm"] > 0 for row in found)
    saved = load_file(runs / "adapted/model/adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    assert "tags" in (runs / "adapted/model/README.md").read_text()
    assert not (runs / "adapted/model/config.json").exists()
    # What is learnt from is the same as without adapters, which compute zero at the beginning.
    assert found[0]["sample_hash"] == rows(runs, "plain")[0]["sample_hash"]


def test_the_block_learns_along_without_touching_the_backbone(runs: Path, base: Path) -> None:
    before, plain, along = (
        tensors(base / "hf"), *(weights(runs / name, 1) for name in ("alone", "along"))
    )  # fmt: skip
    for name, tensor in along.items():
        block = name.startswith("mtp.")
        assert torch.equal(tensor, plain[name]) != (block and ".gate." not in name), name
        assert torch.equal(plain[name], before[name]) == (block or ".gate." in name), name


def test_the_reference_holds_the_policy(runs: Path) -> None:
    """From the second step on its divergence has a gradient."""
    free, kept = rows(runs, "plain"), rows(runs, "kept")
    assert kept[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-5)
    assert kept[1]["grad_norm"] > 2 * free[1]["grad_norm"]


def test_a_teacher_like_the_student_moves_nothing(runs: Path, base: Path) -> None:
    """And another one does: answers go to the teacher of their environment."""
    before = tensors(base / "hf")
    after = {name: weights(runs / name, 2) for name in ("same", "swapped")}
    assert all(torch.equal(before[n], after["same"][n]) for n in before)
    assert not all(torch.equal(before[n], after["swapped"][n]) for n in before)
    assert {row["advantage_abs"] for row in rows(runs, "same")} == {0}
    assert all(row["advantage_abs"] > 0.1 for row in rows(runs, "swapped"))


def test_teachers_are_asked_together(runs: Path) -> None:
    found = rows(runs, "taught")
    assert len(found) == 3
    assert all(row["advantage_abs"] > 0 for row in found)
    assert all(0 <= row["reward"] <= 1 for row in found)  # measured all the same


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


GOOD = {"prompt": "ab", "environment": "letters"}
MISTAKES: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    ({}, {"prompt": "ab", "environment": "word"}, "line 2: there is no environment 'word'"),
    (
        {},
        {"prompt": "ab"},
        "line 2: the row names no environment: give one of letters, digits, own",
    ),
    ({}, {"prompt": "a", "environment": "own"}, "line 2: environment own needs the field answer"),
    ({}, {"prompt": "a " * 80, **{"environment": "letters"}}, "line 2: the prompt has"),
    ({}, {"text": "ab", "environment": "letters"}, "line 2: a prompt has one of the fields"),
    ({"rollout__temperature": 0.7}, None, "rollout.temperature must be 1, got 0.7"),
    ({"rollout__samples": 1}, None, "rollout.samples must be 2 or more"),
    ({"rollout__samples": 3}, None, "(20 answers) is not divisible by rollout.samples (3)"),
    ({"rollout__response_tokens": 64}, None, "leaves no room for prompts"),
    ({"environments": {}}, None, "environments is missing"),
    ({"environments": {"lettres": {}}}, None, "environments.lettres: there is no kind 'lettres'"),
    ({"lora__alpha": 2.0}, None, "lora options have no effect without lora.rank"),
    ({"train__router_bias_rate": 1e-3}, None, "no effect without train.train_router"),
    ({"train__eval_sequences": 8}, None, "there are no held-out prompts"),
    ({"rl__clip_low": 0.1}, None, "rl.clip_low has no effect with rl.updates 1"),
    (
        {"rl__importance": "none", "rl__importance_low": 0.1},
        None,
        "no effect with rl.importance none",
    ),
    ({"rollout__lag": 2}, None, "rollout.lag"),
    ({"rl__importance_low": 6.0}, None, "rl.importance_low exceeds rl.importance_high"),
    (
        {"teachers": {"a": "BASE"}, "routes": {"letters": "a"}},
        None,
        "environment digits has no teacher: name one in routes, or a default",
    ),
    (
        {"teachers": {"a": "BASE"}, "routes": {"default": "b"}},
        None,
        "routes: there is no teacher 'b' in teachers",
    ),
    (
        {"teachers": {"a": "BASE"}, "routes": {"default": "a", "word": "a"}},
        None,
        "routes: there is no environment 'word'",
    ),
    (
        {"teachers": {"a": "FOREIGN"}, "routes": {"default": "a"}},
        None,
        "teachers.a: FOREIGN has another tokenizer than",
    ),
    ({"data__shares": {"word": 1}}, None, "data.shares: there is no environment 'word'"),
    ({"data__shares": {"letters": 0}}, None, "data.shares are all 0"),
    (
        {},
        {"prompt": "ab", "environment": "letters", "pass_rate": 2},
        "line 2: pass_rate is 2, not a number from 0 to 1",
    ),
    (
        {"data__easy_first": True},
        {"prompt": "ab", "environment": "letters", "pass_rate": 1},
        "line 1: data.easy_first needs",
    ),
    ({"data__skip_solved": True}, None, "data.skip_solved needs the field pass_rate, and no row"),
    ({"data__path": None}, None, "data.path is missing"),
    ({"model__from_hf": None}, None, "model.from_hf is missing"),
]


def test_mistakes_are_named(commands: Commands, base: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(base / "hf", foreign)
    with (foreign / "tokenizer.json").open("a") as file:
        file.write("\n")
    places = {"BASE": str(base / "hf"), "FOREIGN": str(foreign)}
    for number, (changes, row, message) in enumerate(MISTAKES):
        if "teachers" in changes:
            teachers = {name: places[place] for name, place in changes["teachers"].items()}
            changes, message = (
                {**changes, "teachers": teachers},
                message.replace("FOREIGN", str(foreign)),
            )
        directory = tmp_path / str(number)
        directory.mkdir()
        questions = directory / "questions.jsonl"
        lines = [GOOD, GOOD if row is None else row]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = ask(base / "hf", questions, directory / "run", **changes)
        file = directory / "rl.yaml"
        file.write_text(dump_config(config))
        said = commands("rl", "--config", file)
        assert said.status == 2, (changes, row, said)
        assert message in said.err, (said.err, message)
        assert said.err.count("error: ") == 1, said.err
        assert not list(directory.glob("run/checkpoints/*"))
    said = commands("rl", "--config", file, "--train.max_tokens", "1e6")
    assert said.status == 2
    assert "train.max_tokens: nobody knows how long answers become; give max_steps" in said.err


def test_bad_rows_can_be_left_out_and_disagreement_stops(
    commands: Commands, base: Path, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path / "questions.jsonl")
    with questions.open("a") as file:
        file.write(json.dumps({"prompt": "ab", "environment": "word"}) + "\n")
    # One that nothing reaches: sampling and training are never equal to the last bit.
    config = ask(
        base / "hf", questions, tmp_path / "run", data__skip_bad=True, train__max_steps=5,
        rl__max_mismatch=1,
    )  # fmt: skip
    file = tmp_path / "rl.yaml"
    file.write_text(dump_config(config))
    said = commands("rl", "--config", file)
    assert "10 prompts (1 left out) for letters, digits, own" in said.out
    assert said.status == 3, said.err
    assert "sampling and training disagree: for 3 steps" in said.err
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 2


def test_when_nothing_can_be_judged(commands: Commands, base: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    row = {"prompt": "q", "environment": "own", "answer": "", "fault": "fail"}
    questions.write_text(json.dumps(row) + "\n")
    file = tmp_path / "rl.yaml"
    file.write_text(dump_config(ask(base / "hf", questions, tmp_path / "run")))
    said = commands("rl", "--config", file)
    assert said.status == 2
    assert "none of the 20 answers of a step could be judged: environment own: RuntimeError: a" in (
        said.err
    )
    assert ENVIRONMENTS["own"]
    with questions.open("a") as out:
        out.write(json.dumps(GOOD) + "\n")
    config = ask(base / "hf", questions, tmp_path / "some", train__max_steps=2)
    file.write_text(dump_config(config))
    said = commands("rl", "--config", file)
    assert said.status == 0, said.err
    assert (
        said.out.count("warning: environment own could not judge an answer: RuntimeError: a") == 1
    )
