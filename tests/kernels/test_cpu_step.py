"""The CPU training-step benchmark compares the same thing on both sides and can say that it does
not."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "cpu_step.py"


@pytest.fixture(scope="module")
def cpu_step() -> ModuleType:
    sys.path.insert(0, str(FILE.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("cpu_step", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpu_step"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_models_agree_and_the_check_notices_other_experts(
    cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = cpu_step.Workload(batch=2, length=128)
    found = cpu_step.check_comparison(work)
    assert found["token_difference"] < 1e-3
    build_peer = cpu_step.build_peer

    def with_permuted_experts(*arguments: Any) -> torch.nn.Module:
        peer = build_peer(*arguments)
        with torch.no_grad():
            for name, weight in peer.named_parameters():
                if name.endswith("experts.up_proj"):
                    weight.copy_(weight.roll(1, 0))
        return peer

    monkeypatch.setattr(cpu_step, "build_peer", with_permuted_experts)
    with pytest.raises(AssertionError, match="the models' losses differ"):
        cpu_step.check_comparison(work)


def test_a_step_changes_the_weights(cpu_step: ModuleType) -> None:
    work = cpu_step.Workload(batch=1, length=64)
    model, loss_function = cpu_step.build(cpu_step.Candidate("", "bfloat16"), work)
    before = loss_function().item()
    step = cpu_step.stepper(model, loss_function)
    assert step() > 0
    assert loss_function().item() < before
    assert all(p.grad is None for p in model.parameters())


def test_the_products_of_a_step_are_all_there(cpu_step: ModuleType) -> None:
    """Counted by hand, and against torch's own counter for the tiny model."""
    import step_products
    from torch.utils.flop_counter import FlopCounterMode

    linear, x_TD = torch.nn.Linear(8, 16, bias=False), torch.randn(5, 8)
    products, flop = step_products.replay(lambda: linear(x_TD).square().sum().backward())
    assert flop == 2 * 2 * 5 * 8 * 16  # the output and the weight's gradient: x needs none
    assert products() > 0
    work = cpu_step.Workload(batch=1, length=64)
    ours, peer = (
        cpu_step.stepper(*cpu_step.build(cpu_step.Candidate(experts, "float32"), work))
        for experts in ("", "eager")
    )
    with FlopCounterMode(display=False) as counter:  # knows no products in place, as we have them
        peer()
    counts = counter.get_flop_counts()["Global"].items()
    expected = sum(n for op, n in counts if str(op).endswith("mm"))
    assert step_products.replay(peer)[1] == pytest.approx(expected, rel=1e-3)
    assert step_products.replay(ours)[1] == pytest.approx(expected, rel=0.05)


def test_the_fastest_of_each_side_and_the_table(cpu_step: ModuleType) -> None:
    rows = [
        {
            "side": candidate.name,
            "dtype": candidate.dtype,
            "loss": 13.25,
            "seconds_alone": 1.0 - i / 100,
            "peak_mib": 1000.0 + i,
            "peak_mib_over_imports": 600.0,
            "over_products": 1.5 + i / 100,
        }
        for i, candidate in enumerate(cpu_step.CANDIDATES)
    ]
    best = [cpu_step.fastest(rows, ours=True), cpu_step.fastest(rows, ours=False)]
    assert best == [("", "bfloat16", "auto"), ("batched_mm", "bfloat16", "auto")]
    check = {
        "loss_ours": 13.25,
        "loss_peer": 13.25,
        "token_difference": 1e-4,
        "experts_effect": 0.6,
        "max_load": 2.0,
    }
    pair = {
        "check": check,
        "candidates": best,
        "ours": {"median_s": 0.5},
        "peer": {"median_s": 1.0},
    }
    from moe_problem import TINY

    times = {"nemo_hybrid": 2.0, "transformers (eager)": 5.0, "transformers (grouped_mm)": 3.0}
    layer = {
        "shape": asdict(TINY),
        "path": "reference",
        "dtypes": {"float32": {name: {"median_ms": ms} for name, ms in times.items()}},
        "speedups": {"float32": 1.5},
    }
    result = {
        "environment": cpu_step.environment(),
        "work": {},
        "alone": rows,
        "pair": pair,
        "moe_layer": layer,
        "speedup": 2.0,
    }
    text = cpu_step.table(json.loads(json.dumps(result)))  # also a result read from its file
    assert (
        "| nemo_hybrid | bfloat16 | 990 | **500** | 4096 | 1001 | 600 | 13.2500 | 1.51 x |" in text
    )
    assert "| transformers (batched_mm) | bfloat16 | 910 | **1000** | 2048 | 1009 |" in text
    assert "**2.00 x** tokens/s" in text
    assert "48 tokens, 3 of 8 experts each, 16 -> 24 -> 16; path reference" in text
    assert "float32: 2.00 ms, transformers (grouped_mm) 3.00 ms: **1.50 x**." in text


