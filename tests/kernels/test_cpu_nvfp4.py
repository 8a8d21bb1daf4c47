"""The benchmark of emulated NVFP4, on a problem so small that its figures say nothing."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture(scope="module")
def cpu_nvfp4() -> ModuleType:
    sys.path.insert(0, str(FOLDER))  # as for a script
    spec = importlib.util.spec_from_file_location("cpu_nvfp4", FOLDER / "cpu_nvfp4.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_measures_operands_and_steps(
    cpu_nvfp4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_nvfp4, "ROWS", 64)
    result = cpu_nvfp4.measure(cpu_nvfp4.Workload(batch=1, length=64, steps=3, threads=1))
    assert set(result["operands_ns_per_element"]) == set(cpu_nvfp4.OPERANDS)
    for recipe, row in result["steps"].items():
        assert len(row["steps_s"]) == 3
        bf16 = result["steps"]["bf16"]["median_s"]
        assert result["over_bf16"][recipe] == pytest.approx(row["median_s"] / bf16)
    assert "| nvfp4_super |" in cpu_nvfp4.table(result)


def test_a_recipe_that_quantizes_nothing_is_noticed(
    cpu_nvfp4: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_nvfp4.policy, "Precision", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="nvfp4_super moves the loss by 0"):
        cpu_nvfp4.step_times(cpu_nvfp4.Workload(batch=1, length=64, steps=3, threads=1))
