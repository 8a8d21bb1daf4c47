"""import on the command line: what it writes, what it says, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid import HybridLM, cli
from nemo_hybrid.config.model import FP32_NAMES

CONFIG = tiny_config("ME*E-", mtp_num_depths=1)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A directory as released ones are: all in bf16, in one file."""
    loud_model(CONFIG).save_hf(str(tmp_path / "released"))
    (file,) = (tmp_path / "released").glob("*.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    for old in (tmp_path / "released").glob("*.safetensors*"):
        old.unlink()
    save_file(tensors, tmp_path / "released" / "model.safetensors", {"format": "pt"})
    return tmp_path / "released"


def test_imported_model_is_the_same(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours"
    assert cli.main(["import", str(released), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "widened from BF16 to F32" in said
    assert f"pretrain --model.from_hf {out}" in said
    held = {}
    for file in out.glob("*.safetensors"):
        held |= load_file(file)
    wide = {name for name, tensor in held.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in held if name.rpartition(".")[2] in FP32_NAMES}
    ids = random_ids(CONFIG, 1, 20)
    with torch.no_grad():
        before, after = (HybridLM.from_hf(str(path))(ids).logits for path in (released, out))
    assert torch.equal(before, after)
    assert cli.main(["inspect", str(out)]) == 0
    words = ["compare-logprobs", str(released), str(out), "--tokens", "20", "--tolerance", "0"]
    assert cli.main(words) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["import", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line, *_) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return said.err[said.err.index(line) :]


def test_out_may_be_a_link(released: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert cli.main(["import", str(released), "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "import_report.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "link", "released"]


def test_mistakes(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "ours"
    assert "missing: --out" in refused(capsys, released)
    assert "import takes 1 path, got none" in refused(capsys, "--out", out)
    assert "does not exist" in refused(capsys, tmp_path / "gone", "--out", out)
    assert "has to be downloaded" in refused(capsys, "nvidia/a-model", "--out", out)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the working directory" in refused(capsys, released, "--out", ".")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(capsys, tmp_path / "empty", "--out", out)
    assert "is not empty" in refused(capsys, released, "--out", released)
    assert not out.exists()


def test_a_missing_tensor_leaves_nothing(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = Path(shutil.copytree(released, tmp_path / "torn"))
    tensors = load_file(torn / "model.safetensors")
    del tensors["backbone.layers.2.mixer.q_proj.weight"]
    save_file(tensors, torn / "model.safetensors")
    said = refused(capsys, torn, "--out", tmp_path / "ours")
    assert "backbone.layers.2.mixer.q_proj.weight: missing" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["released", "torn"]
