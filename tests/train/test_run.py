"""A run from the command line to the last file: two processes, expert parallel, ZeRO-2, bf16,
packed documents, multi-token prediction, accumulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helpers.parts import ce_sums
from helpers.processes import run_command
from helpers.runs import tiny_run
from nemo_hybrid.checkpoint import steps
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.train.metrics import evaluations, read_metrics
from train.conftest import Unbroken


def test_every_step_has_a_row(unbroken: Unbroken) -> None:
    lines = (unbroken.run_dir / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    promised = {"step", "loss", "mtp_losses", "lr", "grad_norm", "tokens", "tokens_per_s"}
    assert promised | {"max_vio"} <= first.keys()
    rows = read_metrics(unbroken.run_dir / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 13))
    for row in rows:
        numbers = [row.loss, *row.mtp_losses, row.lr, row.grad_norm, row.tokens_per_s, row.max_vio]
        assert all(math.isfinite(x) and x > 0 for x in numbers), row
        assert len(row.mtp_losses) == 2
        assert row.tokens == 8 * 32
    assert rows[-1].tokens_total == 12 * 8 * 32
    assert len({row.sample_hash for row in rows}) == 12


def test_losses_fall(unbroken: Unbroken) -> None:
    rows = read_metrics(unbroken.run_dir / "metrics.jsonl")
    assert rows[-1].loss < rows[0].loss - 0.5
    assert all(b < a - 0.2 for a, b in zip(rows[0].mtp_losses, rows[-1].mtp_losses, strict=True))
    heldout = evaluations(rows)
    assert [step for step, _ in heldout] == [0, 6, 12]
    assert all(b[0] < a[0] for (_, a), (_, b) in pairwise(heldout))


def test_learning_rate_warms_up_and_decays(unbroken: Unbroken) -> None:
    lr = [row.lr for row in read_metrics(unbroken.run_dir / "metrics.jsonl")]
    assert lr[0] < lr[1] < lr[2] == lr[7] == 5e-3
    assert all(b < a for a, b in pairwise(lr[7:]))
    assert lr[-1] == pytest.approx(5e-5)


def test_the_profile_holds_the_steps_that_were_asked_for(unbroken: Unbroken) -> None:
    place = unbroken.run_dir / "profile/steps_3-4"
    assert f"profile of steps 3 to 4: {place}" in unbroken.stdout
    events = json.loads((place / "trace.json").read_text())["traceEvents"]
    looked_up = [e for e in events if e.get("name", "").endswith(": EmbeddingBackward0")]
    assert len(looked_up) == 2 * 2 * 3  # steps, micro-batches; the model and two MTP depths
    assert "aten::mm" in (place / "operations.txt").read_text()


def test_plots_and_tensorboard_are_there(unbroken: Unbroken) -> None:
    plots = sorted(unbroken.run_dir.glob("plots/*.png"))
    assert len(plots) >= 2
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    events = list(unbroken.run_dir.glob("tensorboard/events*"))
    assert events
    assert all(event.stat().st_size > 1000 for event in events)
    loads = [json.loads(x) for x in (unbroken.run_dir / "expert_load.jsonl").open()]
    assert [row["step"] for row in loads] == [5, 10, 12]
    for row in loads:
        # 256 tokens go to 2 experts each; the block of the two depths counts twice.
        assert {sum(load) for load in row["load"].values()} == {512, 1024}


def test_checkpoints_are_whole_and_latest_is_the_newest(unbroken: Unbroken) -> None:
    checkpoints = unbroken.run_dir / "checkpoints"
    found = [d.name for d in steps.list_steps(checkpoints)]
    assert found == [f"step_{step:08d}" for step in (12, 8, 4)]
    for directory in steps.list_steps(checkpoints):
        verify(directory)
    assert steps.read_latest(checkpoints) == checkpoints / "step_00000012"
    assert not list(unbroken.run_dir.rglob(".tmp-*"))
    held = {path.name for path in (checkpoints / "step_00000012").iterdir()}
    assert held >= {"config.json", "tokenizer.json", "generation_config.json", "run.yaml",
                    "model.safetensors.index.json", "optimizer.index.json", "run_state.json",
                    "rank-00000.safetensors", "rank-00001.safetensors"}  # fmt: skip


def test_checkpoint_is_the_trained_model(unbroken: Unbroken, store: object) -> None:
    """The weights on disk have the held-out loss that the run measured at its end."""
    from nemo_hybrid.config.run import DataOptions, TrainOptions
    from nemo_hybrid.data.loader import heldout_batches, open_blend
    from nemo_hybrid.objectives.base import Normalizer
    from nemo_hybrid.objectives.next_token import NextToken, count_targets

    model = HybridLM.from_hf(str(unbroken.run_dir))
    data = DataOptions(path=str(store), sequence_length=32)
    objective = NextToken(model, TrainOptions())
    steps: list[torch.Tensor] = []
    for layer in model.backbone.layers:
        if layer.letter == "M":
            layer.mixer.register_forward_pre_hook(
                lambda mixer, args: steps.append(mixer._project(args[0])[2].flatten())
            )
    total, count = 0.0, 0
    for batch in heldout_batches(
        open_blend(data, model.config),
        sequence_length=32,
        micro_batch_size=16,
        rank=0,
        world_size=1,
        limit=16,
    ):
        counts_N = count_targets(batch, objective.depths)
        total += float(ce_sums(objective(batch, Normalizer(counts_N, 16)))[0])
        count += int(counts_N[0])
    last = read_metrics(unbroken.run_dir / "metrics.jsonl")[-1]
    assert total / count == pytest.approx(last.heldout_loss, rel=5e-3)
    # Those that transformers would raise to the limit.
    small = (torch.cat(steps) < model.config.time_step_min).double().mean()
    assert 0 < small < 0.5
    assert last.further["heldout_small_time_steps"] == pytest.approx(float(small), rel=0.05)


def test_output_says_what_runs_and_where_it_is(unbroken: Unbroken) -> None:
    assert "2 processes on cpu, expert parallel 2, ZeRO-2, accumulation 2, bf16" in unbroken.stdout
    assert "fresh start" in unbroken.stdout
    assert str(unbroken.run_dir / "checkpoints") in unbroken.stdout


def test_finished_run_gets_the_plots_it_lacks(
    unbroken: Unbroken, pretrain: Callable[..., int], tmp_path: Path
) -> None:
    """Killed after its last checkpoint, before or while it drew."""
    run_dir = unbroken.copy(tmp_path / "run")
    plots = sorted((run_dir / "plots").iterdir())
    for lost in (plots, [run_dir / "plots/learning_rate.png"]):
        for plot in lost:
            plot.unlink()
        assert pretrain("--config", unbroken.config, "--run_dir", run_dir) == 0
        assert sorted((run_dir / "plots").iterdir()) == plots
        assert len(plots) == 3


def test_run_of_one_step_measures_what_it_changed(store: Path, tmp_path: Path) -> None:
    config = tiny_run(store, train={"max_steps": 1})
    config.run_dir = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    run_command("pretrain", "--config", tmp_path / "run.yaml")
    (first, before), (last, after) = evaluations(read_metrics(tmp_path / "run/metrics.jsonl"))
    assert (first, last) == (0, 1)
    assert after[0] < before[0] - 0.05
    assert len(before) == len(after) == 3


def test_finished_run_prints_its_summary_and_makes_no_step(
    unbroken: Unbroken, pretrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in unbroken.run_dir.rglob("[!.]*")}

    before = written()
    assert pretrain("--config", unbroken.config, "--run_dir", unbroken.run_dir) == 0
    output = capsys.readouterr()
    assert "already finished at step 12" in output.out
    assert str(unbroken.run_dir / "metrics.jsonl") in output.out
    assert written() == before
