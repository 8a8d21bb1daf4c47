"""Exported directories: every tensor, memory and reads, transformers, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.memory import with_helpers
from helpers.nemotron_h_oracle import load_theirs, transformers_twin
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.checkpoint.tensors import TensorFile, tensor_bytes
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.export import write
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.export.layout import ExportFacts, modules_of
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.precision.assign import assign, places, planned
from nemo_hybrid.precision.quantize import decoded, weight_tensors

WIDE: dict[str, object] = {
    "hidden_size": 64, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
    "mamba_head_dim": 16,
}  # fmt: skip
CONFIG = tiny_config("ME*-E", mtp_num_depths=2, **WIDE)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """bf16 weights in two files; a tokenizer beside them."""
    out = tmp_path_factory.mktemp("source") / "model"
    loud_model(CONFIG).bfloat16().save_hf(str(out))
    (path,) = out.glob("*.safetensors")
    content = load_file(path)
    index = {}
    for i in range(2):
        part = {n: content[n] for n in sorted(content)[i::2]}
        save_file(part, out / f"{i}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(part, f"{i}.safetensors")
    path.unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (out / "tokenizer.json").write_text("{}")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "generation_config.json").write_text('{"top_p":0.9}')
    return out


def calibration(shape: HybridConfig = CONFIG) -> Calibration:
    """Other numbers for each place and expert."""
    amax, kv = {}, {}
    for i, (place, size) in enumerate(places(shape).items()):
        amax[place] = (
            torch.arange(1.0, size[0] + 1) + i if len(size) == 3 else torch.tensor(2.0 + i)
        )
        if place.endswith((".k_proj", ".v_proj")) and not place.startswith("mtp."):
            kv[place] = 7.0 + i
    return Calibration(amax, {}, kv, 100)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in directory.glob("*.safetensors") for n, t in load_file(p).items()}


def described(directory: Path, facts: ExportFacts) -> dict[str, bytes]:
    """Files that name the tensors which are there already, and their size."""
    config = json.loads((directory / "config.json").read_text())
    assert (directory / "hf_quant_config.json").exists() == (
        config["quantization_config"]["quant_method"] == "modelopt"
    )
    return {"report.json": json.dumps([sorted(tensors(directory)), facts.bytes_after]).encode()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor_bytes(tensor))


def test_bf16_of_bf16_is_byte_for_byte_the_same(source, tmp_path) -> None:
    assignment = planned(CONFIG, "bf16", "conservative", {}, calibrated=False)
    facts = export_directory(source, tmp_path / "out", assignment, target="bf16")
    verify(tmp_path / "out")
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [p.read_bytes() for p in written] == [
        p.read_bytes() for p in sorted(source.glob("*.safetensors"))
    ]
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(source).keys()
    assert facts.bytes_before == facts.bytes_after == index["metadata"]["total_size"]
    assert facts.parameters == sum(t.numel() for t in tensors(source).values())


@pytest.mark.parametrize("target", ["nvfp4", "mixed", "fp8", "compressed-tensors"])
def test_every_tensor(source, tmp_path, target) -> None:
    """Names, bytes and dtypes, of what is quantized by the quantizer for each matrix alone."""
    rules = {"*.[qkvo]_proj": {"fp8": "fp8", "mixed": "fp8"}.get(target, "nvfp4")}
    if target == "mixed":
        rules |= {"mtp.*.o_proj": "fp8", "lm_head": "nvfp4_w4a16", "*fc1_latent_proj": "fp8"}
    preset = "super" if target == "mixed" else "conservative"
    assignment = planned(CONFIG, target, preset, rules, calibrated=True)
    seen = calibration()
    layout = "compressed-tensors" if target == "compressed-tensors" else "modelopt"
    kv = "fp8" if layout == "modelopt" else "none"
    search = "four_over_six" if target == "nvfp4" else "amax"
    facts = export_directory(
        source, tmp_path / "out", assignment, target=target, search=search, calibration=seen,
        kv_cache=kv, describe=described, max_shard_bytes=1 << 14,
    )  # fmt: skip
    verify(tmp_path / "out")
    before, sizes, wanted = tensors(source), places(CONFIG), {}
    known = {m: p for p in assignment for m in modules_of(p, sizes[p])}
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        place = known.get(module)
        if place is None or assignment[place] == "bf16":
            wanted[name] = tensor
            continue
        fused = place.endswith(("q_proj", "k_proj", "v_proj"))
        together = [re.sub(r"[qkv]_proj$", f"{p}_proj", place) for p in "qkv"] if fused else [place]
        amax = None
        if fused:
            amax = torch.stack([before[f"{p}.weight"].abs().max() for p in together]).max().float()
        stored = weight_tensors(tensor, assignment[place], layout, amax, search)
        wanted |= {f"{module}.{part}": t for part, t in stored.items()}
        largest = max(float(seen.amax[p].max()) for p in together)
        most = {"fp8": 448, "nvfp4": 2688}.get(assignment[place])
        if most and layout == "modelopt":
            wanted[f"{module}.input_scale"] = torch.tensor(largest / most)
        elif most:
            wanted[f"{module}.input_global_scale"] = torch.tensor([most / largest])
    if kv == "fp8":
        for place, amax in seen.kv.items():
            wanted[f"{place}.{place.split('.')[-1][0]}_scale"] = torch.tensor(amax / 448)
    written = tensors(tmp_path / "out")
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert written[name].dtype == tensor.dtype, name
        assert written[name].shape == tensor.shape, name
        if tensor.dtype == torch.float32 and name not in before:
            assert torch.allclose(written[name], tensor, rtol=1e-6, atol=0), name
        else:
            assert raw(written[name]) == raw(tensor), name
        if name.rpartition(".")[2] in FP32_NAMES:
            assert tensor.dtype == torch.float32
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < (1 << 14) + 12_000 or "lm_head.weight" in load_file(path)
               or "backbone.embeddings.weight" in load_file(path) for path in files)  # fmt: skip
    assert facts.bytes_after == sum(t.nbytes for t in written.values())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == [sorted(written), facts.bytes_after]
    assert facts.parameters == sum(t.numel() for t in before.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] in ("modelopt", "compressed-tensors")
    assert (tmp_path / "out" / "hf_quant_config.json").exists() == (layout == "modelopt")
    assert facts.errors.keys() == ({"experts", "shared_experts", "mlp", "attention"} if
                                   target == "nvfp4" else set())  # fmt: skip
    for errors in facts.errors.values():
        assert 0.05 < errors["four_over_six"] < errors["amax"] < 0.15


def test_pieces_of_weights_change_no_byte(tmp_path, source, monkeypatch) -> None:
    """However many numbers are quantized at once; errors measured on a part of them are near those
    of all."""
    assignment = planned(CONFIG, "nvfp4", "conservative", {}, calibrated=False)
    found, files = [], []
    for numbers in (write._AT_ONCE, (1 << 10, 1 << 9)):
        monkeypatch.setattr(write, "_AT_ONCE", numbers)
        out = tmp_path / str(numbers[0])
        facts = export_directory(
            source, out, assignment, target="nvfp4", search="four_over_six", show_progress=False
        )
        found.append(facts.errors)
        files.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
    assert files[0] == files[1]
    whole, parts = found
    assert whole != parts
    assert whole.keys() == parts.keys()
    for kind, errors in whole.items():
        assert parts[kind] == pytest.approx(errors, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("stacked", [False, True])
def test_other_sources(tmp_path, dtype, stacked) -> None:
    """transformers' names, stacked experts, other dtypes: the same export."""
    model = loud_model(CONFIG)
    for tensor in tensors_by_name(model).values():
        tensor.data.copy_(tensor.bfloat16().half())  # so that every dtype holds the same model
    assignment = planned(CONFIG, "nvfp4", "conservative", {}, calibrated=False)
    model.save_hf(str(tmp_path / "ours"))
    export_directory(tmp_path / "ours", tmp_path / "a", assignment, target="nvfp4")
    theirs = {
        n.replace("backbone.", "model."): part.detach().to(dtype).contiguous()
        for name, tensor in tensors_by_name(model).items()
        for n, part in ([(name, tensor)] if stacked else to_hub(name, tensor))
    }
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    shutil.copy(tmp_path / "ours" / "config.json", tmp_path / "theirs")
    export_directory(tmp_path / "theirs", tmp_path / "b", assignment, target="nvfp4")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(raw(a[n]) == raw(b[n]) for n in a)
    kept = [n for n, t in a.items() if t.dtype == torch.float32 and "scale" not in n]
    assert {n.rpartition(".")[2] for n in kept} == set(FP32_NAMES)


