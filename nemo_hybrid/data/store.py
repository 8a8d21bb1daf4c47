"""The token store: tokens of documents on disk, memory-mapped and checksummed.

    OUT/tokenizer.json ...           the tokenizer, once for both splits
    OUT/train, OUT/heldout           one store each
        tokens-00000.bin ...         little-endian uint16 (uint32 beyond 65,536 ids), documents
                                     one after another, each ending with the eos token
        documents.npy                int64 [documents + 1], starts of documents, then the end
        store.json                   counts, ids, size and SHA-256 of each file

store.json never names a path: file names follow from how many there are.
"""

from __future__ import annotations

import array
import json
from bisect import bisect_right
from dataclasses import KW_ONLY, asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import NewFile, hash_file, sync_directory, write_file

FORMAT = "nemo_hybrid token store"
VERSION = 1
INDEX = "documents.npy"
TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 1 << 28
_ITEM_SIZES = {"<u2": 2, "<u4": 4}

Verify = Literal["full", "size"]


@dataclass(frozen=True)
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
    files: dict[str, Any]
    sources: dict[str, Any]


def token_dtype(vocab_size: int) -> str:
    """NumPy name of the smallest type that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


@dataclass
class StoreWriter:
    """Writes one store into a directory that it makes; store.json comes last."""

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
        self._files: dict[str, dict[str, Any]] = {}
        self._shard: NewFile | None = None

    @property
    def documents(self) -> int:
        return len(self._starts) - 1

    def add(self, ids: NDArray[np.int64]) -> None:
        """Append a document of at least one token, ending it with eos if it does not already."""
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids must lie in range({self.vocab_size})")
        if ids[-1] != self.eos_id:
            ids = np.append(ids, self.eos_id)
        data = ids.astype(self.dtype)
        while len(data):
            if self._shard is None:
                self._shard = NewFile(self.path / shard_name(len(self._files)))
            part = data[: self.shard_tokens - self.tokens % self.shard_tokens]
            self._shard.write(part.tobytes())
            self.tokens += len(part)
            data = data[len(part) :]
            if self.tokens % self.shard_tokens == 0:
                self._close_shard()
        self._starts.append(self.tokens)

    def finish(self, sources: dict[str, Any]) -> None:
        """Close the files and write the index and store.json."""
        self._close_shard()
        with NewFile(self.path / INDEX) as index:
            np.save(index, np.array(self._starts, dtype="<i8"), allow_pickle=False)
        self._files[INDEX] = asdict(index.record)
        info = StoreInfo(
            format=FORMAT,
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
        """Close an open file without finishing the store; for the way out after an error."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._files[self._shard.path.name] = asdict(self._shard.finish())
            self._shard = None


class TokenStore:
    """Read-only view of a store; tokens stay on disk until asked for."""

    def __init__(
        self, path: Path, info: StoreInfo, shards: list[np.memmap], starts: NDArray[np.int64]
    ) -> None:
        self.path = path
        self.info = info
        self._shards = shards
        self._ends = list(accumulate(len(s) for s in shards))
        self._starts = starts

    @property
    def tokenizer_dir(self) -> Path:
        """Directory that transformers' AutoTokenizer loads the store's tokenizer from."""
        return self.path.parent

    def __len__(self) -> int:
        """Number of tokens."""
        return self.info.tokens

    @staticmethod
    def open(path: str | Path, verify: Verify = "full") -> TokenStore:
        """Open a store, checking the tokenizer's hash, every file's size and the document index,
        and with verify="full" the SHA-256 of every file. Raises UserError."""
        path = Path(path)
        info = _read_info(path)
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
            shards = [
                np.memmap(path / shard_name(i), dtype=info.dtype, mode="r")
                for i in range(len(info.files) - 1)
            ]
            starts = np.lib.format.open_memmap(path / INDEX, mode="r")
        except FileNotFoundError as e:
            raise UserError(f"{path}: {e.filename} is missing; prepare the store again") from e
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read: {e}; prepare the store again") from e
        sound = (
            starts.dtype == np.dtype("<i8")
            and starts.shape == (info.documents + 1,)
            and starts[0] == 0
            and starts[-1] == info.tokens
            and (verify == "size" or bool((np.diff(starts) > 0).all()))
        )
        if not sound:
            raise UserError(f"{path / INDEX} does not fit store.json; prepare the store again")
        return TokenStore(path, info, shards, starts)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start to stop, across shards."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start} to {stop} lie outside a store of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            number = bisect_right(self._ends, at)
            first = self._ends[number - 1] if number else 0
            part = self._shards[number][at - first : stop - first]
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


def _read_info(path: Path) -> StoreInfo:
    name = path / "store.json"
    try:
        raw = json.loads(name.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"{path} is not a token store (it has no store.json); make one with "
            "`nemo-hybrid prepare`"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{name} cannot be read: {e}; prepare the store again") from e
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{name} does not describe a token store; prepare the store again")
    if raw.get("version") != VERSION:
        raise UserError(
            f"{name} has format version {raw.get('version')!r}, this program reads {VERSION}; "
            "prepare the store again with this version"
        )
    kinds = {"str": str, "int": int, "dict[str, Any]": dict}
    for f in fields(StoreInfo):
        # bool is an int to isinstance, so compare types.
        if type(raw.get(f.name)) is not kinds[str(f.type)]:
            raise UserError(f"{name}: {f.name} is missing or malformed; prepare the store again")
    info = StoreInfo(**{f.name: raw[f.name] for f in fields(StoreInfo)})
    shards = [shard_name(i) for i in range(len(info.files) - 1)]
    sizes = [_entry_size(info.files.get(s)) for s in shards]
    item = _ITEM_SIZES.get(info.dtype, 0)
    consistent = (
        set(info.files) == {INDEX, *shards}
        and item > 0
        and info.dtype == token_dtype(info.vocab_size)
        and 0 <= info.eos_id < info.vocab_size
        and info.tokens >= info.documents > 0
        and all(size > 0 and size % item == 0 for size in sizes)
        and sum(sizes) == info.tokens * item
        and _entry_size(info.files.get(INDEX)) > 0
    )
    if not consistent:
        raise UserError(f"{name} contradicts itself; prepare the store again")
    return info


def _entry_size(entry: object) -> int:
    """Size of a file's entry in store.json, -1 if the entry is malformed."""
    if isinstance(entry, dict) and type(entry.get("size")) is int:
        return int(entry["size"]) if isinstance(entry.get("sha256"), str) else -1
    return -1


def _check_file(path: Path, entry: dict[str, Any], verify: Verify) -> None:
    size = path.stat().st_size
    if size != entry["size"]:
        raise UserError(
            f"{path} has {size} bytes, store.json says {entry['size']}; prepare the store again"
        )
    if verify == "full" and hash_file(path) != entry["sha256"]:
        raise UserError(f"{path} is damaged (its SHA-256 differs); prepare the store again")
