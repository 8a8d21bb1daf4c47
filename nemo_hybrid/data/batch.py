"""One micro-batch of token windows, with everything a layer may need to know about documents.

Shape suffixes: B rows, S tokens per row, W = S + 1 tokens of a window, T = B*S.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_kernels.documents import Documents


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
    documents: Documents
    """Where documents begin; every start of a row is one."""
    positions_BS: Tensor
    """int32 position within the document, from 0."""
    sample_ids: tuple[int, ...] = ()
    """Global sample number of each row; -1 for a padding row."""

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document."""
        return len(self.documents.spans) > self.ids_BS.shape[0]

    @property
    def packing(self) -> Documents | None:
        """What layers are given: None where every row is one document."""
        return self.documents if self.packed else None

    @property
    def seq_idx_BS(self) -> Tensor:
        """int32 index of the document within its row, from 0."""
        return self.documents.seq_idx_BS

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]: starts of the documents in the T flattened tokens, then T."""
        return self.documents.cu_seqlens

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, documents=self.documents.to(device), **moved)

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
        documents = Documents.from_starts(document_starts_BW[:, :-1])
        bounds = documents.cu_seqlens
        first_T = bounds[:-1].repeat_interleave(bounds.diff())
        return Batch(
            ids_BS=tokens_BW[:, :-1].long(),
            labels_BS=tokens_BW[:, 1:].long().masked_fill(~mask_BS, 0),
            loss_mask_BS=mask_BS,
            documents=documents,
            positions_BS=(torch.arange(B * S) - first_T).int().view(B, S),
            sample_ids=sample_ids,
        )
