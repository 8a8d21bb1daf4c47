"""Text to token ids, piece by piece: while one is encoded, by all threads of the tokenizer, the one
before is written and the next one read; and what an interrupted run has encoded is found again.

Whole pieces are kept beside the store that is being made, each under the hash of the tokenizer and
its texts. So a later run with the same input encodes none of them again, and one with other input
whatever is different.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.data.sources import Document
from nemo_hybrid.data.store import token_dtype
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.files import make_directories, naming, replace_file

PIECE_CHARACTERS = 1 << 22
"""A piece ends with the document that makes it as long, or with the last one."""
_AT_ONCE = 1 << 20
"""Characters for the tokenizer, whose results take many times their memory until they are ids."""
_DIGEST_BYTES = hashlib.sha256().digest_size

Sorted = tuple[str, Document]
"""A document, and the split that it belongs to."""
Ids = NDArray[np.integer]


class Pieces:
    """Encodes pieces, and keeps them in a directory."""

    def __init__(self, tokenizer: TextTokenizer, kept: Path) -> None:
        self._tokenizer, self._kept = tokenizer, kept
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))

    def encoded(self, documents: Iterator[Sorted]) -> Iterator[tuple[str, Ids]]:
        """(split, ids) of every document, in their order; documents of token ids stay as they are.
        Raises UserError where a piece cannot be kept."""
        before: tuple[list[Sorted], Future[list[Ids]]] | None = None
        with ThreadPoolExecutor(1) as encoder:
            while True:
                piece = _next(documents, PIECE_CHARACTERS)
                texts = [d.content for _, d in piece if isinstance(d.content, str)]
                following = piece, encoder.submit(self._ids, texts)
                if before:
                    yield from self._joined(before[0], iter(before[1].result()))
                if not piece:
                    return
                before = following

    def _joined(self, piece: list[Sorted], ids: Iterator[Ids]) -> Iterator[tuple[str, Ids]]:
        for split, document in piece:
            found = next(ids) if isinstance(document.content, str) else document.content
            # A tokenizer may drop all of a text; the document then is its end alone.
            yield split, found if len(found) else np.array([self._tokenizer.eos_id])

    def _ids(self, texts: list[str]) -> list[Ids]:
        if sum(map(len, texts)) < PIECE_CHARACTERS:
            return self._encode(texts)
        key = hashlib.sha256(self._tokenizer.sha256.encode())
        for text in texts:
            content = text.encode()
            key.update(b"%d\n" % len(content))
            key.update(content)
        path = self._kept / key.hexdigest()
        if (known := self._read(path, len(texts))) is not None:
            return known
        ids = self._encode(texts)
        lengths = np.array([len(i) for i in ids], "<i8")
        content = lengths.tobytes() + np.concatenate(ids).tobytes()
        with naming("write", self._kept):
            make_directories(self._kept)
        replace_file(path, [hashlib.sha256(content).digest(), content])
        return ids

    def _read(self, path: Path, count: int) -> list[Ids] | None:
        """What is kept of a piece, unless it is damaged."""
        if not path.is_file():
            return None
        with naming("read", path):
            content = path.read_bytes()
        digest, rest = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
        if hashlib.sha256(rest).digest() != digest:
            return None
        lengths = np.frombuffer(rest, "<i8", count)
        ids = np.frombuffer(rest[lengths.nbytes :], self._dtype)
        return np.split(ids, lengths.cumsum()[:-1])

    def _encode(self, texts: list[str]) -> list[Ids]:
        out: list[Ids] = []
        at, characters = 0, 0
        for end, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= _AT_ONCE or end == len(texts):
                out += [i.astype(self._dtype) for i in self._tokenizer.encode(texts[at:end])]
                at, characters = end, 0
        return out


def _next(documents: Iterator[Sorted], characters: int) -> list[Sorted]:
    """The next documents, which have so many characters together, or the last ones."""
    piece: list[Sorted] = []
    for found in documents:
        piece.append(found)
        characters -= len(found[1].content)
        if characters <= 0:
            break
    return piece


@contextmanager
def told(kept: Path) -> Iterator[None]:
    """Where this ends too early, it says what is kept for another time."""
    try:
        yield
    except BaseException:
        if kept.is_dir():
            print(
                f"what was encoded waits in {kept}: the same command goes on from there "
                "(remove it if there will be none)",
                file=sys.stderr,
            )
        raise
