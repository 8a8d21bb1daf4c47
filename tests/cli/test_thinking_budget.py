"""--thinking, --thinking_budget and --thinking_markers of generate and rollout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Commands, Said, commands_in_one_process
from helpers.conversations import CHATML, REASONING
from helpers.once import once
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.data.tokenizer import train_tokenizer

OPENING, CLOSING, ANSWERING = 261, 262, 263
CONFIG = tiny_config("M*", vocab_size=270, mtp_num_depths=1, mtp_pattern="*")
ADDED = {"<|im_start|>": 259, "<|im_end|>": 260, "<think>": OPENING, "</think>": CLOSING,
         "<answer>": ANSWERING}  # fmt: skip
ASK = [{"role": "user", "content": "a <think> b?"}]


def write_models(directory: Path) -> None:
    """Models whose templates think, do not, and are not there; and one without a tokenizer."""
    tokenizer = train_tokenizer(["a b"], 259)
    for name, template in {"thinks": REASONING, "talks": CHATML, "bare": None}.items():
        loud_model(CONFIG).save_hf(str(directory / name))
        for file, data in tokenizer.files.items():
            (directory / name / file).write_bytes(data)
        if template:
            (directory / name / "chat_template.jinja").write_text(template)
            (directory / name / "added_tokens.json").write_text(json.dumps(ADDED))
    loud_model(CONFIG).save_hf(str(directory / "ids"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "thinkers", write_models)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as commands:
        yield commands


def asked(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_a_budget_makes_of_rollouts(
    home: Path, commands: Commands, tmp_path: Path, drafts: int
) -> None:
    data = asked(
        tmp_path,
        [
            {"prompt": ASK},
            {"prompt": ASK, "thinking_budget": 0},
            {"prompt": ASK, "thinking_budget": 10**30},
            {"prompt": "<think>a</think> b"},
            {"prompt": "</think>a<think> b"},
            {"input_ids": [5, OPENING, 6]},
            {"prompt": ASK, "chat_template_kwargs": {"enable_thinking": False}},
        ],
    )
    out = tmp_path / "out.jsonl"
    said = commands("rollout", "--from", home / "thinks", "--data", data, "--out", out,
                    "--max_new_tokens", "12", "--thinking_budget", "3",
                    "--speculate", str(drafts))  # fmt: skip
    assert said.status == 0, said.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    places = [[i for i, chosen in enumerate(row["chosen"]) if not chosen] for row in rows]
    # The model itself opens and closes nothing here.
    assert not any({OPENING, CLOSING} & {*row["ids"][:3]} for row in rows[2:])
    assert places == [[3], [0], [], [], [3], [3], []]
    for row, forced in zip(rows, places, strict=True):
        assert len(row["chosen"]) == len(row["ids"]) == len(row["logprobs"])
        assert [i for i, token in enumerate(row["ids"]) if token == CLOSING] == forced
        assert row["text"].count("</think>") == len(forced)


def test_drafts_are_measured_within_budgets(home: Path, commands: Commands, tmp_path: Path) -> None:
    data, out = asked(tmp_path, [{"prompt": ASK, "thinking_budget": 2}]), tmp_path / "out"
    said = commands("eval-mtp", "--from", home / "thinks", "--data", data, "--out", out,
                    "--max_new_tokens", "9", "--depths", "7")  # fmt: skip
    assert said.status == 0, said.err
    runs = json.loads((out / "eval_mtp.json").read_text())["runs"]
    assert [run["drafts"] for run in runs] == [0, 7, 0, 7]


def test_a_marker_that_somebody_wrote_opens_nothing(home: Path, commands: Commands) -> None:
    said = generate(commands, home / "talks", "--chat", "--prompt", "a <think> b?",
                    "--thinking_budget", "0", "--thinking_markers", "<think> </think>")  # fmt: skip
    assert (said.status, "</think>" in said.out) == (0, False)
    said = generate(commands, home / "talks", "--prompt", "a <think> b?",
                    "--thinking_budget", "0", "--thinking_markers", "<think> </think>")  # fmt: skip
    assert said.out.startswith("a <think> b?</think>")


def test_a_budget_of_another_run_is_refused(home: Path, commands: Commands, tmp_path: Path) -> None:
    given = ["rollout", "--from", home / "thinks", "--data", asked(tmp_path, [{"prompt": ASK}]),
             "--out", tmp_path / "out.jsonl", "--max_new_tokens", "2"]  # fmt: skip
    assert commands(*given, "--thinking_budget", "3").status == 0
    assert "thinking_budget is 3 there, 4 here" in commands(*given, "--thinking_budget", "4").err
    more = ["--thinking_budget", "3", "--thinking_markers", "<think> </think><answer>"]
    assert "markers is [[261], [262]] there" in commands(*given, *more).err


def generate(commands: Commands, model: Path, *more: object) -> Said:
    return commands("generate", "--from", model, "--max_new_tokens", "6", *more)


def test_other_markers_and_the_switch(home: Path, commands: Commands) -> None:
    model, chat = home / "thinks", ("--chat", "--prompt", "a")
    marked = generate(commands, model, *chat, "--thinking_budget", "2",
                      "--thinking_markers", "<think> </think><answer>")  # fmt: skip
    assert marked.out.count("</think><answer>") == 1
    plain = generate(commands, model, *chat)
    on, off = (generate(commands, model, *chat, "--thinking", how) for how in ("on", "off"))
    assert on.out == plain.out != off.out
    without = generate(commands, model, *chat, "--thinking", "off", "--thinking_budget", "0")
    assert without.out == off.out


@pytest.mark.parametrize(
    ("model", "words", "why"),
    [
        ("thinks", "--thinking_budget=-1", "thinking_budget must be 0 or more, got -1"),
        ("thinks", "--thinking_budget 1.5", "expected an integer or null, got 1.5"),
        ("thinks", "--thinking maybe", "expected one of auto, on, off, got maybe"),
        ("thinks", "--thinking on", "--thinking is for conversations"),
        ("thinks", "--thinking_markers <think>", "give two with a blank between"),
        ("thinks", "--thinking_markers=", "give two with a blank between"),
        ("thinks", "--chat --prompt=", "--chat: give what the user says"),
        ("thinks", "--thinking_markers <a>_<a>", "give two with a blank between"),
        ("thinks", "--thinking_markers <a>_</a>", "are for budgets, and there is none"),
        ("thinks", "--thinking_budget 1 --thinking_markers <a>_</a>",
         "no tokens of its own (added tokens) that <a> begins and ends with"),
        ("thinks", "--thinking_budget 1 --thinking_markers <think>_a</think>", "that a</think>"),
        ("thinks", "--thinking_markers </think>_<think>", "names first what closes thinking"),
        ("thinks", "--thinking_budget 1 --thinking_markers <think>_</s>",
         "markers of thinking hold token 2, which ends texts"),
        ("talks", "--thinking_budget 1", "no chat template in"),
        ("bare", "--thinking_budget 1", "no chat template in"),
        ("talks", "--chat --thinking off", "takes no enable_thinking or thinking"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    home: Path, commands: Commands, model: str, words: str, why: str
) -> None:
    given = [word.replace("_<", " <").replace("_a<", " a<") for word in words.split()]
    said = generate(commands, home / model, "--prompt", "a", *given)
    (line,) = said.err.splitlines()
    assert (said.status, said.out) == (2, "")
    assert line.startswith("error: ")
    assert why in line


@pytest.mark.parametrize(
    ("model", "row", "more", "why"),
    [
        ("thinks", {"prompt": "a", "thinking_budget": -1}, (), "line 1: thinking_budget -1 is no"),
        ("thinks", {"prompt": "a", "thinking_budget": True}, (), "thinking_budget True is no"),
        ("thinks", {"prompt": "a"}, ("--thinking", "on"), "line 1: --thinking is for conversat"),
        ("talks", {"prompt": ASK}, ("--thinking", "on"), "line 1: the chat template"),
        ("ids", {"input_ids": [5], "thinking_budget": 2}, (), "has no tokenizer.json, so nothing"),
    ],
)
def test_a_row_that_cannot_be_is_named(
    home: Path, commands: Commands, tmp_path: Path, model: str, row: dict[str, Any],
    more: tuple[str, ...], why: str,
) -> None:  # fmt: skip
    data = asked(tmp_path, [row])
    said = commands("rollout", "--from", home / model, "--data", data, "--out",
                    tmp_path / "out.jsonl", *more)  # fmt: skip
    (line,) = said.err.splitlines()
    assert said.status == 2
    assert why in line
    assert list(tmp_path.iterdir()) == [data]
