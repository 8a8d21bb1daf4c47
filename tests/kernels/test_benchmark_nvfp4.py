"""The NVFP4 benchmark of a GPU on tiny inputs on a CPU: its times mean nothing."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from helpers.processes import run_python

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.mark.slow
def test_it_runs_through(tmp_path: Path) -> None:
    words = [FOLDER / "nvfp4.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    (done,) = run_python(words)
    found = json.loads((tmp_path / "nvfp4.json").read_text())
    assert found["not_measured"] == []
    assert [row["row"] for row in found["rows"]][-1] == "training step"
    for row in found["rows"][:-1]:
        assert row["limit_ms"] == pytest.approx(row["bytes"] / found["limits"]["bytes_per_s"] * 1e3)
    first = found["rows"][0]  # read twice, and bf16 values and a tensor scale written
    assert first["bytes"] == 64 * 96 * (2 + 2 + 2) + 4
    step = found["rows"][-1]
    assert step["nvfp4_super_first_loss"] != step["bf16_first_loss"]
    assert "training step" in done.stdout
    assert "training step" in (tmp_path / "nvfp4.md").read_text()


def test_wrong_bits_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("nvfp4", "measuring"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    benchmark, measuring = import_module("nvfp4"), import_module("measuring")
    quantizer = benchmark.quantizer

    def wrong(path: str, x: torch.Tensor, sides: object) -> object:
        rows, columns = quantizer("reference", x, sides)
        return (rows._replace(values=-rows.values), columns) if path == "wrong" else (rows, columns)

    monkeypatch.setattr(benchmark, "quantizer", wrong)
    meter = measuring.Meter("cpu", 60)
    name, limits = next(iter(benchmark.SIDES)), {"bytes_per_s": 1e9}
    row = benchmark.quantizer_row(meter, "wrong", (16, 32), name, limits)
    assert "differs from the reference" in row["unavailable"]
    assert "found" in benchmark.quantizer_row(meter, "reference", (16, 32), name, limits)
