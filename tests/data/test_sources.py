"""What a corpus is read as: every format, compressed or not, links, and what is refused or left
out by name. Oracles are the libraries that write the formats."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.data.readers import read_documents, read_records
from nemo_hybrid.data.sources import Document, Record, Unusable, find_samples, find_sources
from nemo_hybrid.errors import UserError

TEXTS = ["one, two", 'three "quoted"\nsecond line', "vier ✓ fünf", " six\t"]


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts).encode()


def table(delimiter: str, texts: list[str] = TEXTS) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["n", "text"], *([1, t] for t in texts)])
    return out.getvalue().encode()


def parquet(texts: list[str] = TEXTS) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out)
    return out.getvalue()


def arrow(packing: str, content: bytes) -> bytes:
    import pyarrow as pa

    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, packing) as stream:
        stream.write(content)
    return bytes(out.getvalue())


zstd, lz4 = partial(arrow, "zstd"), partial(arrow, "lz4")
RECORDS = [{"text": t} for t in TEXTS]
ARRAY = json.dumps(RECORDS).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd, "lz4": lz4,
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
READ: dict[str, bytes] = {
    "a.jsonl": lines(),
    "a.ndjson": lines(),
    "A.JSONL": BOM + lines(),
    "lines.json": lines(),
    "bom.json": BOM + b"\n" + lines(),
    "array.json": ARRAY,
    "array bom.json": BOM + ARRAY,
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "strings.jsonl": b"".join(json.dumps(t).encode() + b"\n" for t in TEXTS),
    "a.csv": table(","),
    "bom.csv": BOM + table(","),
    "a.tsv": table("\t"),
    "a.parquet": parquet(),
    "no_name": parquet(),
    "part-00000": lines(),
    "a.json-00000-of-00002": lines(),
    "a.csv-00000-of-00002": table(","),
    "a.jsonl.bak": lines(),
    "a.jl": lines(),
    "array": ARRAY,
    "not really.jsonl.gz": lines(),
    **{f"a.jsonl.{ending}": pack(lines()) for ending, pack in PACK.items()},
    **{f"a.{ending}.json": pack(ARRAY) for ending, pack in PACK.items()},
    **{f"part {ending}": pack(lines()) for ending, pack in PACK.items()},
    "a.csv.gz": gzip.compress(table(",")),
    "members.jsonl.gz": gzip.compress(lines(TEXTS[:2])) + gzip.compress(lines(TEXTS[2:])),
    "frames.jsonl.zst": zstd(lines(TEXTS[:2])) + zstd(lines(TEXTS[2:])),
}


def documents(path: Path) -> list[str]:
    """Of everything that a path names, none of which may be unusable."""
    found = [d for s in find_sources([path]).sources for d in read_documents(s, "text", None)]
    assert all(isinstance(d, Document) for d in found), found
    assert all(0 <= d.done <= 1 for d in found)
    return [str(d.content) for d in found if isinstance(d, Document)]


@pytest.mark.parametrize("name", READ)
def test_records_are_read_whatever_they_lie_in(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    path.write_bytes(READ[name])
    assert documents(path) == TEXTS
    assert documents(path.parent) == TEXTS
    (source,) = find_samples([path.parent]).sources
    records = [*read_records(source, "text")]
    assert [r.content["text"] for r in records if isinstance(r, Record)] == TEXTS
    assert len({r.key for r in records if isinstance(r, Record)}) == len(TEXTS)


def test_json_under_another_name_is_no_text(tmp_path: Path) -> None:
    """Where it begins as records do; files of text and notebooks are text."""
    (tmp_path / "a.data").write_bytes(lines(["x" * 9000, "y"]))
    assert documents(tmp_path / "a.data") == ["x" * 9000, "y"]
    raw = {
        "a.txt": lines(),
        "b.ipynb": b'{\n "cells": []\n}',
        "c.js": b'{"a": 1} // more',
        "d": b"{",
    }
    for name, content in raw.items():
        (tmp_path / name).write_bytes(content)
        assert documents(tmp_path / name) == [content.decode()]


def test_one_object_is_one_record(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"text": "a\nb", "deep": {"x": [1, {}]}}, indent=indent))
        assert documents(path) == ["a\nb"]
    (tmp_path / "nothing.json").write_text("[ ]\n")
    (tmp_path / "empty.json").write_text("\n")
    assert documents(tmp_path / "nothing.json") == documents(tmp_path / "empty.json") == []


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as archive:
    archive.addfile(tarfile.TarInfo("a.txt"))
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as zipped:
    zipped.writestr("a.txt", "text")
NPY = io.BytesIO()
np.save(NPY, np.arange(3))
REFUSED: dict[str, tuple[bytes, str]] = {
    "a.pdf": (b"%PDF-1.7\ntext", "a PDF document: extract its text"),
    "a.docx": (ZIP.getvalue(), "a zip archive, as .docx and .npz are: unpack it"),
    "a.txt": (ZIP.getvalue(), "a zip archive"),
    "a.tar": (TAR.getvalue(), "a tar archive: unpack it"),
    "a.tgz": (gzip.compress(TAR.getvalue()), "a tar archive: unpack it"),
    "a.tar.zst": (zstd(TAR.getvalue()), "a tar archive: unpack it"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not text but binary"),
    "a.npy": (NPY.getvalue(), "not text but binary"),
    "a.safetensors": (b"\x08\0\0\0\0\0\0\0{}      ", "not text but binary"),
    "a.arrow": (b"ARROW1\0\0", "an Arrow file: name the directory that `datasets` saved"),
    "data-00000-of-00001.arrow": (b"\xff\xff\xff\xff\x10\0", "an Arrow file"),
    "utf16.csv": ("text\nhello".encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
    "a.parquet.gz": (gzip.compress(parquet()), "a compressed .parquet file: decompress it"),
    "cut.gz": (b"\x1f\x8b\x08", "a damaged gzip file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_never_taken_for_it(name: str, tmp_path: Path) -> None:
    content, why = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    for named in (path, tmp_path):
        (source,) = find_sources([named]).sources
        (found,) = read_documents(source, "text", None)
        assert isinstance(found, Unusable)
        assert (found.where, found.kind) == (str(path), "not readable")
        assert why in found.why
    if path.suffix in (".csv", ".jsonl", ".parquet", ".txt"):  # a fault, and nothing of other kinds
        assert find_samples([path]).sources == find_sources([path]).sources
    elif name != "a.parquet.gz":
        with pytest.raises(UserError, match=r"is .*; name \.jsonl, \.json, \.csv") as e:
            find_samples([path])
        assert why in str(e.value)


def faults(path: Path, content: bytes) -> str:
    """All that is said of a file."""
    path.write_bytes(content)
    said = []
    try:
        for source in find_sources([path]).sources:
            found = read_documents(source, "text", None)
            said += [f"{u.where}: {u.why}" for u in found if isinstance(u, Unusable)]
    except UserError as e:
        said.append(str(e))
    return "; ".join(said).replace(str(path), "FILE")


LONG = lines([np.random.default_rng(0).bytes(30_000).hex()])
POINTER = b"version https://git-lfs.github.com/spec/v1\noid"
FAULTS: dict[str, tuple[str, bytes, str]] = {
    "pointer": ("a.jsonl", POINTER, "run `git lfs pull`"),
    "pointer to a table": ("a.parquet", POINTER, "run `git lfs pull`"),
    "pointer to text": ("a.txt", POINTER, "run `git lfs pull`"),
    "no column": (
        "a.csv",
        b"body,url\nx,y\n",
        "FILE has no column 'text'; its columns are body, u",
    ),
    "semicolons": ("a.csv", b"text;url\nx;y\n", "FILE has no columns by ',' in its first line, "),
    "tabs": ("a.csv", b"text\turl\nx\ty\n", "write it with commas, or with tabs as .tsv"),
    "an array": ("a.jsonl", b'[{"text": "x"}]\n', "FILE line 1: a JSON array, not an object: "),
    "no header": ("a.csv", b"x" * 99 + b"\n", f"its columns are {'x' * 40}... (choose one with"),
    "no line": ("a.csv", b"", "FILE has no column 'text'; its columns are  (choose"),
    "twice": ("a.csv", b"text,text\nx,y\n", "FILE has two columns of the same name"),
    "fields": ("a.csv", b"text,url\nx,y\nx\n", "FILE line 3: 1 fields under 2 names of columns"),
    "quote": ("a.csv", b'text,url\n"x,y\n', "FILE line 2 cannot be read: unexpected end of data"),
    "tsv quote": ("a.tsv", b'text\turl\n"x" z\ty\n', "FILE line 2 cannot be read: "),
    "csv bytes": ("a.csv", b"text\nx\n\xff\n", "FILE line 3: not UTF-8"),
    "no field": ("a.json", b'[{"text": "x"}, {"body": 1}]', "FILE row 1: no text in field 'text'"),
    "numbers": ("a.json", b'[{"text": "x"}, [], 5]', "FILE row 2: not a JSON object"),
    "cut": ("a.json", b'[{"text": "x"},', "FILE is neither a JSON array nor objects in lines: "),
    "more": ("a.json", b'[{"text": "x"}]\n[]', "in lines: Extra data: line 2"),
    "objects": ("a.json", b'{\n"text": "x"\n}{\n"text": "x"\n}', "in lines: Extra data: line 3"),
    "bytes": ("a.json", b'[{"text": "\xff"}]', "in lines: 'utf-8' codec"),
    "deep": ("a.json", b"[" * 99_999, "in lines: maximum recursion"),
    "one object": ("a.json", b'{"version": 1,\n "data": []}', "FILE row 0: no text in field"),
    "a line": (
        "a.json",
        b'{"text": "x\n{"text": "y"}\n',
        "in lines: Invalid control character at: line 1",
    ),
    "short": ("a.jsonl.gz", gzip.compress(lines())[:-9], "FILE: a damaged gzip file (Compressed"),
    "crc": ("a.jsonl.gz", gzip.compress(LONG)[:-8] + bytes(8), "CRC check failed"),
    **{
        f"cut {ending}": (f"a.jsonl.{ending}", PACK[ending](LONG)[:-99], f"a damaged {name} file")
        for ending, name in {
            "gz": "gzip",
            "bz2": "bz2",
            "xz": "xz",
            "zst": "zstd",
        }.items()
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str, tmp_path: Path) -> None:
    file, content, said = FAULTS[name]
    assert said in faults(tmp_path / file, content)


def left_out(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for kind, where in find_sources([path]).left_out:
        found.setdefault(kind, []).append(str(where.relative_to(path)))
    return found


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = path.suffix in (".jsonl", ".json")
        path.write_bytes(lines([name]) if records else name.encode())


def test_what_belongs_to_a_data_set_is_left_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "README.md", "LICENSE", "data/a.jsonl", "data/b.json", "data/NOTICE.txt")
    write(data, "data/state.json")
    assert documents(data) == ["data/a.jsonl", "data/b.json"]
    metadata = ["data/state.json", "LICENSE", "README.md", "data/NOTICE.txt"]
    assert left_out(data) == {"metadata of data sets": metadata}
    assert len(find_samples([data]).sources) == 2
    # Beside other text they are text, unless they have the head of a card.
    write(data, "notes.md")
    assert documents(data)[:3] == ["LICENSE", "README.md", "notes.md"]
    assert "data/NOTICE.txt" not in documents(data)
    (data / "README.md").write_text("---\nlicense: mit\n---\n# Data")
    assert documents(data)[:2] == ["LICENSE", "notes.md"]
    assert documents(data / "LICENSE") == ["LICENSE"]
    write(tmp_path / "texts", "a.txt", "README_en.md", "deep/README", "dataset_infos.json")
    assert documents(tmp_path / "texts") == ["a.txt", "deep/README"]


def test_a_dataset_is_found_anywhere_below(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    root = tmp_path / "in"
    write(root, "a.txt", "deep/b.txt")
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(root / "deep" / "saved"))
    assert documents(root) == ["a.txt", "deep/b.txt", *TEXTS]
    keys = [s.key for s in find_sources([root]).sources]
    assert keys == ["a.txt", "deep/b.txt", "deep/saved"]
    assert left_out(root) == {}
    write(root, "deep/saved/notes.txt")
    assert left_out(root) == {"files beside a saved dataset": ["deep/saved/notes.txt"]}
    saved = find_sources([root / "deep" / "saved"]).sources
    assert [(s.key, s.kind) for s in saved] == [("saved", "dataset")]
    assert [s.kind for s in find_samples([root]).sources] == ["text", "text", "dataset"]
    splits = DatasetDict({"train": Dataset.from_dict({"text": TEXTS})})
    splits.save_to_disk(str(root / "splits"))
    with pytest.raises(UserError, match=r"in/splits holds the splits train: name one"):
        find_sources([root])


def test_a_dataset_gives_what_it_was_made_of(tmp_path: Path) -> None:
    """Its features may be stored as something else, such as JSON as text."""
    import datasets

    rows = [{"text": "a", "call": {"x": 1}}, {"text": "b", "call": {"x": "y", "z": [1, {}]}}]
    kinds = {"text": datasets.Value("string"), "call": datasets.features.features.Json()}
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    made.save_to_disk(str(tmp_path / "saved"))
    (source,) = find_sources([tmp_path]).sources
    records = read_records(source, "text")
    assert [record.content for record in records if isinstance(record, Record)] == rows


def test_links_are_followed_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "in", tmp_path / "outside"
    write(root, "a.txt", "deep/b.txt", ".git/c", ".d.txt", "__pycache__/e")
    write(outside, "x.txt", "y/z.txt")
    for link, target in {
        "aa.txt": outside / "x.txt", "again.txt": outside / "x.txt", "own.txt": root / "a.txt",
        "away": outside, "back": root, "deep/up": root / "deep", "ghost": tmp_path / "nowhere",
        "self": root / "self",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    assert documents(root) == ["a.txt", "deep/b.txt", "x.txt", "y/z.txt"]
    assert [s.key for s in find_sources([root]).sources] == [
        "a.txt", "deep/b.txt", "aa.txt", "away/y/z.txt",
    ]  # fmt: skip
    assert {kind: sorted(names) for kind, names in left_out(root).items()} == {
        "hidden and cache entries": [".d.txt", ".git", "__pycache__"],
        "links to nothing": ["ghost", "self"],
        "links to what is read already": [
            "again.txt", "away/x.txt", "back", "deep/up", "own.txt",
        ],
    }  # fmt: skip
    assert find_samples([root]).left_out == find_sources([root]).left_out


def test_a_snapshot_of_the_hub_s_cache(tmp_path: Path) -> None:
    """All of its files are links, to names that say nothing."""
    cache = tmp_path / "datasets--a--b"
    snapshot = cache / "snapshots" / "0123"
    (snapshot / "data").mkdir(parents=True)
    (cache / "blobs").mkdir()
    content = {"README.md": b"# Data", "data/train.jsonl.gz": gzip.compress(lines()),
               "data/test.parquet": parquet(["t"])}  # fmt: skip
    for number, (name, data) in enumerate(content.items()):
        (cache / "blobs" / str(number)).write_bytes(data)
        depth = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{depth}blobs/{number}")
    assert documents(snapshot) == ["t", *TEXTS]
    assert left_out(snapshot) == {"metadata of data sets": ["README.md"]}
    assert [s.key for s in find_samples([snapshot]).sources] == [
        "data/test.parquet", "data/train.jsonl.gz",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"hub's cache .*: name one .*snapshots/0123"):
        find_sources([tmp_path])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted({*READ, *REFUSED, "a.bin", "a.idx", "b.md"})),
    content=st.sampled_from([*READ.values(), *(content for content, _ in REFUSED.values())]),
    cut=st.none() | st.integers(0, 400),
    flip=st.none() | st.integers(0, 400),
    noise=st.binary(max_size=9),
)
def test_no_file_escapes_as_another_error(
    name: str, content: bytes, cut: int | None, flip: int | None, noise: bytes
) -> None:
    """Fuzz: under any name, damaged, cut and with anything behind it, a file is read or refused."""
    data = bytearray(content[:cut] + noise)
    if flip is not None and flip < len(data):
        data[flip] ^= 255
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        with suppress(UserError):
            for source in find_sources([folder]).sources:
                for item in read_documents(source, "text", 9):
                    assert isinstance(item, Document | Unusable)
