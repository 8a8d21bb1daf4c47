"""Drawing tokens, by numbers that depend on nothing but what is drawn.

Every token of every sample has a random number of its own, a function of the seed, the number of
the prompt, that of the sample and the token's place in it. So a text does not depend on what is
drawn beside it or before it.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from nemo_kernels.lowp.rounding import random_words

_LEAST = 1e-30
"""Temperatures below are this one, at which a division cannot fail."""


def stream(seed: int, prompt: int | str, sample: int) -> int:
    """What the random numbers of a sample come from: 64 bits, signed."""
    digest = hashlib.blake2b(repr((seed, prompt, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(streams_B: Tensor, places_B: Tensor) -> Tensor:
    """The random number in [0, 1) of a place (int64, from 0) in each stream: fp64, of 53 bits."""
    words_B = random_words(places_B, streams_B)
    return ((words_B >> 11) & (2**53 - 1)).double() * 2.0**-53


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Of the next token [.., V], at a positive temperature, from fp32 logits [.., V].

    ``top_p``: only of the fewest most probable tokens that together have at least this
    probability (Holtzman et al. 2020, arXiv 1904.09751); ties keep the smaller id.
    """
    below = logits - logits.amax(-1, keepdim=True)
    parts = (below / max(temperature, _LEAST)).softmax(-1)
    if top_p == 1:
        return parts
    ordered, order = parts.double().sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill_(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(ordered).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))


def pick(parts_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Token ids [B]: every token has a part of [0, 1) that is as large as its share of the row, in
    the order of ids, and that is picked in whose part the uniform number lies."""
    ends_BV = parts_BV.cumsum(-1, dtype=torch.float64)
    picked_B1 = (uniforms_B * ends_BV[:, -1])[:, None]
    # Where a part is no number there is no place; whoever reads the log-probability notices.
    found_B1 = torch.searchsorted(ends_BV, picked_B1, right=True)
    return found_B1[:, 0].clamp_(max=ends_BV.shape[1] - 1)


def log_probabilities(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """The model's own log-probability of each id [B], whatever the temperature that it was drawn
    at."""
    return logits_BV.gather(-1, ids_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
