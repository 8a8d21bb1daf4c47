"""`nemo-hybrid export` from options to files that `verify-export` accepts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.corpus import TINY_MODEL, write_corpus
from helpers.tiny_models import loud_model
from nemo_hybrid import HybridConfig, UserError
from nemo_hybrid.command_options import ExportOptions, VerifyOptions
from nemo_hybrid.export.verify import verify_command
from nemo_hybrid.export.write import export_command

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
    return out


def options(files: Path, out: Path, **changes: object) -> ExportOptions:
    model = "reader" if str(changes.get("calibration")).endswith("text") else "model"
    return ExportOptions(from_=str(files / model), out=str(out), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "bf16"},
        {"format": "nvfp4"},
        {"format": "nvfp4", "preset": "nano", "scales": "mse", "data": "store"},
        {"format": "mixed", "preset": "super", "data": "store", "kv_cache": "fp8",
         "percentile": 99.9},
        {"format": "fp8", "preset": "ultra", "data": "store", "kv_cache": "fp8"},
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
        rest["calibration_tokens"] = 600
    export_command(options(files, tmp_path / "out", **rest))
    said = capsys.readouterr().out
    assert f"nemo-hybrid verify-export {tmp_path / 'out'} --base" in said
    checked = VerifyOptions(paths=[str(tmp_path / "out")], base=str(files / "model"), tokens=200)
    assert verify_command(checked) == 0
    assert "FAILED" not in capsys.readouterr().out
    written = {
        n: t for p in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(p).items()
    }
    inputs = [n for n in written if "input" in n.rpartition(".")[2]]
    assert bool(inputs) == bool(data)
    assert any(n.endswith("k_scale") for n in written) == ("kv_cache" in changes)
    assert ("no token reached" in said) == (data == "text")
    assert (f"with {changes.get('scales')}, " in said) == ("scales" in changes)
    if "budget_bits" in changes:
        report = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
        assert 4.5 <= report["bits"] <= 6.0
    readme = (tmp_path / "out" / "README.md").read_text()
    assert changes["format"] in readme


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4", "percentile": 99.0}, "percentile needs calibration"),
        ({"format": "nvfp4", "budget_bits": 5.0}, "budget_bits needs calibration"),
        ({"format": "bf16", "calibration": "text"}, "calibration is for quantized formats"),
        ({"format": "mixed", "budget_bits": 5.0, "calibration": "text", "formats": {"*": "fp8"}},
         "leave formats out"),
        ({"format": "nvfp4", "formats": {"*up_prj": "fp8"}}, "*up_prj matches no weight"),
        ({"format": "mixed", "preset": "super"}, "name a text or token store as calibration"),
        ({"format": "nvfp4", "kv_cache": "fp8"}, "kv_cache fp8 needs calibration"),
        ({"format": "nvfp4", "calibration": "nothing"}, "cannot read nothing"),
    ],
)  # fmt: skip
def test_unfit_options_leave_nothing(files, tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        export_command(options(files, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        export_command(options(files, tmp_path, format="nvfp4"))
