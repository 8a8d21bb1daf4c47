"""What kinds of run know of the weights that they began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.corpus import EOS, TINY_MODEL, write_corpus
from helpers.processes import TESTS
from helpers.tiny_models import tiny_config
from nemo_hybrid.agreement import OneProcess
from nemo_hybrid.checkpoint import steps
from nemo_hybrid.commands import evaluate
from nemo_hybrid.config.finetune import DistillOptions, FinetuneConfig, LoraOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import DataOptions, ModelOptions, RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import read_pieces
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.recipes import recipe_of
from nemo_hybrid.recipes.adapt import Adapt
from nemo_hybrid.recipes.pretrain import Pretrain

ROWS = SimpleNamespace(
    digests=["d"], weights=[1.0], later_weights=None, tokenizer_sha256="t", packs=range(64)
)


def opened(recipe: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: Path | None = None) -> Any:
    monkeypatch.setattr(type(recipe), "_open_rows", lambda self, world: ROWS)
    recipe.open_data(OneProcess(), checkpoint)
    return recipe


def distilled(model: ModelOptions) -> FinetuneConfig:
    return FinetuneConfig(model=model, distill=DistillOptions(preset="nano"))


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


def test_a_checkpoint_beside_other_weights_is_refused_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, checkpoint = tmp_path / "base", tmp_path / "run/checkpoints/step_00000003"
    HybridLM(tiny_config("-")).save_hf(str(base))
    model = ModelOptions(from_hf=str(base))
    adapt = opened(recipe_of(FinetuneConfig(model=model, lora=LoraOptions(rank=2))), monkeypatch)
    whole = opened(recipe_of(FinetuneConfig(model=model)), monkeypatch)
    digest = adapt.identity()["base"]
    checkpoint.mkdir(parents=True)

    def refusal(recipe: Any, saved: str | None, named: Path) -> str:
        (checkpoint / "run_state.json").write_text(json.dumps({"base": saved}))
        settings = {"base_model_name_or_path": str(named)}
        (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError) as error:
            recipe._check_base(checkpoint)
        assert digest not in str(error.value)
        assert "0123" not in str(error.value)
        return str(error.value)

    assert f"not those in {base} now: they were written anew" in refusal(adapt, "0123", base)
    gone = tmp_path / "other/checkpoints/step_00000001"
    assert f"(it names {gone}, which is not there any more)" in refusal(adapt, "0123", gone)
    (tmp_path / "copy").mkdir()
    assert f"(it names {tmp_path / 'copy'})" in refusal(adapt, "0123", tmp_path / "copy")
    for recipe, saved in ((whole, "0123"), (adapt, None)):
        assert "another kind of run" in refusal(recipe, saved, base)


def test_a_beginning_that_its_run_may_remove_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step_00000003"
    HybridLM(tiny_config("-")).save_hf(str(checkpoint))
    model = ModelOptions(from_hf=str(tmp_path / "run"))
    for config, what in (
        (FinetuneConfig(model=model, lora=LoraOptions(rank=2)), "which the adapter is for"),
        (FinetuneConfig(model=model), "which every start of this run reads"),
        (distilled(model), "which every start of this run reads"),
        (RunConfig(model=model), "which every start of this run reads"),
    ):
        recipe = opened(recipe_of(config), monkeypatch)
        (tmp_path / "run/config.yaml").write_text("checkpoint: {keep: 0}")
        assert list(recipe._origin_warning()) == []
        (tmp_path / "run/config.yaml").write_text("checkpoint: {keep: 2}")
        (warning,) = recipe._origin_warning()
        assert f"{checkpoint}, {what}, is a checkpoint of a run that keeps its 2 newest" in warning
        assert "(nemo-hybrid import" in warning
    recipe = opened(recipe_of(RunConfig(continue_from=str(tmp_path / "run"))), monkeypatch)
    (warning,) = recipe._origin_warning()
    assert f"begin with a copy (cp -r {checkpoint} DIR, continue_from DIR)" in warning


def test_a_run_that_needs_its_beginning_finds_it_where_more_has_been_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (tmp_path / "run/checkpoints" / steps.step_name(step) for step in (3, 6))
    HybridLM(tiny_config("-")).save_hf(str(first))
    config = distilled(ModelOptions(from_hf=str(tmp_path / "run")))
    recipe = opened(recipe_of(config), monkeypatch)
    assert recipe.origin == first
    checkpoint = tmp_path / "distilled"
    checkpoint.mkdir()
    (checkpoint / "run_state.json").write_text(json.dumps({"base": recipe.identity()["base"]}))
    HybridLM(tiny_config("-"), seed=1).save_hf(str(second))
    assert opened(recipe_of(config), monkeypatch).origin == second
    assert opened(recipe_of(config), monkeypatch, checkpoint).origin == first
    shutil.rmtree(first)
    with pytest.raises(UserError, match=rf"base weights that are not those in {second}"):
        opened(recipe_of(config), monkeypatch, checkpoint)


def test_an_adapter_is_no_beginning_of_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter,) = (TESTS / "fixtures/last_version").rglob("adapter_config.json")
    model = ModelOptions(from_hf=str(adapter.parent))
    for config in (RunConfig(model=model), FinetuneConfig(model=model)):
        with pytest.raises(UserError, match="holds an adapter: add it to its weights first"):
            opened(recipe_of(config), monkeypatch)
    assert isinstance(recipe_of(RunConfig()), Pretrain)


@pytest.mark.parametrize("listed", ["config.json", "generation_config.json", None])
def test_texts_end_with_any_token_that_the_model_lists(listed: str | None, tmp_path: Path) -> None:
    """In pre-training, evaluation and calibration: the first of them is the model's own."""
    store, base = write_corpus(tmp_path / "store", documents=40), tmp_path / "base"
    HybridLM(HybridConfig(**{**TINY_MODEL, "pattern": "-", "eos_token_id": 5})).save_hf(str(base))
    shutil.copy(store / "tokenizer.json", base)
    if listed:
        said = json.loads((base / listed).read_text())
        (base / listed).write_text(json.dumps({**said, "eos_token_id": [5, EOS]}))
    shape = HybridConfig.from_hf(str(base))
    assert shape.eos_token_id == 5
    data = DataOptions(path=str(store), sequence_length=16)
    pretrain = Pretrain(RunConfig(model=ModelOptions(from_hf=str(base)), data=data))
    options = evaluate.EvalOptions(from_=str(base), data=str(store), sequence_length=16)
    for read in (
        lambda: pretrain.open_data(OneProcess(), None),  # type: ignore[arg-type]
        lambda: evaluate._open(options, shape, base),
        lambda: read_pieces(str(store), base, shape, 32, length=16),
    ):
        if listed:
            assert read()
            continue
        with pytest.raises(UserError) as e:
            read()
        assert f"ends documents with token {EOS}, the model ends them with 5: " in str(e.value)
        assert f"5: add it to eos_token_id in {base / 'config.json'}, or" in str(e.value)
        # Of another tokenizer the number of a token says nothing.
        known = (base / "tokenizer.json").read_text()
        (base / "tokenizer.json").write_text(known.replace("<pad>", "<none>"))
        with pytest.raises(UserError, match="was made with another tokenizer than that of"):
            read()
        (base / "tokenizer.json").write_text(known)
