"""Streaming records and documents out of sources."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.data.megatron import read_megatron
from nemo_hybrid.data.sources import (
    DAMAGED,
    BadRecord,
    Document,
    Record,
    Source,
    Unusable,
    content_files,
    unpacked,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, read_json, refuse_pointer

_ROWS = 256  # of a table, read at once
_OF_SAMPLES = {"messages", "conversations", "prompt"}
Done = Callable[[], float]


def read_documents(
    source: Source, text_field: str, vocab_size: int | None
) -> Iterator[Document | Unusable]:
    """Stream the documents of a source. vocab_size: bound for sources that hold token ids.

    Raises UserError for a source that is unusable as a whole.
    """
    if source.kind == "megatron":
        with naming("read", source.path):
            yield from read_megatron(source, vocab_size)
        return
    for record in read_records(source, text_field, columns=[text_field]):
        if isinstance(record, Unusable):
            yield record
            continue
        text, why = record.content.get(text_field), None
        if not isinstance(text, str):
            samples = _OF_SAMPLES & record.content.keys()
            hint = "--for finetune reads conversations" if samples else "--text_field names another"
            why = f"no text in field {text_field!r} ({hint})"
        elif not _is_unicode(text):
            why = f"field {text_field!r} holds half a surrogate pair"
        yield Unusable(record.where, why) if why else Document(record.key, str(text), record.done)


def read_records(
    source: Source, text_field: str, columns: Sequence[str] | None = None
) -> Iterator[Record | Unusable]:
    """Stream the records of a source. A text file is one record, {text_field: its text}.

    ``columns``: the columns to read of a table; all by default. Raises UserError for a source that
    is unusable as a whole.
    """
    with naming("read", source.path):
        if source.kind == "other":
            yield Unusable(str(source.path), source.why, "not readable", 1.0)
        elif source.kind == "parquet":
            yield from _read_parquet(source, columns)
        elif source.kind == "dataset":
            yield from _read_dataset(source, columns)
        else:
            with _opened(source) as (file, done):
                if source.kind == "text":
                    yield from _read_text(source, file, text_field)
                elif source.kind == "lines":
                    yield from _read_lines(source, file, done, text_field)
                elif source.kind == "array":
                    yield from _read_array(source, file, text_field)
                else:
                    yield from _read_csv(source, file, done, columns)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[IO[bytes], Done]]:
    """The content of a file, decompressed, and a function that says what share of it was read."""
    with open(source.path, "rb") as raw:
        try:
            yield unpacked(raw, source.packing), lambda: raw.tell() / max(1, source.size)
        except DAMAGED as e:
            raise UserError(f"{source.path} is a damaged {source.packing} file: {e}") from e


def _read_text(source: Source, file: IO[bytes], text_field: str) -> Iterator[Record | Unusable]:
    data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        yield Unusable(f"{source.path} line {line}", "not UTF-8")
    else:
        yield Record(source.key, str(source.path), {text_field: text}, 1.0)


def _read_lines(
    source: Source, lines: Iterable[bytes], done: Done, text_field: str
) -> Iterator[Record | Unusable]:
    """JSON, one object per line."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        where = f"{source.path} line {number}"
        try:
            value = json.loads(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError:
            yield Unusable(where, "not UTF-8")
        except json.JSONDecodeError as e:
            yield Unusable(where, "not JSON", detail=f": {e.msg} at column {e.colno}")
        except (ValueError, RecursionError):
            yield Unusable(where, "not JSON")
        else:
            yield _record(value, f"{source.key}#{number}", where, done(), text_field)


def _read_array(source: Source, file: IO[bytes], text_field: str) -> Iterator[Record | Unusable]:
    """A JSON array, or one value over several lines: at once."""
    try:
        found = json.loads(file.read().decode("utf-8-sig").strip() or "[]")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source.path} is neither a JSON array nor objects in lines: {e}") from e
    values = found if isinstance(found, list) else [found]
    for row, value in enumerate(values):
        where = f"{source.path} row {row}"
        yield _record(value, f"{source.key}#{row}", where, (row + 1) / len(values), text_field)


def _record(value: Any, key: str, where: str, done: float, text_field: str) -> Record | Unusable:
    if isinstance(value, str):
        value = {text_field: value}
    if isinstance(value, list):
        return Unusable(where, "a JSON array, not an object: a file of one array is named .json")
    if not isinstance(value, dict):
        return Unusable(where, "not a JSON object")
    return Record(key, where, value, done)


