"""Weights in both directions: what one of HybridLM and transformers saves, the other one loads.

Logits agree to 1e-5 of their norm in fp32, whichever format the file holds. In bf16 each side
rounds at other places; there 2e-2 is asked of models without choice of experts, since rounding to
bf16 may well decide such a choice.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from helpers.nemotron_h_oracle import load_theirs, transformers_twin
from helpers.sabotage import quiet_paths, relative
from helpers.tiny_models import CHUNK, decided_model, loud_model, random_ids, tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.config.model import FP32_NAMES

TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2
MARGIN = 1e-4
CONFIGS = {
    "latent": tiny_config("ME*-ME"),
    "full-width": tiny_config("*-EM", moe_latent_size=None, n_groups=1),
    "without-experts": tiny_config("M*-M", n_groups=4),
    "with-mtp": tiny_config("ME*-", mtp_num_depths=2),
}


def rounded(model: HybridLM) -> HybridLM:
    """The same model with every value, those of the fp32 list included, one that bf16 can hold."""
    with torch.no_grad():
        for tensor in tensors_by_name(model).values():
            tensor.copy_(tensor.bfloat16())
    return model


def build(name: str) -> tuple[HybridLM, Tensor]:
    """A model which these tests compare in its bf16 form, and the tokens to compare it on."""
    config = CONFIGS[name]
    ids_BS = random_ids(config, 2, 3 * CHUNK + 3)
    model = rounded(decided_model(config, ids_BS, MARGIN))
    assert quiet_paths(model, ids_BS) == {}
    return model, ids_BS


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by its name on disk."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@torch.no_grad()
def deviation(ours: HybridLM, theirs: nn.Module, ids_BS: Tensor) -> float:
    return relative(ours(ids_BS).logits.float(), theirs(ids_BS, use_cache=False).logits.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_save(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids_BS = build(name)
    model.to(dtype).save_hf(str(tmp_path / "ours"))
    theirs, keys = load_theirs(tmp_path / "ours", torch.float32)
    assert keys["missing_keys"] == keys["mismatched_keys"] == set()
    assert all(key.startswith("mtp.") for key in keys["unexpected_keys"])
    model = model.float()
    assert deviation(model, theirs, ids_BS) < TOLERANCE

    # They keep silent about unexpected keys of multi-token prediction: count keys on disk.
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = read(tmp_path / "ours"), read(tmp_path / "theirs")
    ours_only = {key for key in ours if key not in again}
    assert again.keys() <= ours.keys()
    assert ours_only == {key for key in ours if key.startswith("mtp.")}
    assert bool(ours_only) == (model.config.mtp_num_depths > 0)
    assert all(torch.equal(ours[key].float(), again[key]) for key in again)
    kept = {tensor.dtype for key, tensor in ours.items() if key.split(".")[-1] in FP32_NAMES}
    assert kept <= {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hub", [True, False], ids=["hub", "in-memory"])
@pytest.mark.parametrize("name", ["latent", "full-width", "without-experts"])
def test_we_load_what_transformers_saves(
    name: str, hub: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """In the hub's layout and in its own (stacked experts, ``model.``); its bf16 files hold all of
    the fp32 list in bf16."""
    model, ids_BS = build(name)
    twin = transformers_twin(model).to(dtype)
    twin.save_pretrained(tmp_path, save_original_format=hub)
    stored = read(tmp_path)
    assert any(key.startswith("backbone." if hub else "model.") for key in stored)
    listed = [key for key in stored if key.endswith((".A_log", ".D", ".dt_bias"))]
    assert listed
    assert all(stored[key].dtype == dtype for key in listed)

    ours = HybridLM.from_hf(str(tmp_path), torch.float32)
    assert ours.config == model.config
    after = tensors_by_name(ours)
    for key, tensor in tensors_by_name(model).items():
        assert torch.equal(after[key], tensor), key
    theirs, keys = load_theirs(tmp_path, torch.float32)
    assert not any(keys.values())
    assert deviation(ours, theirs, ids_BS) < TOLERANCE
    as_stored = HybridLM.from_hf(str(tmp_path))
    assert as_stored.lm_head.weight.dtype == dtype
    for key, tensor in tensors_by_name(as_stored).items():
        assert tensor.dtype == (torch.float32 if key.split(".")[-1] in FP32_NAMES else dtype)


@torch.no_grad()
def test_every_weight_counts_in_these_comparisons() -> None:
    """Sensitivity: rows of any tensor that change places, alone, change the logits."""
    config = CONFIGS["latent"]
    ids_BS = random_ids(config, 2, 3 * CHUNK + 3)
    model = loud_model(config)
    before = model(ids_BS).logits
    for name, tensor in tensors_by_name(model).items():
        kept = tensor.clone()
        tensor.copy_(tensor.roll(1, 0))
        assert relative(model(ids_BS).logits, before) > 100 * TOLERANCE, name
        tensor.copy_(kept)


@pytest.mark.parametrize("pattern", ["M", "*", "-", "M*-M"])
def test_bf16_models_agree(pattern: str, tmp_path: Path) -> None:
    ids_BS = random_ids(tiny_config(pattern), 2, 3 * CHUNK + 3)
    model = loud_model(tiny_config(pattern))
    transformers_twin(model).bfloat16().save_pretrained(tmp_path)
    ours = HybridLM.from_hf(str(tmp_path))
    theirs, _ = load_theirs(tmp_path, torch.bfloat16)
    assert ours(ids_BS).logits.dtype == torch.bfloat16
    assert deviation(ours, theirs, ids_BS) < BF16_TOLERANCE
    exact = HybridLM.from_hf(str(tmp_path), torch.float32)
    assert quiet_paths(exact, ids_BS) == {}
    assert deviation(exact, theirs, ids_BS) > TOLERANCE  # bf16 was really computed in


def test_a_block_that_transformers_dropped_is_missed(tmp_path: Path) -> None:
    """It drops the weights of multi-token prediction but keeps them in its config.json."""
    model = loud_model(CONFIGS["with-mtp"])
    model.save_hf(str(tmp_path / "ours"))
    theirs, _ = load_theirs(tmp_path / "ours", torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"mtp\.layers\.0\.norm\.weight: missing"):
        HybridLM.from_hf(str(tmp_path / "theirs"))


def test_what_we_save_comes_back_whole(tmp_path: Path) -> None:
    model = loud_model(CONFIGS["with-mtp"], seed=3)
    model.save_hf(str(tmp_path / "out"))
    again = HybridLM.from_hf(str(tmp_path / "out"))
    assert again.config == model.config
    before, after = tensors_by_name(model), tensors_by_name(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("e_score_correction_bias" in name for name in before)
    with pytest.raises(UserError, match="not empty"):
        model.save_hf(str(tmp_path / "out"))
