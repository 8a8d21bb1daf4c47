"""Prefill and decode against the full forward pass, and drawing of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.tiny_models import CHUNK, CONV, loud_model, random_ids, tiny_config
from nemo_hybrid.generate import generate, sample
from nemo_hybrid.model.attention import AttentionCache
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mamba2 import MambaCache

PATTERNS = ["M", "*", "E", "-", "ME*-ME"]
# Shorter than the convolution, as long, around a chunk, and off the chunk grid.
PROMPTS = [1, CONV - 2, CONV - 1, CONV, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
LENGTH = 3 * CHUNK + 2


def decode_all(model: HybridLM, ids_BS: Tensor, prompt: int) -> Tensor:
    """Logits [B, S - prompt + 1, V] of every position from the prompt's last on."""
    logits_BV, caches = model.prefill(ids_BS[:, :prompt])
    steps = [logits_BV]
    for t in range(prompt, ids_BS.shape[1]):
        steps.append(model.decode(ids_BS[:, t], caches))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_decoding_equals_the_full_forward_pass(pattern: str, prompt: int) -> None:
    model = loud_model(tiny_config(pattern))
    ids_BS = random_ids(model.config, 3, LENGTH)
    full_BSV = model(ids_BS).logits[:, prompt - 1 :]
    steps_BSV = decode_all(model, ids_BS, prompt)
    assert (steps_BSV - full_BSV).abs().max() < 1e-5 * full_BSV.abs().max()


@pytest.mark.parametrize("cache", ["conv_BCJ", "ssm_BHPN", "k_BTGP", "v_BTGP"])
@torch.no_grad()
def test_every_cache_matters(cache: str) -> None:
    """Sensitivity: without one of the things remembered, decoding goes wrong."""
    model = loud_model(tiny_config("M" if "ssm" in cache or "conv" in cache else "*"))
    ids_BS = random_ids(model.config, 3, LENGTH)
    full_BV = model(ids_BS).logits[:, -1]
    _, caches = model.prefill(ids_BS[:, :-1])
    getattr(caches[0], cache).zero_()
    assert (model.decode(ids_BS[:, -1], caches) - full_BV).abs().max() > 1e-2


