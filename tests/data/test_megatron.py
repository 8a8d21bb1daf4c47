"""Megatron's pairs of .bin and .idx files, written from the layout's description."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.preparing import make
from nemo_hybrid.data.store import Store
from nemo_hybrid.errors import UserError


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2"
) -> bytes:
    """A .bin/.idx pair written from the layout's description; returns the index."""
    sequences = [s for d in documents for s in d]
    lengths = [len(s) for s in sequences]
    item = np.dtype(dtype).itemsize
    offsets = [item * sum(lengths[:i]) for i in range(len(lengths))]
    bounds = [sum(len(d) for d in documents[:i]) for i in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(bounds))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets)
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.idx").write_bytes(index)
    tokens = np.array([t for s in sequences for t in s], dtype=dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return index


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatron_pairs(folder: Path, tmp_path: Path, code: int, dtype: str) -> None:
    make([folder], tmp_path / "tok")
    prefix = tmp_path / "corpus_v1.2_text"
    documents = [[[10, 11], [12]], [[13, 2]], [], [[], [14]]]
    write_megatron(prefix, documents, code, dtype)
    for i, path in enumerate((prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))):
        out = tmp_path / f"out{i}"
        summary = make([path], out, tokenizer=tmp_path / "tok", heldout=0.0)
        store = Store.open(out / "train")
        assert store.read(0, len(store)).tolist() == [10, 11, 12, 2, 13, 2, 14, 2]
        assert np.flatnonzero(store.document_starts(0, 8)).tolist() == [0, 4, 6]
        assert summary.left_out == {"empty documents": 1}


def test_megatron_pairs_in_a_directory(folder: Path, tmp_path: Path) -> None:
    make([folder], tmp_path / "tok")
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    write_megatron(corpus / "deep" / "m", [[[10, 11]], [[12]]])
    write_megatron(tmp_path / "n", [[[13]]])
    for ending in ("bin", "idx"):
        (corpus / f"linked.{ending}").symlink_to(tmp_path / f"n.{ending}")
    summary = make([corpus], tmp_path / "out", tokenizer=tmp_path / "tok", heldout=0.0)
    store = Store.open(tmp_path / "out" / "train")
    assert store.read(0, len(store)).tolist() == [10, 11, 2, 12, 2, 13, 2]
    assert (summary.left_out, summary.dropped) == ({}, {})
    (corpus / "deep" / "m.bin").unlink()
    with pytest.raises(UserError, match=r"m\.idx: not text but binary"):
        make([corpus], tmp_path / "out2", tokenizer=tmp_path / "tok", heldout=0.0)


def test_megatron_documents_with_other_ends_are_noted(folder: Path, tmp_path: Path) -> None:
    """They are taken as they are; <s> is token 1, </s> token 2."""
    make([folder], tmp_path / "tok")
    write_megatron(tmp_path / "m", [[[10, 2]], [[10, 2, 11]], [[10, 1]], [[2, 10]], [[11]]])
    summary = make([tmp_path / "m"], tmp_path / "out", tokenizer=tmp_path / "tok", heldout=0.0)
    inside, other = summary.noted
    assert "</s> before their end" in inside
    assert "end with <s>: </s> stands behind it" in other
    assert list(summary.noted.values()) == [2, 1]
    assert summary.examples == {inside: ["m#1", "m#3"], other: ["m#2"]}
    assert "noted                 2 documents with </s>" in str(summary)


def test_bad_megatron_pairs(folder: Path, tmp_path: Path) -> None:
    make([folder], tmp_path / "tok")
    prefix = tmp_path / "m"
    good = write_megatron(prefix, [[[10, 11]], [[12]]])

    def message(index: bytes | None = None, **options: Any) -> str:
        if index is not None:
            Path(f"{prefix}.idx").write_bytes(index)
        with pytest.raises(UserError) as e:
            make([prefix], tmp_path / "out", **{"tokenizer": tmp_path / "tok", **options})
        return str(e.value)

    assert "name the tokenizer" in message(tokenizer=None)
    assert "wrong magic number" in message(b"X" + good[1:])
    assert "wrong magic number" in message(b"MMI")
    assert "version 2" in message(good[:9] + b"\2" + good[10:])
    assert "dtype code 6" in message(good[:17] + b"\6" + good[18:])
    assert "truncated" in message(good[:-1])
    at = 34 + 2 * 4 + 8  # byte offset of the second sequence
    assert "points outside" in message(good[:at] + struct.pack("<q", 400) + good[at + 8 :])
    assert "points outside" in message(good[:at] + struct.pack("<q", -2) + good[at + 8 :])
    assert "points outside" in message(good[:-8] + struct.pack("<q", 1))
    moved = struct.pack("<q", 2)  # overlaps with the first
    said = message(good[:at] + moved + good[at + 8 :])
    assert re.search(r"m\.idx does not fit m\.bin: sequence 1 does not begin where", said)
    longer = Path(f"{prefix}.bin")
    write_megatron(prefix, [[[10, 11]], [[12]]])
    longer.write_bytes(longer.read_bytes() + bytes(2))
    assert "it accounts for 3 of 4 tokens" in message()
    # Lengths without the token that ends a document, which the tokens have.
    write_megatron(prefix, [[[10, 2]], [[12, 2]]])
    tokens = longer.read_bytes()
    write_megatron(prefix, [[[10]], [[12]]])
    longer.write_bytes(tokens)
    assert "leave out the token that ends a document" in message()
    for nothing in ([], [[[]]]):
        write_megatron(prefix, nothing)
        assert message().endswith("m.bin and m.idx hold no documents")
    write_megatron(prefix, [[[10, 11]], [[300]]])
    assert re.search(r"m\.bin document 1: token id 300 lies outside.* 300;", message())
    Path(f"{prefix}.idx").unlink()
    assert "m.idx is missing" in message()
    Path(f"{prefix}.bin").rename(tmp_path / "n.idx")
    with pytest.raises(UserError, match=r"n\.bin does not exist"):
        make([tmp_path / "n.idx"], tmp_path / "out", tokenizer=tmp_path / "tok")
    assert not (tmp_path / "out").exists()
