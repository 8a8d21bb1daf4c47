"""What the paths of a corpus name: files by what their bytes and names say that they are, saved
datasets and Megatron pairs; and what is left out of directories, by name."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from nemo_hybrid.errors import UserError

if TYPE_CHECKING:  # the process that renders conversations starts without numpy
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["text", "lines", "array", "csv", "parquet", "dataset", "megatron", "other"]

_HEAD = 1 << 13
"""Bytes at the beginning of a file that say what it is."""
_PACKINGS = {
    rb"\x1f\x8b\x08": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bz2",
    rb"\xfd7zXZ\0": "xz",
    rb"\(\xb5/\xfd|[\x50-\x5f]\*M\x18": "zstd",
    rb"\x04\x22M\x18": "lz4",
}
_SAYS_NOTHING = re.compile(
    r"(\.(gz|gzip|bz2|xz|zst|zstd|lz4|bak|old|orig|tmp|part)|[.-]\d+(-of-\d+)?|~)+$", re.IGNORECASE
)
"""Ends of names behind that which tells what a file is: data.jsonl.gz, data.csv-00000-of-00002."""
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What reading a compressed file raises beside OSError."""
_NOT_TEXT = {
    rb"%PDF-": "a PDF document: extract its text",
    rb"PK\x03\x04": "a zip archive, as .docx and .npz are: unpack it, or extract its text",
    rb".{257}ustar": "a tar archive: unpack it",
    rb"7z\xbc\xaf|Rar!|\x1f\x9d": "an archive: unpack it",
    rb"ARROW1|\xff{4}": "an Arrow file: name the directory that `datasets` saved, or make it a "
    ".parquet file",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text: convert it to UTF-8",
    rb"\{\\rtf": "an RTF document: extract its text",
}
_ENDINGS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".jsonlines": "lines",
    ".ndjson": "lines",
    ".json": "array",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_DESCRIBES = "metadata of data sets"
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_CARD = re.compile(r"(README|LICEN[CS]E|COPYING|CITATION|NOTICE)([._-].*)?", re.IGNORECASE)
_HUB_CARD = re.compile(
    rb"---\s.*^(license|language|configs|dataset_info|\w+_categories|pretty_name):",
    re.DOTALL | re.MULTILINE,
)
_NOT_CORPUS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
TWICE, DANGLING = "links to what is read already", "links to nothing"


@dataclass(frozen=True)
class Source:
    """One input: a file, a saved dataset, or a Megatron pair."""

    path: Path
    key: str
    """Path relative to what the user named: the same on every machine."""
    kind: Kind
    size: int
    """Bytes on disk."""
    packing: str | None = None
    """How the file is compressed."""
    why: str = ""
    """Of another kind: what it is, and what to do."""

    @property
    def ending(self) -> str:
        """Of the file's name, without what says nothing of its content."""
        return _ending(self.path)


@dataclass
class Found:
    """What paths name."""

    sources: list[Source] = field(default_factory=list)
    left_out: list[tuple[str, Path]] = field(default_factory=list)
    """What else there is: of what kind (in the plural), and where."""


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
    detail: str = ""
    """What more is known of this one, which is told where one alone is."""


class BadRecord(Exception):
    """Why a record is not usable, and what kind of fault that is."""

    def __init__(self, why: str, kind: str = "malformed") -> None:
        super().__init__(why)
        self.kind = kind


def find_sources(paths: Sequence[str | Path]) -> Found:
    """What the paths name: files and datasets below a directory in sorted order, then what its
    links lead to, each once. Raises UserError."""
    found = Found()
    for path in map(Path, paths):
        try:
            _find(path, found)
        except OSError as e:
            raise UserError(f"cannot read {e.filename or path}: {e.strerror}") from e
    return found


