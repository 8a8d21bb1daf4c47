"""The bigram yardstick against its definition written with dictionaries, and its properties."""

import math
from collections import Counter

import numpy as np
import pytest
from bigram import fit_pairs, pairs_within_documents

V = 13


def sample(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs from a skewed joint distribution; tokens 11 and 12 never occur."""
    rng = np.random.default_rng(seed)
    contexts = rng.zipf(1.6, n) % 11
    targets = (contexts * 3 + rng.zipf(2.0, n)) % 11
    return contexts, targets


def naive(contexts: np.ndarray, targets: np.ndarray, d: float):
    pair, context, target = Counter(), Counter(), Counter()
    after: dict[int, set[int]] = {}
    for v, w in zip(contexts.tolist(), targets.tolist(), strict=True):
        pair[v, w] += 1
        context[v] += 1
        target[w] += 1
        after.setdefault(v, set()).add(w)
    n = len(targets)

    def p(w: int, v: int) -> float:
        p_uni = max(target[w] - d, 0) / n + d * len(target) / n / V
        if not context[v]:
            return p_uni
        kept = max(pair[v, w] - d, 0) / context[v]
        return kept + d * len(after[v]) / context[v] * p_uni

    return p


@pytest.mark.parametrize("discount", [0.75, 0.3])
def test_equals_the_definition_with_dictionaries(discount):
    contexts, targets = sample(300, seed=1)
    model, p = fit_pairs(contexts, targets, V, discount), naive(contexts, targets, discount)
    v, w = (grid.ravel() for grid in np.meshgrid(np.arange(V), np.arange(V), indexing="ij"))
    expected = [p(int(b), int(a)) for a, b in zip(v, w, strict=True)]
    np.testing.assert_allclose(model.probabilities(v, w), expected, rtol=1e-12)
    other = fit_pairs(contexts, targets, V, 0.5).probabilities(v, w)
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("n", [1, 5, 300])
def test_is_a_proper_distribution(n):
    model = fit_pairs(*sample(n, seed=2), V)
    for context in range(V):
        p = model.probabilities(np.full(V, context), np.arange(V))
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)
    assert model.unigram_V.sum() == pytest.approx(1, abs=1e-12)


def test_perplexity_bounds():
    # deterministic successor: close to no surprise in training data, worse than chance on others
    contexts = np.arange(100_000) % V
    model = fit_pairs(contexts, (contexts + 1) % V, V)
    assert 0 < model.cross_entropy(contexts, (contexts + 1) % V) < 1e-3
    assert model.cross_entropy(contexts, (contexts + 2) % V) > math.log(V)
    # independent uniform: nothing to learn, so the entropy of the source
    rng = np.random.default_rng(3)
    train, test = rng.integers(0, V, (2, 2, 50_000))
    assert fit_pairs(*train, V).cross_entropy(*test) == pytest.approx(math.log(V), abs=5e-3)


def test_cross_entropy_approaches_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(4)
    transition = rng.dirichlet(np.full(V, 0.3), size=V)
    chain = [0]
    for u in rng.random(60_000):
        chain.append(min(V - 1, int(np.searchsorted(transition[chain[-1]].cumsum(), u))))
    ids = np.array(chain)
    model = fit_pairs(ids[:40_000], ids[1:40_001], V)
    held_out = model.cross_entropy(ids[40_001:-1], ids[40_002:])
    exact = float(-np.log(transition[ids[40_001:-1], ids[40_002:]]).mean())
    assert exact < held_out < exact + 0.01
    uniform = fit_pairs(rng.permutation(ids[:40_000]), ids[1:40_001], V)
    assert uniform.cross_entropy(ids[40_001:-1], ids[40_002:]) > exact + 0.1


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_pairs_stay_within_documents(distance):
    documents = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]]
    ids = np.array([token for document in documents for token in document])
    starts = np.array([i == 0 for document in documents for i in range(len(document))])
    expected = [
        (document[i], document[i + distance])
        for document in documents
        for i in range(len(document) - distance)
    ]
    found = pairs_within_documents(ids, starts, distance)
    assert list(zip(*(a.tolist() for a in found), strict=True)) == expected


def test_bad_arguments():
    empty = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="no pairs"):
        fit_pairs(empty, empty, V)
    with pytest.raises(ValueError, match="discount"):
        fit_pairs(*sample(5, 1), V, discount=1.0)
    with pytest.raises(ValueError, match="no targets"):
        fit_pairs(*sample(5, 1), V).cross_entropy(empty, empty)
