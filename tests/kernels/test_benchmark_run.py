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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a tiny run printed, and its result."""
    folder = tmp_path_factory.mktemp("tiny")
    peer = folder / "peers" / "scattermoe"
    peer.mkdir(parents=True)
    (peer / "__init__.py").write_text("raise RuntimeError('made for another GPU')\n")
    done = run(folder, "--tiny", "--budget", "600", "--peers", str(peer.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith((folder / "moe.md").read_text() + "\n")
    return done.stdout, json.loads((folder / "moe.json").read_text())


@pytest.mark.slow
def test_it_runs_and_reports(tiny: tuple[str, dict[str, Any]]) -> None:
    text, result = tiny
    assert "no time here says anything" in text
    assert "scattermoe: RuntimeError: made for another GPU" in text
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
    assert 2 * slots * inner < ours <= grouped
    assert layer["flops"] == 12 * slots * inner * 16
    tokens, experts = 48 * 16, 8 * inner * 16
    assert layer["bytes"] == 2 * (6 * tokens + 2 * 3 * experts)


@pytest.mark.slow
def test_transformers_takes_part(tiny: tuple[str, dict[str, Any]]) -> None:
    pytest.importorskip("transformers")
    found = tiny[1]["rows"][0]["found"]
    kept = found["transformers grouped_mm"]["kept_bytes"]
    assert kept > found["grouped_mm"]["kept_bytes"]


@pytest.mark.slow
def test_routings_and_limits_are_as_named(tiny: tuple[str, dict[str, Any]]) -> None:
    rows = {(row["row"], row["routing"]): row for row in tiny[1]["rows"]}
    layer = "MoE layer forward"
    assert rows[layer, "skewed"]["busiest_expert"] > 1.5 > rows[layer, "uniform"]["busiest_expert"]
    used = [rows[layer, name]["experts_used"] for name in ("uniform", "skewed", "half unused")]
    assert used == [8, 8, 4]
    fewer = rows[layer, "uniform"]["bytes"] - rows[layer, "half unused"]["bytes"]
    assert fewer == 4 * 2 * 2 * 24 * 16  # both matrices of 4 experts, in bf16
    router, limits = rows["router", "uniform"], tiny[1]["limits"]
    assert router["flops"] == 2 * 48 * 40 * 8
    by_flops, by_bytes = (router[n] / limits[f"{n}_per_s"] * 1e3 for n in ("flops", "bytes"))
    assert router["limit_ms"] == pytest.approx(max(by_flops, by_bytes))


def test_what_the_budget_does_not_suffice_for_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run as program

    words = ["run.py", "--device", "cpu", "--out", str(tmp_path), "--tiny", "--budget", "1"]
    monkeypatch.setattr(sys, "argv", words)
    assert program.main() == 1
    assert json.loads((tmp_path / "moe.json").read_text())["not_measured"] == [
        "tiny, uniform: no time left",
        "tiny, skewed: no time left",
        "tiny, half unused: no time left",
    ]


def test_a_cpu_gets_tiny_inputs_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run as program

    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        program.main()
    assert raised.value.code == 2
    assert "on a CPU only --tiny" in capsys.readouterr().err


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


def test_a_contender_that_fails_late_takes_nobody_along(problem: Any) -> None:
    """In its first call, while its memory is measured, or only while it is timed."""
    x_TL = problem.x_TL.detach()

    def fails_after(calls: int) -> Any:
        left = [calls]

        def call() -> tuple[torch.Tensor]:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError(f"call {calls + 1}")
            return (x_TL,)

        return call

    failing = {f"call {n + 1}": fails_after(n) for n in (0, 1, 2, 5, 15)}
    found = measured(problem, **failing, right=lambda: (x_TL,))
    assert "median_ms" in found["right"]
    for name in failing:
        assert found[name] == {"unavailable": f"OutOfMemoryError: {name}"}


def test_a_forward_pass_that_fails_is_reported(problem: Any) -> None:
    """It is run once more to see what it keeps."""
    from measuring import Meter
    from moe_rows import Row, measure

    x_TL = problem.x_TL.detach()

    def broken() -> Any:
        raise RuntimeError("no more")

    row = Row(
        "row",
        "a",
        {"a": lambda: lambda: (x_TL,), "b": lambda: lambda: (x_TL,)},
        lambda: (x_TL.float(),),
        flops=1,
        bytes=1,
        forward={"a": lambda: broken},
    )
    found = measure(row, Meter(DEVICE, 60))
    assert found["a"] == {"unavailable": "RuntimeError: no more"}
    assert "median_ms" in found["b"]


def test_inputs_that_cannot_be_made_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import run as program
    from measuring import Meter
    from moe_problem import TINY, UNIFORM

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(program, "draw", too_large)
    result: dict[str, Any] = {"not_measured": []}
    assert list(program.measure_case(Meter(DEVICE, 60), "reference", TINY, UNIFORM, result)) == []
    assert result["not_measured"] == ["tiny, uniform: OutOfMemoryError: too large"]


def test_no_row_computes_before_it_is_measured(
    problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe_rows

    def too_early(*_: Any) -> None:
        raise AssertionError("computed outside of measure")

    monkeypatch.setattr(moe_rows.reference, "topk_router", too_early)
    monkeypatch.setattr(moe_rows.moe, "moe_mlp", too_early)
    names = [row.name for row in moe_rows.rows(problem, "triton")]
    assert "router" in names
    assert len(names) == 6


def test_everyone_begins_a_round_in_turn() -> None:
    from measuring import WARM_UP, Meter

    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    Meter(DEVICE, 60).times(calls, seconds=0, least=4)
    rounds = "".join(seen[3 * WARM_UP[DEVICE] :])
    assert rounds == "abc" + "bca" + "cab" + "abc"


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