def find_samples(paths: Sequence[str | Path]) -> Found:
    """What the paths name of files of records, .txt files and saved datasets; other files of
    directories are left out. Raises UserError for a path with others alone."""
    every, fitting = Found(), {*_ENDINGS, ".txt"}
    for path in paths:
        found, fits, others = find_sources([path]), list[Source](), list[Source]()
        for source in found.sources:
            vague = source.kind in ("text", "other") and source.ending not in fitting
            (others if vague or source.kind == "megatron" else fits).append(source)
        if others and not fits:
            what = others[0].why or "no file of samples"
            if others[0].kind == "megatron":
                what = "Megatron data, which does not say what is learnt: it serves pre-training"
            raise UserError(
                f"{others[0].path} is {what}; name .jsonl, .json, .csv, .tsv, .parquet or .txt "
                "files, or a dataset saved by Hugging Face datasets"
            )
        every.sources += fits
        every.left_out += found.left_out
        every.left_out += [("files of other kinds", s.path) for s in others]
    return every


def default_sources() -> list[Source]:
    """The running interpreter's standard library without installed packages and tests."""
    root, sources = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _NOT_CORPUS)
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix == ".py" and not path.is_symlink():
                key = path.relative_to(root).as_posix()
                sources.append(Source(path, key, "text", path.stat().st_size))
    return sources


def content_files(source: Source) -> list[Path]:
    """The files whose bytes make up a source."""
    if source.kind == "megatron":
        return [source.path, source.path.with_suffix(".idx")]
    if source.kind == "dataset":
        return [source.path / "state.json", *sorted(source.path.glob("*.arrow"))]
    return [source.path]


def unpacked(file: IO[bytes], packing: str | None) -> IO[bytes]:
    """The content of a file. Reading raises OSError or one of DAMAGED for a damaged one."""
    if packing is None:
        return file
    if packing == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if packing == "bz2":
        return bz2.BZ2File(file)
    if packing == "xz":
        return lzma.LZMAFile(file)
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), packing))


def _find(path: Path, found: Found) -> None:
    pair = path.with_suffix(".bin") if path.suffix in (".bin", ".idx") else Path(f"{path}.bin")
    if path.suffix in (".bin", ".idx") or (not path.exists() and pair.exists()):
        if not pair.exists():
            raise UserError(f"{pair} does not exist: Megatron data is a .bin and .idx pair")
        found.sources.append(Source(pair, pair.stem, "megatron", pair.stat().st_size))
    elif path.name in _METADATA and _is_dataset(path.parent):
        raise UserError(f"{path} belongs to a saved dataset: name its directory, {path.parent}")
    elif path.is_file():
        found.sources.append(_file_source(path, path.name))
    elif not path.is_dir():
        raise UserError(f"input {path} does not exist (or is neither a file nor a directory)")
    else:
        sources, described = list[Source](), set[Path]()
        for file in _below(path, found):
            key = path.resolve().name if file == path else file.relative_to(path).as_posix()
            if file.is_dir():
                size = sum(p.stat().st_size for p in file.glob("*.arrow"))
                sources.append(Source(file, key, "dataset", size))
            elif file.suffix == ".bin" and file.with_suffix(".idx").exists():
                key = key.removesuffix(".bin")
                sources.append(Source(file, key, "megatron", file.stat().st_size))
            elif file.name in _METADATA:
                found.left_out.append((_DESCRIBES, file))
                described.add(Path(key).parent)
            elif file.suffix != ".idx" or not file.with_suffix(".bin").exists():
                sources.append(_file_source(file, key))
        found.sources += _without_cards(sources, described, found)


def _below(root: Path, found: Found) -> Iterator[Path]:
    """Files and saved datasets below root, and then what links lead to. Raises UserError for what
    has to be named more closely."""

    def fail(e: OSError) -> None:
        raise e

    def to_read(path: Path) -> bool:
        """Whether an entry of a directory is read where it stands."""
        if path.name.startswith(".") or path.name == "__pycache__":
            found.left_out.append(("hidden and cache entries", path))
        elif path.is_symlink():
            starts.append(path)
        else:
            return True
        return False

    seen, starts = set[tuple[int, int]](), [root]
    for start in starts:  # more are found on the way
        if start != root and not start.is_dir():
            if not start.exists():
                found.left_out.append((DANGLING, start))
            elif (at := _place(start)) in seen:
                found.left_out.append((TWICE, start))
            else:
                seen.add(at)
                yield start
            continue
        for folder, folders, names in os.walk(start, onerror=fail):
            here = Path(folder)
            if (at := _place(here)) in seen:
                found.left_out.append((TWICE, here))
                folders.clear()
                continue
            seen.add(at)
            if _is_dataset(here):
                beside = {*names, *folders} - {"state.json", "dataset_info.json"}
                found.left_out += [
                    ("files beside a saved dataset", here / name)
                    for name in sorted(beside)
                    if not name.endswith(".arrow")
                ]
                folders.clear()
                yield here
                continue
            files = [path for name in sorted(names) if to_read(path := here / name)]
            folders[:] = [name for name in sorted(folders) if to_read(here / name)]
            for path in files:
                if not path.is_file():
                    found.left_out.append(("special files", path))
                elif (at := _place(path)) in seen and start != root:
                    found.left_out.append((TWICE, path))
                else:
                    seen.add(at)
                    yield path


