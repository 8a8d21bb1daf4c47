"""A bigram model with interpolated absolute discounting, the yardstick of a short run.

With c the counts of (context v, target w) pairs in the training data, d the discount, u(v) the
number of different targets seen after v, and V the vocabulary size:

    p(w | v)   = max(c(v, w) - d, 0) / c(v) + d u(v) / c(v) * p_uni(w)
    p_uni(w)   = max(c(w) - d, 0) / c + d u / c * 1 / V

(Ney, Essen and Kneser, 1994, with the lower order from plain counts). Both sum to one over w; a
context never seen has p_uni. "Target" need not be the next token: pairs (token t, token t + 1 + k)
give the same kind of model for what a multi-token-prediction depth k predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PairModel:
    """A fitted model; make it with fit_pairs."""

    vocab_size: int
    discount: float
    pairs: Ids
    """[distinct pairs] context * vocab_size + target, ascending."""
    pair_counts: Ids
    """[distinct pairs] how often each was seen."""
    context_counts_V: Ids
    """How often each token was a context."""
    context_kinds_V: Ids
    """How many different targets were seen after each token."""
    unigram_V: NDArray[np.float64]
    """p_uni."""

    def probabilities(self, contexts: Ids, targets: Ids) -> NDArray[np.float64]:
        """p(target | context) of each pair; the two arrays have one shape."""
        wanted = contexts * self.vocab_size + targets
        place = np.searchsorted(self.pairs, wanted).clip(max=len(self.pairs) - 1)
        count = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
        total = self.context_counts_V[contexts]
        seen = total > 0
        total = np.maximum(total, 1)
        kept = np.maximum(count - self.discount, 0) / total
        freed = np.where(seen, self.discount * self.context_kinds_V[contexts] / total, 1.0)
        return kept + freed * self.unigram_V[targets]

    def cross_entropy(self, contexts: Ids, targets: Ids) -> float:
        """Mean of -ln p(target | context) over the pairs, in nats."""
        if not len(targets):
            raise ValueError("no targets to score")
        return float(-np.log(self.probabilities(contexts, targets)).mean())


def fit_pairs(contexts: Ids, targets: Ids, vocab_size: int, discount: float = 0.75) -> PairModel:
    """Fit to pairs of token ids, two arrays [N] with N > 0.

    The discount lies strictly between 0 and 1: at 0 pairs never seen would have no probability.
    """
    if not 0 < discount < 1:
        raise ValueError(f"discount must lie in (0, 1), got {discount}")
    if not len(targets):
        raise ValueError("no pairs to fit a model to")
    pairs, pair_counts = np.unique(contexts * vocab_size + targets, return_counts=True)
    target_counts_V = np.bincount(targets, minlength=vocab_size)
    n, kinds = len(targets), np.count_nonzero(target_counts_V)
    unigram_V = np.maximum(target_counts_V - discount, 0) / n + discount * kinds / n / vocab_size
    return PairModel(
        vocab_size,
        discount,
        pairs,
        pair_counts,
        np.bincount(contexts, minlength=vocab_size),
        np.bincount(pairs // vocab_size, minlength=vocab_size),
        unigram_V,
    )


def pairs_within_documents(ids: Ids, starts: NDArray[np.bool_], distance: int) -> tuple[Ids, Ids]:
    """All pairs (token t, token t + distance) of [N] tokens whose two tokens share a document.

    starts: [N], True for each token that begins a document.
    """
    document = np.cumsum(starts)
    same = document[:-distance] == document[distance:]
    return ids[:-distance][same], ids[distance:][same]
