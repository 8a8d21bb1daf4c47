"""Causal attention of one document after another, by torch's scaled_dot_product_attention.

Without a mask no GPU takes plain products, whose probabilities would be kept for every pair of
tokens. In fp32 torch's kernels know no groups of heads, so keys and values are repeated.

Shapes: as in reference.py; T = B*S tokens, N tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels.attention import reference
from nemo_kernels.backend import Sizes, draw, relative_deviation
from nemo_kernels.documents import Documents

DEVICE_TYPES = ("cuda", "cpu")


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    batch, length = q_BSHP.shape[:2]
    lengths = [length] * batch
    if documents is not None:
        lengths = [end - start for _, start, end in documents.spans]
    # Not by slices, each of whose gradients would be as large as the whole.
    parts = zip(*(t.flatten(0, 1).split(lengths) for t in (q_BSHP, k_BSGP, v_BSGP)), strict=True)
    return torch.cat([_causal(*part) for part in parts]).view(q_BSHP.shape)


def _causal(q_NHP: Tensor, k_NGP: Tensor, v_NGP: Tensor) -> Tensor:
    if q_NHP.dtype.itemsize > 2:
        heads = q_NHP.shape[1] // k_NGP.shape[1]
        k_NGP, v_NGP = (t.repeat_interleave(heads, 1) for t in (k_NGP, v_NGP))
    q, k, v = (t.transpose(0, 1)[None] for t in (q_NHP, k_NGP, v_NGP))
    grouped = q.shape[1] != k.shape[1]
    o_1HNP = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return o_1HNP[0].transpose(0, 1)


def self_check(device_type: str, sizes: Sizes) -> float:
    return checked(attention, device_type, sizes)


def checked(attend: Callable[..., Tensor], device_type: str, sizes: Sizes) -> float:
    """Largest deviation from the reference, of documents in two rows; at a length at which no
    kernel that takes a mask is known to be wrong."""
    length = 128 * max(2, sizes.tokens // 128)
    query, key = ((2, length, n, sizes.attention_dim) for n in (sizes.query_heads, sizes.key_heads))
    inputs = draw(device_type, query, key, key)
    numbers_S = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 130, length - 131]))
    documents = Documents.from_numbers(numbers_S.expand(2, -1)).to(device_type)
    return relative_deviation(
        lambda impl, *t: impl(*t, documents), (attend, reference.attention), inputs
    )