def _place(path: Path) -> tuple[int, int]:
    """What tells whether two names are of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_dataset(path: Path) -> bool:
    """Whether Hugging Face datasets saved one here. Raises UserError for one of several splits, and
    for the hub's cache, where files have names only in snapshots."""
    if (path / "blobs").is_dir() and (path / "snapshots").is_dir():
        snapshots = sorted((path / "snapshots").iterdir())
        raise UserError(
            f"{path} is the hub's cache of a repository: name one of its snapshots, such as "
            f"{snapshots[0] if snapshots else path / 'snapshots'}"
        )
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}: name one, such as {path / splits[0]}"
            if splits
            else f"{path} is a dataset without splits"
        )
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _file_source(path: Path, key: str) -> Source:
    """A file by its first bytes, then by its name."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        packing = next((p for magic, p in _PACKINGS.items() if re.match(magic, head)), None)
        if packing:
            file.seek(0)
            try:
                head = unpacked(file, packing).read(_HEAD)
            except (OSError, *DAMAGED) as e:
                return Source(path, key, "other", size, packing, f"a damaged {packing} file ({e})")
    ending = _ending(path)
    kind = _ENDINGS.get(ending, "text")
    if kind == "array" or (kind == "text" and ending not in (".txt", ".md")):
        kind = _kind_of_json(head) or kind
    source = Source(path, key, kind, size, packing)
    other = next((w for magic, w in _NOT_TEXT.items() if re.match(magic, head, re.DOTALL)), None)
    if head.startswith(b"PAR1") and packing:
        other = "a compressed .parquet file: decompress it"
    elif head.startswith(b"PAR1") or (source.kind == "parquet" and not other):
        return replace(source, kind="parquet")
    elif b"\0" in head and not other:
        other = "not text but binary"
    return replace(source, kind="other", why=other) if other else source


def _kind_of_json(head: bytes) -> Kind | None:
    """What the beginning of a file is of, if it is of records in JSON."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb'\[\s*\{\s*"', text):
        return "array"
    line, end, _ = text.partition(b"\n")
    if not end and len(head) == _HEAD:  # of a long line
        return "lines" if re.match(rb'\{[ \t]*"', line) else None
    try:
        return "lines" if isinstance(json.loads(line), dict) else None
    except (ValueError, RecursionError):
        return None


def _ending(path: Path) -> str:
    return Path(_SAYS_NOTHING.sub("", path.name)).suffix.lower()


def _without_cards(sources: list[Source], described: Set[Path], found: Found) -> list[Source]:
    """Leave out what describes a data set: a card with the hub's head, and README, LICENSE and the
    like beside its metadata, or where all other files of their directory, and below it, hold
    records."""
    records, texts = set[Path](), set[Path]()
    for source in sources:
        if source.kind == "text" and not _CARD.fullmatch(source.path.name):
            texts.update(Path(source.key).parents)
        elif source.kind not in ("text", "other"):
            records.update(Path(source.key).parents)
    kept = []
    for source in sources:
        folder = Path(source.key).parent
        card = source.kind == "text" and _CARD.fullmatch(source.path.name) is not None
        if card and folder not in described and (folder not in records or folder in texts):
            with open(source.path, "rb") as file:
                card = source.ending == ".md" and bool(_HUB_CARD.match(file.read(_HEAD)))
        if card:
            found.left_out.append((_DESCRIBES, source.path))
        else:
            kept.append(source)
    return kept
