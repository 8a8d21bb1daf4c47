"""import_directory, and how much of a directory is read: memory, and bytes of other ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.memory import with_helpers
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint import tensors
from nemo_hybrid.checkpoint.convert import REPORT, import_directory
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import is_stacked, to_hub
from nemo_hybrid.checkpoint.weights import account, load_weights, read_headers
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import FP32_NAMES

CONFIG = tiny_config("ME*-", mtp_num_depths=2)


def write_source(out: Path, stacked: bool, dtype: torch.dtype = torch.bfloat16) -> HybridLM:
    """Two shards, the fp32 list in the same dtype, of a model whose values that dtype can hold."""
    out.mkdir()
    model = loud_model(CONFIG)
    for tensor in tensors_by_name(model).values():
        tensor.data.copy_(tensor.to(dtype))
    hub = {
        n.replace("backbone.", "model."): part.detach().to(dtype).contiguous()
        for name, tensor in tensors_by_name(model).items()
        for n, part in ([(name, tensor)] if stacked else to_hub(name, tensor))
    }
    weight_map = {}
    for i in range(2):
        part = {n: hub[n] for n in sorted(hub)[i::2]}
        save_file(part, out / f"{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = CONFIG.to_hf() | {"eos_token_id": [2, 7]}
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text("{}")
    (out / "generation_config.json").write_text('{"top_p":0.9}')
    return model


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_import_is_the_same_model_in_our_layout(tmp_path, stacked, dtype, capfd) -> None:
    model = write_source(tmp_path / "in", stacked, dtype)
    report = import_directory(tmp_path / "in", tmp_path / "out")
    assert "importing" in capfd.readouterr().err
    verify(tmp_path / "out")
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    expected = {n: p for name, t in tensors_by_name(model).items() for n, p in to_hub(name, t)}
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor.float(), expected[name]), name
        assert tensor.dtype == (torch.float32 if name.endswith(FP32_NAMES) else dtype), name

    out = HybridLM.from_hf(str(tmp_path / "out"))
    assert out.config == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"top_p":0.9}'
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [2, 7]
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")

    listed = json.loads((tmp_path / "out" / REPORT).read_text())
    assert listed["summary"] == report.summary()
    names = {n for i in range(2) for n in load_file(tmp_path / "in" / f"{i}.safetensors")}
    assert {t["name"]: t["status"] for t in listed["tensors"]} == dict.fromkeys(names, "mapped")
    assert not report.rounded
    notes = {f.name: f.note for f in report.findings}
    assert (
        notes["model.layers.0.mixer.dt_bias"]
        == {
            torch.float32: "",
            torch.bfloat16: "widened from BF16 to F32",
            torch.float16: "widened from F16 to F32",
        }[dtype]
    )
    assert sum(map(bool, notes.values())) in (0, 5)  # A_log, D, dt_bias, two router biases
    assert listed["not_carried"] == []


def test_one_wide_tensor_makes_no_other_wider(tmp_path, caplog) -> None:
    """Not even in its own stack of experts; and what is left behind is named."""
    write_source(tmp_path / "in", stacked=False)
    wide = ("model.norm_f.weight", "model.layers.1.mixer.experts.3.up_proj.weight")
    for path in (tmp_path / "in").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({n: t.float() if n in wide else t for n, t in tensors.items()}, path)
    for name in ("vocab.json", "merges.txt", "LICENSE", "modeling.py", "old.safetensors"):
        (tmp_path / "in" / name).write_text(name)
    report = import_directory(tmp_path / "in", tmp_path / "out")
    assert any(r.levelname == "WARNING" and "1 skipped" in r.message for r in caplog.records)
    (stray,) = report.having("skipped")
    assert (stray.name, stray.note) == (
        "old.safetensors",
        "a whole file, which the index does not list",
    )
    listed = json.loads((tmp_path / "out" / REPORT).read_text())
    assert listed["not_carried"] == ["LICENSE", "modeling.py", "old.safetensors"]
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_text() == name
    written = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    ours = {name.replace("model.", "backbone.") for name in wide}
    assert ours < written.keys()
    for name, tensor in written.items():
        widened = name in ours or name.endswith(FP32_NAMES)
        assert tensor.dtype == (torch.float32 if widened else torch.bfloat16), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"

    caplog.clear()
    loaded = HybridLM.from_hf(str(tmp_path / "out"))
    assert {t.dtype for t in tensors_by_name(loaded).values()} == {torch.float32}
    assert "loaded as fp32" in caplog.text
    assert "norm_f.weight is F32" in caplog.text or "experts.3.up_proj.weight is F32" in caplog.text


def test_nothing_is_written_unless_all_fits(tmp_path) -> None:
    write_source(tmp_path / "in", stacked=False)
    path = tmp_path / "in" / "1.safetensors"
    content = load_file(path)
    save_file({**content, "x.y": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"x\.y: 1\.safetensors holds it, but the index does not"):
        import_directory(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    save_file(content, path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"):
        import_directory(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        import_directory(tmp_path / "in", tmp_path / "in")
    with pytest.raises(UserError, match="does not exist"):
        import_directory(tmp_path / "nowhere", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch) -> None:
    write_source(tmp_path / "in", stacked=False)
    first, second = (tmp_path / "in" / f"{i}.safetensors" for i in range(2))

    def show(*args: object) -> object:
        second.write_bytes(first.read_bytes())
        return original(*args)

    from nemo_hybrid.checkpoint import convert

    original = convert.progress_bar
    monkeypatch.setattr(convert, "progress_bar", show)
    with pytest.raises(UserError, match=r"1\.safetensors changed while it was being read"):
        import_directory(tmp_path / "in", tmp_path / "out", show_progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


class Counted:
    """The library's open file, and how many bytes of tensors it gave out, to all of them."""

    total = 0

    def __init__(self, *args: object) -> None:
        self._file = safe_open(*args)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return count(self._file.get_tensor(name))

    def get_slice(self, name: str) -> object:
        found = self._file.get_slice(name)
        about = {"get_dtype": found.get_dtype, "get_shape": found.get_shape}
        take = {"__getitem__": lambda _, rows: count(found[rows])}
        return type("Slice", (), take | {n: staticmethod(f) for n, f in about.items()})()


