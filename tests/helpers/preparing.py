"""Texts to prepare, and what a prepared store holds of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.making import Summary
from nemo_hybrid.data.store import Store
from nemo_hybrid.data.tokenizer import load_tokenizer

WORDS = "the quick brown fox jumps over lazy dogs while naïve Čerenkov 光 shines 🎉 on </s> and <s>"


def texts(count: int, salt: str = "") -> list[str]:
    words = WORDS.split()
    return [
        f"{salt}{i}\n" + " ".join(words[(i * 7 + j * j) % len(words)] for j in range(30))
        for i in range(count)
    ]


def make(paths: list[Any], out: Path, **options: Any) -> Summary:
    if "tokenizer" not in options:
        options = {"vocab_size": 300, **options}
    how = {name: options.pop(name) for name in ("progress", "reuse") if name in options}
    options = {"heldout": 0.3, "seed": 0, **options, "paths": [*map(str, paths)], "out": str(out)}
    return prepare(**options, **{"progress": False, **how})


def decoded(out: Path, split: str) -> list[str]:
    """Text of every document, by the tokenizer that was stored with it."""
    store = Store.open(out / split)
    tokenizer = load_tokenizer(out).tokenizer
    ids = store.read(0, len(store))
    starts = np.flatnonzero(store.document_starts(0, len(store))).tolist()
    documents = [ids[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert all(d[-1] == store.info.eos_id for d in documents)
    return [tokenizer.decode(d[:-1], skip_special_tokens=False) for d in documents]


def everything(out: Path, splits: tuple[str, ...] = ("train", "heldout")) -> list[str]:
    return sorted(t for split in splits for t in decoded(out, split))


def nothing_left(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def write_folder(root: Path) -> Path:
    """A directory with one file of each kind, some of them nested; 40 documents in all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "deep" / "er").mkdir(parents=True)
    drawn = texts(40)
    for i in range(10):
        (root / "deep" / f"{i}.txt").write_text(drawn[i])
        (root / "deep" / "er" / f"{i}.py").write_bytes(b"\xef\xbb\xbf" + drawn[10 + i].encode())
    lines = [
        json.dumps({"text": t, "other": 1}, ensure_ascii=i % 2 == 0) for i, t in enumerate(drawn)
    ]
    (root / "x.jsonl").write_text("\n\n".join(lines[20:30]) + "\n")
    pq.write_table(pa.table({"text": drawn[30:40], "n": range(10)}), root / "y.parquet")
    (root / "empty.txt").touch()
    (root / ".hidden.txt").write_bytes(b"\xff")
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "a.pyc").write_bytes(b"\xff")
    (root / "link.txt").symlink_to(root / "empty.txt")
    (root / "loop").symlink_to(root)
    return root
