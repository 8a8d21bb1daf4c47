"""One micro-batch of token windows, with everything a layer may need to know about documents.

Shape suffixes: B rows, S tokens per row, W = S + 1 tokens of a window, T = B*S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Token windows and their document structure; made once, never repaired by a layer.

    A document that a window cuts counts as beginning at the start of the row.
    """

    ids_BS: Tensor
    """int64 token ids."""
    labels_BS: Tensor
    """int64 next token, 0 where loss_mask_BS is False."""
    loss_mask_BS: Tensor
    """bool; False where the next token belongs to another document, and in padding rows. Targets
    further ahead (multi-token prediction) must honour the mask of their own position too."""
    seq_idx_BS: Tensor
    """int32 index of the document within its row, from 0."""
    cu_seqlens: Tensor
    """int32 [documents + 1]: starts of the documents in the T flattened tokens, then T. Every
    start of a row is one."""
    positions_BS: Tensor
    """int32 position within the document, from 0."""
    max_seqlen: int
    """Tokens of the longest document."""
    sample_ids: tuple[int, ...] = ()
    """Global sample number of each row; -1 for a padding row."""

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document. Reads shapes only: no device sync."""
        return self.cu_seqlens.shape[0] - 1 > self.ids_BS.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    @staticmethod
    def from_windows(
        tokens_BW: Tensor,
        document_starts_BW: Tensor,
        sample_ids: tuple[int, ...] = (),
        keep_B: Tensor | None = None,
    ) -> Batch:
        """Cut windows of S + 1 tokens into inputs and labels.

        tokens_BW: integers. document_starts_BW: bool, True where a document begins.
        keep_B: bool, False for padding rows, whose every label is masked.
        """
        B, W = tokens_BW.shape
        S = W - 1
        if document_starts_BW.shape != (B, W) or S < 1:
            raise ValueError(
                f"windows {tuple(tokens_BW.shape)} and document starts "
                f"{tuple(document_starts_BW.shape)} must both be [B, S + 1] with S >= 1"
            )
        mask_BS = ~document_starts_BW[:, 1:]
        if keep_B is not None:
            mask_BS = mask_BS & keep_B[:, None]
        starts_BS = document_starts_BW[:, :-1].clone()
        starts_BS[:, 0] = True
        end = torch.tensor([B * S])
        bounds = torch.cat([starts_BS.flatten().nonzero().flatten(), end])
        document_T = starts_BS.flatten().cumsum(0) - 1
        return Batch(
            ids_BS=tokens_BW[:, :-1].long(),
            labels_BS=tokens_BW[:, 1:].long().masked_fill(~mask_BS, 0),
            loss_mask_BS=mask_BS,
            seq_idx_BS=(starts_BS.cumsum(1) - 1).int(),
            cu_seqlens=bounds.int(),
            positions_BS=(torch.arange(B * S) - bounds[document_T]).int().view(B, S),
            max_seqlen=int(bounds.diff().max()),
            sample_ids=sample_ids,
        )
