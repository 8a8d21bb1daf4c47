"""Drawing of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_hybrid.generation.sampling import log_probabilities, pick, probabilities, stream, uniforms

PROBABILITIES = [0.4, 0.25, 0.2, 0.1, 0.05]
DRAWS = 20_000


def draw(logits_BV: Tensor, temperature: float, top_p: float, uniforms_B: Tensor) -> Tensor:
    return pick(probabilities(logits_BV, temperature, top_p), uniforms_B)


def numbers(count: int, seed: int = 0) -> Tensor:
    """The first random numbers of one sample."""
    places_B = torch.arange(count)
    return uniforms(torch.full_like(places_B, stream(seed, 3, 1)), places_B)


def shares(temperature: float, top_p: float, seed: int = 0) -> Tensor:
    """How often each of five tokens is drawn from PROBABILITIES in DRAWS draws."""
    logits_BV = torch.tensor(PROBABILITIES).log().add(3.0).expand(DRAWS, -1)
    ids_B = draw(logits_BV, temperature, top_p, numbers(DRAWS, seed))
    assert ids_B.shape == (DRAWS,)
    return torch.bincount(ids_B, minlength=5) / DRAWS


def surprise(observed: Tensor, probabilities: list[float]) -> float:
    """Chi-square per degree of freedom over tokens that can occur; infinite if others did."""
    p = torch.tensor(probabilities)
    p = p / p.sum()
    if observed[p == 0].any():
        return float("inf")
    chi = DRAWS * ((observed - p).square() / p)[p > 0].sum()
    return float(chi) / max(1, int((p > 0).sum()) - 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    expected = [p ** (1 / temperature) for p in PROBABILITIES]
    assert surprise(shares(temperature, 1.0), expected) < 4
    assert surprise(shares(temperature * 1.4, 1.0), expected) > 20


@pytest.mark.parametrize(
    ("top_p", "support"),
    [(0.3, 1), (0.399, 1), (0.401, 2), (0.649, 2), (0.651, 3), (0.951, 5)],
)
def test_top_p_draws_from_the_fewest_most_probable_tokens(top_p: float, support: int) -> None:
    expected = [p if i < support else 0.0 for i, p in enumerate(PROBABILITIES)]
    observed = shares(1.0, top_p)
    assert int((observed > 0).sum()) == support
    assert surprise(observed, expected) < 4


def test_top_p_applies_after_the_temperature() -> None:
    """At temperature 2 the first token has 0.296, so 0.35 needs two; at 1 it has 0.4."""
    assert int((shares(2.0, 0.35) > 0).sum()) == 2
    assert int((shares(1.0, 0.35) > 0).sum()) == 1


def test_sampling_edge_cases() -> None:
    tied_BV, many_B = torch.zeros(100, 4), numbers(100)
    assert set(draw(tied_BV, 1.0, 0.5, many_B).tolist()) == {0, 1}  # ties keep the smaller ids
    assert draw(tied_BV, 1.0, 1e-9, many_B).tolist() == [0] * 100
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-3, 1e-10, 1e-40, 1e-300):  # ever more careful, never broken
        found_B = draw(logits_BV * 1e3, temperature, 1.0, numbers(6))
        assert torch.equal(found_B, logits_BV.argmax(-1))
    never_BV = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    ends_B = torch.tensor([0.0, 1 - 2.0**-53, 0.5, 0.5 - 2.0**-53], dtype=torch.float64)
    for top_p in (1.0, 0.999):
        found_B = draw(never_BV.expand(200, -1), 1.0, top_p, numbers(200))
        assert set(found_B.tolist()) == {1, 3}
        assert draw(never_BV.expand(4, -1), 1.0, top_p, ends_B).tolist() == [1, 3, 3, 1]
    broken_BV = torch.full((1, 4), float("nan"))
    found_B = draw(broken_BV, 1.0, 1.0, numbers(1))
    assert 0 <= int(found_B) < 4
    assert log_probabilities(broken_BV, found_B).isnan()


def test_a_token_has_as_much_of_the_line_as_its_probability() -> None:
    """Numbers on either side of each border of the distribution's sums."""
    logits_BV = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    borders = logits_BV[0].double().softmax(-1).cumsum(-1)
    for side, first in ((-1e-6, 0), (1e-6, 1)):
        found_B = draw(logits_BV.expand(39, -1), 1.0, 1.0, borders[:-1] + side)
        assert found_B.tolist() == list(range(first, 39 + first))


def test_random_numbers_are_those_of_splitmix64() -> None:
    """Against the generator as its authors state it, one word after the other."""
    seed = stream(7, 2, 5)
    state, expected = seed % 2**64, []
    for _ in range(50):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append((z ^ (z >> 31)) // 2**11 / 2**53)
    found_B = uniforms(torch.full((50,), seed), torch.arange(50))
    assert found_B.tolist() == expected
    assert found_B.dtype == torch.float64


def test_every_number_of_a_sample_matters() -> None:
    streams = {stream(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1),
                                        (0, 1, 11), (2**63 - 1, 10**9, 10**6)]}  # fmt: skip
    assert len(streams) == 7
    assert all(-(2**63) <= one < 2**63 for one in streams)


def test_log_probabilities_are_the_models_own() -> None:
    logits_BV = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) * 5
    ids_B = torch.tensor([0, 29, 3, 7, 7])
    expected_B = logits_BV.double().log_softmax(-1)[torch.arange(5), ids_B]
    assert torch.allclose(log_probabilities(logits_BV, ids_B).double(), expected_B, atol=1e-5)
