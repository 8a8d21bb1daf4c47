"""Finding input files and streaming records and documents out of them."""

from __future__ import annotations

import codecs
import json
import os
import struct
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming

Kind = Literal["text", "jsonl", "parquet", "dataset", "megatron"]

_SKIPPED_FOLDERS = {"__pycache__"}
_ROWS = 256  # of a table, read at once
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    """One input: a file, a saved dataset, or a Megatron pair."""

    path: Path
    key: str
    """Path relative to what the user named: the same on every machine."""
    kind: Kind
    size: int
    """Bytes on disk."""


@dataclass(frozen=True)
class Record:
    """One line, row or text file."""

    key: str
    where: str
    """For messages: FILE line N (from 1), FILE row N (from 0) or FILE."""
    content: dict[str, Any]
    done: float
    """Fraction of the source read so far."""


@dataclass(frozen=True)
class Document:
    """One document: text, or token ids where the source holds tokens."""

    key: str
    content: str | NDArray[np.int64]
    done: float
    """Fraction of the source read so far."""


@dataclass(frozen=True)
class Unusable:
    """Something that should have been a document or sample but is not."""

    where: str
    why: str
    kind: str = "malformed"
    done: float = 0.0
    """Fraction of the source read so far, where that is known."""


class BadRecord(Exception):
    """Why a record is not usable, and what kind of fault that is."""

    def __init__(self, why: str, kind: str = "malformed") -> None:
        super().__init__(why)
        self.kind = kind


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """What the paths name, files of a directory in sorted order. Raises UserError."""
    found: list[Source] = []
    for path in map(Path, paths):
        try:
            found.extend(_sources_of(path))
        except OSError as e:
            raise UserError(f"cannot read {e.filename or path}: {e.strerror}") from e
    return found


def find_samples(paths: Sequence[str | Path]) -> tuple[list[Source], list[Path]]:
    """What the paths name of .jsonl, .parquet, .txt and saved datasets, and the other files of
    directories. Raises UserError for a path with others alone."""
    taken, others = [], []
    for path in paths:
        found = find_sources([path])
        fits = [s.kind != "text" or s.path.suffix.lower() == ".txt" for s in found]
        if found and not any(fits):
            raise UserError(
                f"{found[0].path} is no file of samples: name .jsonl files (JSON, one object per "
                "line), .parquet or .txt files, or a dataset saved by Hugging Face datasets"
            )
        taken += [s for s, fit in zip(found, fits, strict=True) if fit]
        others += [s.path for s, fit in zip(found, fits, strict=True) if not fit]
    return taken, others


def find_links(paths: Sequence[str | Path]) -> list[Path]:
    """Symbolic links to files below the directories that the paths name, which are not read."""
    folders = (root for root in map(Path, paths) if root.is_dir())
    return [path for root in folders for path in _walk(root) if path.is_symlink()]


