"""inspect: what it says about configurations, and about directories whose tensors do not fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid import cli
from nemo_hybrid.agreement import OneProcess
from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.manifest import MANIFEST, manifest_text, read_manifest
from nemo_hybrid.checkpoint.state import KINDS, Fragment, save_checkpoint
from nemo_hybrid.files import FileRecord, hash_file
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.mamba2 import Mamba2
from nemo_hybrid.model.mlp import MLP

ROOT = Path(__file__).parents[2]
SUPER = ROOT / "configs" / "model" / "super.yaml"
CONFIG = tiny_config("MEM*E-", mtp_num_depths=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with one file of weights."""
    directory = tmp_path_factory.mktemp("inspect") / "model"
    loud_model(CONFIG).save_hf(str(directory))
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON that inspect prints about a path."""

    def run(path: Path, status: int = 0, deep: bool = False) -> dict[str, Any]:
        assert cli.main(["inspect", str(path), "--json", *["--deep"] * deep]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_table_of_a_released_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(SUPER)]) == 0
    shown = capsys.readouterr().out
    for words in ("123,611,012,096", "120,668,687,360", "12,770,216,960", "2,942,324,736",
                  "88 layers: 40 Mamba-2, 40 LatentMoE, 8 attention", "20,992 router bias",
                  "moe_latent_size", "230.24 GiB"):  # fmt: skip
        assert words in shown


def test_memory_of_a_released_model(inspected: Callable[..., dict[str, Any]]) -> None:
    """Two bytes per parameter; A_log, D and dt_bias have four, and so have the router biases."""
    heads, biases = 40 * 128, 41 * 512
    found = inspected(SUPER)
    assert found["bf16_bytes"] == 2 * 123_611_012_096 + 2 * 3 * heads + 4 * biases
    assert found["router_biases"] == biases


def test_components_are_those_of_the_modules(
    saved: Path, inspected: Callable[..., dict[str, Any]]
) -> None:
    """Counting by name agrees with counting by class."""
    model = HybridLM(CONFIG)
    layers = model.backbone.layers

    def size(*modules: Any) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    def of_class(kind: type) -> int:
        return size(*(layer.mixer for layer in layers if isinstance(layer.mixer, kind)))

    moe = [layer.mixer for layer in layers if layer.letter == "E"]
    expected = {
        "embedding": size(model.backbone.embeddings),
        "Mamba-2": of_class(Mamba2),
        "LatentMoE: routers": size(*(m.gate for m in moe)),
        "LatentMoE: latent projections": size(
            *(m.fc1_latent_proj for m in moe), *(m.fc2_latent_proj for m in moe)
        ),
        "LatentMoE: routed experts": size(*(m.experts for m in moe)),
        "LatentMoE: shared experts": size(*(m.shared_experts for m in moe)),
        "attention": of_class(Attention),
        "dense MLP": of_class(MLP),
        "norms": size(model.backbone.norm_f, *(layer.norm for layer in layers)),
        "head": size(model.lm_head),
        "MTP block": size(model.mtp),
    }
    found = inspected(saved)
    counts = found["parameters"]
    assert {name: counts[name] for name in expected} == expected
    assert counts["total"] == size(model) == sum(expected.values())
    assert counts["total without MTP"] == size(model) - size(model.mtp)
    assert found["layers"] == {"Mamba-2": 2, "LatentMoE": 2, "attention": 1, "dense MLP": 1}
    assert found["bf16_bytes"] == _bytes(model.bfloat16())


def _bytes(model: HybridLM) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_every_kind_of_path_shows_the_same_shape(
    saved: Path, tmp_path: Path, inspected: Callable[..., dict[str, Any]]
) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000007"
    shutil.copytree(saved, step)
    (tmp_path / "run.yaml").write_text(f"train: {{lr: 1e-3}}\nmodel: {{from_hf: {saved}}}\n")
    shape = inspected(saved)["config"]
    for path in (saved / "config.json", step, tmp_path / "run", tmp_path / "run.yaml"):
        assert inspected(path)["config"] == shape
    assert inspected(tmp_path / "run")["path"] == str(step)

    (tmp_path / "model.yaml").write_text("pattern: ME*\nhidden_size: 128\n")
    (tmp_path / "run.yaml").write_text("model: model.yaml\n")
    one, other = (inspected(tmp_path / f"{name}.yaml")["config"] for name in ("model", "run"))
    assert one == other
    assert (one["pattern"], one["hidden_size"]) == ("ME*", 128)


def test_every_tensor_is_accounted_for(
    saved: Path, inspected: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = saved.glob("*.safetensors")
    held = load_file(file)
    found = inspected(saved)
    assert {t["name"]: t["status"] for t in found["tensors"]} == dict.fromkeys(held, "mapped")
    assert found["files"] == {file.name: file.stat().st_size}
    assert cli.main(["inspect", str(saved)]) == 0
    assert f"Tensors of 1 files, {file.stat().st_size / 1024:.2f} KiB" in capsys.readouterr().out


def test_directory_without_weights(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copied.glob("*.safetensors*"):
        file.unlink()
    assert cli.main(["inspect", str(copied)]) == 0
    assert "no weights here" in capsys.readouterr().out
    (copied / "pytorch_model.bin").write_text("")
    assert cli.main(["inspect", str(copied)]) == 2
    assert "convert pytorch_model.bin to safetensors" in capsys.readouterr().err


def test_tensors_that_do_not_fit_are_named(
    copied: Path, inspected: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = copied.glob("*.safetensors")
    tensors = load_file(file)
    gone = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    del tensors[gone]
    tensors["backbone.layers.9.norm.weight"] = torch.ones(32)
    tensors["lm_head.weight"] = torch.ones(7, 32)
    tensors["backbone.norm_f.weight"] = torch.ones(32, dtype=torch.int64)
    (copied / "model.safetensors.index.json").unlink()
    file.unlink()
    save_file(tensors, copied / "model.safetensors")

    found = inspected(copied, status=2)
    errors = {t["name"]: t["note"] for t in found["tensors"] if t["status"] == "error"}
    assert set(errors) == {
        gone, "backbone.layers.9.norm.weight", "lm_head.weight", "backbone.norm_f.weight"
    }  # fmt: skip
    assert cli.main(["inspect", str(copied)]) == 2
    shown = capsys.readouterr().out
    for name, note in errors.items():
        assert f"{name}: {note}" in shown
    assert "[7, 32]" in shown


def test_a_hint_follows_the_errors(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, mtp_num_depths=0).to_hf()
    (copied / "config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(copied)]) == 2
    assert "set num_nextn_predict_layers to 1" in capsys.readouterr().out


def test_files_outside_of_the_index(
    copied: Path, inspected: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "more.safetensors").write_text("")
    (stray,) = [t for t in inspected(copied)["tensors"] if t["status"] != "mapped"]
    assert (stray["name"], stray["status"]) == ("more.safetensors", "skipped")
    assert cli.main(["inspect", str(copied)]) == 0
    assert "a whole file, which the index does not list" in capsys.readouterr().out


def test_many_errors_are_counted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = copied.glob("*.safetensors")
    count = len(load_file(file))
    for old in copied.glob("*.safetensors*"):
        old.unlink()
    save_file({"other": torch.ones(1)}, copied / "model.safetensors")
    assert cli.main(["inspect", str(copied)]) == 2
    assert f"and {count + 1 - 20} more errors" in capsys.readouterr().out


def broken_header(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])


def absent_shard(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    file.rename(directory / "else.safetensors")


def no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def other_model(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama"}')


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (broken_header, "safetensors"),
        (absent_shard, "which is not there"),
        (no_index, "model.safetensors.index.json"),
        (broken_config, "not valid JSON"),
        (other_model, "model_type is 'llama'"),
        (no_config, "holds no checkpoint"),
    ],
)
def test_broken_directories_are_mistakes(
    damage: Callable[[Path], None],
    expected: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(copied)
    assert cli.main(["inspect", str(copied)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert expected in said.err


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone", None, "does not exist"),
        ("gone.yaml", None, "does not exist"),
        ("model.bin", "x", "is neither a .yaml file, nor a config.json, nor a directory"),
        ("a.yaml", "patern: ME", "unknown key model.patern; did you mean model.pattern?"),
        ("a.yaml", "pattern: MXE", "unknown layer letter 'X'"),
        ("a.yaml", f"hidden_size: {10**15}", "a model of impossible size"),
        ("a.yaml", f"hidden_size: {10**20}", "a model of impossible size"),
        ("a.yaml", "pattern: *E", "put text that starts with * in quotes"),
        ("a.yaml", "train: {learning: 1}", "unknown key train.learning"),
        ("a.yaml", "- 1", "expected `key: value` lines"),
        ("a.json", "[]", "does not hold a JSON object"),
        ("a.json", "{}", "model_type is missing"),
    ],
)
def test_mistakes(
    name: str, content: str | None, expected: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name).write_text(content)
    assert cli.main(["inspect", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "inspect takes 1 path, got none"),
        ("a b", "inspect takes 1 path, got a b"),
        ("a --jsn", "did you mean --json?"),
    ],
)
def test_wrong_options(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", *words.split()]) == 2
    assert expected in capsys.readouterr().err


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint."""
    model = loud_model(CONFIG)
    fragments = [
        Fragment(name, 0, p.numel(), tuple(p.shape), {k: p.detach().flatten() for k in KINDS})
        for name, p in model.named_parameters()
    ]
    return save_checkpoint(
        tmp_path_factory.mktemp("run") / "checkpoints", 7, OneProcess(), config=CONFIG,
        weights=[(name, tensor, 0) for name, tensor in tensors_by_name(model).items()],
        fragments=fragments, run_state={"layout": {"world_size": 1, "ep": 1}}, rank_state={},
        companions=Companions(), resolved_config="", keep=0,
    )  # fmt: skip


