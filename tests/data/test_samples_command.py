"""`prepare --for finetune`: what the command says, its preview, and options that contradict."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.sample_files import chat, lines
from nemo_hybrid.cli import main
from nemo_hybrid.commands.prepare import PrepareOptions
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.store import Store

MakeModel = Callable[..., Path]


def test_the_command(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "a.jsonl", *(chat("a", f"b{i}") for i in range(30)))
    out = tmp_path / "out"
    words = ["prepare", str(data), "--tokenizer", str(make_model()), "--out", str(out)]
    assert main([*words, "--for", "finetune", "--heldout", "0.2"]) == 0
    assert "30 records: messages" in capsys.readouterr().out
    summary = json.loads((out / "prepare.json").read_text())["summary"]
    assert sum(summary["entries"].values()) == 30
    assert Store.open(out / "heldout", samples=True)


def test_preview(make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [chat("hello \x1b[31m", "fox"), "{", {**chat("a", "b"), "url": "x"}, chat("c", "d")]
    data = lines(tmp_path / "a.jsonl", *records)
    before = sorted(tmp_path.iterdir())
    model = make_model()
    assert main(["prepare", str(data), "--tokenizer", str(model), "--preview", "3"]) == 0
    shown = capsys.readouterr().out
    head, first, *_ = shown.split("\n", 1)
    assert re.fullmatch(rf"{re.escape(str(data))} line 1: \d+ tokens, \d+ learnt", head)
    assert first.startswith(
        "<|im_start|>user\nhello \\x1b[31m<|im_end|>\n<|im_start|>assistant\n[[fox<|im_end|>\n]]\n"
    )
    assert f"{data} line 2: unusable: not JSON" in shown
    assert re.search(r" line 3: \d+ tokens, \d+ learnt; unread: url\n", shown)
    assert "[[b<|im_end|>\n]]" in shown
    assert "[[d" not in shown
    assert sorted(tmp_path.iterdir()) == sorted([*before, model])


def test_preview_in_colour(
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = lines(tmp_path / "a.jsonl", chat("[bold]a[/bold]", "b" * 300))
    words = ["prepare", str(data), "--tokenizer", str(make_model()), "--preview", "1"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\x1b[1;32mbbb" in shown
    assert "\x1b[2m<|im_start|>user" in shown
    assert "[bold]a[/bold]" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[[bbb" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--out", "o", "--sequence_length", "5"], "--sequence_length is about samples"),
        (["x", "--out", "o", "--truncate"], "--truncate is about samples: give --for finetune"),
        (["x", "--for", "finetune", "--tokenizer", "t"], "--out is missing"),
        (["--for", "finetune", "--tokenizer", "t", "--out", "o"], "samples need data"),
        (["x", "--for", "finetune", "--out", "o"], "--tokenizer is missing"),
        (["x", "--preview", "2"], "--tokenizer is missing"),
        (["x", "--preview", "2", "--tokenizer", "t", "--vocab_size", "300"], "not both"),
    ],
)
def test_options_that_contradict(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *words]) == 2
    assert message in capsys.readouterr().err


def test_prepare_options_are_sample_options() -> None:
    assert PrepareOptions(for_="finetune").heldout == SampleOptions().heldout