def test_transformers_reads_bf16(tmp_path) -> None:
    """Of fp32 weights that bf16 holds."""
    shape = tiny_config("ME*-E", **WIDE)
    model = loud_model(shape).bfloat16().float()
    model.save_hf(str(tmp_path / "model"))
    assignment = planned(shape, "bf16", "conservative", {}, calibrated=False)
    facts = export_directory(tmp_path / "model", tmp_path / "out", assignment, target="bf16")
    assert facts.bytes_after < 0.51 * facts.bytes_before
    theirs, info = load_theirs(tmp_path / "out", torch.float32)
    assert not any(info.values())
    ids = random_ids(shape, 2, 20)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, transformers_twin(model)(ids).logits)


def test_transformers_reads_dense_compressed_tensors(tmp_path) -> None:
    """Its experts it cannot read (issue of transformers 5.23), so there are none here."""
    pytest.importorskip("compressed_tensors", reason="is not installed; the dev extra has it")
    shape = tiny_config("M-*-M", **WIDE)
    model = loud_model(shape).bfloat16()
    model.save_hf(str(tmp_path / "model"))
    rules = {"*.in_proj": "nvfp4", "backbone.layers.4.*.in_proj": "bf16", "*.o_proj": "nvfp4"}
    assignment = planned(shape, "compressed-tensors", "conservative", rules, calibrated=False)
    export_directory(tmp_path / "model", tmp_path / "out", assignment, target="compressed-tensors")
    theirs, info = load_theirs(tmp_path / "out", torch.bfloat16)
    assert not any(info.values())
    ids = random_ids(shape, 2, 20)
    with torch.no_grad():
        plain = transformers_twin(model.float())(ids).logits
        for place, format in assignment.items():
            if format != "bf16":
                weight = model.get_parameter(f"{place}.weight")
                stored = weight_tensors(weight.bfloat16(), format, "compressed-tensors")
                weight.copy_(decoded(stored).bfloat16())
        ours = transformers_twin(model.bfloat16()).bfloat16()(ids).logits.float()
        got = theirs(ids).logits.float()
    assert torch.equal(got, ours)
    assert (plain - ours).abs().max() > 0.1 * ours.abs().max()


