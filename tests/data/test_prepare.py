from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.preparing import decoded, everything, make, nothing_left, texts
from nemo_hybrid.data.sources import default_sources
from nemo_hybrid.data.store import Store
from nemo_hybrid.data.tokenizer import TextTokenizer, load_tokenizer
from nemo_hybrid.errors import UserError


def test_every_reader_and_the_text_comes_back(folder: Path, tmp_path: Path) -> None:
    summary = make([folder], tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    assert everything(out) == sorted(texts(40))
    assert nothing_left(tmp_path / "new", "out")
    assert sum(summary.entries.values()) == 40
    assert summary.left_out == {
        "empty documents": 1,
        "hidden and cache entries": 2,
        "links to what is read already": 2,
    }
    assert summary.dropped == {}
    for split in ("train", "heldout"):
        store = Store.open(out / split)
        assert store.info.documents == summary.entries[split]
        assert len(store) == summary.tokens[split]
        assert store.info.sources == summary.sources
    assert "train" in str(summary)


def test_special_tokens_spelled_in_the_text_stay_text(folder: Path, tmp_path: Path) -> None:
    make([folder], tmp_path / "out")
    store = Store.open(tmp_path / "out" / "train")
    ids = store.read(0, len(store))
    assert (ids == store.info.eos_id).sum() == store.info.documents
    assert not np.isin(ids, [0, 1]).any()
    assert any("</s>" in t for t in decoded(tmp_path / "out", "train"))


def test_transformers_loads_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    make([folder], tmp_path / "out")
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = cls.from_pretrained(tmp_path / "out")
        special = tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token
        assert special == ("<pad>", "<s>", "</s>")
        ids = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        assert ids == (0, 1, 2)
        text = texts(3)[2].replace("</s>", "")
        ours = load_tokenizer(tmp_path / "out").encode([text])[0].tolist()
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours
        assert tokenizer.decode(ours) == text


def test_same_input_same_bytes_in_other_processes(folder: Path, tmp_path: Path) -> None:
    code = (  # a shell's background job ignores Ctrl-C, and so would its children
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from nemo_hybrid.data.documents import prepare;"
        "prepare(sys.argv[2], [sys.argv[1]], vocab_size=330, heldout=0.3)"
    )
    for name, threads in (("a", "1"), ("b", "3")):
        env = {**os.environ, "PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / name)]
        subprocess.run(command, check=True, env=env)
    for file in ("tokenizer.json", "train/store.json", "heldout/store.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_split_follows_keys_and_seed_not_places(folder: Path, tmp_path: Path) -> None:
    make([folder], tmp_path / "out")
    moved = tmp_path / "moved" / "elsewhere"
    moved.parent.mkdir()
    folder.rename(moved)
    make([moved], tmp_path / "out2")
    assert decoded(tmp_path / "out2", "heldout") == decoded(tmp_path / "out", "heldout")
    make([moved], tmp_path / "out3", seed=1)
    assert decoded(tmp_path / "out3", "heldout") != decoded(tmp_path / "out", "heldout")
    summary = make([moved], tmp_path / "out4", heldout=0.0)
    assert summary.entries == {"train": 40}
    assert not (tmp_path / "out4" / "heldout").exists()


def test_the_tokenizer_is_trained_on_the_training_part_only(tmp_path: Path) -> None:
    """A word that only held-out documents hold must not become an entry."""
    root = tmp_path / "in"
    root.mkdir()
    for i in range(60):
        (root / f"{i}.txt").write_text(texts(60)[i])
    make([root], tmp_path / "first")
    held = set(decoded(tmp_path / "first", "heldout"))
    assert held
    for file in root.iterdir():
        if file.read_text() in held:
            file.write_text("zyxwvut " * 200)
    summary = make([root], tmp_path / "second")
    assert summary.entries["heldout"] == len(held)
    entries = load_tokenizer(tmp_path / "second").tokenizer.get_vocab()
    assert not any("zyx" in e for e in entries)
    (root / "extra.txt").write_text("zyxwvut " * 200)
    make([root], tmp_path / "third", heldout=0.0)
    assert any("zyx" in e for e in load_tokenizer(tmp_path / "third").tokenizer.get_vocab())


def test_a_given_tokenizer_is_kept(folder: Path, tmp_path: Path) -> None:
    make([folder], tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    other = tmp_path / "other.txt"
    other.write_text("another text")
    for given in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        out = tmp_path / f"b{given.suffix}"
        make([other], out, tokenizer=given, heldout=0.0)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
        assert decoded(out, "train") == ["another text"]


def test_truncation_in_a_given_tokenizer_does_not_cut_documents(
    folder: Path, tmp_path: Path
) -> None:
    make([folder], tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a").tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(tmp_path / "a" / "tokenizer.json"))
    make([folder], tmp_path / "b", tokenizer=tmp_path / "a")
    assert everything(tmp_path / "b") == sorted(texts(40))


def test_a_saved_hugging_face_dataset(folder: Path, tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"body": texts(20), "n": list(range(20))})
    saved.save_to_disk(str(tmp_path / "ds"))
    make([tmp_path / "ds"], tmp_path / "out", text_field="body")
    assert everything(tmp_path / "out") == sorted(texts(20))
    with pytest.raises(UserError, match=r"no column 'text'; its columns are body, n"):
        make([tmp_path / "ds"], tmp_path / "out2")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(UserError, match=r"splits test, train: name one"):
        make([tmp_path / "dict"], tmp_path / "out2", text_field="body")
    make([tmp_path / "dict" / "test"], tmp_path / "out3", text_field="body")
    assert everything(tmp_path / "out3") == sorted(texts(20))
    datasets.Dataset.from_dict({"body": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="there is nothing to learn from"):
        make([tmp_path / "none"], tmp_path / "out2", text_field="body")
    make([tmp_path / "none", tmp_path / "dict" / "test"], tmp_path / "out4", text_field="body")
    assert everything(tmp_path / "out4") == sorted(texts(20))
    (tmp_path / "ds" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable Hugging Face dataset"):
        make([tmp_path / "ds"], tmp_path / "out2", text_field="body")


def test_unusable_records_are_counted_named_and_skipped_on_request(
    folder: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "bad.txt").write_bytes(b"fine\nthen \xff\n")
    lines = [
        b'{"text": "ok then"}',
        b'{"txt": 1}',
        b"{",
        b'{"text": 5}',
        b"[1]",
        b'{"text": "\xff"}',
    ]
    lines += [b'{"text": "\\ud800"}', b"[" * 100_000]
    (folder / "z.jsonl").write_bytes(b"\n".join(lines))
    pq.write_table(pa.table({"text": ["row", None]}), folder / "z.parquet")
    with pytest.raises(UserError) as e:
        make([folder], tmp_path / "out")
    message = str(e.value)
    assert message.startswith("9 records or documents cannot be learnt from:\n  9 malformed:\n")
    # Each reason once, with all of its places.
    assert re.search(r"bad\.txt line 2; \S*z\.jsonl line 6: not UTF-8\n", message)
    assert re.search(r"z\.jsonl line 2, 4; \S*z\.parquet row 1: no text in field 'text'", message)
    assert re.search(r"z\.jsonl line 3, 8: not JSON\n", message)
    assert " more" not in message
    assert "skip_bad true" in message
    assert not (tmp_path / "out").exists()

    summary = make([folder], tmp_path / "out", skip_bad=True)
    assert everything(tmp_path / "out") == sorted([*texts(40), "ok then", "row"])
    assert summary.dropped == {"malformed": 9}
    assert Store.open(tmp_path / "out" / "train").info.sources["unusable"] == 9
    assert "9 malformed" in str(summary)
    assert [s.split("/")[-1] for s in summary.examples["malformed"]][:2] == [
        "z.jsonl line 6: not UTF-8",
        "z.parquet row 1: no text in field 'text' (--text_field names another)",
    ]


def test_a_reason_that_repeats_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + '{"txt": 1}\n' * 9)
    with pytest.raises(UserError) as e:
        make([tmp_path / "a.jsonl"], tmp_path / "out")
    assert str(e.value).splitlines()[1] == (
        f"  9 malformed: {tmp_path}/a.jsonl line 2, 3, 4, 5, 6: no text in field 'text' "
        "(--text_field names another); and 4 more"
    )


def test_conversations_without_their_option_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(UserError, match=r"\(--for finetune reads conversations\)"):
        make([tmp_path / "chats.jsonl"], tmp_path / "out")


def test_bad_input_is_one_clear_message_and_leaves_nothing(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("some text")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "nothing.txt").touch()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    no_eos = tmp_path / "no_eos"
    no_eos.mkdir()
    bad_tokenizer = tmp_path / "bad_tokenizer"
    bad_tokenizer.mkdir()
    (bad_tokenizer / "tokenizer.json").write_text("{}")
    make([good], tmp_path / "made", heldout=0.0)
    (no_eos / "tokenizer.json").write_bytes((tmp_path / "made" / "tokenizer.json").read_bytes())
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "out"
    cases: list[tuple[list[Path], Path, dict[str, Any], str]] = [
        ([tmp_path / "missing"], out, {}, "missing does not exist"),
        ([empty], out, {}, r"nothing to learn from .*\n  1 empty documents: nothing.txt"),
        ([tmp_path / "broken.parquet"], out, {}, "broken.parquet is not a readable parquet"),
        ([good], out, {}, "none of the 1 documents falls into the heldout split"),
        ([good], out, {"heldout": 0.9999}, "falls into the train split"),
        ([good], out, {"vocab_size": 258}, "at least 259"),
        ([good], out, {"tokenizer": tmp_path / "missing"}, "cannot read the tokenizer"),
        ([good], out, {"tokenizer": bad_tokenizer}, "is not a Hugging Face tokenizer"),
        ([good], out, {"tokenizer": no_eos}, "must name an eos_token"),
        ([good], tmp_path / "made", {}, "exists already"),
        ([good], good, {}, "exists already"),
        ([good], good / "out", {"heldout": 0.0}, "cannot write .*good.txt"),
    ]
    for paths, to, options, message in cases:
        with pytest.raises(UserError, match=message):
            make(list(paths), to, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, message


@pytest.mark.skipif(os.getuid() == 0, reason="root may read and write everywhere")
def test_permissions(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    good = tmp_path / "good.txt"
    good.write_text("some text")
    with pytest.raises(UserError, match="cannot write"):
        make([good], closed / "out", heldout=0.0)
    good.chmod(0)
    with pytest.raises(UserError, match="cannot read"):
        make([good], tmp_path / "out", heldout=0.0)


def test_a_full_disk_and_an_interrupt_leave_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "made"
    target.mkdir()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            make([folder], target / "out")
    assert nothing_left(target)

    seen: list[list[str]] = []

    def interrupted(self: TextTokenizer, texts: list[str]) -> Iterator[Any]:
        seen.append([p.name for p in target.iterdir()])
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(TextTokenizer, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make([folder], target / "out")
    assert seen == [[".tmp-out"]]
    assert nothing_left(target)


def test_reuse_needs_the_same_arguments_and_a_sound_store(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = make([folder], out, reuse=True)
    assert not first.reused
    written = (out / "train" / "store.json").stat().st_mtime_ns
    again = make([folder], out, reuse=True)
    assert again == replace(first, reused=True)
    assert (out / "train" / "store.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"other arguments \(heldout, seed differ\)"):
        make([folder], out, reuse=True, seed=1, heldout=0.2)
    with pytest.raises(UserError, match="exists already"):
        make([folder], out)
    shard = out / "heldout" / "tokens-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="damaged"):
        make([folder], out, reuse=True)
    with pytest.raises(UserError, match="not a store made by prepare"):
        make([folder], folder, reuse=True)


def test_stores_of_the_version_before_are_reused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = make([folder], out)
    record = json.loads((out / "prepare.json").read_text())
    record["summary"] = {
        "out": str(out), "train_tokens": 1, "train_documents": 1, "heldout_tokens": 1,
        "heldout_documents": 1, "vocab_size": made.vocab_size, "eos_id": 2, "sources": {},
        "seconds": 1.0, "reused": False,
    }  # fmt: skip
    (out / "prepare.json").write_text(json.dumps(record))
    found = make([folder], out, reuse=True)
    assert (found.entries, found.tokens) == (made.entries, made.tokens)
    for broken in ({"request": [], "summary": {}}, {"request": record["request"]}, []):
        (out / "prepare.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="not a store made by prepare"):
            make([folder], out, reuse=True)


def test_an_empty_directory_may_be_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make([folder], tmp_path / "out")
    assert everything(tmp_path / "out") == sorted(texts(40))


def test_the_default_corpus_is_the_library_without_tests_and_packages() -> None:
    sources = default_sources()
    keys = {s.key for s in sources}
    assert {"os.py", "json/decoder.py", "unittest/case.py"} <= keys
    banned = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(banned & set(k.split("/")) for k in keys)
    assert all(k.endswith(".py") for k in keys)
    assert sum(s.size for s in sources) > 5_000_000


def test_no_paths_means_the_default_corpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unusable files, which the user cannot mend, are skipped and counted."""
    (folder / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    summary = make([], tmp_path / "out")
    assert everything(tmp_path / "out") == sorted(texts(20)[10:])
    assert summary.dropped == {"malformed": 1}
    assert summary.sources["paths"] == ["standard library of the running Python"]


def test_progress_is_plain_lines_without_a_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make([folder], tmp_path / "out", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"training the tokenizer: done in [\d.]+ s\n", captured.err)
    assert re.search(r"encoding: done in [\d.]+ s\n", captured.err)
    assert "\x1b" not in captured.err


def test_links_are_followed_once_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    (root / "link.txt").symlink_to(root / "a.JSONL")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "b.txt").write_text("three")
    (root / "folder").symlink_to(tmp_path)
    summary = make([root], tmp_path / "out", heldout=0.0)
    assert sorted(decoded(tmp_path / "out", "train")) == ["one", "three", "two"]
    assert summary.left_out == {"links to what is read already": 2}
    assert f"2 links to what is read already\n    {root / 'link.txt'}\n" in str(summary)
    sources = Store.open(tmp_path / "out" / "train").info.sources
    assert (sources["files"], sources["links"]) == (2, 2)


def test_what_a_killed_prepare_left_is_removed_and_what_another_writes_is_not(
    folder: Path, tmp_path: Path
) -> None:
    left = tmp_path / "made" / ".tmp-out"
    left.mkdir(parents=True)
    (left / "tokens").write_text("")
    holder = os.open(left, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"another process is writing .*out: wait for it"):
        make([folder], tmp_path / "made" / "out")
    assert (left / "tokens").exists()
    os.close(holder)
    make([folder], tmp_path / "made" / "out")
    assert nothing_left(tmp_path / "made", "out")