def _read_csv(
    source: Source, file: IO[bytes], done: Done, columns: Sequence[str] | None
) -> Iterator[Record | Unusable]:
    """Rows below a line with the columns' names, in the dialect of spreadsheets."""
    csv.field_size_limit(sys.maxsize)
    # What is no UTF-8 is noticed row by row.
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    between = "\t" if source.ending == ".tsv" else ","
    rows = csv.reader(text, delimiter=between, strict=True)
    try:
        names = next(rows, [])
        if len(names) == 1 and re.search(r"[,;|\t]", names[0]):
            raise UserError(
                f"{source.path} has no columns by {between!r} in its first line, "
                f"{names[0][:80]!r}: write it with commas, or with tabs as .tsv"
            )
        _check_columns(source, names, columns)
        if len(set(names)) < len(names):
            raise UserError(f"{source.path} has two columns of the same name")
        for number, row in enumerate(rows):
            where = f"{source.path} line {rows.line_num}"
            if not _is_unicode("".join(row)):
                yield Unusable(where, "not UTF-8")
            elif row and len(row) != len(names):
                yield Unusable(where, f"{len(row)} fields under {len(names)} names of columns")
            elif row:
                content = dict(zip(names, row, strict=True))
                yield Record(f"{source.key}#{number}", where, content, done())
    except csv.Error as e:
        raise UserError(f"{source.path} line {rows.line_num} cannot be read: {e}") from e


def _is_unicode(text: str) -> bool:
    """Whether a text is free of lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(source: Source, columns: Sequence[str] | None) -> Iterator[Record | Unusable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            _check_columns(source, file.schema_arrow.names, columns)
            rows = (
                dict(zip(batch.schema.names, row, strict=True))
                for batch in file.iter_batches(_ROWS, columns=columns)
                for row in zip(*batch.columns, strict=True)
            )
            yield from _read_table(source, rows, file.metadata.num_rows)
    except pa.ArrowException as e:
        raise UserError(f"{source.path} is not a readable parquet file: {e}") from e


def _read_dataset(source: Source, columns: Sequence[str] | None) -> Iterator[Record | Unusable]:
    from datasets import load_from_disk

    for file in content_files(source):
        refuse_pointer(file)
    if read_json(source.path / "state.json").get("_data_files") == []:
        return  # no rows: the library has written no file of them, and does not read that
    try:
        dataset = load_from_disk(str(source.path))
        _check_columns(source, dataset.column_names, columns)
        dataset = dataset.select_columns(list(columns or dataset.column_names))
        rows = (
            dict(zip(batch, row, strict=True))
            for batch in dataset.iter(_ROWS)
            for row in zip(*batch.values(), strict=True)
        )
        yield from _read_table(source, rows, len(dataset))
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{source.path} is not a readable Hugging Face dataset: {e}") from e


def _check_columns(source: Source, present: Sequence[str], wanted: Sequence[str] | None) -> None:
    for name in wanted or ():
        if name not in present:
            shown = [f"{other[:40]}..." if len(other) > 43 else other for other in present[:20]]
            raise UserError(
                f"{source.path} has no column {name!r}; its columns are {', '.join(shown)} "
                "(choose one with --text_field)"
            )


def _read_table(
    source: Source, rows: Iterable[dict[str, Any]], count: int
) -> Iterator[Record | Unusable]:
    """One record per row; values may be pyarrow's scalars."""
    for number, row in enumerate(rows):
        where = f"{source.path} row {number}"
        try:
            content = {k: v.as_py() if hasattr(v, "as_py") else v for k, v in row.items()}
        except UnicodeDecodeError:
            yield Unusable(where, "not UTF-8")
        else:
            key = f"{source.key}#{number}"
            yield Record(key, where, _without_nulls(content), (number + 1) / count)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """A table has every field of any row in all rows, so an object's null may be of its making."""

    def mended(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_nulls(value)
        if isinstance(value, list) and value and not isinstance(value[0], int):
            return [mended(v) for v in value]
        return value

    return {k: mended(v) for k, v in fields.items() if v is not None}


def integers(value: object, name: str) -> NDArray[np.int64]:
    """A field's list of whole numbers. Raises BadRecord."""
    try:
        array = np.asarray(value if isinstance(value, list) else None)
        whole = array.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(f"{name} is no list of whole numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "biuf" or not np.array_equal(array, whole):
        raise BadRecord(f"{name} is no list of whole numbers")
    return whole


def plain_text(value: object, name: str) -> str:
    """A field's text. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} is not text")
    if not _is_unicode(value):
        raise BadRecord(f"{name} holds half a surrogate pair")
    return value
