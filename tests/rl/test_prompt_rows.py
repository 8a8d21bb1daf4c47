"""Rows that others wrote, asked as they would be asked in our own form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import TEMPLATE, conversations
from nemo_hybrid.data.prompts import Prompt, PromptReader
from nemo_hybrid.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_hybrid.errors import UserError

ASKED = [{"role": "user", "content": "ab cde"}]
FUNCTION = {
    "name": "add",
    "description": "Add.",
    "parameters": {"type": "object", "properties": {}},
}
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"responses_create_params": {"input": ASKED}}, {"messages": ASKED}),
    ({"responses_create_params": {"input": "ab cde"}}, {"messages": ASKED}),
    (
        {"responses_create_params": {"input": ASKED, "instructions": "fg"}},
        {"messages": [{"role": "system", "content": "fg"}, *ASKED]},
    ),
    (
        {"responses_create_params": {"input": ASKED, "tools": [{"type": "function", **FUNCTION}]}},
        {"messages": ASKED, "tools": [{"type": "function", "function": FUNCTION}]},
    ),
    ({"prompt": ASKED, "solution": "7", "level": 3}, {"messages": ASKED}),
]


@pytest.fixture
def reader(tmp_path: Path) -> PromptReader:
    texts = [m["content"] for messages in conversations(50) for m in messages]
    for name, content in train_tokenizer(texts, 280).files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "chat_template.jinja").write_text(WITH_TOOLS)
    return PromptReader(tmp_path, load_tokenizer(tmp_path), 280, 2000, 8)


def read(reader: PromptReader, path: Path, rows: list[Any], faults: Any = None) -> list[Prompt]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reader.read_file(str(path), faults)


def test_rows_of_others_are_asked_as_ours(reader: PromptReader, tmp_path: Path) -> None:
    theirs = read(reader, tmp_path / "theirs.jsonl", [row for row, _ in PAIRS])
    ours = read(reader, tmp_path / "ours.jsonl", [row for _, row in PAIRS])
    assert [p.ids for p in theirs] == [p.ids for p in ours]
    assert len({tuple(p.ids) for p in ours}) == 3
    for prompt, (row, _) in zip(theirs, PAIRS, strict=True):
        assert prompt.row == row  # all of it is for the environment


def test_environments_of_rows(reader: PromptReader, tmp_path: Path) -> None:
    gym = {"responses_create_params": {"input": ASKED}, "agent_ref": {"name": "mcqa", "type": "x"}}
    rows = [gym, {"prompt": "ab", "environment": "exact"}, {"prompt": "ab"}]
    found = read(reader, tmp_path / "rows.jsonl", rows)
    assert [p.environment for p in found] == ["mcqa", "exact", None]
    assert [p.where.split()[-1] for p in found] == ["1", "2", "3"]


def test_bad_rows_are_named_or_counted(reader: PromptReader, tmp_path: Path) -> None:
    bad = [
        {"responses_create_params": {"tools": []}},
        {"responses_create_params": {"input": [*ASKED, {"role": "assistant", "content": "x"}]}},
        {"responses_create_params": {"input": ASKED}, "prompt": "ab"},
        {"prompt": "ab " * 3000},
    ]
    faults: list[str] = []
    found = read(reader, tmp_path / "rows.jsonl", [{"prompt": "ab"}, *bad], faults)
    assert len(found) == 1
    for line, (fault, why) in enumerate(
        zip(
            faults, ("has no input", "nothing is to be answered", "one of", "exceeds"), strict=True
        ),
        2,
    ):
        assert f"line {line}: " in fault
        assert why in fault
    with pytest.raises(UserError, match="line 2: responses_create_params has no input"):
        read(reader, tmp_path / "rows.jsonl", [{"prompt": "ab"}, *bad])
