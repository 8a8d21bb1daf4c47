"""Continued pre-training begins with the very weights of a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.corpus import TINY_MODEL
from helpers.processes import run_command
from helpers.runs import tiny_run
from helpers.tiny_models import loud_model
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.files import read_json

GENERATION = '{"eos_token_id": [2, 11], "temperature": 0.6}'


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """An fp32 checkpoint with the tokenizer of the data and end-of-text settings of its own."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    loud_model(HybridConfig(**TINY_MODEL)).save_hf(str(directory))
    shutil.copy(store / "tokenizer.json", directory)
    (directory / "generation_config.json").write_text(GENERATION)
    config = read_json(directory / "config.json") | {"eos_token_id": [2, 11]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob(f"{prefix}*.safetensors"):
        found |= load_file(path)
    return found


def exact(source: Path, model_shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Our parameters, flat, from the per-expert tensors on disk."""
    stored = tensors(source, "model")
    out = {}
    for name, shape in model_shapes.items():
        if ".experts." in name:
            before, _, matrix = name.partition(".experts.")
            pieces = [stored[f"{before}.experts.{e}.{matrix}.weight"] for e in range(shape[0])]
            out[name] = torch.stack(pieces).flatten()
        else:
            out[name] = stored[name].flatten()
    return out


@pytest.mark.parametrize("ep", [1, 2])
def test_weights_and_masters_are_those_of_the_files(
    source: Path, store: Path, tmp_path: Path, ep: int
) -> None:
    """After a step too small to be seen: weights rounded to bf16, masters not rounded at all."""
    train = {"max_steps": 1, "lr": 1e-25, "router_bias_rate": 0.0, "eval_sequences": 0}
    config = tiny_run(store, recipe="bf16", ep=ep, train=train)
    config.model.from_hf = str(source)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ["pretrain", "--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run"]
    finished = run_command(*words, size=ep)
    assert f"{source}: " in finished[0].stdout
    assert "mapped" in finished[0].stdout
    checkpoint = tmp_path / "run/checkpoints/step_00000001"

    # What belongs to the weights travels with them.
    assert (checkpoint / "generation_config.json").read_text() == GENERATION
    assert read_json(checkpoint / "config.json")["eos_token_id"] == [2, 11]
    assert (checkpoint / "tokenizer_config.json").is_file()  # of the data

    stored, saved = tensors(source, "model"), tensors(checkpoint, "model")
    assert stored.keys() == saved.keys()
    for name, value in stored.items():
        leaf = name.rsplit(".", 1)[-1]
        keeps = leaf in FP32_NAMES or leaf == "e_score_correction_bias"
        assert torch.equal(saved[name], value if keeps else value.bfloat16()), name

    index = read_json(checkpoint / "optimizer.index.json")
    truth = exact(source, {name: entry["shape"] for name, entry in index.items()})
    compared = rounded = 0
    for key, master in tensors(checkpoint, "optimizer-r*-master").items():
        name, start = key.split("|")
        expected = truth[name][int(start) : int(start) + master.numel()]
        assert torch.equal(master, expected), name
        rounded += int((expected != expected.bfloat16()).sum())
        compared += master.numel()
    assert compared == sum(t.numel() for t in truth.values())
    assert rounded > compared / 2  # masters that had been rounded would be noticed


def test_without_from_hf_other_weights_are_trained(source: Path, store: Path) -> None:
    """The comparison above can fail: a fresh model of the same shape has other weights."""
    from nemo_hybrid import HybridLM

    fresh = HybridLM(HybridConfig(**TINY_MODEL), seed=tiny_run(store).train.seed).state_dict()
    stored = tensors(source, "model")
    same = [n for n, t in fresh.items() if n in stored and torch.equal(t, stored[n])]
    assert len(same) < len(fresh) / 10, json.dumps(same)