@torch.no_grad()
def test_decoding_in_bf16_follows_the_full_forward_pass() -> None:
    model = loud_model(tiny_config("M*-M")).bfloat16()
    ids_BS = random_ids(model.config, 2, LENGTH)
    full_BSV = model(ids_BS).logits[:, 4:].float()
    steps_BSV = decode_all(model, ids_BS, 5)
    assert steps_BSV.dtype == torch.bfloat16
    assert (steps_BSV.float() - full_BSV).norm() < 0.02 * full_BSV.norm()
    _, caches = model.prefill(ids_BS)
    assert [c.ssm_BHPN.dtype for c in caches if isinstance(c, MambaCache)] == [torch.float32] * 2


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix() -> None:
    model = loud_model(tiny_config("ME*-"))
    ids_BS = random_ids(model.config, 3, CHUNK + 5)
    together_BSV = decode_all(model, ids_BS, 5)
    for row in range(3):
        alone_BSV = decode_all(model, ids_BS[row : row + 1], 5)
        torch.testing.assert_close(alone_BSV[0], together_BSV[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prompt", [1, CONV - 1, CHUNK + 1])
@torch.no_grad()
def test_greedy_continuation_equals_that_without_caches(pattern: str, prompt: int) -> None:
    model = loud_model(tiny_config(pattern))
    prompt_BS = random_ids(model.config, 2, prompt)
    cached_BN = torch.stack(list(generate(model, prompt_BS, 20)), dim=1)
    ids_BS = prompt_BS
    for _ in range(20):
        next_B = model(ids_BS).logits[:, -1].argmax(-1)
        ids_BS = torch.cat([ids_BS, next_B[:, None]], dim=1)
    assert torch.equal(cached_BN, ids_BS[:, prompt:])


def test_greedy_continuations_are_not_trivial() -> None:
    """Else the comparison above would compare little: long runs of one token, or no memory."""
    model = loud_model(tiny_config("ME*-ME"))
    tokens = [int(ids[0]) for ids in generate(model, random_ids(model.config, 1, 9), 20)]
    other = [int(ids[0]) for ids in generate(model, random_ids(model.config, 1, 9, seed=1), 20)]
    assert len(set(tokens)) > 5
    assert tokens != other


class Work(TorchDispatchMode):
    """Counts elements that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        self.elements += sum(x.numel() for x in tensors)
        return out


@torch.no_grad()
def decode_work(pattern: str, prompt: int) -> tuple[int, int]:
    """Elements touched by one decoding step after a prompt, and elements held by the caches."""
    model = loud_model(tiny_config(pattern))
    ids_BS = random_ids(model.config, 1, prompt)
    _, caches = model.prefill(ids_BS)
    ids_B = torch.tensor([1])
    model.decode(ids_B, caches)  # the attention cache grows here
    with Work() as work:
        model.decode(ids_B, caches)
    held = sum(
        x.numel() for cache in caches if cache for x in vars(cache).values() if type(x) is Tensor
    )
    return work.elements, held


def test_the_cost_of_a_token_does_not_grow_with_what_mamba_layers_have_seen() -> None:
    assert decode_work("MEM-", 3) == decode_work("MEM-", 50) == decode_work("MEM-", 200)
    few, many = decode_work("M*", 3), decode_work("M*", 200)
    assert many[0] > few[0] + 200  # a key/value cache is seen to grow
    assert many[1] > few[1] + 200


def test_attention_cache_is_copied_seldom() -> None:
    cache = AttentionCache()
    x_B1GP = torch.zeros(1, 1, 2, 4)
    cache.start(x_B1GP, x_B1GP)
    buffers = set()
    for step in range(1000):
        new_BGP = torch.full((1, 2, 4), float(step))
        keys_BTGP, values_BTGP = cache.append(new_BGP, -new_BGP)
        buffers.add(cache.k_BTGP.data_ptr())
    assert len(buffers) <= 10
    expected = torch.tensor([0.0, *range(1000)])
    assert torch.equal(keys_BTGP[0, :, 0, 0], expected)
    assert torch.equal(values_BTGP[0, :, 1, 3], -expected)


PROBABILITIES = [0.4, 0.25, 0.2, 0.1, 0.05]
DRAWS = 20_000


def shares(temperature: float, top_p: float, seed: int = 0) -> Tensor:
    """How often each of five tokens is drawn from PROBABILITIES in DRAWS draws."""
    logits_BV = torch.tensor(PROBABILITIES).log().add(3.0).expand(DRAWS, -1)
    generator = torch.Generator().manual_seed(seed)
    ids_B = sample(logits_BV, temperature, top_p, generator)
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
    assert surprise(shares(temperature * 1.2, 1.0), expected) > 20


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
    tied_BV = torch.zeros(100, 4)
    assert set(sample(tied_BV, 1.0, 0.5).tolist()) == {0, 1}  # ties keep the smaller ids
    assert sample(tied_BV, 1.0, 1e-9).tolist() == [0] * 100
    logits_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits_BV, 0.0, 1.0), logits_BV.argmax(-1))
    for temperature in (1e-3, 1e-10, 1e-40, 1e-300):  # ever more careful, never broken
        assert torch.equal(sample(logits_BV * 1e3, temperature, 1.0), logits_BV.argmax(-1))
    never_BV = torch.tensor([[0.0, float("-inf"), 0.0]]).expand(200, -1)
    assert set(sample(never_BV, 1.0, 1.0).tolist()) == {0, 2}
    assert set(sample(never_BV, 1.0, 0.999).tolist()) == {0, 2}


def test_the_seed_decides_the_draws() -> None:
    model = loud_model(tiny_config("M*"))
    prompt_BS = random_ids(model.config, 2, 5)

    def draw(seed: int) -> list[list[int]]:
        return [ids.tolist() for ids in generate(model, prompt_BS, 12, temperature=1.0, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(draw(1)) == 12
    assert list(generate(model, prompt_BS, 0)) == []
