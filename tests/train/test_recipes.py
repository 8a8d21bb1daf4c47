"""What kinds of run know of the weights that they began with."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.processes import TESTS
from helpers.tiny_models import tiny_config
from nemo_hybrid.checkpoint.directory import OneProcess
from nemo_hybrid.config.finetune import FinetuneConfig, LoraOptions
from nemo_hybrid.config.run import ModelOptions, RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.recipes import recipe_of
from nemo_hybrid.recipes.adapt import Adapt
from nemo_hybrid.recipes.pretrain import Pretrain

ROWS = SimpleNamespace(digests=["d"], weights=[1.0], tokenizer_sha256="t", packs=range(64))


def opened(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(type(recipe), "_open_rows", lambda self, world: ROWS)
    recipe.open_data(OneProcess(), None)
    return recipe


def test_a_run_is_what_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints name the weights of its start, whatever becomes of these meanwhile."""
    HybridLM(tiny_config("-")).save_hf(str(tmp_path / "base"))
    config = FinetuneConfig(
        model=ModelOptions(from_hf=str(tmp_path / "base")), lora=LoraOptions(rank=2)
    )
    recipe = opened(recipe_of(config), monkeypatch)
    assert isinstance(recipe, Adapt)
    before = recipe.identity()
    assert before["base"]
    shutil.rmtree(tmp_path / "base")
    assert recipe.identity() == before
    HybridLM(tiny_config("-"), seed=1).save_hf(str(tmp_path / "base"))
    assert recipe.identity() == before
    assert opened(recipe_of(config), monkeypatch).identity() != before


def test_an_adapter_is_no_beginning_of_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter,) = (TESTS / "fixtures/last_version").rglob("adapter_config.json")
    model = ModelOptions(from_hf=str(adapter.parent))
    for config in (RunConfig(model=model), FinetuneConfig(model=model)):
        with pytest.raises(UserError, match="holds an adapter: add it to its weights first"):
            opened(recipe_of(config), monkeypatch)
    assert isinstance(recipe_of(RunConfig()), Pretrain)