def test_the_moe_layer_alone(cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides are right, and are timed only because they are."""
    import cpu_moe

    work = cpu_step.Workload(batch=1, length=64, steps=2, threads=1)
    call = {"candidates": [], "work": asdict(work)}
    result = json.loads(json.dumps(cpu_step.child(call)))
    assert result["shape"]["tokens"] == 64
    for dtype in ("float32", "bfloat16"):
        rows = result["dtypes"][dtype]
        assert len(rows) == 4
        assert sorted(row["repeats"] for row in rows.values()) == [3, 3, 4, 4]
        peers = [row["median_ms"] for name, row in rows.items() if name != "nemo_hybrid"]
        ratio = min(peers) / rows["nemo_hybrid"]["median_ms"]
        assert result["speedups"][dtype] == pytest.approx(ratio)

    def with_other_experts(name: str, problem: Any) -> Any:
        other = replace(problem, ids_TK=problem.ids_TK.roll(1, 0))
        return make_layer(name, other)

    make_layer = cpu_moe.transformers_layer
    monkeypatch.setattr(cpu_moe, "transformers_layer", with_other_experts)
    with pytest.raises(AssertionError, match=r"transformers \(eager\) in float32 deviates by"):
        cpu_step.child(call)


def test_the_result_is_written_whole(cpu_step: ModuleType, tmp_path: Path) -> None:
    cpu_step.write_json(tmp_path / "new" / "result.json", {"speedup": 2.0})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == {"speedup": 2.0}


def test_too_few_steps_are_refused(
    cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_step.py", "--steps", "3"])
    with pytest.raises(SystemExit) as raised:
        cpu_step.main()
    assert raised.value.code == 2
    assert "--steps must be at least 10" in capsys.readouterr().err


def test_the_timed_pair_must_agree(cpu_step: ModuleType) -> None:
    fp32 = cpu_step.Candidate("", "float32"), cpu_step.Candidate("eager", "float32")
    mixed = fp32[0], cpu_step.Candidate("eager", "bfloat16")
    assert cpu_step.check_pair(fp32, [9.0, 9.0005]) == [9.0, 9.0005]
    assert cpu_step.check_pair(mixed, [9.0, 9.04]) == [9.0, 9.04]
    for pair, other in ((fp32, 9.01), (mixed, 9.2), (mixed, float("nan"))):
        with pytest.raises(AssertionError, match="losses differ"):
            cpu_step.check_pair(pair, [9.0, other])


def test_a_pair_is_checked_before_it_is_timed(
    cpu_step: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_step, "check_comparison", lambda work: {})
    monkeypatch.setattr(cpu_step, "BF16_LOSS_TOLERANCE", -1.0)
    pair = cpu_step.Candidate("", "float32"), cpu_step.Candidate("", "bfloat16")
    with pytest.raises(AssertionError, match="losses differ"):
        cpu_step.run_pair(*pair, cpu_step.Workload(batch=1, length=32, steps=1, threads=1))
