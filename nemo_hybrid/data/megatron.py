"""Megatron-LM's indexed dataset: NAME.bin with token ids, NAME.idx with where documents lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemo_hybrid.data.sources import Document, Source
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import refuse_pointer

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_megatron(source: Source, vocab_size: int | None) -> Iterator[Document]:
    """The documents of a pair. Raises UserError for a damaged one, and for ids outside the
    vocabulary."""
    if vocab_size is None:
        raise UserError(
            f"{source.path} holds token ids: name the tokenizer that made them (--tokenizer DIR)"
        )
    tokens, lengths, offsets, bounds = _open(source.path)
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


def _open(path: Path) -> tuple[np.memmap, np.memmap, np.memmap, np.memmap]:
    """Token ids; int32 length and int64 byte offset in the .bin file of each sequence; int64
    document bounds: numbers of first sequences, then the total.

    Version 1 of the .idx file (Megatron-LM, core/datasets/indexed_dataset.py), all little-endian: 9
    bytes "MMIDIDX" and two zeros, uint64 version, uint8 dtype code, uint64 number of sequences,
    uint64 number of bounds; then the three arrays. Raises UserError when the two files do not fit:
    the sequences must fill the .bin file, one behind the other.
    """
    index = path.with_suffix(".idx")
    try:
        refuse_pointer(index)
        with open(index, "rb") as f:
            header = f.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{index} is not a Megatron index (wrong magic number)")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{index}: version {version} with dtype code {code} is not supported "
                "(version 1 with an integer type is)"
            )
        start = len(header)
        expected = start + sequences * 12 + documents * 8
        if index.stat().st_size != expected:
            raise UserError(f"{index} is truncated or damaged: expected {expected} bytes")
        if documents < 2 or not path.stat().st_size:
            raise UserError(f"{path} and {index.name} hold no documents")
        lengths = np.memmap(index, "<i4", "r", start, (sequences,))
        offsets = np.memmap(index, "<i8", "r", start + 4 * sequences, (sequences,))
        bounds = np.memmap(index, "<i8", "r", start + 12 * sequences, (documents,))
        tokens = np.memmap(path, _DTYPES[code], "r")
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} is missing: Megatron data is a .bin and .idx pair") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} and {index.name} cannot be read: {e}") from e
    ends = np.cumsum(lengths, dtype=np.int64)
    sound = (
        (lengths >= 0).all()
        and (offsets >= 0).all()
        and (offsets // tokens.itemsize + lengths <= len(tokens)).all()
        and bounds[0] == 0
        and bounds[-1] == sequences
        and (np.diff(bounds) >= 0).all()
    )
    if not sound:
        raise UserError(f"{index} points outside {path.name}: the pair is damaged")
    apart = np.flatnonzero(offsets != (ends - lengths) * tokens.itemsize)
    total = int(ends[-1]) if sequences else 0
    if len(apart) or total != len(tokens):
        what = (
            f"sequence {apart[0]} does not begin where the one before it ends"
            if len(apart)
            else f"it accounts for {total:,} of {len(tokens):,} tokens"
        )
        raise UserError(
            f"{index} does not fit {path.name}: {what}. Every document might be shifted, as by "
            "lengths that leave out the token that ends a document; make the pair again"
        )
    return tokens, lengths, offsets, bounds
