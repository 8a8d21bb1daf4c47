"""The printed and written figures of the modelled step."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "kernels" / "benchmarks" / "roofline.py"
CONFIG = ["--config", str(ROOT / "configs" / "model" / "tiny.yaml")]
KEYS = {
    "us_per_token", "tokens_per_s", "mfu", "fp32_matmul_flop_share", "host_syncs_per_micro_batch",
    "peak_bytes", "ops",
}  # fmt: skip


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    sys.path.insert(0, str(FILE.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("roofline", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures(roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["--tokens", "256", "--documents", "4", "--chip", "b200", "--json", str(out)]
    assert roofline.main([*CONFIG, *words]) == 0
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found) >= KEYS
    assert found["asked"]["documents"] == 4
    assert found["asked"]["config"] == "tiny"
    assert f"{found['us_per_token']:.2f} us per token" in said
    assert "tiny on one b200, modelled, not measured" in said
    times = [of["us"] for of in found["ops"].values()]
    assert sum(times) == pytest.approx(found["us_per_token"])
    assert found["tokens_per_s"] == pytest.approx(1e6 / found["us_per_token"])
    for name in (*found["ops"], "one layer", *(f"{n} x {w}" for w, n in found["waits"].items())):
        assert name in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tokens", "0"], "expected a positive number, got 0"),
        (["--documents", "300", "--tokens", "256"], "--documents 300: more than --tokens 256"),
        (["--ep", "3"], "--ep 3 does not divide the number of experts (16)"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--recompute", "X"], "--recompute X: expected letters of M, E, *, - and e"),
        (["--chip", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_mistakes(
    roofline: ModuleType, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = roofline.main([*CONFIG, *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(FILE.parent.glob("results/roofline_*.json")))
def test_results_that_are_kept(file: Path) -> None:
    found = json.loads(file.read_text())
    assert found["modelled"] == "not measured"
    assert set(found) >= KEYS
    assert sum(of["us"] for of in found["ops"].values()) == pytest.approx(found["us_per_token"])


@pytest.mark.parametrize("name", ["nano_3b", "nano_ep8", "super_ep64"])
def test_results_before_and_after(name: str) -> None:
    before, after = (
        json.loads((FILE.parent / f"results/roofline_{name}_{when}.json").read_text())
        for when in ("before", "after")
    )
    assert before["asked"] == after["asked"]
    assert after["us_per_token"] < before["us_per_token"] / 2
    assert after["fp32_matmul_flop_share"] < 0.005 < before["fp32_matmul_flop_share"]
    assert after["host_syncs_per_micro_batch"] < before["host_syncs_per_micro_batch"]