def count(tensor: torch.Tensor) -> torch.Tensor:
    Counted.total += tensor.nbytes
    return tensor


@pytest.mark.parametrize("stacked", [False, True])
def test_a_rank_reads_its_own_experts_only(tmp_path, stacked, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "safe_open", Counted)
    model = write_source(tmp_path / "in", stacked)
    whole = tensors_by_name(model)
    size = {n: t.numel() * 2 for n, t in whole.items()}  # on disk, in BF16
    experts = sum(size[n] for n in size if is_stacked(n))
    for owned in (range(0, 8), range(2, 4), range(7, 8)):
        targets = {
            n: torch.zeros_like(t[owned.start : owned.stop] if is_stacked(n) else t)
            for n, t in whole.items()
        }
        Counted.total = 0
        report = load_weights(tmp_path / "in", targets, owned, n_experts=8)
        for n, t in whole.items():
            assert torch.equal(targets[n], t[owned.start : owned.stop] if is_stacked(n) else t)
        foreign = experts // 8 * (8 - len(owned))
        assert Counted.total == sum(size.values()) - foreign
        if not stacked:
            assert len(report.having("skipped")) == 4 * (8 - len(owned))

    Counted.total = 0
    plan = account(read_headers(tmp_path / "in"), whole, None, None)
    assert not plan.having("error")
    assert Counted.total == 0


MEASURE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from helpers.memory import peak_of
from nemo_hybrid.checkpoint.convert import import_directory
from nemo_hybrid.checkpoint.load import load_model

source, out, tiny = map(Path, sys.argv[1:])
load_model(tiny)  # what importing and first use take is not of the weights
for action in (
    lambda: import_directory(source, out, show_progress=False),
    lambda: load_model(source),
    lambda: [t.clone() for p in source.glob("*.safetensors") for t in load_file(p).values()],
):
    print(peak_of(action))
"""


@pytest.mark.slow
def test_memory_is_that_of_one_shard(tmp_path) -> None:
    """Beyond the model itself, where one is made."""
    cfg = HybridConfig(
        pattern="E" * 8, vocab_size=64, hidden_size=256, n_routed_experts=32,
        num_experts_per_tok=2, moe_intermediate_size=512, moe_latent_size=None,
        moe_shared_expert_intermediate_size=64, mtp_num_depths=0,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {n: p for name, t in tensors_by_name(HybridLM(cfg)).items()
                  for n, p in to_hub(name, t)}  # fmt: skip
    layers: dict[str, dict[str, torch.Tensor]] = {}
    noise = torch.randn(2**17).bfloat16()
    for name, like in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else "0"
        tensor = noise[: like.numel()].reshape(like.shape).clone()
        layers.setdefault(f"{layer}.safetensors", {})[name] = tensor
    source = tmp_path / "source"
    source.mkdir()
    for file, content in layers.items():
        save_file(content, source / file)
    weight_map = {name: file for file, content in layers.items() for name in content}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps(cfg.to_hf()))
    HybridLM(replace(CONFIG, pattern="ME")).save_hf(str(tmp_path / "tiny"))
    del layers

    shard = (source / "3.safetensors").stat().st_size
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert len(list(source.glob("*.safetensors"))) == 8
    assert shard > 16 << 20
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out", tmp_path / "tiny"],
        capture_output=True, text=True, check=True, env=with_helpers(),
    )  # fmt: skip
    importing, loading, everything = map(int, run.stdout.split())
    print(f"shard {shard}: import {importing}, load {loading} of {weights}, all {everything}")
    assert importing < 1.5 * shard
    assert 0.9 * weights < loading < weights + 1.5 * shard
    assert everything > 7 * shard  # the meter sees what it is to see
