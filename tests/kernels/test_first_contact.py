"""What runs first on a GPU, tried on the CPU: its steps, and that what fails is told and stops
nothing."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_kernels import backend

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
ON_CPU = ["--device", "cpu", "--tiny", "--out"]


def script(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # as for a script
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def contact() -> ModuleType:
    return script("first_contact")


@pytest.fixture(scope="module")
def train_step() -> ModuleType:
    return script("train_step")


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which the kernels, tested elsewhere, take minutes."""
    given = backend.importable

    def importable(op: str, names: list[str]) -> list[str]:
        return [name for name in given(op, names) if name != "triton"]

    monkeypatch.setattr(backend, "importable", importable)


def rows(out: Path, step: str) -> dict[str, dict[str, Any]]:
    found = json.loads((out / "first_contact.json").read_text())
    return {row["name"]: row for row in found[step]}


def test_operations_and_packed_rows(contact: ModuleType, tmp_path: Path) -> None:
    steps = ["ops", "packed", "deterministic"]
    assert contact.main([*steps, *ON_CPU, str(tmp_path)]) == 0
    ops = rows(tmp_path, "ops")
    assert {op: ops[f"choice of {op}"]["path"] for op in backend.OPS} == dict.fromkeys(
        backend.OPS, "reference"
    )
    for op in backend.OPS:
        mine = {name: row for name, row in ops.items() if name.startswith(f"{op} reference, ")}
        assert mine
        assert all(row["state"] == "passed" for row in mine.values())
    assert 0 < ops["ssd reference, documents"]["deviation"] < contact.LIMIT
    assert "does not run on cpu" in ops["attention varlen, documents"]["reason"]
    assert len(rows(tmp_path, "packed")) == 4
    assert {row["state"] for row in rows(tmp_path, "deterministic").values()} == {"passed"}


def test_a_row_that_fails_stops_no_other(
    contact: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents that are not told apart on the device, and a path that raises."""
    made = script("contact_problems")
    right, attend = made.causal_conv1d, made.attention

    def wrong(x: torch.Tensor, *others: Any) -> torch.Tensor:
        found: torch.Tensor = right(x, *others[: 2 if x.dtype == torch.bfloat16 else 3])
        return found

    def broken(q: torch.Tensor, *others: Any) -> torch.Tensor:
        if q.dtype == torch.bfloat16:
            raise RuntimeError("no kernel image")
        found: torch.Tensor = attend(q, *others)
        return found

    monkeypatch.setattr(made, "causal_conv1d", wrong)
    monkeypatch.setattr(made, "attention", broken)
    assert contact.main(["ops", *ON_CPU, str(tmp_path)]) == 1
    found = rows(tmp_path, "ops")
    failed = {name for name, row in found.items() if row["state"] == "FAILED"}
    assert {name.split()[0] for name in failed} == {"conv1d", "attention"}
    assert "deviates by" in found["conv1d reference, documents"]["reason"]
    assert "RuntimeError: no kernel image" in found["attention reference, documents"]["reason"]
    assert found["choice of nvfp4"]["state"] == "passed"


def test_training_without_deepspeed(
    contact: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact, "find_spec", lambda name: None)
    assert contact.main(["training", *ON_CPU, str(tmp_path)]) == 0
    found = rows(tmp_path, "training")
    assert found["pretrain, DeepSpeed, resume"]["state"] == "skipped"
    assert found["pretrain, DeepSpeed, resume"]["reason"] == "DeepSpeed is not installed"
    assert found["a step in fp32"]["deviation"] == 0  # the same device
    assert found["steps in bf16"]["deviation"] > 0
    helper = script("contact_training")
    monkeypatch.setattr(helper, "batch", lambda given=helper.batch: given(64))
    assert helper.gradients("cpu", torch.float32) == 0


def test_a_step_that_cannot_begin_is_a_row(
    contact: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "contact_training", None)
    assert contact.main(["training", "deterministic", *ON_CPU, str(tmp_path)]) == 1
    for step in ("training", "deterministic"):
        assert "NotFoundError" in rows(tmp_path, step)["the step itself"]["reason"]


@pytest.mark.sweep
def test_pretrain_and_resume(contact: ModuleType, tmp_path: Path) -> None:
    given = contact.Given("cpu", True, tmp_path)
    found = contact.pretrained(given)
    assert found["deviation"] == 0
    assert len(found["losses"]) == 4


@pytest.mark.slow
def test_profile_names_what_takes_longest(
    contact: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contact.main(["compiler", "profile", *ON_CPU, str(tmp_path)]) in (0, 1)
    row = rows(tmp_path, "profile")["three steps"]
    times = [kernel["us_per_step"] for kernel in row["kernels"]]
    assert times == sorted(times, reverse=True)
    assert row["kernels"][0]["name"] in capsys.readouterr().out


def test_ours_is_measured_and_compared(train_step: ModuleType, tmp_path: Path) -> None:
    task = train_step.Task("tiny", 32, 1, "cpu", 0.0)
    found = train_step.measured(task, train_step.CONTENDERS["ours, 80 documents"], 1)
    assert found["repeats"] == 3
    ops = ("ssd", "conv1d", "moe", "attention", "norm", "loss")
    assert found["paths"] == dict.fromkeys(ops, "reference")
    ours = {"tokens_per_s": 30.0, "peak_gib": 2.0, "first_loss": 5.0}
    slow, fast = ({**ours, "tokens_per_s": rate, "peak_gib": 4.0} for rate in (10.0, 15.0))
    ran = {"ours": ours, "transformers, eager": slow, "transformers, grouped_mm": fast}
    expected = {"speedup": 2.0, "memory": 0.5, "loss_difference": 0.0, "agree": True}
    assert train_step.compared(ran) == expected
    assert not train_step.compared(ran | {"ours": {**ours, "first_loss": 5.2}})["agree"]
    assert train_step.compared({"ours": ours, "transformers, eager": {"failed": "no"}}) == {}


def test_who_fails_is_listed(
    train_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_peer(task: Any, contender: Any) -> dict[str, Any]:
        raise ImportError("no transformers")

    monkeypatch.setattr(train_step, "measure", no_peer)
    assert train_step.main([*ON_CPU, str(tmp_path)]) == 1
    found = json.loads((tmp_path / "train_step.json").read_text())
    assert {row["failed"] for row in found["rows"].values()} == {"ImportError: no transformers"}
    done = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nout of memory\n")
    monkeypatch.setattr(train_step.subprocess, "run", lambda *_, **__: done)
    on_gpu = train_step.Task("tiny", 32, 1, "cuda", 0.0)
    assert train_step.measured(on_gpu, train_step.CONTENDERS["ours"], 9) == {
        "failed": "Traceback / out of memory"
    }


@pytest.mark.slow
def test_both_sides_have_the_same_loss(train_step: ModuleType, tmp_path: Path) -> None:
    assert train_step.main([*ON_CPU, str(tmp_path)]) == 0
    found = json.loads((tmp_path / "train_step.json").read_text())
    assert found["compared"]["agree"]
    losses = {name: row["first_loss"] for name, row in found["rows"].items()}
    by_documents = abs(losses["ours"] - losses["ours, 80 documents"])
    assert by_documents > 5 * found["compared"]["loss_difference"]
