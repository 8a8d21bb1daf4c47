"""Weights that hold NaN or infinity are named by what reads them, and nothing is made of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.chats import tune, write_base, write_chats
from nemo_hybrid.checkpoint.adapter import CONFIG, WEIGHTS
from nemo_hybrid.checkpoint.manifest import MANIFEST
from nemo_hybrid.cli import main
from nemo_hybrid.commands.train import train_command
from nemo_hybrid.errors import UserError
from nemo_hybrid.hub import HybridLM

EXPERT = "backbone.layers.1.mixer.experts.1.up_proj.weight"
PLACES = ("lm_head.weight", EXPERT, "backbone.layers.0.mixer.A_log", "backbone.norm_f.weight")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("finite") / "base", torch.bfloat16)


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("finite") / "store"
    chats = write_chats(made.parent / "chats.jsonl", 40)
    words = ["--for", "finetune", "--tokenizer", str(base), "--out", str(made), "--heldout", "0.5"]
    assert main(["prepare", str(chats), *words]) == 0
    return made


def edit(directory: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a directory, with its tensors changed."""
    shutil.copytree(directory, out)
    (out / MANIFEST).unlink()  # with the checksums of what was there
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return out


def broken(base: Path, out: Path, name: str, value: float) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        if name in tensors:
            tensors[name].view(-1)[-1] = value

    return edit(base, out, change)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", PLACES)
def test_every_reader_names_the_weight(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    value: float,
) -> None:  # fmt: skip
    model, out = broken(base, tmp_path / "model", name, value), tmp_path / "out"
    for words in (
        ["generate", "--from", str(model), "--prompt", "a"],
        ["eval", "--from", str(model), "--data", str(store)],
        ["import", str(model), "--out", str(out)],
        ["compare-logprobs", str(model), str(base), "--tokens", "9"],
    ):
        assert main(words) == 2
        said = capsys.readouterr()
        assert f"{name} holds NaN or infinity" in said.err
        assert str(model) in said.err
    assert not out.exists()
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
        HybridLM.from_hf(str(model))
    assert main(["inspect", str(model)]) == 0
    assert main(["inspect", str(base), "--deep"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(model), "--deep", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["tensors"]
    assert [f["name"] for f in found if f["status"] == "error"] == [name]


def test_finetune_blames_the_weights(base: Path, store: Path, tmp_path: Path) -> None:
    model = broken(base, tmp_path / "model", EXPERT, torch.nan)
    config = tune(model, store.parent / "chats.jsonl")
    config.run_dir = str(tmp_path / "run")
    with pytest.raises(UserError, match=f"{EXPERT} holds NaN or infinity"):
        train_command(config)


def adapter_for(base: Path, out: Path, value: float) -> Path:
    """PEFT's files for q_proj or the like: A is all ones, B holds ``value``."""
    name = "backbone.layers.0.mixer.in_proj"
    rows, columns = HybridLM.from_hf(str(base)).get_parameter(f"{name}.weight").shape
    theirs = name.replace("backbone", "base_model.model.model")
    out.mkdir()
    tensors = {
        f"{theirs}.lora_A.weight": torch.ones(1, columns),
        f"{theirs}.lora_B.weight": torch.full((rows, 1), value),
    }
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    settings = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["in_proj"],
        "base_model_name_or_path": str(base), "layers_to_transform": [0],
    }  # fmt: skip
    (out / CONFIG).write_text(json.dumps(settings))
    return out


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.nan, "in_proj.lora_B.weight holds NaN or infinity"),
        (3e38, "with the adapter backbone.layers.0.mixer.in_proj.weight holds NaN or infinity"),
    ],
)
def test_an_adapter_and_its_sum(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, said: str
) -> None:
    """Base and adapter may be finite, and their sum not."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in {"backbone.layers.0.mixer.in_proj.weight"} & tensors.keys():
            tensors[name].fill_(3e38)

    huge = edit(base, tmp_path / "base", change)
    adapter, out = adapter_for(huge, tmp_path / "adapter", value), tmp_path / "out"
    for words in (
        ["merge", "--from", str(adapter), "--out", str(out)],
        ["generate", "--from", str(adapter), "--prompt", "a"],
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_logits_and_losses_of_finite_weights(
    base: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head so large that its products overflow."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in {"lm_head.weight", "backbone.norm_f.weight"} & tensors.keys():
            tensors[name].fill_(1e38)

    model = edit(base, tmp_path / "model", change)
    assert main(["generate", "--from", str(model), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "the logits of new token 1 are not finite" in said
    assert main(["eval", "--from", str(model), "--data", str(store)]) == 2
    assert "the held-out loss is nan" in capsys.readouterr().err
