"""`prepare`: text in many formats to a tokenizer and two token stores.

Documents are streamed twice, once to train the tokenizer and once to encode, so memory is bounded
by the largest document or JSON array, a batch of text, and eight bytes per document for the index.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nemo_hybrid.data.making import Summary, making, reading, recorded, split_of, stands
from nemo_hybrid.data.readers import read_documents
from nemo_hybrid.data.sources import (
    DANGLING,
    TWICE,
    Document,
    Found,
    Source,
    Unusable,
    default_sources,
    find_sources,
)
from nemo_hybrid.data.store import TRAIN
from nemo_hybrid.data.tokenizer import (
    TextTokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)

TRAINED_VOCAB_SIZE = 4096
"""Entries of a tokenizer that is trained, unless it is told otherwise."""
_BATCH_CHARACTERS = 1 << 20
_EMPTY = "empty documents"


def prepare(
    out: str | Path,
    paths: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    text_field: str = "text",
    heldout: float = 0.03,
    skip_bad: bool = False,
    seed: int = 0,
    progress: bool = True,
    reuse: bool = False,
) -> Summary:
    """Read documents (of the default corpus, where no paths are given), train or take a tokenizer,
    and write the token stores below out.

    Documents are held out by a hash of seed and path (and line or row number). Unusable files of
    the default corpus are skipped and counted. ``reuse``: return the summary of an existing store
    that was made with the same arguments.

    Raises UserError. Nothing appears under out until everything is written.
    """
    started = time.monotonic()
    out = Path(out)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_size = TRAINED_VOCAB_SIZE if vocab_size is None else vocab_size
    if given is None:
        check_vocab_size(vocab_size)
    request = {
        "paths": [str(Path(p).resolve()) for p in paths],
        "tokenizer_sha256": given.sha256 if given else None,
        "vocab_size": None if given else vocab_size,
        "text_field": text_field,
        "heldout": heldout,
        "skip_bad": skip_bad,
        "seed": seed,
    }
    if stands(out, reuse):
        return recorded(out, request, "documents", "remove it or name another --out")

    found = find_sources(paths) if paths else Found(default_sources())

    def documents(
        title: str, summary: Summary, vocab_size: int | None = None
    ) -> Iterator[tuple[str, Document]]:
        """(split, document) of every document that is not empty; the others are counted."""

        def read(source: Source) -> Iterator[Document | Unusable]:
            return read_documents(source, text_field, vocab_size)

        for item in reading(title, found.sources, read, progress):
            if isinstance(item, Unusable):
                summary.drop(item)
            elif len(item.content):
                if given is not None and isinstance(item.content, np.ndarray):
                    for kind in _unexpected_ends(item.content, given):
                        summary.note(kind, item.key)
                yield split_of(item.key, seed, heldout), item
            else:
                summary.leave_out(_EMPTY, item.key)
        summary.check(skip_bad or not paths)  # nobody can mend the default corpus

    if given is None:
        uncounted = Summary("", 0, "documents")
        texts = documents("prepare: training the tokenizer", uncounted)
        given = train_tokenizer(
            (str(d.content) for split, d in texts if split == TRAIN), vocab_size
        )
    summary = Summary(str(out), given.vocab_size, "documents")
    for kind, path in found.left_out:
        summary.leave_out(kind, path)
    with making(out, request, given, summary) as writers:
        for split, ids in _encoded(
            documents("prepare: encoding", summary, given.vocab_size), given
        ):
            writers[split].add(ids)
        summary.sources = {
            "paths": [*paths] or ["standard library of the running Python"],
            "files": len(found.sources),
            "bytes": sum(s.size for s in found.sources),
            "empty": summary.left_out.get(_EMPTY, 0),
            "unusable": sum(summary.dropped.values()),
            "links": sum(summary.left_out.get(kind, 0) for kind in (TWICE, DANGLING)),
            "unusable_examples": [e for kind in summary.dropped for e in summary.examples[kind]],
        }
        summary.seconds = time.monotonic() - started
    return summary


def _unexpected_ends(ids: np.ndarray, tokenizer: TextTokenizer) -> Iterator[str]:
    """What tells that token ids were made with another token at the end of documents, or other
    bounds of them."""
    end = tokenizer.tokenizer.id_to_token(tokenizer.eos_id)
    if (ids[:-1] == tokenizer.eos_id).any():
        yield f"documents with {end} before their end: what stands behind it sees what is before"
    if ids[-1] != tokenizer.eos_id:
        last = tokenizer.tokenizer.id_to_token(int(ids[-1]))
        if last and tokenizer.added_tokens.get(last):
            yield f"documents that end with {last}: {end} stands behind it"


def _encoded(
    documents: Iterator[tuple[str, Document]], tokenizer: TextTokenizer
) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids) of every document, encoded many at once."""
    while batch := _batch(documents):
        texts = [d.content for _, d in batch if isinstance(d.content, str)]
        encoded = iter(tokenizer.encode(texts))
        for split, document in batch:
            ids = next(encoded) if isinstance(document.content, str) else document.content
            # A tokenizer may drop all of a text; the document then is its end alone.
            yield split, ids if len(ids) else np.array([tokenizer.eos_id])


def _batch(documents: Iterator[tuple[str, Document]]) -> list[tuple[str, Document]]:
    """The next documents, which have _BATCH_CHARACTERS together, or the last ones."""
    batch, characters = [], 0
    for found in documents:
        batch.append(found)
        characters += len(found[1].content)
        if characters >= _BATCH_CHARACTERS:
            break
    return batch