def default_sources() -> list[Source]:
    """The running interpreter's standard library without installed packages and tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [s for s in _files_below(root, _NOT_CORPUS) if s.path.suffix == ".py"]


def read_documents(
    source: Source, text_field: str, vocab_size: int | None
) -> Iterator[Document | Unusable]:
    """Stream the documents of a source. vocab_size: bound for sources that hold token ids.

    Raises UserError for a source that is unusable as a whole.
    """
    if source.kind == "megatron":
        with naming("read", source.path):
            yield from _read_megatron(source, vocab_size)
        return
    for record in read_records(source, text_field, columns=[text_field]):
        if isinstance(record, Unusable):
            yield record
            continue
        try:
            text = _checked(record.content.get(text_field), text_field)
        except BadRecord as e:
            yield Unusable(record.where, str(e))
        else:
            yield Document(record.key, text, record.done)


def read_records(
    source: Source, text_field: str, columns: Sequence[str] | None = None
) -> Iterator[Record | Unusable]:
    """Stream the records of a source. A text file is one record, {text_field: its text}.

    ``columns``: the columns to read of a table; all by default. Raises UserError for a source that
    is unusable as a whole.
    """
    with naming("read", source.path):
        if source.kind == "text":
            yield from _read_text(source, text_field)
        elif source.kind == "jsonl":
            yield from _read_jsonl(source)
        elif source.kind == "parquet":
            yield from _read_parquet(source, columns)
        elif source.kind == "dataset":
            yield from _read_dataset(source, columns)
        else:
            raise UserError(
                f"{source.path} holds documents of token ids and not what is learnt of them: "
                "it serves pre-training only"
            )


def content_files(source: Source) -> list[Path]:
    """The files whose bytes make up a source."""
    if source.kind == "megatron":
        return [source.path, source.path.with_suffix(".idx")]
    if source.kind == "dataset":
        return [source.path / "state.json", *sorted(source.path.glob("*.arrow"))]
    return [source.path]


def _sources_of(path: Path) -> Iterator[Source]:
    pair = path.with_suffix(".bin") if path.suffix in (".bin", ".idx") else Path(f"{path}.bin")
    if path.suffix in (".bin", ".idx") or (not path.exists() and pair.exists()):
        if not pair.exists():
            raise UserError(f"{pair} does not exist: Megatron data is a .bin and .idx pair")
        yield Source(pair, pair.stem, "megatron", pair.stat().st_size)
    elif path.is_file():
        yield _file_source(path, path.name)
    elif not path.is_dir():
        raise UserError(f"input {path} does not exist (or is neither a file nor a directory)")
    elif (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}: name one, such as {path / splits[0]}"
            if splits
            else f"{path} is a dataset without splits"
        )
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        size = sum(p.stat().st_size for p in path.glob("*.arrow"))
        yield Source(path, path.resolve().name, "dataset", size)
    else:
        yield from _files_below(path)


def _files_below(root: Path, left_out: Set[str] = frozenset()) -> Iterator[Source]:
    for path in _walk(root, left_out):
        if not path.is_symlink():
            yield _file_source(path, path.relative_to(root).as_posix())


def _walk(root: Path, left_out: Set[str] = frozenset()) -> Iterator[Path]:
    """Files below root and links to files, sorted; hidden ones are left out."""

    def fail(e: OSError) -> None:
        raise e

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS | left_out
        )
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _file_source(path: Path, key: str) -> Source:
    kinds: dict[str, Kind] = {".jsonl": "jsonl", ".parquet": "parquet"}
    return Source(path, key, kinds.get(path.suffix.lower(), "text"), path.stat().st_size)


def _read_text(source: Source, text_field: str) -> Iterator[Record | Unusable]:
    data = source.path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        yield Unusable(f"{source.path} line {line}", "not UTF-8")
    else:
        yield Record(source.key, str(source.path), {text_field: text}, 1.0)


def _read_jsonl(source: Source) -> Iterator[Record | Unusable]:
    consumed = 0
    with open(source.path, "rb") as f:
        for number, line in enumerate(f, 1):
            consumed += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            where = f"{source.path} line {number}"
            try:
                content = _json_object(line)
            except BadRecord as e:
                yield Unusable(where, str(e))
            else:
                yield Record(f"{source.key}#{number}", where, content, consumed / source.size)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    return record


def _checked(text: object, text_field: str) -> str:
    if not isinstance(text, str):
        raise BadRecord(f"no text in field {text_field!r} (--text_field names another)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"field {text_field!r} holds half a surrogate pair") from None
    return text


def _read_parquet(source: Source, columns: Sequence[str] | None) -> Iterator[Record | Unusable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            _check_columns(source, file.schema_arrow.names, columns)
            batches = file.iter_batches(_ROWS, columns=columns)
            rows = (
                dict(zip(b.schema.names, values, strict=True))
                for b in batches
                for values in zip(*b.columns, strict=True)
            )
            yield from _read_table(source, rows, file.metadata.num_rows)
    except pa.ArrowException as e:
        raise UserError(f"{source.path} is not a readable parquet file: {e}") from e


def _read_dataset(source: Source, columns: Sequence[str] | None) -> Iterator[Record | Unusable]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(source.path))
        _check_columns(source, dataset.column_names, columns)
        if columns is not None:
            dataset = dataset.select_columns(list(columns))
        rows = (
            dict(zip(batch, values, strict=True))
            for batch in dataset.iter(_ROWS)
            for values in zip(*batch.values(), strict=True)
        )
        yield from _read_table(source, rows, len(dataset))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{source.path} is not a readable Hugging Face dataset: {e}") from e


def _check_columns(source: Source, present: Sequence[str], wanted: Sequence[str] | None) -> None:
    for name in wanted or ():
        if name not in present:
            raise UserError(
                f"{source.path} has no column {name!r}; its columns are {', '.join(present)} "
                "(choose one with --text_field)"
            )


def _read_table(
    source: Source, rows: Iterable[dict[str, Any]], count: int
) -> Iterator[Record | Unusable]:
    """One record per row; values may be pyarrow's scalars."""
    for number, row in enumerate(rows):
        where = f"{source.path} row {number}"
        try:
            content = _without_nulls(
                {k: v.as_py() if hasattr(v, "as_py") else v for k, v in row.items()}
            )
        except UnicodeDecodeError:
            yield Unusable(where, "not UTF-8")
        else:
            yield Record(f"{source.key}#{number}", where, content, (number + 1) / count)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """A table has every field of any row in all rows, so an object's null may be of its making."""

    def mended(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_nulls(value)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            return [mended(v) for v in value]
        return value

    return {k: mended(v) for k, v in fields.items() if v is not None}


_MEGATRON_MAGIC = b"MMIDIDX\0\0"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
_MEGATRON_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def _read_megatron(source: Source, vocab_size: int | None) -> Iterator[Document]:
    """Megatron-LM's indexed dataset: NAME.bin with token ids, NAME.idx with where documents lie."""
    if vocab_size is None:
        raise UserError(
            f"{source.path} holds token ids: name the tokenizer that made them (--tokenizer DIR)"
        )
    tokens, lengths, offsets, bounds = _open_megatron(source.path)
    last = len(bounds) - 1
    for number in range(last):
        parts = [
            tokens[offsets[s] // tokens.itemsize :][: lengths[s]]
            for s in range(bounds[number], bounds[number + 1])
        ]
        ids = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise UserError(
                f"{source.path} document {number}: token id {outside[0]} lies outside the "
                f"vocabulary of {vocab_size}; name the tokenizer that the file was made with"
            )
        yield Document(f"{source.key}#{number}", ids, (number + 1) / last)


def _open_megatron(path: Path) -> tuple[np.memmap, np.memmap, np.memmap, np.memmap]:
    """Token ids; int32 length and int64 byte offset in the .bin file of each sequence; int64
    document bounds: numbers of first sequences, then the total.

    Version 1 of the .idx file (Megatron-LM, core/datasets/indexed_dataset.py), all little-endian: 9
    bytes "MMIDIDX" and two zeros, uint64 version, uint8 dtype code, uint64 number of sequences,
    uint64 number of bounds; then the three arrays. Raises UserError when the two files do not fit.
    """
    index = path.with_suffix(".idx")
    try:
        with open(index, "rb") as f:
            header = f.read(_MEGATRON_HEADER.size)
        if len(header) < _MEGATRON_HEADER.size or not header.startswith(_MEGATRON_MAGIC):
            raise UserError(f"{index} is not a Megatron index (wrong magic number)")
        _, version, code, sequences, documents = _MEGATRON_HEADER.unpack(header)
        if version != 1 or code not in _MEGATRON_DTYPES:
            raise UserError(
                f"{index}: version {version} with dtype code {code} is not supported "
                "(version 1 with an integer type is)"
            )
        start = len(header)
        expected = start + sequences * 12 + documents * 8
        if index.stat().st_size != expected or documents < 2:
            raise UserError(f"{index} is truncated or damaged: expected {expected} bytes")
        lengths = np.memmap(index, "<i4", "r", start, (sequences,))
        offsets = np.memmap(index, "<i8", "r", start + 4 * sequences, (sequences,))
        bounds = np.memmap(index, "<i8", "r", start + 12 * sequences, (documents,))
        tokens = np.memmap(path, _MEGATRON_DTYPES[code], "r")
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} is missing: Megatron data is a .bin and .idx pair") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} and {index.name} cannot be read: {e}") from e
    ends = offsets // tokens.itemsize + lengths
    sound = (
        (lengths >= 0).all()
        and (offsets >= 0).all()
        and (offsets % tokens.itemsize == 0).all()
        and (ends >= 0).all()  # no overflow
        and (ends <= len(tokens)).all()
        and bounds[0] == 0
        and bounds[-1] == sequences
        and (np.diff(bounds) >= 0).all()
    )
    if not sound:
        raise UserError(f"{index} points outside {path.name}: the pair is damaged")
    return tokens, lengths, offsets, bounds
