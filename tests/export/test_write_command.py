"""`nemo-hybrid export` from options to files that `verify-export` accepts."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from helpers.corpus import TINY_MODEL, write_corpus
from helpers.tiny_models import loud_model
from nemo_hybrid import HybridConfig, UserError
from nemo_hybrid.checkpoint import load
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.cli import main
from nemo_hybrid.commands.export import ExportOptions, export_command
from nemo_hybrid.commands.verify import VerifyOptions, verify_command
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.words import read_options
from nemo_hybrid.export.calibrate import read_pieces
from nemo_hybrid.export.verify import load_exported, verify_directory

CONFIG = HybridConfig(**(TINY_MODEL | {"pattern": "ME*-", "moe_intermediate_size": 32}))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """``store`` and ``model`` of one tokenizer; ``text``, and ``reader``, the same model for it."""
    out = tmp_path_factory.mktemp("files")
    write_corpus(out / "store")
    loud_model(CONFIG).bfloat16().save_hf(str(out / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "store" / name, out / "model" / name)
    shutil.copytree(out / "model", out / "reader")
    tokenizer = json.loads((out / "model" / "tokenizer.json").read_text()) | {"added_tokens": []}
    (out / "reader" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "text").write_text("w1 w2 w3 w5")
    (out / "link").symlink_to("text")
    (out / "word").write_text("w1")
    for name in ("narrow", "quantized", "cut"):
        shutil.copytree(out / "model", out / name)
    narrow = replace(CONFIG, moe_intermediate_size=24)
    shutil.rmtree(out / "narrow")
    loud_model(narrow).bfloat16().save_hf(str(out / "narrow"))
    config = json.loads((out / "model" / "config.json").read_text())
    (out / "quantized" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "modelopt"}})
    )
    (path,) = (out / "cut").glob("*.safetensors")
    content = load_file(path)
    save_file({n: t for n, t in content.items() if "norm_f" not in n}, path, {"format": "pt"})
    return out


def options(files: Path, out: Path, **changes: object) -> ExportOptions:
    model = "reader" if str(changes.get("calibration")).endswith("text") else "model"
    source = str(files / str(changes.pop("from_", model)))
    given = ExportOptions(from_=source, out=str(out), **changes)  # type: ignore[arg-type]
    given.validate()
    return given


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "bf16"},
        {"format": "nvfp4", "preset": "nano", "scales": "mse", "data": "store"},
        {"format": "mixed", "preset": "super", "data": "store", "kv_cache": "fp8",
         "percentile": 99.9},
        {"format": "fp8", "preset": "ultra", "data": "store"},
        {"format": "compressed-tensors", "scales": "training"},
        {"format": "compressed-tensors", "scales": "four_over_six", "data": "text"},
        {"format": "mixed", "formats": {"mtp.*": "fp8", "lm_head": "nvfp4"}, "data": "store"},
        {"format": "mixed", "budget_bits": 6.0, "data": "store"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)  # fmt: skip
def test_what_is_exported_is_verified(files, tmp_path, capsys, changes) -> None:
    data = changes.get("data")
    rest = {k: v for k, v in changes.items() if k != "data"}
    if data:
        rest["calibration"] = str(files / data)
        rest["calibration_tokens"] = 250
    given = options(files, tmp_path / "out", **rest)
    export_command(given)
    said = capsys.readouterr().out
    assert f"nemo-hybrid verify-export {tmp_path / 'out'} --base" in said
    checked = VerifyOptions(paths=[str(tmp_path / "out")], base=given.from_, tokens=200)
    assert verify_command(checked) == 0
    assert "FAILED" not in capsys.readouterr().out
    written = {
        n: t for p in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(p).items()
    }
    inputs = [n for n in written if "input" in n.rpartition(".")[2]]
    assert bool(inputs) == bool(data)
    layers = [
        n.rpartition(".")[0] for n in written if n.endswith(("k_proj.weight", "v_proj.weight"))
    ]
    scales = {f"{n}.{n.rpartition('.')[2][0]}_scale" for n in layers}  # the MTP block's, too
    assert any(n.startswith("mtp.") for n in scales)
    found = {n for n in written if n.endswith(("k_scale", "v_scale"))}
    assert found == (scales if "kv_cache" in changes else set())
    assert ("no token reached" in said) == (data == "text")
    assert ("warning: calibrated on" in said) == bool(data)  # few tokens
    assert (f"with {changes.get('scales')}, " in said) == ("scales" in changes)
    if "budget_bits" in changes:
        report = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
        assert 4.5 <= report["bits"] <= 6.0
    readme = (tmp_path / "out" / "README.md").read_text()
    assert changes["format"] in readme


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "compressed-tensors"},
        {"format": "mixed", "preset": "super", "calibration": "store", "calibration_tokens": 250,
         "formats": {"lm_head": "nvfp4"}},
    ],
    ids=["weights", "inputs"],
)  # fmt: skip
def test_the_card_has_what_held_out_text_gives(files, tmp_path, capsys, changes) -> None:
    """KL and perplexity against whole passes of both models, and what verify-export finds."""
    if "calibration" in changes:
        changes = changes | {"calibration": str(files / changes["calibration"])}
    store, out = str(files / "store"), tmp_path / "out"
    export_command(options(files, out, heldout=store, heldout_tokens=150, **changes))
    said, readme = capsys.readouterr().out, (out / "README.md").read_text()
    pieces = read_pieces(store, files / "model", CONFIG, 150, "heldout")
    rows, inputs = [], "calibration" in changes
    with torch.no_grad():
        p, q = ([m(ids).logits[0, :-1].double().log_softmax(-1) for ids in pieces] for m in (
            load_model(files / "model", torch.float32), load_exported(out)))  # fmt: skip
    p_TV, q_TV = torch.cat(p), torch.cat(q)
    labels_T = torch.cat([ids[0, 1:] for ids in pieces])
    kl = float((p_TV.exp() * (p_TV - q_TV)).sum(1).mean())
    before, after = (math.exp(F.nll_loss(x_TV, labels_T)) for x_TV in (p_TV, q_TV))
    rows = re.findall(r"^\| (nothing|weights)\S* .*\| (.*) \| ([\d.]+) \|$", readme, re.M)
    assert len(rows) == 2 + inputs
    assert rows[0] == ("nothing", "", f"{before:.3f}")
    assert float(rows[1][1]) == pytest.approx(kl, rel=2e-3, abs=1e-12)
    assert float(rows[1][2]) == pytest.approx(after, rel=1e-3)
    found = verify_directory(out, base=str(files / "model"), data=store, tokens=150).measured
    assert found is not None
    assert len(found.runs) == 2 + inputs
    if inputs:
        rounded = found.runs[2]
        assert rows[2][1:] == (f"{rounded.kl:.3e}", f"{math.exp(rounded.loss):.3f}")
        assert float(rows[2][1]) != pytest.approx(kl, rel=0.02)
    assert f"{len(labels_T)} tokens of the held-out part of `store`, in FP32" in readme
    for cell in {cell for row in rows for cell in row[1:]}:
        assert cell in said


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded."""

    def fails(*args: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", fails)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"percentile": 99.0}, "percentile needs calibration"),
        ({"percentile": 0.999, "calibration": "store"}, "percentile must lie in [90, 100]"),
        ({"budget_bits": 5.0}, "budget_bits needs calibration"),
        ({"format": "bf16", "calibration": "text"}, "calibration is for quantized formats"),
        ({"format": "mixed", "budget_bits": 5.0, "calibration": "text", "formats": {"*": "fp8"}},
         "leave formats out"),
        ({"formats": {"*up_prj": "fp8"}}, "*up_prj matches nothing in the"),
        ({"formats": {"*up_prj": "fp8"}, "calibration": "store"}, "*up_prj matches nothing in the"),
        ({"preset": "super", "calibration": "store"}, "which --format nvfp4 cannot hold"),
        ({"format": "mixed", "preset": "super"}, "name a text or token store as calibration"),
        ({"kv_cache": "fp8"}, "kv_cache fp8 needs calibration"),
        ({"format": "compressed-tensors", "kv_cache": "fp8", "calibration": "store"},
         "kv_cache fp8 is written with --format nvfp4"),
        ({"calibration": "nothing"}, "nothing does not exist"),
        ({"calibration": "store", "heldout": "nothing"}, "nothing does not exist"),
        ({"calibration": "text", "heldout": "text"}, "heldout is the text of the calibration"),
        ({"calibration": "text", "heldout": "link"}, "heldout is the text of the calibration"),
        ({"heldout_tokens": 9}, "heldout_tokens has no effect"),
        ({"heldout": "word", "from_": "reader"}, "fewer than two tokens"),
        ({"formats": {"*": "nvfp4_w4a16"}, "calibration": "store"}, "calibration has no effect"),
        ({"formats": {"*": "nvfp4_w4a16"}, "calibration": "store", "kv_cache": "fp8",
          "percentile": 99.0}, "percentile has no effect where no inputs are rounded"),
        ({"format": "mixed", "formats": {"*": "fp8"}, "calibration": "store", "scales": "mse"},
         "scales has no effect where nothing becomes NVFP4"),
        ({"calibration": "store", "from_": "narrow"}, "down_proj has rows of 24, which blocks of"),
        ({"preset": "nano", "scales": "training"}, "in_proj has 164 rows, which the 16x16 blocks"),
        ({"calibration": "store", "from_": "quantized"}, "quantization_config is set"),
        ({"calibration": "store", "from_": "cut"}, "does not fit the model"),
        ({"budget_bits": 4.4, "calibration": "store"}, "too small: give at least 4.5"),
        ({"format": "fp8", "budget_bits": 7.0, "calibration": "store"}, "give at least 8"),
        ({"budget_bits": 5.0, "calibration": "store", "kv_cache": "fp8",
          "format": "compressed-tensors"}, "kv_cache fp8 is written with"),
    ],
)  # fmt: skip
def test_unfit_options_leave_nothing(files, tmp_path, changes, message, unreadable) -> None:
    for name in ("calibration", "heldout"):
        if changes.get(name, "nothing") != "nothing":
            changes = changes | {name: str(files / changes[name])}
    with pytest.raises(UserError, match=re.escape(message)):
        export_command(options(files, tmp_path / "out", **({"format": "nvfp4"} | changes)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [None, 5.0])
def test_target_and_disk_are_looked_at_first(
    files, tmp_path, monkeypatch, budget, unreadable
) -> None:
    given = {"format": "nvfp4", "calibration": str(files / "store"), "budget_bits": budget}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_command(options(files, tmp_path / "full", **given))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"out needs 0\.07 GB, but .* has 0\.00 GB free"):
        export_command(options(files, tmp_path / "out", **given))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_fails_late_leaves_nothing(files, tmp_path) -> None:
    """NaN where neither headers nor calibration see it, and logits that are not finite."""
    for name in ("mtp.layers.0.eh_proj.weight", "lm_head.weight"):
        broken = tmp_path / name
        shutil.copytree(files / "model", broken)
        (path,) = broken.glob("*.safetensors")
        content = load_file(path)
        content[name].view(-1)[3] = torch.nan
        save_file(content, path, {"format": "pt"})
        (tmp_path / "new").mkdir(exist_ok=True)
        heldout = str(files / "store")
        with pytest.raises(UserError, match=re.escape(f"{name} holds NaN or infinity")):
            export_command(
                ExportOptions(
                    from_=str(broken), out=str(tmp_path / "new/out"), format="nvfp4",
                    heldout=heldout, heldout_tokens=50, calibration=heldout, calibration_tokens=50,
                )
            )  # fmt: skip
        assert list((tmp_path / "new").iterdir()) == []


