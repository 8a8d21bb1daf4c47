"""One micro-batch of token windows, with everything a layer may need to know about documents.

Shape suffixes: B rows, S tokens per row, W = S + 1 tokens of a window, T = B*S, D depths of
multi-token prediction, N = 1 + D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_kernels.documents import Documents, Packing, Shard, divided, to_device


class Ahead(NamedTuple):
    """What lies ahead of every token, which a part of a row cannot find in itself."""

    ids_DBS: Tensor
    """int64: the token that each depth reads."""
    labels_NBS: Tensor
    """int64: what the next-token loss and each depth learn."""
    weights_NBS: Tensor
    """fp32: how much of their cross-entropies counts."""


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
    weight_BS: Tensor | None = None
    """fp32: how often the next token's cross-entropy counts, of either sign; None: once. Targets
    further ahead count once."""
    experts_BSLK: Tensor | None = None
    """int16: the K experts that tokens go to in each of L MoE layers, see `Tile`; None: those that
    routers choose."""
    in_one: int = 1
    """Rows that take the place of one of data.sequence_length: above 1 in steps on short rows."""
    shard: Shard | None = None
    """Which part of its rows this is (see `cut`), ``documents`` being those of whole rows; None:
    rows are whole."""
    ahead: Ahead | None = None
    """Known where they are not."""

    @property
    def packing(self) -> Packing:
        """What layers are given: None where every row is one document, and whole."""
        return self.documents.packing if self.shard is None else self.shard

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on device."""
        moved: dict[str, Any] = {
            name: to_device(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.shard is not None:
            moved["shard"] = self.shard.to(device)
        if self.ahead is not None:
            moved["ahead"] = Ahead(*(to_device(t, device) for t in self.ahead))
        return replace(self, documents=self.documents.to(device), **moved)

    def cut(self, part: int, parts: int, reach: int, ahead: Ahead | None = None) -> Batch:
        """The part-th of so many parts of every row, on the CPU; the model's convolution reaches
        ``reach`` tokens back. ``ahead``: of whole rows, where anything is asked of it."""
        sizes = divided(self.ids_BS.shape[1], parts)
        low = sum(sizes[:part])
        tokens = slice(low, low + sizes[part])
        own: dict[str, Any] = {
            name: value[:, tokens]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(
            self,
            shard=Shard.cut(self.documents, sizes, part, reach),
            ahead=ahead and Ahead(*(t[..., tokens] for t in ahead)),
            **own,
        )

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
        mask_BS = ~document_starts_BW[:, 1:]
        if keep_B is not None:
            mask_BS = mask_BS & keep_B[:, None]
        documents = Documents.from_starts(document_starts_BW[:, :-1])
        return _batch(tokens_BW[:, :-1], tokens_BW[:, 1:], mask_BS, documents, sample_ids)

    @staticmethod
    def from_packs(
        rows: Sequence[Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]],
        length: int,
        pad_id: int,
        sample_ids: tuple[int, ...] = (),
    ) -> Batch:
        """Rows of ``length`` tokens out of samples: ids, and which of them are targets.

        What a row has left is padding, a document of its own. Rows whose sample id is -1 are
        masked as a whole.
        """
        B = len(rows)
        ids_BS = np.full((B, length), pad_id, np.int64)
        mask_BS, real_BS, starts_BS = (np.zeros((B, length), np.bool_) for _ in range(3))
        for b, samples in enumerate(rows):
            at = 0
            for ids, targets in samples:
                end = at + len(ids)
                ids_BS[b, at:end], starts_BS[b, at] = ids, True
                mask_BS[b, at : end - 1] = targets[1:]  # position t predicts token t + 1
                at = end
            real_BS[b, :at] = True
            if at < length:
                starts_BS[b, at] = True
            if sample_ids and sample_ids[b] < 0:
                mask_BS[b] = False
        documents = Documents.from_starts(
            torch.from_numpy(starts_BS), None if real_BS.all() else torch.from_numpy(real_BS)
        )
        tokens_BS, kept_BS = torch.from_numpy(ids_BS), torch.from_numpy(mask_BS)
        return _batch(tokens_BS, tokens_BS.roll(-1, 1), kept_BS, documents, sample_ids)


def _batch(
    ids_BS: Tensor,
    next_BS: Tensor,
    mask_BS: Tensor,
    documents: Documents,
    sample_ids: tuple[int, ...],
) -> Batch:
    bounds = documents.cu_seqlens
    first_T = bounds[:-1].repeat_interleave(bounds.diff())
    return Batch(
        ids_BS=ids_BS.long(),
        labels_BS=next_BS.long().masked_fill(~mask_BS, 0),
        loss_mask_BS=mask_BS,
        documents=documents,
        positions_BS=(torch.arange(ids_BS.numel()) - first_T).int().view(ids_BS.shape),
        sample_ids=sample_ids,
    )