def test_a_whole_checkpoint(
    training: Path, inspected: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for deep in (False, True):
        assert inspected(training, deep=deep)["verified"] == {
            "files": len(list(training.iterdir())) - 1,
            "bytes": sum(p.stat().st_size for p in training.iterdir() if p.name != MANIFEST),
            "checksums": deep,
            "step": 7,
            "layout": {"world_size": 1, "ep": 1},
        }
    assert cli.main(["inspect", str(training.parents[1])]) == 0
    said = capsys.readouterr().out
    assert "Checkpoint of step 7 (ep 1, world_size 1): optimizer state of all parameters." in said
    assert "of the right size (contents: --deep)" in said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "damage", "needs_deep"),
    [
        ("optimizer-r00000-exp_avg.safetensors", cut, False),
        ("rank-00000.safetensors", Path.unlink, False),
        (MANIFEST, Path.unlink, False),
        ("run_state.json", Path.unlink, False),
        ("model-r00000-00001.safetensors", flip, True),
    ],
)
def test_a_damaged_checkpoint_is_named(
    name: str, damage: Callable[[Path], None], needs_deep: bool, training: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copy = Path(shutil.copytree(training, tmp_path / training.name))
    damage(copy / name)
    assert cli.main(["inspect", str(copy)]) == (0 if needs_deep else 2)
    assert cli.main(["inspect", str(copy), "--deep"]) == 2
    assert str(copy / name) in capsys.readouterr().err


def drop_moment(copy: Path) -> str:
    path = copy / "optimizer-r00000-exp_avg_sq.safetensors"
    moments = load_file(path)
    del moments["lm_head.weight|0"]
    save_file(moments, path)
    return f"{path} has no exp_avg_sq of lm_head.weight"


def drop_from_index(copy: Path) -> str:
    path = copy / "optimizer.index.json"
    index = json.loads(path.read_text())
    del index["lm_head.weight"]
    path.write_text(json.dumps(index))
    return f"{copy} holds no optimizer state of lm_head.weight"


@pytest.mark.parametrize("damage", [drop_moment, drop_from_index])
def test_missing_state_is_named(
    damage: Callable[[Path], str], training: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Although every file is what the manifest says."""
    copy = Path(shutil.copytree(training, tmp_path / training.name))
    expected = damage(copy)
    records = {name: FileRecord((copy / name).stat().st_size, hash_file(copy / name))
               for name in read_manifest(copy)}  # fmt: skip
    (copy / MANIFEST).write_text(manifest_text(records))
    assert cli.main(["inspect", str(copy), "--deep"]) == 2
    assert expected in capsys.readouterr().err


def test_deep_looks_at_other_directories_too(
    copied: Path, inspected: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere files may be edited: only who asks is told."""
    assert inspected(copied)["verified"] is None
    assert inspected(copied, deep=True)["verified"]["step"] is None
    with (copied / "config.json").open("a") as file:
        file.write("\n")
    assert inspected(copied)["verified"] is None
    assert cli.main(["inspect", str(copied), "--deep"]) == 2
    assert "config.json" in capsys.readouterr().err
    (copied / MANIFEST).unlink()
    assert inspected(copied, deep=True)["verified"] is None
    assert cli.main(["inspect", str(SUPER), "--deep"]) == 2
    assert "has neither weights nor a manifest" in capsys.readouterr().err
