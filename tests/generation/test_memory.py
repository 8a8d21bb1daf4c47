"""What generating holds per text is what `plan` says: by counting every tensor that is alive."""

from __future__ import annotations

import gc

import pytest
import torch

from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.commands.memory import sequence_memory
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.generation.batched import Generator, Request, Rollout
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.cache import StateFormat
from nemo_hybrid.model.hybrid import HybridLM

SLOTS, PROMPT, NEW, WITHIN = 3, 1000, 9, 0.05


def alive() -> dict[int, int]:
    """Bytes of every tensor's storage by its address."""
    tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    storages = (x.untyped_storage() for x in tensors if x.device.type == "cpu")
    return {s.data_ptr(): s.nbytes() for s in storages}


def config(pattern: str) -> HybridConfig:
    return tiny_config(
        pattern, vocab_size=32, hidden_size=16, mtp_num_depths=1, mtp_pattern="*",
        chunk_size=64, mamba_head_dim=64, ssm_state_size=64,
    )  # fmt: skip


def held(model: HybridLM, states: StateFormat = "float32", drafts: int = 0) -> float:
    """Bytes per slot when all texts have begun, less what was there before."""
    before, found = alive(), 0
    requests = [Request(n, [1 + n] * PROMPT, NEW) for n in range(SLOTS)]

    def watch(rollout: Rollout) -> None:
        nonlocal found
        if len(rollout.ids) > 1 and not found:
            found = sum(size for place, size in alive().items() if place not in before)

    list(Generator(model, SLOTS, states=states, drafts=drafts).run(requests, watch))
    return found / SLOTS


@pytest.mark.parametrize(
    ("pattern", "dtype", "states", "drafts", "cached"),
    [
        ("M*M", torch.float32, "float32", 0, None),
        ("M*M", torch.bfloat16, "stochastic", 0, None),
        ("M*M", torch.float32, "float32", 0, 1),
        ("M", torch.float32, "float32", 1, None),
    ],
)
def test_a_generator_holds_what_plan_says(
    pattern: str, dtype: torch.dtype, states: StateFormat, drafts: int, cached: int | None
) -> None:
    model = loud_model(config(pattern)).to(dtype)
    if cached:  # as of an export
        (layer,) = (m for m in model.backbone.modules() if isinstance(m, Attention))
        layer.k_scale = layer.v_scale = 0.01
    width, state = dtype.itemsize, 4 if states == "float32" else 2
    told = sequence_memory(model.config, width, state=state, cached=cached, drafts=drafts > 0)
    found = held(model, states, drafts)
    assert found == pytest.approx(told.at(PROMPT + NEW), rel=WITHIN)
    assert told.at(NEW) < (1 - 4 * WITHIN) * found or cached  # tokens are a part of it
