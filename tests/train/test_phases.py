"""A phase that continues from a checkpoint is the run that never stopped, on its own data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.once import once
from helpers.processes import Finished, run_python
from nemo_hybrid.agreement import ALONE
from nemo_hybrid.commands.plan import COMMANDS
from nemo_hybrid.config.read import load_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.train.metrics import read_metrics
from nemo_hybrid.train.resume import begin_phase
from train.phases import SAVED


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    def make(out: Path) -> None:
        finished: list[Finished] = run_python(
            [Path(__file__).with_name("phases.py"), store, out], size=2
        )
        (out / "stdout").write_text(finished[0].stdout)

    return once(tmp_path_factory, "phases", make)


def state(runs: Path, name: str, step: int) -> dict[str, bytes]:
    """Weights, router biases, masters and moments of a checkpoint."""
    directory = runs / name / f"checkpoints/step_{step:08d}"
    files = {p.name: p.read_bytes() for p in directory.glob("*.safetensors")}
    return {name: content for name, content in files.items() if not name.startswith("rank-")}


def test_it_equals_never_stopping_to_the_last_bit(runs: Path) -> None:
    whole, phase = state(runs, "unbroken", 2 * SAVED), state(runs, "phase", SAVED)
    assert sum(name.startswith("optimizer-r") for name in phase) == 2 * 3
    assert phase == whole
    # Without the moments, or from elsewhere, all of it would differ.
    for other in (state(runs, "moments", SAVED), state(runs, "unbroken", SAVED)):
        assert all(other[name] != content for name, content in whole.items())


def test_steps_begin_anew(runs: Path) -> None:
    unbroken, phase = (read_metrics(runs / n / "metrics.jsonl") for n in ("unbroken", "phase"))
    assert [row.step for row in phase] == [1, 2]
    assert [row.tokens_total for row in phase] == [row.tokens_total for row in unbroken[:SAVED]]
    assert [row.loss for row in phase] == [row.loss for row in unbroken[SAVED:]]
    first, last = (
        read_json(runs / f"phase/checkpoints/step_{SAVED:08d}/run_state.json"),
        read_json(runs / f"unbroken/checkpoints/step_{2 * SAVED:08d}/run_state.json"),
    )
    assert (first["step"], first["batches"], first["optimizer_steps"]) == (2, 2, 4)
    assert last["optimizer_steps"] == 4
    assert len(first["guard"]["accepted"]["loss"]) == SAVED
    middle = runs / f"unbroken/checkpoints/step_{SAVED:08d}"
    assert f"a new phase, from {middle}\n" in (runs / "stdout").read_text()


def test_it_goes_over_other_lengths_and_does_not_begin_again(runs: Path) -> None:
    rows = read_metrics(runs / "longer/metrics.jsonl")
    assert [row.tokens for row in rows] == [8 * 64] * SAVED
    # Bands of positions are measured before and after.
    bands = {f"{when}_loss_at_{2**k}" for k in range(7) for when in ("before", "heldout")}
    named = {name for row in rows for name in row.further if "_at_" in name}
    assert named == bands
    newest = runs / f"unbroken/checkpoints/step_{2 * SAVED:08d}"  # of the run that was named
    text = (runs / "stdout").read_text()
    assert text.count(f"a new phase, from {newest}\n") == 1
    assert text.count(f"already finished at step {SAVED}") == 1


def test_wrong_beginnings_are_named(runs: Path) -> None:
    refused = read_json(runs / "refused.json")
    middle = runs / f"unbroken/checkpoints/step_{SAVED:08d}"
    assert refused["dtype"] == (
        f"{middle} was written with weight_dtype 'bfloat16', this run has 'float32'; use the same"
    )
    assert "model.hidden_size is 128 here, 32 there" in refused["shape"]
    assert "holds no checkpoint" in refused["model"]
    assert not any((runs / name).exists() for name in ("fp32", "changed", "model"))


def test_plan_reads_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config([runs / "phase/config.yaml"])
    middle = str(runs / f"unbroken/checkpoints/step_{SAVED:08d}")
    assert (config.continue_from, config.model.from_hf) == (middle, middle)
    words = ["--config", str(runs / "phase/config.yaml"), "--plan.processes", "2"]
    assert COMMANDS["plan"].start("plan", words) == 0
    assert "4 x 32 tokens per micro-batch, 1 micro-batches per step" in capsys.readouterr().out


def test_a_beginning_may_be_removed_by_its_own_run(tmp_path: Path) -> None:
    """While this one builds its model."""
    identity = partial(dict, tokenizer="", weight_dtype="", base=None)
    run: Any = SimpleNamespace(world=ALONE, recipe=SimpleNamespace(shape=None, identity=identity))
    removed = tmp_path / "run/checkpoints/step_00000002"
    with pytest.raises(UserError, match=r"step_00000002 was removed while it was read: a run that"):
        begin_phase(removed, run)
