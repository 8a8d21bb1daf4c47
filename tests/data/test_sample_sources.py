"""Samples by where they come from: every kind of file, what is not read, what is read again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.sample_files import chat, lines, make, stored
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data import samples as module
from nemo_hybrid.data.preview import preview
from nemo_hybrid.data.tokenizer import load_tokenizer
from nemo_hybrid.errors import UserError

MakeModel = Callable[..., Path]


def test_every_source_gives_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    model = make_model()
    records = [chat("hello", "fox"), chat("a\nb", "é"), {"text": "x"}]
    rows = [{"messages": None, "text": None, **r} for r in records]
    lines(tmp_path / "a.jsonl", *records)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "c"))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(records, indent=1).encode()))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "link").symlink_to(tmp_path / "a.jsonl")
    names = ("a.jsonl", "b.parquet", "c", "e.json.gz", "f")
    for name in names:
        make(model, tmp_path / f"out {name}", tmp_path / name)
    found = [stored(tmp_path / f"out {name}") for name in names]
    assert found == [found[0]] * len(names)
    (tmp_path / "d.txt").write_text("x")
    (tmp_path / "g.csv").write_text("text\nx\n")
    for name in ("d.txt", "g.csv"):
        make(model, tmp_path / f"out {name}", tmp_path / name)
        assert stored(tmp_path / f"out {name}") == found[0][2:]


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_tables_invent_no_nulls(kind: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Rows share a type, so that each has the fields of all; jsonl is the oracle."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    rows = []
    for arguments in ({"city": "Rome"}, {"a": 1, "deep": [{"x": 1}, {"y": "z"}]}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        record = chat("q", "yes")
        record["messages"][1]["tool_calls"] = [call]
        rows.append({**record, "tools": [{"name": "f", "parameters": arguments}]})
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{{ m.tool_calls | default([]) | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    model = make_model(template)
    make(model, tmp_path / "expected", lines(tmp_path / "a.jsonl", *rows))
    table = tmp_path / ("a.parquet" if kind == "parquet" else "a")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
        shown = pq.read_table(table).to_pylist()[0]["messages"][1]["tool_calls"][0]
        assert shown["function"]["arguments"] == {"city": "Rome", "a": None, "deep": None}
    else:
        Dataset.from_list(rows).save_to_disk(str(table))
    make(model, tmp_path / "out", table)
    tokenizer = load_tokenizer(model)
    assert [tokenizer.decode(ids) for ids, _ in stored(tmp_path / "out")] == [
        tokenizer.decode(ids) for ids, _ in stored(tmp_path / "expected")
    ]
    assert stored(tmp_path / "out") == stored(tmp_path / "expected")


@pytest.mark.parametrize("name", ["chats.md", "README", "folder"])
def test_files_of_other_kinds_are_no_samples(
    name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model, path = make_model(), tmp_path / name
    file = path / "b.yaml" if name == "folder" else path
    file.parent.mkdir(exist_ok=True)
    file.write_text("messages: []")
    what = rf"{file} is no file of samples; name \.jsonl, \.json, \.csv, "
    with pytest.raises(UserError, match=what):
        make(model, tmp_path / "out", path)
    with pytest.raises(UserError, match=what):
        preview(SampleOptions(), [str(path)], str(model), 1, seed=0)


def test_what_a_directory_holds_besides_samples(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    lines(folder / "a.JSONL", chat("a", "b"))
    (folder / "b.TXT").write_text("text")
    others = [f"{i}.py" for i in range(6)] + ["deep/README.md"]
    for name in others:
        (folder / name).write_text("x")
    outside = lines(tmp_path / "c.jsonl", chat("c", "d"))
    (folder / "deep" / "link.jsonl").symlink_to(outside)
    (folder / "deep" / "ghost.jsonl").symlink_to(tmp_path / "nowhere")
    summary = make(make_model(), tmp_path / "out", folder, heldout_paths=(outside,))
    assert summary.records == {"messages": 3, "text": 1}
    assert summary.left_out == {
        "links to nothing": 1,
        "metadata of data sets": 1,
        "files of other kinds": 6,
    }
    named = [str(folder / name) for name in others[:5]]
    assert summary.examples["files of other kinds"] == named
    for shown in ("6 files of other kinds\n", named[0], "1 links to nothing\n"):
        assert shown in str(summary)
    recorded = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert recorded["summary"]["left_out"] == summary.left_out
    assert "left out" not in str(make(tmp_path / "model", tmp_path / "plain", outside))


def test_reuse_notices_another_tokenizer(make_model: MakeModel, tmp_path: Path) -> None:
    """Its settings too: they name the token that ends texts."""
    model = make_model()
    data = lines(tmp_path / "a.jsonl", {"text": "fox"})
    make(model, tmp_path / "out", data)
    config = model / "tokenizer_config.json"
    named = json.loads(config.read_text())
    changes = {
        config: json.dumps({**named, "eos_token": "<s>"}),
        model / "special_tokens_map.json": json.dumps({"bos_token": "</s>"}),
        model / "tokenizer.json": (model / "tokenizer.json").read_text() + " ",
    }
    for file, content in changes.items():
        before = file.read_bytes() if file.exists() else None
        file.write_text(content)
        with pytest.raises(UserError, match=r"\(tokenizer differ\)"):
            make(model, tmp_path / "out", data, reuse=True)
        file.unlink()
        if before is not None:
            file.write_bytes(before)
        assert make(model, tmp_path / "out", data, reuse=True).reused


def test_reuse_notices_other_data_options_and_templates(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    data = lines(tmp_path / "a.jsonl", chat("a", "b"), chat("c", "d"))
    made = make(model, tmp_path / "out", data)
    with monkeypatch.context() as m:
        m.setattr(module, "making", None)  # nothing is read again
        again = make(model, tmp_path / "out", data, reuse=True)
    assert again == replace(made, reused=True)
    assert "reused" in str(again)
    with pytest.raises(UserError, match="exists already"):
        make(model, tmp_path / "out", data)
    different = {
        "reasoning": lambda: make(model, tmp_path / "out", data, reuse=True, reasoning="mask"),
        "heldout data": lambda: make(
            model, tmp_path / "out", data, reuse=True, heldout_paths=(data,)
        ),
    }
    for what, call in different.items():
        with pytest.raises(UserError, match=rf"\({what} differ\); name another run_dir"):
            call()
    before = data.read_bytes()
    data.write_bytes(before.replace(b"d", b"e"))
    with pytest.raises(UserError, match=r"\(train data differ\)"):
        make(model, tmp_path / "out", data, reuse=True)
    data.write_bytes(before)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    with pytest.raises(UserError, match=r"\(chat_template differ\)"):
        make(model, tmp_path / "out", data, reuse=True)
    (tmp_path / "out" / "train" / "targets-00000.bin").write_bytes(b"\1")
    template.write_text(template.read_text().removesuffix("{# edited #}"))
    with pytest.raises(UserError, match=r"targets-00000\.bin has 1 bytes"):
        make(model, tmp_path / "out", data, reuse=True)