def read(*words: str) -> dict[str, str]:
    given = ["--from", "a", "--out", "b", "--format", "nvfp4", *words]
    return read_options(ExportOptions, given).formats


def test_formats_are_a_file_or_a_mapping(tmp_path) -> None:
    """In a file or inline: globs in their order, of which the last that matches counts."""
    file = tmp_path / "formats.yaml"
    file.write_text("# comment\n'*.o_proj': nvfp4\nmtp.*: bf16\n'*.k_proj': fp8\n")
    wanted = {"*.o_proj": "nvfp4", "mtp.*": "bf16", "*.k_proj": "fp8"}
    for words in (
        ["--formats", str(file)],
        [f"--formats={file}"],
        ["--formats", "{'*.o_proj': nvfp4, mtp.*: bf16, '*.k_proj': fp8}"],
        ["--formats", "'*.o_proj': nvfp4\nmtp.*: bf16\n'*.k_proj': fp8"],
    ):
        assert list(read(*words).items()) == list(wanted.items())
    assert read("--formats", "{}") == {}
    (tmp_path / "run.yaml").write_text("distill: {formats: formats.yaml}")
    of_file = load_config([tmp_path / "run.yaml"], kind=FinetuneConfig)
    of_word = load_config([], ["--distill.formats", str(file)], kind=FinetuneConfig)
    assert of_file.distill.formats == of_word.distill.formats == wanted
    assert load_config([], ["--precision.formats", str(file)]).precision.formats == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "formats.yaml: No such file"),
        ("- a\n", "formats.yaml: expected `key: value` lines"),
        ("a: fp8\nb: bf16\na: bf16\n", "line 3: not valid YAML: the key 'a' is given twice"),
        ("*.o_proj: fp8\n", "put text that starts with * in quotes"),
        ("a: 3\n", "formats: expected a mapping of globs to formats"),
        ("a: {b: c}\n", "formats: expected a mapping of globs to formats"),
    ],
)
def test_files_of_formats_that_cannot_be_used(tmp_path, content, message) -> None:
    file = tmp_path / "formats.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read("--formats", str(file))
    (tmp_path / "run.yaml").write_text("distill: {formats: formats.yaml}")
    with pytest.raises(UserError, match=re.escape(message)):
        load_config([tmp_path / "run.yaml"], kind=FinetuneConfig)


def test_the_command_line_says_what_is_wrong(files, tmp_path, capsys) -> None:
    (tmp_path / "formats.yaml").write_text("'*.o_proj': fp4\n")
    words = ["export", "--from", str(files / "model"), "--out", str(tmp_path / "new/out")]
    words += ["--format", "nvfp4", "--formats", str(tmp_path / "formats.yaml")]
    assert main(words) == 2
    assert "formats: *.o_proj: 'fp4' is no format; use bf16, fp8" in capsys.readouterr().err
    assert main([*words[:-2], "--budget_bits", "16", "--calibration", str(files / "store")]) == 2
    assert "budget_bits must lie in (0, 16), got 16" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
