"""`prepare`: text in many formats to a tokenizer and two token stores.

Documents are streamed twice, once to train the tokenizer and once to encode, so memory is bounded
by the largest document, a batch of text, and eight bytes per document for the index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nemo_hybrid.data.sources import (
    Document,
    Source,
    Unusable,
    count_links,
    default_sources,
    find_sources,
    read_documents,
)
from nemo_hybrid.data.store import TOKENS, StoreWriter, TokenStore
from nemo_hybrid.data.tokenizer import (
    TextTokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, sync_directory, write_file
from nemo_hybrid.terminal import progress_bar

T = TypeVar("T")
TRAINED_VOCAB_SIZE = 4096
"""Entries of a tokenizer that is trained, unless it is told otherwise."""
TRAIN, HELDOUT = "train", "heldout"
RECORD = "prepare.json"
_BATCH_CHARACTERS = 1 << 20
_NAMED_UNUSABLE = 5
_LEFTOVER_AGE_S = 3600


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` made."""

    out: str
    train_tokens: int
    train_documents: int
    heldout_tokens: int
    heldout_documents: int
    vocab_size: int
    eos_id: int
    sources: dict[str, Any]
    """paths, files, bytes, empty (documents without content), unusable (records skipped),
    unusable_examples and links (symbolic links to files, skipped)."""
    seconds: float
    reused: bool = False
    """True where an existing store of the same arguments was returned as it is."""

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {'reused, ' if self.reused else ''}vocabulary {self.vocab_size:,}",
            f"  train    {self.train_tokens:>14,} tokens in {self.train_documents:,} documents",
            f"  held out {self.heldout_tokens:>14,} tokens in {self.heldout_documents:,} documents",
        ]
        for name in ("empty", "unusable"):
            if self.sources[name]:
                lines.append(f"  skipped  {self.sources[name]:>14,} {name} documents")
        if self.sources["links"]:
            lines.append(f"  skipped  {self.sources['links']:>14,} symbolic links to files")
        return "\n".join(lines)


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
) -> PrepareSummary:
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
    if not is_free(out):
        if reuse:
            return _existing(out, request)
        raise UserError(f"{out} exists already; name another --out or remove it first")

    sources = find_sources(paths) if paths else default_sources()
    corpus = _Corpus(sources, [*paths], out, text_field, heldout, skip_bad, seed, progress)
    if given is None:
        given = train_tokenizer(corpus.training_texts(), vocab_size)
    with replacing(out) as partial:
        with split_writers(partial, corpus.splits, given) as writers:
            _encode(corpus, given, writers)
            summary = _summary(corpus, given, writers, started)
            for writer in writers.values():
                writer.finish(summary.sources)
        for name, data in given.files.items():
            write_file(partial / name, [data])
        write_record(partial, request, asdict(summary))
    return summary


@dataclass
class _Corpus:
    """The documents of all sources, assigned to a split; counts of the latest pass."""

    sources: list[Source]
    paths: list[str]
    out: Path
    text_field: str
    heldout: float
    skip_bad: bool
    seed: int
    progress: bool
    empty: int = 0
    unusable: int = 0
    examples: list[Unusable] = field(default_factory=list)
    """The first of the unusable ones."""

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN, HELDOUT) if self.heldout else (TRAIN,)

    def documents(self, title: str, vocab_size: int | None) -> Iterator[tuple[str, Document]]:
        """(split, document) of every document that is not empty. Raises UserError at the end for
        unusable records, unless they may be skipped, and for an empty split."""
        self.empty, self.unusable, self.examples = 0, 0, []
        counts: Counter[str] = Counter()
        total = max(1, sum(s.size for s in self.sources))
        before = 0
        with progress_bar(title, total, self.progress) as update:
            for source in self.sources:
                for item in read_documents(source, self.text_field, vocab_size):
                    if isinstance(item, Unusable):
                        self.unusable += 1
                        if len(self.examples) < _NAMED_UNUSABLE:
                            self.examples.append(item)
                        continue
                    update(before + item.done * source.size)
                    if len(item.content) == 0:
                        self.empty += 1
                        continue
                    split = split_of(item.key, self.seed, self.heldout)
                    counts[split] += 1
                    yield split, item
                before += source.size
        self._check(counts)

    def training_texts(self) -> Iterator[str]:
        for split, document in self.documents("prepare: training the tokenizer", None):
            if split == TRAIN and isinstance(document.content, str):
                yield document.content

    def _check(self, counts: Counter[str]) -> None:
        if self.unusable and self.paths and not self.skip_bad:
            named = "; ".join(f"{u.where}: {u.why}" for u in self.examples)
            more = self.unusable - len(self.examples)
            raise UserError(
                f"{self.unusable} unusable: {named}"
                + (f"; and {more} more" if more else "")
                + ". Mend the input, or skip such records with --skip_bad true"
            )
        if not counts:
            raise UserError(
                "the corpus is empty: no document with content in "
                + (", ".join(str(s.path) for s in self.sources[:5]) or "the named paths")
            )
        for split in self.splits:
            if not counts[split]:
                raise empty_split(split, counts.total(), "documents", self.heldout)


def draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on both and is the same everywhere."""
    digest = hashlib.sha256(f"{seed}/{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, seed: int, heldout: float) -> str:
    return HELDOUT if draw(seed, key) < heldout else TRAIN


def empty_split(split: str, count: int, what: str, heldout: float) -> UserError:
    return UserError(
        f"none of the {count} {what} falls into the {split} split at heldout {heldout}: give more "
        f"{what}, another heldout fraction or seed, or heldout 0 for no held-out split"
    )


@contextmanager
def split_writers(
    directory: Path, splits: Iterable[str], tokenizer: TextTokenizer, format: str = TOKENS
) -> Iterator[dict[str, StoreWriter]]:
    """A writer for the store of each split, closed on the way out."""
    writers = {
        split: StoreWriter(
            directory / split,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            format=format,
        )
        for split in splits
    }
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.close()


def _encode(corpus: _Corpus, tokenizer: TextTokenizer, writers: dict[str, StoreWriter]) -> None:
    pending: list[tuple[str, Document]] = []
    characters = 0
    for split, document in corpus.documents("prepare: encoding", tokenizer.vocab_size):
        pending.append((split, document))
        characters += len(document.content)
        if characters >= _BATCH_CHARACTERS:
            _write(pending, tokenizer, writers)
            pending, characters = [], 0
    _write(pending, tokenizer, writers)


def _write(
    pending: list[tuple[str, Document]], tokenizer: TextTokenizer, writers: dict[str, StoreWriter]
) -> None:
    texts = [d.content for _, d in pending if isinstance(d.content, str)]
    encoded = iter(tokenizer.encode(texts))
    for split, document in pending:
        ids = next(encoded) if isinstance(document.content, str) else document.content
        # A tokenizer may drop all of a text; the document then is its end alone.
        writers[split].add(ids if len(ids) else np.array([tokenizer.eos_id]))


def _summary(
    corpus: _Corpus, tokenizer: TextTokenizer, writers: dict[str, StoreWriter], started: float
) -> PrepareSummary:
    held, paths = writers.get(HELDOUT), corpus.paths
    return PrepareSummary(
        out=str(corpus.out),
        train_tokens=writers[TRAIN].tokens,
        train_documents=writers[TRAIN].documents,
        heldout_tokens=held.tokens if held else 0,
        heldout_documents=held.documents if held else 0,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sources={
            "paths": paths or ["standard library of the running Python"],
            "files": len(corpus.sources),
            "bytes": sum(s.size for s in corpus.sources),
            "empty": corpus.empty,
            "unusable": corpus.unusable,
            "links": count_links(paths),
            "unusable_examples": [f"{u.where}: {u.why}" for u in corpus.examples],
        },
        seconds=time.monotonic() - started,
    )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A directory beside out that becomes out on success and disappears otherwise."""
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    with naming("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial.mkdir()
        try:
            yield partial
            sync_directory(partial)
            os.rename(partial, out)
            sync_directory(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what a killed prepare of the same out left; younger ones may still be written."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    for path in out.parent.iterdir():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
        if time.time() - newest > _LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def is_free(out: Path) -> bool:
    """Whether out is absent or an empty directory."""
    with naming("write", out):
        if out.is_symlink() or out.is_file():
            return False
        return not out.is_dir() or not any(out.iterdir())


def _existing(out: Path, request: dict[str, Any]) -> PrepareSummary:
    """Summary of the complete store at out if it was made by the same request."""
    summary = recorded(out, PrepareSummary, request, "remove it or name another --out")
    TokenStore.open(out / TRAIN)
    if request["heldout"]:
        TokenStore.open(out / HELDOUT)
    return summary


def recorded(out: Path, summary: type[T], request: dict[str, Any], mend: str) -> T:
    """The summary that prepare.json keeps, marked as reused. Raises UserError if what is at out was
    not made by the same request."""
    try:
        record = json.loads((out / RECORD).read_bytes())
        made_by = record["request"]
        found = summary(**{**record["summary"], "out": str(out), "reused": True})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out} exists and is not a store made by prepare; remove it first") from e
    different = [name for name, value in request.items() if made_by.get(name) != value]
    if different:
        raise UserError(
            f"{out} was prepared with other arguments ({', '.join(different)} differ); {mend}"
        )
    return found


def write_record(directory: Path, request: dict[str, Any], summary: dict[str, Any]) -> None:
    record = {"request": request, "summary": summary}
    write_file(directory / RECORD, [json.dumps(record, indent=2).encode()])
