from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.data.store import Store, StoreWriter
from nemo_hybrid.errors import UserError

DOCUMENTS = [[5, 6, 2], [2], [7] * 20 + [2], [8, 9, 10, 2]]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 69999), min_size=1, max_size=12), min_size=1),
    shard_tokens=st.integers(1, 30),
    wide=st.booleans(),
    data=st.data(),
)
def test_reads_what_was_written_across_shards(
    documents: list[list[int]], shard_tokens: int, wide: bool, data: st.DataObject
) -> None:
    vocab_size = 70000 if wide else 65536
    documents = [[t % vocab_size for t in d] for d in documents]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(b"t")
        writer = StoreWriter(
            Path(folder) / "s",
            vocab_size=vocab_size,
            eos_id=2,
            tokenizer_sha256=sha256(b"t").hexdigest(),
            shard_tokens=shard_tokens,
        )
        for d in documents:
            writer.add(np.array(d))
        writer.finish({})
        store = Store.open(Path(folder) / "s")

        ended = [d if d[-1] == 2 else [*d, 2] for d in documents]
        flat = [t for d in ended for t in d]
        begins = [i == 0 for d in ended for i in range(len(d))]
        assert len(store) == len(flat)
        assert len(list((Path(folder) / "s").glob("*.bin"))) == -(-len(flat) // shard_tokens)
        assert store.info.dtype == ("<u4" if wide else "<u2")
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        assert store.read(start, stop).tolist() == flat[start:stop]
        assert store.document_starts(start, stop).tolist() == begins[start:stop]
        S = data.draw(st.integers(1, 9))
        assert store.windows(S) == max(0, (len(flat) - 1) // S)
        for w in range(store.windows(S)):
            tokens, starts = store.window(w, S)
            assert tokens.tolist() == flat[w * S : w * S + S + 1]
            assert starts.tolist() == begins[w * S : w * S + S + 1]
            assert len(tokens) == S + 1


def test_reading_outside_is_an_error(make_store: Callable[..., Path]) -> None:
    store = Store.open(make_store("s", DOCUMENTS))
    with pytest.raises(IndexError):
        store.read(0, len(store) + 1)
    with pytest.raises(IndexError):
        store.window(store.windows(4), 4)


def test_writer_refuses_ids_outside_the_vocabulary(make_store: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="range"):
        make_store("s", [[100, 2]])


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(store: Path, **changes: Any) -> None:
    info = json.loads((store / "store.json").read_text())
    info.update(changes)
    (store / "store.json").write_text(json.dumps(info))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (lambda s: flip(s / "tokens-00001.bin"), "tokens-00001.bin is damaged"),
    "index bit flip": (lambda s: flip(s / "documents.npy"), "documents.npy is damaged"),
    "truncated": (lambda s: (s / "tokens-00001.bin").write_bytes(b"12"), "has 2 bytes"),
    "missing shard": (lambda s: (s / "tokens-00002.bin").unlink(), "tokens-00002.bin is missing"),
    "missing index": (lambda s: (s / "documents.npy").unlink(), "documents.npy is missing"),
    "missing store.json": (lambda s: (s / "store.json").unlink(), "not a token store"),
    "not JSON": (lambda s: (s / "store.json").write_text("{"), "cannot be read"),
    "not an object": (lambda s: (s / "store.json").write_text("[]"), "does not describe"),
    "other version": (lambda s: edit(s, version=99), "version 99"),
    "tokenizer": (lambda s: flip(s.parent / "tokenizer.json"), "is not the tokenizer"),
    "no tokenizer": (lambda s: (s.parent / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "shard is a folder": (
        lambda s: ((s / "tokens-00000.bin").unlink(), (s / "tokens-00000.bin").mkdir()),
        "tokens-00000.bin",
    ),
    "path in files": (
        lambda s: edit(s, files={n: {"size": 2, "sha256": ""} for n in ("../x", "documents.npy")}),
        "contradicts itself",
    ),
    "token count": (lambda s: edit(s, tokens=5), "contradicts itself"),
    "document count": (lambda s: edit(s, documents=3), "does not fit"),
    "dtype": (lambda s: edit(s, vocab_size=70000), "contradicts itself"),
    "eos outside": (lambda s: edit(s, eos_id=100), "contradicts itself"),
    "no size": (lambda s: edit(s, files={"documents.npy": {}}), "files is missing or malformed"),
    "field of a wrong type": (lambda s: edit(s, vocab_size=True), "vocab_size is missing or"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_message(name: str, make_store: Callable[..., Path]) -> None:
    path = make_store("s", DOCUMENTS)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(UserError, match=message):
        Store.open(path)


def test_size_verification_is_cheap_and_still_sees_truncation(
    make_store: Callable[..., Path],
) -> None:
    path = make_store("s", DOCUMENTS)
    flip(path / "tokens-00001.bin")
    Store.open(path, verify="size")
    (path / "tokens-00001.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="has 2 bytes"):
        Store.open(path, verify="size")
    with pytest.raises(UserError, match="not a token store"):
        Store.open(path / "nowhere")


def test_no_edit_of_store_json_escapes_as_another_error(make_store: Callable[..., Path]) -> None:
    """Fuzz: any value in any place is either harmless or a UserError."""
    path = make_store("s", DOCUMENTS)
    good = (path / "store.json").read_text()
    keys = [*json.loads(good), "files/documents.npy", "files/tokens-00000.bin"]
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
        max_leaves=5,
    )

    @settings(max_examples=150, deadline=None)
    @given(key=st.sampled_from(keys), value=values)
    def run(key: str, value: object) -> None:
        info = json.loads(good)
        place, _, name = key.partition("/")
        if name:
            info[place][name] = value
        else:
            info[place] = value
        (path / "store.json").write_text(json.dumps(info))
        try:
            Store.open(path, verify="size")
        except UserError:
            return
        assert key in ("sources", "vocab_size", "eos_id") or info == json.loads(good)

    run()
