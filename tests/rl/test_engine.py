"""Rollouts by a server: the protocol, whole runs with it, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.chats import write_base
from helpers.commands import Commands, commands_in_one_process
from helpers.engine import FAULTS, FakeEngine, served
from helpers.processes import TESTS, run_python
from helpers.questions import ask, write_questions
from nemo_hybrid.checkpoint.load import load
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.batched import Request
from nemo_hybrid.generation.remote import Remote
from nemo_hybrid.train.metrics import read_metrics

STOPS = frozenset({7, 8, 9})
ASKED = [Request("a", [5, 6], 6, (0, 1, 2), STOPS), Request(4, [11] * 9, 3, (3,), STOPS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("engine") / "hf")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with served() as engine:
        yield engine


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


def remote(engine: FakeEngine, timeout_s: float = 60.0) -> Remote:
    return Remote(engine.url + "/", 2, seed=1, timeout_s=timeout_s, vocab_size=288)


def test_samples_are_those_that_were_asked_for(engine: FakeEngine, base: Path) -> None:
    remote(engine).update(base)
    found = list(remote(engine).run(ASKED))
    assert [(r.request.prompt, r.sample) for r in found] == [("a", 0), ("a", 1), ("a", 2), (4, 3)]
    assert len({tuple(r.ids) for r in found[:3]}) == 3  # of seeds of their own
    for rollout in found:
        assert rollout.ended
        assert len(rollout.ids) == len(rollout.logprobs) == len(rollout.chosen)
        assert all(rollout.chosen)
    assert [r.ids for r in remote(engine).run(ASKED)] == [r.ids for r in found]


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_none_are_named(engine: FakeEngine, base: Path, fault: str) -> None:
    remote(engine).update(base)
    engine.fault, engine.good = fault, 1
    with pytest.raises(UserError) as error:
        list(remote(engine).run(ASKED))
    assert f"rollout.engine {engine.url}: " in str(error.value)
    assert FAULTS[fault] in str(error.value)


def test_who_is_silent_is_not_waited_for(engine: FakeEngine, base: Path) -> None:
    remote(engine).update(base)
    engine.fault = "silent"
    with pytest.raises(UserError, match="/v1/completions: timed out"):
        list(remote(engine, timeout_s=0.2).run(ASKED))
    assert engine.samples <= 4  # each once


def test_behind_a_failure_no_more_is_asked_for(engine: FakeEngine, base: Path) -> None:
    remote(engine).update(base)
    engine.fault, engine.good = "other prompt", 1
    with pytest.raises(UserError, match="it answers to other token ids"):
        list(remote(engine).run([Request("a", [5, 6], 6, range(50), STOPS)]))
    for thread in threading.enumerate():
        if thread.name == "engine":
            thread.join()
    assert engine.samples <= 3  # each of two threads stops at its first that is none


def test_who_keeps_what_it_computed_is_named(engine: FakeEngine, base: Path) -> None:
    engine.fault = "still answering"
    with pytest.raises(UserError, match="keeps what it computed with other weights"):
        remote(engine).update(base)


def test_a_failure_that_passes_is_none(engine: FakeEngine, base: Path) -> None:
    """The server is asked again."""
    remote(engine).update(base)
    engine.fault, engine.good, engine.bad = "fails", 2, 2
    assert len(list(remote(engine).run(ASKED))) == 4
    assert engine.samples == 6


@pytest.mark.slow
def test_a_run_samples_with_the_weights_of_each_step(
    engine: FakeEngine, base: Path, tmp_path: Path, commands: Commands
) -> None:
    """Mismatch says so: a server that keeps the first weights is noticed."""
    questions = write_questions(tmp_path / "questions.jsonl")
    for name in ("good", "stale"):
        engine.fault, engine.model = name, None
        config = ask(
            base, questions, tmp_path / name, rollout__engine=engine.url, rl__max_mismatch=100.0
        )
        (tmp_path / "rl.yaml").write_text(dump_config(config))
        said = commands("rl", "--config", tmp_path / "rl.yaml")
        assert said.status == 0, said.err
        assert f"rollouts by {engine.url}" in said.out
        found = [row.further for row in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert found[0]["mismatch"] < 1.00001
        for row in found[1:]:
            assert (row["mismatch"] < 1.00001) == (name == "good")
            assert (row["mismatch"] > 1.001) == (name == "stale")
        assert not (tmp_path / name / "engine").exists()


def write_ahead(engine: FakeEngine, base: Path, out: Path, **changes: Any) -> Path:
    """The configuration of OUT/run, whose answers are sampled while it learns from others."""
    questions = write_questions(out / "questions.jsonl")
    ahead = {"rollout__engine": engine.url, "rollout__lag": 1, "rollout__log_every": 1}
    ahead |= {"checkpoint__every": 1, "checkpoint__keep": 9, "rl__max_mismatch": 100.0}
    config = ask(base, questions, out / "run", **ahead | changes)
    (out / "rl.yaml").write_text(dump_config(config))
    return out / "rl.yaml"


def alike(given: dict[str, Tensor], directory: Path) -> bool:
    weights = load(directory)[0].state_dict()
    assert given.keys() == weights.keys()
    return all(torch.equal(given[name], weights[name]) for name in weights)


def asked(engine: FakeEngine, update: int) -> list[tuple[list[int], int]]:
    return sorted((one.prompt, one.seed) for one in engine.answered[update])


@pytest.mark.slow
def test_the_next_answers_are_sampled_while_processes_learn(
    engine: FakeEngine, base: Path, tmp_path: Path
) -> None:
    """Nobody gets them before the checkpoint stands that the step before theirs leads to. Processes
    that divide experts give whole weights."""
    file = write_ahead(
        engine, base, tmp_path, parallel__ep=2, train__micro_batch_size=1,
        rollout__engine_timeout_s=60.0,
    )  # fmt: skip
    run = tmp_path / "run"

    def hold(updates: int) -> None:
        """Of the second update on; the first one is of the first turn."""
        step = run / f"checkpoints/step_{updates - 1:08d}"
        while updates > 1 and not step.exists() and not engine.closing.wait(0.02):
            pass

    engine.hold = hold
    run_python(["-m", "nemo_hybrid", "rl", "--config", file], 2)
    rows = [row.further for row in read_metrics(run / "metrics.jsonl")]
    assert [row["mismatch"] > 1.001 for row in rows] == [False, True, True]  # as weights moved on
    assert rows[0]["mismatch"] < 1.00001
    of_turns = [base, base, run / "checkpoints/step_00000001"]
    assert [*map(alike, engine.given, of_turns)] == [True] * 3
    assert not alike(engine.given[2], base)
    for turn, answered in enumerate(engine.answered, 1):
        lines = (run / f"rollouts/turn_{turn:08d}.jsonl").read_text().splitlines()
        learnt = [(line["prompt_ids"], line["ids"]) for line in map(json.loads, lines)]
        assert sorted(learnt) == sorted((one.prompt, one.ids) for one in answered)
        assert len(learnt) == 20
    assert not (run / "engine").exists()


@pytest.mark.slow
def test_what_is_not_answered_yet_is_asked_again(
    engine: FakeEngine, base: Path, tmp_path: Path, commands: Commands
) -> None:
    """Of a checkpoint in the middle of a turn, which is not asked again."""
    file = write_ahead(engine, base, tmp_path, rl__updates=2, train__max_steps=5)
    run = tmp_path / "run"
    assert commands("rl", "--config", file).status == 0
    before = read_metrics(run / "metrics.jsonl")
    for step in range(2, 6):
        shutil.rmtree(run / f"checkpoints/step_{step:08d}")
    said = commands("rl", "--config", file)
    assert said.status == 0, said.err
    after = read_metrics(run / "metrics.jsonl")
    assert [row.step for row in after] == [1, 2, 3, 4, 5]
    for name in ("loss", "grad_norm", "sample_hash"):
        assert getattr(after[1], name) == getattr(before[1], name)
    assert len(engine.given) == 3 + 2
    assert [asked(engine, n) for n in (3, 4)] == [asked(engine, n) for n in (1, 2)]
    assert asked(engine, 1) != asked(engine, 2)
    steps = ["step_00000001", "step_00000002"]
    assert [alike(engine.given[3 + n], run / "checkpoints" / steps[n]) for n in (0, 1)] == [
        True
    ] * 2


@pytest.mark.slow
def test_who_is_stopped_waits_for_no_answer(engine: FakeEngine, base: Path, tmp_path: Path) -> None:
    """Two steps are learnt from one turn, and the server is silent in the next."""
    file = write_ahead(
        engine, base, tmp_path, rl__updates=2, train__max_steps=5, checkpoint__every=0,
        rollout__engine_timeout_s=3600.0,
    )  # fmt: skip
    engine.hold = lambda updates: updates > 1 and engine.closing.wait()
    faults = json.dumps({"signal": [1, int(signal.SIGTERM)]})
    words = [TESTS / "helpers/faulty.py", faults, "rl", "--config", file]
    (said,) = run_python(words, timeout=300.0, succeed=False)
    assert said.status == 4, said.stderr
    assert len(engine.given) == 2
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]


@pytest.mark.parametrize("lag", [0, 1])
def test_nothing_is_lost_when_the_server_fails(
    engine: FakeEngine, base: Path, tmp_path: Path, commands: Commands, lag: int
) -> None:
    """With a lag it does so while a step is made."""
    questions = write_questions(tmp_path / "questions.jsonl")
    config = ask(
        base, questions, tmp_path / "run", rollout__engine=engine.url, rollout__lag=lag,
        rl__max_mismatch=100.0,
    )  # fmt: skip
    (tmp_path / "rl.yaml").write_text(dump_config(config))
    engine.fault, engine.good = "other prompt", 45
    said = commands("rl", "--config", tmp_path / "rl.yaml")
    assert said.status == 2
    assert "it answers to other token ids" in said.err
    assert said.err.count("error: ") == 1
    # 20 samples of a step: two steps were made.
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000002"]
    engine.fault = None
    said = commands("rl", "--config", tmp_path / "rl.yaml")
    assert said.status == 0, said.err
    assert [row.step for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


MISTAKES = [
    ({"rollout__engine": "vllm"}, "rollout.engine must be local or begin with http:// or https://"),
    ({"rollout__engine": "localhost:8000"}, "rollout.engine must be local or begin with http"),
    ({"rollout__engine": "http://"}, "rollout.engine must be local or begin with http"),
    ({"rollout__engine": "http://[::1"}, "rollout.engine must be local or begin with http"),
    ({"lora__rank": 2}, "rollout.engine: a server is given whole weights, no adapters"),
    ({"rl__router_replay": True}, "rollout.engine: no server says which experts"),
    ({"rollout__engine": "http://127.0.0.1:9"}, "http://127.0.0.1:9: /collective_rpc: <urlopen"),
]


def test_mistakes_are_named(
    engine: FakeEngine, base: Path, tmp_path: Path, commands: Commands
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "ab", "environment": "letters"}) + "\n")
    for number, (changes, message) in enumerate(MISTAKES):
        config = ask(base, questions, tmp_path / f"{number}", rollout__engine=engine.url)
        for name, value in changes.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        (tmp_path / "rl.yaml").write_text(dump_config(config))
        said = commands("rl", "--config", tmp_path / "rl.yaml")
        assert said.status == 2, (changes, said)
        assert message in said.err, said.err
        assert not list(tmp_path.glob(f"{number}/checkpoints/*"))
        assert not (tmp_path / f"{number}/engine").exists()
