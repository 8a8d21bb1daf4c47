"""The NVFP4 experiment: its statistics on known numbers, and a minute's worth of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import nvfp4_gap as script
import pytest

SMALL = (
    "--tokens", "1536", "--seeds", "2", "--model.vocab_size", "96", "--model.hidden_size", "32",
    "--data.sequence_length", "32", "--model.pattern", "MEE", "--train.eval_sequences", "8",
    "--model.moe_intermediate_size", "32", "--model.moe_shared_expert_intermediate_size", "32",
    "--train.log_every", "1", "--model.mtp_num_depths", "0", "--precision.health_every", "2",
)  # fmt: skip
"""Options of three steps of 512 tokens of a minute model, in two seeds."""


def test_a_gap_is_the_mean_of_paired_relative_differences():
    gap = script.paired_gap([2.02, 4.12, 1.01], [2.0, 4.0, 1.0])
    assert gap.per_seed == pytest.approx([1.0, 3.0, 1.0])
    assert gap.mean == pytest.approx(5 / 3)
    assert gap.spread == pytest.approx(math.sqrt(4 / 3))
    assert gap.standard_error == pytest.approx(2 / 3)
    assert not gap.resolved
    # Pairing matters: the same losses in another order have the same means and another spread.
    assert script.paired_gap([4.12, 2.02, 1.01], [2.0, 4.0, 1.0]).spread > 50


@pytest.mark.parametrize(
    ("losses", "resolved", "text"),
    [
        # Differences of 1 and 3 per cent: mean 2, spread 1.41.
        ([1.01, 1.03], False, "+2.00 ± 1.41 (s.e. 1.00) unresolved"),
        # Mean 3, spread 1.41: more than twice.
        ([1.02, 1.04], True, "+3.00 ± 1.41 (s.e. 1.00)"),
        ([0.96, 0.98], True, "-3.00 ± 1.41 (s.e. 1.00)"),
        ([1.5], False, "+50.00 ± nan (s.e. nan) unresolved"),
        ([1.01, math.nan], False, "+nan ± nan (s.e. nan) unresolved"),
    ],
)
def test_what_is_smaller_than_twice_its_spread_is_unresolved(losses, resolved, text):
    gap = script.paired_gap(losses, [1.0] * len(losses))
    assert gap.resolved == resolved
    assert str(gap) == text


def test_gaps_need_one_loss_per_seed():
    with pytest.raises(ValueError, match="expected one per seed"):
        script.paired_gap([1.0], [1.0, 2.0])


def test_last_tenth():
    assert script.last_tenth([*range(90), *[7.0] * 10]) == 7.0
    assert script.last_tenth([3.0, 5.0]) == 5.0


def test_the_gap_over_training_is_found_again():
    steps, seeds = 200, 3
    base = np.stack([5 - np.arange(steps) / 100 + seed for seed in range(seeds)])
    factor = 1 + np.where(np.arange(steps) < 100, 0.0, 0.01)
    noise = np.random.default_rng(0).normal(0, 1e-4, (seeds, steps))
    mean, spread = script.gap_over_training(base * (factor + noise), base)
    assert mean[:89] == pytest.approx(0, abs=0.02)
    assert mean[111:] == pytest.approx(1, abs=0.02)
    assert 0 < spread.max() < 0.02
    # One seed that goes elsewhere is seen in the spread.
    base[0] *= 1.05
    assert script.gap_over_training(base * factor, base / [[1.05], [1], [1]])[1].min() > 2


def run(work: Path, *words: str) -> int:
    return script.main(["--work", str(work), "--jobs", "2", *SMALL, *words])


@pytest.fixture
def work(tmp_path: Path, store: Path) -> Path:
    (tmp_path / "corpus").symlink_to(store)
    return tmp_path


@pytest.mark.sweep
def test_the_experiment_and_its_continuation(work, capsys):
    assert run(work, "--variants", "recipe") == 0
    said = capsys.readouterr().out
    assert "4 runs, of which 0 are complete" in said
    assert "recipe, seed 2: held-out loss" in said
    assert list(json.loads((work / "nvfp4_gap.json").read_text())["variants"]) == ["bf16", "recipe"]

    # Finished runs are used again, the missing ones made, and another configuration is refused.
    logs = work / "1536-tokens" / "logs"
    before = {log.name: log.read_text() for log in logs.iterdir()}
    assert run(work, "--variants", "recipe", "all-nvfp4") == 0
    assert "6 runs, of which 4 are complete" in capsys.readouterr().out
    assert all((logs / name).read_text() == log for name, log in before.items())
    assert run(work, "--train.lr", "1e-3") == 2
    assert "another configuration" in capsys.readouterr().err

    result = json.loads((work / "nvfp4_gap.json").read_text())
    assert list(result["variants"]) == ["bf16", "recipe", "all-nvfp4"]
    assert result["tokens"] == 1536
    assert result["environment"]["cpu"]
    assert "emulated" in result["arithmetic"]
    for name, found in result["variants"].items():
        losses = [loss["held_out_loss"] for loss in found["runs"]]
        base = [loss["held_out_loss"] for loss in result["variants"]["bf16"]["runs"]]
        assert losses[0] != losses[1]
        sample = found["runs"][0]["low_precision"]
        assert "zero_gradients" in sample["in_proj"]
        assert ("dy_flushed" in sample["in_proj"]) == (name != "bf16")
        if name != "bf16":
            assert all(0 < abs(a - b) < 0.1 for a, b in zip(losses, base, strict=True))
            gaps = found["to bf16"]["held_out"]["per_seed"]
            assert gaps == pytest.approx(
                [100 * (a / b - 1) for a, b in zip(losses, base, strict=True)], rel=1e-6
            )
    text = (work / "nvfp4_gap.md").read_text()
    assert "| recipe |" in text
    assert "below 1 %" in text
    assert "emulated" in text
    assert (work / "nvfp4_gap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.sweep
def test_a_failed_run_ends_the_experiment_with_its_message(work, capsys):
    assert run(work, "--variants", "recipe", "--model.hidden_size", "24") == 1
    said = capsys.readouterr().err
    assert "recipe, seed 1 failed with status 2" in said
    assert "not divisible by" in said
    assert not (work / "nvfp4_gap.json").exists()
