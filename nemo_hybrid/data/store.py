"""Stores: tokens of documents, or samples, on disk, memory-mapped and checksummed.

    OUT/tokenizer.json ...           the tokenizer, once for both splits
    OUT/train, OUT/heldout           one store each
        tokens-00000.bin ...         little-endian uint16 (uint32 beyond 65,536 ids), documents
                                     one after another, each ending with the eos token
        documents.npy                int64 [documents + 1], starts of documents, then the end
        store.json                   counts, ids, size and SHA-256 of each file

A sample store, for fine-tuning, holds samples as they are instead of documents, and beside them

        targets-00000.bin ...        uint8: 1 where a loss is taken when this token is predicted;
                                     as many as tokens in the shard of the same number

store.json never names a path: file names follow from how many there are.
"""

from __future__ import annotations

import array
import json
from bisect import bisect_right
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import (
    FileRecord,
    NewFile,
    hash_file,
    refuse_pointer,
    sync_directory,
    write_file,
)

TOKENS = "nemo_hybrid token store"
SAMPLES = "nemo_hybrid sample store"
_CONTENT = {TOKENS: "a token store", SAMPLES: "a store of samples for fine-tuning"}
_MADE_BY = {
    TOKENS: "`nemo-hybrid prepare`, which `pretrain` takes",
    SAMPLES: "`nemo-hybrid prepare --for finetune`, which `finetune` takes",
}
VERSION = 1
TRAIN, HELDOUT = "train", "heldout"
RECORD = "prepare.json"
"""How the stores beside it were made."""
INDEX = "documents.npy"
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 1 << 28

Verify = Literal["full", "size"]
N = TypeVar("N", bound=np.generic)


@checked(config={"strict": True}, frozen=True)
class StoreInfo:
    """What store.json says."""

    format: str
    version: int
    dtype: str
    tokens: int
    documents: int
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    files: dict[str, FileRecord]
    sources: dict[str, Any]


