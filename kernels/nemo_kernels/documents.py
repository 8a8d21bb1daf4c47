"""Documents packed into rows, as every op that mixes tokens needs to know them; and rows that are
divided over processes.

Shapes: B rows, S tokens per row, T = B*S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Made once for a batch, on the host; layers only read it, so none waits for a GPU."""

    seq_idx_BS: Tensor
    """int32: index of the document within its row, from 0."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: where documents begin in the T flattened tokens, then T."""
    max_seqlen: int
    """Tokens of the longest document."""
    spans: tuple[tuple[int, int, int], ...]
    """Row, first token and end of every document, in order."""
    real_BS: Tensor | None = None
    """bool: False for padding, which forms documents of its own; None: there is none."""

    @staticmethod
    def from_starts(starts_BS: Tensor, real_BS: Tensor | None = None) -> Documents:
        """From a bool per token, True where a document begins. Rows always begin one."""
        rows, length = starts_BS.shape
        starts_BS = starts_BS.clone()
        starts_BS[:, 0] = True
        bounds = [*starts_BS.flatten().nonzero()[:, 0].tolist(), rows * length]
        spans = tuple(
            (start // length, start % length, start % length + end - start)
            for start, end in pairwise(bounds)
        )
        return Documents(
            seq_idx_BS=(starts_BS.cumsum(1) - 1).int(),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=starts_BS.device),
            max_seqlen=max(end - start for _, start, end in spans),
            spans=spans,
            real_BS=real_BS,
        )

    @staticmethod
    def from_numbers(numbers_BS: Tensor) -> Documents:
        """From a number per token that changes where a document begins. Waits for a GPU."""
        return Documents.from_starts(_changes(numbers_BS))

    @property
    def packing(self) -> Documents | None:
        """None where every row is one document."""
        return self if len(self.spans) > len(self.seq_idx_BS) else None

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with the tensors on device."""
        return replace(
            self,
            seq_idx_BS=to_device(self.seq_idx_BS, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
            real_BS=None if self.real_BS is None else to_device(self.real_BS, device),
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """One part of every row: consecutive tokens, of which other processes have the other parts.
    Made on the host, as `Documents` are; of these None says that every row is one document."""

    local: Documents | None
    """Of the part alone, as if no document went on from tokens before it."""
    halo: Documents | None
    """Of the part and the tokens before it that the convolution reaches. Those before the first
    part belong to no row: they are a document of their own."""
    whole: Documents | None
    """Of the whole rows."""
    continues_B: Tensor
    """bool: whether the document of the first token begins before it."""
    sizes: tuple[int, ...]
    """Tokens of every part."""
    real_BS: Tensor | None
    """bool, of the part: False for padding; None: there is none."""

    @staticmethod
    def cut(documents: Documents, sizes: Sequence[int], part: int, reach: int) -> Shard:
        """Part number ``part`` of rows divided into parts of ``sizes`` tokens; the convolution
        reaches ``reach`` tokens back, at most as many as the smallest part has."""
        starts_BS, real_BS = _changes(documents.seq_idx_BS), documents.real_BS
        low = sum(sizes[:part])
        high = low + sizes[part]
        before_BS = starts_BS[:, max(0, low - reach) : low]
        if part == 0:
            before_BS = starts_BS.new_zeros(len(starts_BS), reach)
        if real_BS is not None:
            real_BS = real_BS[:, low:high]
        own_BS = starts_BS[:, low:high]
        return Shard(
            local=Documents.from_starts(own_BS, real_BS).packing,
            halo=Documents.from_starts(torch.cat([before_BS, own_BS], 1)).packing,
            whole=documents.packing,
            continues_B=~starts_BS[:, low],
            sizes=tuple(sizes),
            real_BS=real_BS,
        )

    def to(self, device: torch.device | str) -> Shard:
        """The same part with the tensors on device."""
        local, halo, whole = (d and d.to(device) for d in (self.local, self.halo, self.whole))
        return replace(
            self,
            local=local,
            halo=halo,
            whole=whole,
            continues_B=to_device(self.continues_B, device),
            real_BS=None if self.real_BS is None else to_device(self.real_BS, device),
        )


@dataclass(frozen=True, eq=False)
class Tile:
    """Tokens of every row, some or all, for what knows nothing of the others. K experts of each."""

    real_BS: Tensor | None
    """bool: False for padding; None: there is none."""
    experts_BSK: Tensor | None = None
    """Those that tokens are sent to, whatever a router says; -1: as it says."""


Packing = Documents | Shard | None
"""What layers are told of rows; None: every row is one document, and whole."""


def divided(total: int, parts: int) -> list[int]:
    """Sizes of so many parts, as equal as can be, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def _changes(numbers_BS: Tensor) -> Tensor:
    """bool: where a number is another one than that before it in its row."""
    starts_BS = torch.ones_like(numbers_BS, dtype=torch.bool)
    starts_BS[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
    return starts_BS


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. The host waits for no GPU: it copies into pinned memory, out of which
    the GPU fetches when it comes to it. On "meta" there is nothing to fetch."""
    kind = torch.device(device).type
    if kind == "meta":
        return torch.empty_like(tensor, device=device)
    if kind == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
