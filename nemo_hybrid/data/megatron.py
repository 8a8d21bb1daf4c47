"""Megatron-LM's indexed dataset: NAME.bin with token ids, NAME.idx with where documents lie.

Layout of version 1 of the .idx file (Megatron-LM, core/datasets/indexed_dataset.py), all
little-endian: 9 bytes "MMIDIDX" and two zeros, uint64 version, uint8 dtype code, uint64 number of
sequences, uint64 number of document bounds; then int32 length of each sequence, int64 byte offset
of each sequence in the .bin file, int64 document bounds (numbers of first sequences, then the
total).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.errors import UserError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronDataset:
    """Documents of one .bin/.idx pair. Raises UserError when the two do not fit."""

    def __init__(self, path: Path) -> None:
        """path: the .bin file."""
        self.path = path
        index = path.with_suffix(".idx")
        try:
            with open(index, "rb") as f:
                header = f.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise UserError(f"{index} is not a Megatron index (wrong magic number)")
            _, version, code, sequences, bounds = _HEADER.unpack(header)
            if version != 1 or code not in _DTYPES:
                raise UserError(
                    f"{index}: version {version} with dtype code {code} is not supported "
                    "(version 1 with an integer type is)"
                )
            expected = _HEADER.size + sequences * 12 + bounds * 8
            if index.stat().st_size != expected or bounds < 2:
                raise UserError(f"{index} is truncated or damaged: expected {expected} bytes")
            offset = _HEADER.size
            self._lengths = np.memmap(index, "<i4", "r", offset, (sequences,))
            self._offsets = np.memmap(index, "<i8", "r", offset + 4 * sequences, (sequences,))
            self._bounds = np.memmap(index, "<i8", "r", offset + 12 * sequences, (bounds,))
            self._tokens = np.memmap(path, _DTYPES[code], "r")
        except FileNotFoundError as e:
            raise UserError(
                f"{e.filename} is missing: Megatron data is a .bin and .idx pair"
            ) from e
        except (OSError, ValueError) as e:
            raise UserError(f"{path} and {index.name} cannot be read: {e}") from e
        item = self._tokens.itemsize
        ends = self._offsets // item + self._lengths
        sound = (
            (self._lengths >= 0).all()
            and (self._offsets >= 0).all()
            and (self._offsets % item == 0).all()
            and (ends >= 0).all()  # no overflow
            and (ends <= len(self._tokens)).all()
            and self._bounds[0] == 0
            and self._bounds[-1] == sequences
            and (np.diff(self._bounds) >= 0).all()
        )
        if not sound:
            raise UserError(f"{index} points outside {path.name}: the pair is damaged")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def documents(self, vocab_size: int) -> Iterator[NDArray[np.int64]]:
        """Token ids of each document. Raises UserError for an id outside the vocabulary."""
        item = self._tokens.itemsize
        for number in range(len(self)):
            parts = [
                self._tokens[self._offsets[s] // item :][: self._lengths[s]]
                for s in range(self._bounds[number], self._bounds[number + 1])
            ]
            ids = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                bad = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
                raise UserError(
                    f"{self.path} document {number}: token id {bad} lies outside the vocabulary of "
                    f"{vocab_size}; name the tokenizer that the file was made with"
                )
            yield ids