def token_dtype(vocab_size: int) -> str:
    """NumPy name of the smallest type that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def shard_name(number: int, part: str = "tokens") -> str:
    return f"{part}-{number:05d}.bin"


def holds_samples(path: Path) -> bool:
    """Whether a store is one of samples, as far as it says itself."""
    try:
        return SAMPLES in (path / "store.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


@dataclass
class StoreWriter:
    """Writes one store into a directory that it makes; store.json comes last. It is one of samples
    if targets are added."""

    path: Path
    _: KW_ONLY
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        self.path.mkdir()
        self.dtype = np.dtype(token_dtype(self.vocab_size))
        self.tokens = 0
        self._starts = array.array("q", [0])
        self._files: dict[str, FileRecord] = {}
        self._shard: dict[str, NewFile] = {}
        self._format = ""

    @property
    def documents(self) -> int:
        return len(self._starts) - 1

    def add(self, ids: NDArray[np.integer], targets: NDArray[np.bool_] | None = None) -> None:
        """Append a document of at least one token, ending it with eos if it does not already; in a
        sample store a sample as it is, with targets of the same length."""
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids must lie in range({self.vocab_size})")
        self._format = TOKENS if targets is None else SAMPLES
        if targets is None and ids[-1] != self.eos_id:
            ids = np.append(ids, self.eos_id)
        data = {"tokens": ids.astype(self.dtype)}
        if targets is not None:
            data["targets"] = targets.astype(np.uint8)
        at, length = 0, len(ids)
        while at < length:
            if not self._shard:
                number = len(self._files) // len(data)
                self._shard = {k: NewFile(self.path / shard_name(number, k)) for k in data}
            part = min(length - at, self.shard_tokens - self.tokens % self.shard_tokens)
            for kind, file in self._shard.items():
                file.write(data[kind][at : at + part].tobytes())
            at += part
            self.tokens += part
            if self.tokens % self.shard_tokens == 0:
                self._close_shard()
        self._starts.append(self.tokens)

    def finish(self, sources: dict[str, Any]) -> None:
        """Close the files and write the index and store.json."""
        self._close_shard()
        with NewFile(self.path / INDEX) as index:
            np.save(index, np.array(self._starts, dtype="<i8"), allow_pickle=False)
        self._files[INDEX] = index.record
        info = StoreInfo(
            format=self._format,
            version=VERSION,
            dtype=self.dtype.str,
            tokens=self.tokens,
            documents=self.documents,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            tokenizer_sha256=self.tokenizer_sha256,
            files=self._files,
            sources=sources,
        )
        write_file(self.path / "store.json", [json.dumps(asdict(info), indent=2).encode()])
        sync_directory(self.path)

    def close(self) -> None:
        """Close open files without finishing the store; for the way out after an error."""
        for file in self._shard.values():
            file.close()
        self._shard = {}

    def _close_shard(self) -> None:
        for file in self._shard.values():
            self._files[file.path.name] = file.finish()
        self._shard = {}


class Store:
    """Read-only view of a store; what it holds stays on disk until asked for."""

    def __init__(self, path: Path, info: StoreInfo) -> None:
        """Map the files of a store that is known to be sound. Raises OSError, ValueError."""
        self.path = path
        self.info = info
        numbers = range(_shards_of(info))
        self._tokens = [np.memmap(path / shard_name(i), info.dtype, "r") for i in numbers]
        self._targets = [
            np.memmap(path / shard_name(i, "targets"), np.uint8, "r")
            for i in (numbers if info.format == SAMPLES else ())
        ]
        self._ends = list(accumulate(len(s) for s in self._tokens))
        self._starts: NDArray[np.int64] = np.lib.format.open_memmap(path / INDEX, mode="r")

    @property
    def tokenizer_dir(self) -> Path:
        """Directory that transformers' AutoTokenizer loads the store's tokenizer from."""
        return self.path.parent

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document or sample."""
        return np.diff(self._starts)

    @classmethod
    def open(cls, path: str | Path, *, samples: bool = False, verify: Verify = "full") -> Store:
        """Open a store of documents, or of samples, checking the tokenizer's hash, every file's
        size and the document index, and with verify="full" the SHA-256 of every file. Raises
        UserError."""
        path = Path(path)
        info = _read_info(path, SAMPLES if samples else TOKENS)
        try:
            for name, entry in info.files.items():
                _check_file(path / name, entry, verify)
            tokenizer = path.parent / TOKENIZER
            tokenizer.stat()  # a missing one is reported like a missing shard
            if hash_file(tokenizer) != info.tokenizer_sha256:
                raise UserError(
                    f"{tokenizer} is not the tokenizer that {path} was made with; "
                    "put the original back or prepare the store again"
                )
            store = cls(path, info)
        except FileNotFoundError as e:
            raise UserError(f"{path}: {e.filename} is missing; prepare the store again") from e
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read: {e}; prepare the store again") from e
        starts = store._starts
        sound = (
            starts.dtype == np.dtype("<i8")
            and starts.shape == (info.documents + 1,)
            and starts[0] == 0
            and starts[-1] == info.tokens
            and (verify == "size" or bool((store.lengths > 0).all()))
        )
        if not sound:
            raise UserError(f"{path / INDEX} does not fit store.json; prepare the store again")
        return store

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start to stop, across shards."""
        return self._read(self._tokens, start, stop, np.int64)

    def _read(self, shards: list[np.memmap], start: int, stop: int, dtype: type[N]) -> NDArray[N]:
        """Elements start to stop, across shards."""
        out = np.empty(stop - start, dtype=dtype)
        at = start
        while at < stop:
            number = bisect_right(self._ends, at)
            first = self._ends[number - 1] if number else 0
            part = shards[number][at - first : stop - first]
            out[at - start : at - start + len(part)] = part
            at += len(part)
        return out

    def document_starts(self, start: int, stop: int) -> NDArray[np.bool_]:
        """True for each token from start to stop that begins a document."""
        first, last = np.searchsorted(self._starts[:-1], [start, stop])
        out = np.zeros(stop - start, dtype=np.bool_)
        out[self._starts[first:last] - start] = True
        return out

    def windows(self, sequence_length: int) -> int:
        """Number of training windows: each takes sequence_length tokens and peeks at one more."""
        return max(0, (len(self) - 1) // sequence_length)

    def window(
        self, number: int, sequence_length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens and document starts of a window, both [sequence_length + 1]."""
        start = number * sequence_length
        stop = start + sequence_length + 1
        return self.read(start, stop), self.document_starts(start, stop)

    def sample(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """ids and targets of a sample, both [length]; targets: a loss is taken where this token is
        predicted (never the first)."""
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        return self.read(start, stop), self._read(self._targets, start, stop, np.bool_)


def _shards_of(info: StoreInfo) -> int:
    return (len(info.files) - 1) // (2 if info.format == SAMPLES else 1)


def _read_info(path: Path, wanted: str) -> StoreInfo:
    name = path / "store.json"
    try:
        refuse_pointer(name)
        content = name.read_bytes()
        raw = json.loads(content)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"{path} is not {_CONTENT[wanted]} (it has no store.json); make one with "
            + _MADE_BY[wanted]
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{name} cannot be read: {e}; prepare the store again") from e
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != wanted:
        if isinstance(found, str) and found in _CONTENT:
            raise UserError(
                f"{path} is {_CONTENT[found]}, and {_CONTENT[wanted]} is needed: "
                f"one that is made by {_MADE_BY[wanted]}"
            )
        raise UserError(f"{name} does not describe {_CONTENT[wanted]}; prepare the store again")
    if raw.get("version") != VERSION:
        raise UserError(
            f"{name} has format version {raw.get('version')!r}, this program reads {VERSION}; "
            "prepare the store again with this version"
        )
    try:
        info = TypeAdapter(StoreInfo).validate_json(content)
    except ValidationError as e:
        field = e.errors()[0]["loc"][0]
        raise UserError(f"{name}: {field} is missing or malformed; prepare the store again") from e
    sizes = {file: record.size for file, record in info.files.items()}
    dtype = np.dtype(token_dtype(info.vocab_size))
    shards = [sizes.get(shard_name(i), 0) for i in range(_shards_of(info))]
    expected = {INDEX: sizes.get(INDEX)} | {shard_name(i): size for i, size in enumerate(shards)}
    if wanted == SAMPLES:
        targets = (size // dtype.itemsize for size in shards)
        expected |= {shard_name(i, "targets"): size for i, size in enumerate(targets)}
    consistent = (
        sizes == expected
        and info.dtype == dtype.str
        and 0 <= info.eos_id < info.vocab_size
        and info.tokens >= info.documents > 0
        and all(size > 0 and size % dtype.itemsize == 0 for size in shards)
        and sum(shards) == info.tokens * dtype.itemsize
    )
    if not consistent:
        raise UserError(f"{name} contradicts itself; prepare the store again")
    return info


def _check_file(path: Path, entry: FileRecord, verify: Verify) -> None:
    size = path.stat().st_size
    refuse_pointer(path)
    if size != entry.size:
        raise UserError(
            f"{path} has {size} bytes, store.json says {entry.size}; prepare the store again"
        )
    if verify == "full" and hash_file(path) != entry.sha256:
        raise UserError(f"{path} is damaged (its SHA-256 differs); prepare the store again")
