"""`prepare`: text in many formats to a tokenizer and two token stores.

Documents are streamed twice, once to train the tokenizer and once to encode, so memory is bounded
by the largest document or JSON array, a few pieces of text, eight bytes per document for the index
and, where a tokenizer is trained, the different words of what it is trained on.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nemo_hybrid.data.encoding import Pieces, Sorted, told
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
_EMPTY = "empty documents"


def prepare(
    out: str | Path,
    paths: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    tokenizer_sample_mb: int | None = None,
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
    the default corpus are skipped and counted. ``tokenizer_sample_mb``: train the tokenizer on so
    many million bytes, of each source on its share from the beginning on. ``reuse``: return the
    summary of an existing store that was made with the same arguments.

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
        "tokenizer_sample_mb": tokenizer_sample_mb,
        "text_field": text_field,
        "heldout": heldout,
        "skip_bad": skip_bad,
        "seed": seed,
    }
    if stands(out, reuse):
        return recorded(out, request, "documents", "remove it or name another --out")

    found = find_sources(paths) if paths else Found(default_sources())

    def documents(
        title: str, summary: Summary, vocab_size: int | None = None, share: float = 1.0
    ) -> Iterator[Sorted]:
        """(split, document) of every document that is not empty; the others are counted."""
        quota = Quota(share)

        def read(source: Source) -> Iterator[Document | Unusable]:
            return quota.of(source, read_documents(source, text_field, vocab_size))

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
        total = sum(source.size for source in found.sources)
        share = min(1.0, (tokenizer_sample_mb or math.inf) * 1e6 / max(1, total))
        texts = documents("prepare: training the tokenizer", uncounted, share=share)
        given = train_tokenizer(
            (str(d.content) for split, d in texts if split == TRAIN), vocab_size
        )
    summary = Summary(str(out), given.vocab_size, "documents")
    for kind, path in found.left_out:
        summary.leave_out(kind, path)
    kept = out.with_name(f".encoded-{out.name}")
    with making(out, request, given, summary) as writers, told(kept):
        every = documents("prepare: encoding", summary, given.vocab_size)
        for split, ids in Pieces(given, kept).encoded(every):
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
    shutil.rmtree(kept, ignore_errors=True)
    return summary


class Quota:
    """Lets pass, of every source from its beginning on, its share of the bytes of all."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._before = self._taken = 0.0
        """Bytes of the sources so far, and those that were read of them."""

    def of(
        self, source: Source, documents: Iterator[Document | Unusable]
    ) -> Iterator[Document | Unusable]:
        """What is left of a share is the next source's: so of many small files some are read."""
        if self._share >= 1:
            yield from documents
            return
        wanted = self._share * (self._before + source.size) - self._taken
        done = 0.0
        if wanted > 0:
            for item in documents:
                yield item
                done = item.done * source.size
                if done >= wanted:
                    break
        self._before += source.size
        self._taken += done


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
