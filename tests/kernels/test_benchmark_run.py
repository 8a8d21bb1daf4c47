"""The MoE benchmark runs from end to end without a GPU, gives wrong results no time, and says what
it did not measure.

Shapes: T tokens, L width in which experts work.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.triton_env import DEVICE

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def benchmark_modules() -> None:
    """The benchmark's files import each other by name."""
    sys.path.insert(0, str(FOLDER))


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--out", str(folder)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_it_runs_and_reports(tmp_path: Path) -> None:
    peer = tmp_path / "peers" / "scattermoe"
    peer.mkdir(parents=True)
    (peer / "__init__.py").write_text("raise RuntimeError('made for another GPU')\n")
    done = run(tmp_path, "--tiny", "--budget", "600", "--peers", str(peer.parent))
    assert done.returncode == 0, done.stdout + done.stderr

    text = (tmp_path / "moe.md").read_text()
    assert "no time here says anything" in text
    assert done.stdout.endswith(text + "\n")
    assert "scattermoe: RuntimeError: made for another GPU" in text

    result = json.loads((tmp_path / "moe.json").read_text())
    names = {(row["row"], row["routing"]) for row in result["rows"]}
    assert {("MoE layer forward + backward", "uniform"), ("router", "skewed")} <= names
    assert result["not_measured"] == []
    assert {"python", "torch", "triton", "commit", "date"} <= result["machine"].keys()
    for row in result["rows"]:
        assert {"reference"} < {n for n, found in row["found"].items() if "median_ms" in found}
        for found in row["found"].values():
            if "median_ms" in found:
                assert 0 < found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]
                assert found["deviation"] <= 0.05
    layer = result["rows"][0]
    slots, inner = 48 * 3, 24
    ours, grouped = (layer["found"][n]["kept_bytes"] for n in ("reference", "grouped_mm"))
    assert (
        2 * slots * inner
        < ours
        <= grouped
        < layer["found"]["transformers grouped_mm"]["kept_bytes"]
    )
    assert layer["flops"] == 12 * slots * inner * 16
    # Skewed routing is skewed.
    assert result["rows"][-1]["busiest_expert"] > 1.5 > layer["busiest_expert"]


def test_what_the_budget_does_not_suffice_for_is_listed(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "--budget", "1")
    assert done.returncode == 1
    assert json.loads((tmp_path / "moe.json").read_text())["not_measured"] == [
        "tiny, uniform: no time left",
        "tiny, skewed: no time left",
    ]


def test_a_cpu_gets_tiny_inputs_only(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "on a CPU only --tiny" in done.stderr


@pytest.fixture
def problem() -> Any:
    from moe_problem import TINY, UNIFORM, draw

    return draw(TINY, UNIFORM, DEVICE)


def test_parts_of_path_triton_are_right(problem: Any) -> None:
    """This also holds the benchmark to the kernels' present signatures."""
    pytest.importorskip("triton")
    from measuring import TOLERANCE, deviation
    from moe_parts import parts

    for part in parts(problem):
        expected = part["expected"]()
        for name, build in part["builders"].items():
            found = deviation(build()(), expected)
            assert found < TOLERANCE, f"{part['name']}, {name}"


def measured(problem: Any, **calls: Any) -> dict[str, dict[str, Any]]:
    from measuring import Meter
    from moe_rows import Row, measure

    expected = problem.x_TL.detach().float()
    builders = {name: lambda call=call: call for name, call in calls.items()}
    row = Row("row", "right", builders, lambda: (expected,), flops=1, bytes=1)
    return measure(row, Meter(DEVICE, 60))


def test_wrong_results_get_no_time(problem: Any) -> None:
    x_TL = problem.x_TL.detach()
    shifted = x_TL.clone()
    shifted[7] *= 1.1  # one token of 48
    missing = x_TL.clone()
    missing[7, 0] = torch.nan

    def broken() -> None:
        raise TypeError("unexpected keyword argument")

    found = measured(
        problem,
        right=lambda: (x_TL,),
        shifted=lambda: (shifted,),
        missing=lambda: (missing,),
        cut=lambda: (x_TL[1:],),
        broken=broken,
    )
    assert found["right"]["repeats"] >= 10
    assert found["right"]["deviation"] == 0
    for name, reason in {
        "shifted": "wrong: deviates by 0.1 ",
        "missing": "wrong: deviates by inf",
        "cut": "wrong: deviates by inf",
        "broken": "TypeError: unexpected keyword argument",
    }.items():
        assert found[name].keys() == {"unavailable"}
        assert found[name]["unavailable"].startswith(reason)


def test_integers_must_be_equal(problem: Any) -> None:
    from measuring import deviation

    ids_TK = problem.ids_TK
    other_TK = ids_TK.clone()
    other_TK[3, 1] += 1
    assert deviation((ids_TK,), (ids_TK.clone(),)) == 0
    assert deviation((other_TK,), (ids_TK,)) == float("inf")


def test_a_lost_gpu_ends_the_measurement(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from measuring import DeviceLost, Meter

    def illegal() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert "illegal" in measured(problem, illegal=illegal)["illegal"]["unavailable"]
    monkeypatch.setattr(Meter, "works", lambda meter: False)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        measured(problem, illegal=illegal)


def test_draws_follow_their_odds() -> None:
    """Without replacement: once per token; where routing is skewed, one over the expert's rank."""
    from moe_problem import SKEWED, UNIFORM, Shape, draw

    shape = Shape("many tokens", 4000, 4, 16, 2, 4, 4)
    for routing, most in ((UNIFORM, 1.1), (SKEWED, 5.0)):
        problem = draw(shape, routing, DEVICE)
        assert (problem.ids_TK[:, 0] != problem.ids_TK[:, 1]).all()
        assert problem.busiest() < most
    assert problem.busiest() > 3
