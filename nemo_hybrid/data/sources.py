"""Finding input files and streaming documents out of them."""

from __future__ import annotations

import codecs
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.data.megatron import MegatronDataset
from nemo_hybrid.errors import UserError

Kind = Literal["text", "jsonl", "parquet", "dataset", "megatron"]

_SKIPPED_FOLDERS = {"__pycache__"}
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
class Document:
    """One document: text, or token ids where the source holds tokens."""

    key: str
    content: str | NDArray[np.int64]
    done: float
    """Fraction of the source read so far."""


@dataclass(frozen=True)
class Unusable:
    """Something that should have been a document but is not."""

    where: str
    why: str


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """What the paths name, files of a directory in sorted order. Raises UserError."""
    found: list[Source] = []
    for path in map(Path, paths):
        try:
            found.extend(_sources_of(path))
        except OSError as e:
            raise UserError(f"cannot read {e.filename or path}: {e.strerror}") from e
    return found


def count_links(paths: Sequence[str | Path]) -> int:
    """Symbolic links to files below the directories that the paths name, which are not read."""
    count = 0
    for root in map(Path, paths):
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS]
            files = [Path(folder, n) for n in names if not n.startswith(".")]
            count += sum(p.is_symlink() and p.is_file() for p in files)
    return count


def default_sources() -> list[Source]:
    """The running interpreter's standard library without installed packages and tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [s for s in _walk(root, _NOT_CORPUS) if s.path.suffix == ".py"]


def read_documents(
    source: Source, text_field: str, vocab_size: int | None
) -> Iterator[Document | Unusable]:
    """Stream the documents of a source. vocab_size: bound for sources that hold token ids.

    Raises UserError for a source that is unusable as a whole.
    """
    try:
        if source.kind == "text":
            yield from _read_text(source)
        elif source.kind == "jsonl":
            yield from _read_jsonl(source, text_field)
        elif source.kind == "parquet":
            yield from _read_parquet(source, text_field)
        elif source.kind == "dataset":
            yield from _read_dataset(source, text_field)
        else:
            yield from _read_megatron(source, vocab_size)
    except OSError as e:
        raise UserError(f"cannot read {source.path}: {e.strerror or e}") from e


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
        yield from _walk(path, set())


def _walk(root: Path, left_out: set[str]) -> Iterator[Source]:
    """Regular files below root, sorted; hidden ones and symbolic links are left out."""

    def fail(e: OSError) -> None:
        raise e

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS | left_out
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and not path.is_symlink():
                yield _file_source(path, path.relative_to(root).as_posix())


def _file_source(path: Path, key: str) -> Source:
    kinds: dict[str, Kind] = {".jsonl": "jsonl", ".parquet": "parquet"}
    return Source(path, key, kinds.get(path.suffix.lower(), "text"), path.stat().st_size)


def _read_text(source: Source) -> Iterator[Document | Unusable]:
    data = source.path.read_bytes()
    try:
        yield Document(source.key, data.decode("utf-8-sig"), 1.0)
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        yield Unusable(f"{source.path} line {line}", "not UTF-8")


def _read_jsonl(source: Source, text_field: str) -> Iterator[Document | Unusable]:
    consumed = 0
    with open(source.path, "rb") as f:
        for number, line in enumerate(f, 1):
            consumed += len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            text = _json_text(line, text_field)
            if isinstance(text, Unusable):
                yield Unusable(f"{source.path} line {number}", text.why)
            else:
                yield Document(f"{source.key}#{number}", text, consumed / source.size)


def _json_text(line: bytes, text_field: str) -> str | Unusable:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Unusable("", "not UTF-8")
    except (ValueError, RecursionError):
        return Unusable("", "not JSON")
    if not isinstance(record, dict):
        return Unusable("", "not a JSON object")
    return _checked(record.get(text_field), text_field)


def _checked(text: object, text_field: str) -> str | Unusable:
    if not isinstance(text, str):
        return Unusable("", f"no text in field {text_field!r} (--text_field names another)")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Unusable("", f"field {text_field!r} holds half a surrogate pair")
    return text


def _read_parquet(source: Source, text_field: str) -> Iterator[Document | Unusable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise _no_column(source, text_field, names)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    yield _row(source, number, file.metadata.num_rows, _scalar(value), text_field)
                    number += 1
    except pa.ArrowException as e:
        raise UserError(f"{source.path} is not a readable parquet file: {e}") from e


def _scalar(value: object) -> object:
    """Python value of a pyarrow scalar; None for bytes that claim to be text but are not UTF-8."""
    try:
        return value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError:
        return None


def _read_dataset(source: Source, text_field: str) -> Iterator[Document | Unusable]:
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(source.path))
        if text_field not in dataset.column_names:
            raise _no_column(source, text_field, dataset.column_names)
        number = 0
        for rows in dataset.select_columns([text_field]).iter(batch_size=256):
            for value in rows[text_field]:
                yield _row(source, number, len(dataset), value, text_field)
                number += 1
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{source.path} is not a readable Hugging Face dataset: {e}") from e


def _row(
    source: Source, number: int, rows: int, value: object, text_field: str
) -> Document | Unusable:
    text = _checked(value, text_field)
    if isinstance(text, Unusable):
        return Unusable(f"{source.path} row {number}", text.why)
    return Document(f"{source.key}#{number}", text, (number + 1) / rows)


def _no_column(source: Source, text_field: str, names: list[str]) -> UserError:
    return UserError(
        f"{source.path} has no column {text_field!r}; its columns are {', '.join(names)} "
        "(choose one with --text_field)"
    )


def _read_megatron(source: Source, vocab_size: int | None) -> Iterator[Document]:
    if vocab_size is None:
        raise UserError(
            f"{source.path} holds token ids: name the tokenizer that made them (--tokenizer DIR)"
        )
    dataset = MegatronDataset(source.path)
    for number, ids in enumerate(dataset.documents(vocab_size)):
        yield Document(f"{source.key}#{number}", ids, (number + 1) / len(dataset))