def break_weight(
    directory: Path, name: str, value: float, dtype: torch.dtype = torch.bfloat16
) -> None:
    for path in directory.glob("*.safetensors"):
        content = load_file(path)
        if name in content:
            content[name] = content[name].to(dtype)
            content[name].view(-1)[5] = value
            save_file(content, path, {"format": "pt"})


NAN = "backbone.layers.1.mixer.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "target", "rules", "message"),
    [
        (lambda d: break_weight(d, NAN, torch.nan), "nvfp4", {}, f"{NAN} holds NaN or infinity"),
        (lambda d: break_weight(d, NAN, torch.inf), "bf16", {}, f"{NAN} holds NaN or infinity"),
        (lambda d: break_weight(d, "backbone.norm_f.weight", torch.nan), "nvfp4", {},
         "backbone.norm_f.weight holds NaN"),
        (lambda d: break_weight(d, "lm_head.weight", 3.4e38, torch.float32), "bf16", {},
         "lm_head.weight holds NaN or infinity (as bfloat16)"),
        (lambda d: break_weight(d, NAN, 3.4e38, torch.float32), "nvfp4", {},
         f"{NAN}: its largest magnitude, 3.4e+38, is beyond"),
        (lambda d: (d / "hf_quant_config.json").write_text("{}"), "bf16", {}, "quantized already"),
        (lambda d: (d / "config.json").write_text(json.dumps(
            json.loads((d / "config.json").read_text()) | {"quantization_config": {}})),
         "nvfp4", {}, "quantization_config is set; only unquantized"),
        (lambda d: (d / "1.safetensors").unlink(), "nvfp4", {}, "which is not there"),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "bf16", {}, "is an adapter"),
        (lambda d: None, "mixed", {"*in_proj": "fp8"}, "is fp8, whose input scale needs calib"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(source, tmp_path, change, target, rules, message) -> None:
    broken = tmp_path / "in" / "model"
    shutil.copytree(source, broken)
    change(broken)
    preset = None if rules or target == "bf16" else "conservative"
    assignment = assign(CONFIG, preset, rules)
    if not rules:
        assignment = {p: "nvfp4_w4a16" if f == "nvfp4" else f for p, f in assignment.items()}
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        export_directory(broken, tmp_path / "new" / "out", assignment, target=target)
    assert str(caught.value).count(NAN) <= 1
    assert list((tmp_path / "new").iterdir()) == []


def test_disk_directory_and_width(source, tmp_path, monkeypatch) -> None:
    assignment = planned(CONFIG, "nvfp4", "conservative", {}, calibrated=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"out needs 0\.07 GB, but .* has 0\.00 GB free"):
        export_directory(source, tmp_path / "a" / "out", assignment, target="nvfp4")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="full exists and is not empty"):
        export_directory(source, tmp_path / "full", assignment, target="nvfp4")
    narrow = tiny_config("E", moe_intermediate_size=24)
    loud_model(narrow).save_hf(str(tmp_path / "narrow"))
    unfit = dict.fromkeys(places(narrow), "nvfp4_w4a16")
    with pytest.raises(UserError, match=r"experts\.down_proj has rows of 24, which blocks of 16"):
        export_directory(tmp_path / "narrow", tmp_path / "out", unfit, target="nvfp4")
    odd = assign(CONFIG, None, {"backbone.layers.0.mixer.in_proj": "nvfp4_w4a16"})
    with pytest.raises(UserError, match="in_proj has 196 rows, which the 16x16 blocks"):
        export_directory(source, tmp_path / "out", odd, target="nvfp4", search="training")
    with pytest.raises(UserError, match="kv_cache fp8 needs calibration"):
        export_directory(source, tmp_path / "out", assignment, target="nvfp4", kv_cache="fp8")
    with pytest.raises(UserError, match="kv_cache fp8 is written with --format nvfp4"):
        export_directory(
            source, tmp_path / "out", dict.fromkeys(assignment, "bf16"), target="bf16",
            kv_cache="fp8",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    loud_model(tiny_config("M-", **WIDE)).save_hf(str(tmp_path / "blind"))
    blind = planned(tiny_config("M-", **WIDE), "nvfp4", "conservative", {}, calibrated=False)
    with pytest.raises(UserError, match="kv_cache: the model has no attention"):
        export_directory(
            tmp_path / "blind", tmp_path / "out", blind, target="nvfp4", kv_cache="fp8",
            calibration=Calibration({}, {}, {}, 1),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_is_written_last_may_fail(source, tmp_path) -> None:
    def fails(directory: Path, facts: ExportFacts) -> dict[str, bytes]:
        assert tensors(directory)
        raise UserError("no card")

    assignment = planned(CONFIG, "nvfp4", "conservative", {}, calibrated=False)
    with pytest.raises(UserError, match="no card"):
        export_directory(source, tmp_path / "out", assignment, target="nvfp4", describe=fails)
    assert list(tmp_path.iterdir()) == []


def test_each_tensor_is_read_once(source, tmp_path, monkeypatch) -> None:
    reads: list[str] = []
    read = TensorFile.read

    def counted(self, name, rows=None):
        reads.append(name)
        return read(self, name, rows)

    monkeypatch.setattr(TensorFile, "read", counted)
    assignment = planned(CONFIG, "nvfp4", "conservative", {"*.[qkv]_proj": "nvfp4"}, False)
    export_directory(source, tmp_path / "out", assignment, target="nvfp4", search="mse")
    twice = {n for n in reads if reads.count(n) == 2}
    assert twice == {f"backbone.layers.2.mixer.{p}_proj.weight" for p in "qkv"}
    assert set(reads) == tensors(source).keys()
    assert len(reads) == len(set(reads)) + 3


MEASURE = """
import sys
from pathlib import Path
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.precision.assign import planned
from nemo_hybrid.export.write import export_directory
from helpers.memory import peak_of

source, out, tiny = map(Path, sys.argv[1:])
for directory, target in ((tiny, out / "tiny"), (source, out / "whole")):
    shape = HybridConfig.from_hf(str(directory))
    assignment = planned(shape, "nvfp4", "conservative", {"lm_head": "nvfp4"}, False)
    peak = peak_of(lambda: export_directory(
        directory, target, assignment, target="nvfp4", max_shard_bytes=8 << 20,
        search="training", show_progress=False))
print(peak)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_shard_and_one_tensor(tmp_path) -> None:
    """Of one source file with everything, of which the largest tensor is 16 MB."""
    shape = tiny_config(
        "EEEE", hidden_size=256, n_routed_experts=8, num_experts_per_tok=2, vocab_size=1 << 15,
        moe_intermediate_size=1024, moe_latent_size=512, moe_shared_expert_intermediate_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = HybridLM(shape).bfloat16()
    noise = torch.randn(1 << 20).bfloat16()
    for tensor in tensors_by_name(model.to_empty(device="cpu")).values():
        tensor.data.copy_(noise[torch.arange(tensor.numel()) % len(noise)].view(tensor.shape))
    model.save_hf(str(tmp_path / "source"))
    del model
    tiny = tiny_config("ME*-E", vocab_size=64, **WIDE)
    loud_model(tiny).bfloat16().save_hf(str(tmp_path / "tiny"))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "source", tmp_path / "out", tmp_path / "tiny"],
        capture_output=True, text=True, check=True, env=with_helpers(),
    )  # fmt: skip
    source = sum(p.stat().st_size for p in (tmp_path / "source").glob("*.safetensors"))
    written = sum(p.stat().st_size for p in (tmp_path / "out" / "whole").glob("*.safetensors"))
    assert source > 96 << 20
    assert written > 36 << 20
    # Shards of 8 MB, written and made; the head and what it becomes; what malloc keeps.
    print(f"source {source}, written {written}, more memory {int(run.stdout)}")
    assert int(run.stdout) < 44 << 20
