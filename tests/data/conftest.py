"""Stores made directly from token lists, without text or a trained tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_hybrid.data.store import StoreWriter, TokenStore

MakeStore = Callable[..., Path]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(name, documents, **options): writes OUT/name, returns its path. Documents are
    lists of ids that end with eos (2)."""

    def make(
        name: str,
        documents: list[list[int]],
        vocab_size: int = 100,
        shard_tokens: int = 7,
        tokenizer: bytes = b"tokenizer",
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "tokenizer.json").write_bytes(tokenizer)
        writer = StoreWriter(
            path,
            vocab_size=vocab_size,
            eos_id=2,
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            shard_tokens=shard_tokens,
        )
        for document in documents:
            writer.add(np.array(document))
        writer.finish({"paths": ["test"]})
        TokenStore.open(path)
        return path

    return make
