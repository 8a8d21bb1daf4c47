"""Documents packed into rows, as every op that mixes tokens needs to know them.

Shapes: B rows, S tokens per row, T = B*S.
"""

from __future__ import annotations

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
        starts_BS = torch.ones_like(numbers_BS, dtype=torch.bool)
        starts_BS[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
        return Documents.from_starts(starts_BS)

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with the tensors on device."""
        return replace(
            self,
            seq_idx_BS=to_device(self.seq_idx_BS, device),
            cu_seqlens=to_device(self.cu_seqlens, device),
            real_BS=None if self.real_BS is None else to_device(self.real_BS, device),
        )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. The host waits for no GPU: it copies into pinned memory, out of which
    the GPU fetches when it comes to it. On "meta" there is nothing to fetch."""
    kind = torch.device(device).type
    if kind == "meta":
        return torch.empty_like(tensor, device=device)
    if kind == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
