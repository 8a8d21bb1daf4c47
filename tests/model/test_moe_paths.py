"""Which implementation of the experts a model really runs, and that all of them agree."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from helpers.tiny_models import loud, tiny_config
from helpers.triton_env import DEVICE
from nemo_hybrid.model.hybrid import HybridLM
from nemo_kernels import backend
from nemo_kernels.moe import PATHS

CONFIG = tiny_config("EE")
MODULES = {**PATHS, "reference": "nemo_kernels.moe.reference"}
OPS = ("topk_router", "sort_slots", "experts_for")


@pytest.fixture(autouse=True)
def restore_choice() -> Iterator[None]:
    yield
    backend.choose(moe="auto")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(path, operation) of every call that reaches an implementation."""
    seen: list[tuple[str, str]] = []

    def watched(name: str, op: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append((name, op))
            return function(*args)

        return call

    for name, module_name in MODULES.items():
        module = import_module(module_name)
        for op in OPS:
            # Paths call each other's sort by names of their own, which stay as they are.
            monkeypatch.setattr(module, op, watched(name, op, getattr(module, op)))
    return seen


@pytest.fixture
def exchange(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The dispatcher of expert parallelism, in a world of one."""
    pytest.importorskip("deepspeed")
    from nemo_hybrid.parallel import dispatch

    def copy(out: torch.Tensor, x: torch.Tensor, *sizes: Any, group: Any) -> None:
        out.copy_(x)

    monkeypatch.setattr(dispatch.dist, "all_to_all_single", copy)
    dispatcher = dispatch.AllToAllDispatcher(CONFIG.n_routed_experts, 1, 0)
    monkeypatch.setattr(dispatcher, "group", object())
    return dispatcher


def gradients(dispatcher: Any = None) -> dict[str, torch.Tensor]:
    """Logits and gradients of a model."""
    model = loud(HybridLM(CONFIG, dispatcher=dispatcher)).to(DEVICE)
    ids_BS = torch.randint(0, CONFIG.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0))
    logits = model(ids_BS.to(DEVICE)).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("name", MODULES)
def test_a_model_takes_the_path_that_was_chosen(name: str, calls: list[tuple[str, str]]) -> None:
    expected = gradients()
    assert {path for path, _ in calls} == {"triton" if DEVICE == "cuda" else "reference"}  # auto
    calls.clear()
    backend.choose(moe=name)
    found = gradients()
    assert {path for path, _ in calls} == {name}
    assert [op for _, op in calls if op != "topk_router"] == ["experts_for", "sort_slots"] * 2
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-5 * value.norm(), key


@pytest.mark.parametrize("name", MODULES)
def test_expert_parallelism_takes_it_too(
    name: str, calls: list[tuple[str, str]], exchange: Any
) -> None:
    expected = gradients()
    calls.clear()
    backend.choose(moe=name)
    found = gradients(exchange)
    assert {path for path, _ in calls} == {name}
    # The public sort of the dispatcher, and the experts on rows that are sorted.
    assert [op for _, op in calls if op != "topk_router"] == ["sort_slots", "experts_for"] * 2
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-5 * value.norm(), key
