"""safetensors files, written and read as streams: no second pass to hash, no copy of a whole file.

Format: https://github.com/huggingface/safetensors#format. Order of tensors and spacing of the
header are those of the reference library, so that equal contents give equal bytes. What is read is
checked more strictly than there: a key given twice is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, parse_json

# In the order in which the reference library places tensors (then by name).
DTYPES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(DTYPES)
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the reference library's limit
_MAX_DIMS = 8


def safetensors_parts(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    fetch: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one part per tensor; tensors may be on any device.

    With ``fetch`` the given tensors say shape and dtype only (they may be on the meta device), and
    it is called for each tensor when its turn comes.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensor_bytes(fetch(name) if fetch else tensors[name])


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view where the tensor allows it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor; offsets are bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """``raw``: the header as it stands in the file, its length included. ``entries`` are in the
    order of the data, which they cover without gaps."""

    raw: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)


class TensorFile:
    """A safetensors file open for reading; a context manager.

    Raises UserError naming the path when it is absent, truncated, or its header is broken; then
    nothing larger than the header has been read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming("read", path):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, rows: range | None = None) -> torch.Tensor:
        """A tensor, or consecutive rows of its first dimension; other bytes are not read."""
        entry = self.header.entries[name]
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        tensor = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype])
        self._fill(tensor_bytes(tensor), self._offset(entry, rows))
        return tensor

    @torch.no_grad()
    def read_into(self, target: torch.Tensor, name: str, rows: range | None = None) -> None:
        """The same into a tensor of that shape, without a copy on the way where it can take the
        bytes as they are."""
        entry = self.header.entries[name]
        as_stored = target.dtype == TORCH_DTYPES[entry.dtype] and target.is_contiguous()
        wanted = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if target.is_cpu and as_stored and target.shape == wanted:
            self._fill(tensor_bytes(target), self._offset(entry, rows))
        else:
            target.copy_(self.read(name, rows))

    def _offset(self, entry: Entry, rows: range | None) -> int:
        """Where the bytes begin in the file."""
        start = len(self.header.raw) + entry.start
        if rows is None or not entry.shape[0]:
            return start
        return start + rows.start * ((entry.stop - entry.start) // entry.shape[0])

    def _fill(self, view: memoryview, offset: int) -> None:
        with naming("read", self.path):
            self._file.seek(offset)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise self._invalid("it ends early")
                view = view[count:]

    def _invalid(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a valid safetensors file: {why}")

    def _read_header(self) -> Header:
        with naming("read", self.path):
            size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._invalid("it is too short to have a header")
        length = bytearray(8)
        self._fill(memoryview(length), 0)
        count = int.from_bytes(length, "little")
        if count > min(size - 8, _MAX_HEADER):
            raise self._invalid(f"its header claims {count} bytes, the file has {size}")
        text = bytearray(count)
        self._fill(memoryview(text), 8)
        if text[:1] != b"{":
            raise self._invalid("its header does not begin with {")
        listing = parse_json(bytes(text), self.path)
        try:
            metadata = listing.pop("__metadata__", {})
            valid = all(isinstance(text, str) for text in metadata.values())
            entries = {name: _entry(**value) for name, value in listing.items()}
            "".join([*entries, *metadata.keys(), *metadata.values()]).encode()
        except (TypeError, ValueError, AttributeError) as error:
            raise self._invalid(f"its header does not describe tensors ({error})") from None
        if not valid:
            raise self._invalid("its metadata are not texts")
        ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
        reached = 0
        for name, entry in ordered:
            if entry.start != reached:
                raise self._invalid(f"the data before {name} have a gap or overlap")
            reached = entry.stop
        if reached != size - 8 - count:
            raise self._invalid(f"it has {size - 8 - count} bytes of data, its header {reached}")
        return Header(bytes(length + text), dict(ordered), metadata)


def _entry(dtype: Any, shape: Any, data_offsets: Any) -> Entry:
    """One entry of a header. Raises ValueError or TypeError unless it makes sense by itself."""
    start, stop = data_offsets
    for numbers in (shape, data_offsets):
        if not isinstance(numbers, list) or any(type(n) is not int for n in numbers):
            raise ValueError(f"not whole numbers: {str(numbers)[:80]}")
        if any(not 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"out of range: {str(numbers)[:80]}")
    if not isinstance(dtype, str) or start > stop or len(shape) > _MAX_DIMS:
        raise ValueError(f"impossible: {dtype!r:.80}, {str(shape)[:80]}, {start} to {stop}")
    known = TORCH_DTYPES.get(dtype)
    if known is not None and prod(shape) * known.itemsize != stop - start:
        raise ValueError(f"{dtype} {shape} does not take {stop - start} bytes")
    return Entry(dtype, tuple(shape), start, stop)
