"""The terminal display and the plain lines show the same facts."""

import io
import math
import re

import pytest
import torch
from rich.console import Console

from nemo_hybrid.train.guard import Counters
from nemo_hybrid.train.metrics import Meter, StepMetrics, Timing, curves
from nemo_hybrid.train.progress import Progress, clock
from nemo_hybrid.train.run import Outcome


def metrics(step: int, seconds: float = 2.0, **changes: object) -> StepMetrics:
    values = dict(
        step=step,
        loss=4.5678,
        mtp_losses=[5.1234, 5.5555],
        aux_loss=1.0,
        lr=1.5e-3,
        grad_norm=0.875,
        tokens=4096,
        tokens_total=4096 * step,
        tokens_per_s=12345.6,
        step_seconds=seconds,
        data_seconds=0.0,
        mfu=0.314,
        memory_gb=1.5,
        max_vio=0.42,
        max_vio_per_layer={"layers.1": 0.42},
        dead_experts=0,
    )
    return StepMetrics(**{**values, **changes})


FACTS = ["4.5678", "5.1234/5.5555", "0.0015", "0.875", "12,346", "31.4%", "1.50 GB", "0.42"]


def run(steps: range, terminal: bool, **changes: object) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    with Progress(steps.stop - 1, steps.start - 1, 10, console) as progress:
        for step in steps:
            progress.update(metrics(step, **changes))
    return out.getvalue()


def test_plain_lines():
    lines = run(range(1, 26), terminal=False).splitlines()
    shown = [re.match(r"step (\d+)/25  ", line) for line in lines]
    assert [int(m[1]) for m in shown if m] == [1, 10, 20, 25]
    for fact in [*FACTS, "eta 0:30"]:
        assert fact in lines[1]
    assert "\x1b" not in "".join(lines)


def test_a_model_without_experts_shows_none_of_theirs():
    """Nor does TensorBoard; also of rows that an earlier version wrote with 0."""
    for none in (None, 0.0):
        without = {"max_vio": none, "max_vio_per_layer": {}}
        for terminal in (False, True):
            assert "max vio" not in run(range(1, 3), terminal, **without)
        assert not [name for name in curves(metrics(1, **without))[1] if name.startswith("experts")]
    assert "max vio 0.42" in run(range(1, 3), False)
    outcome = Outcome({"loss": 1.0}, 1.0, {}, 1, 0, None, False)
    meter = Meter(lambda in_one: 1.0, None, 1, torch.device("cpu"))
    row = meter.metrics(1, 1, 0.1, outcome, Timing(1.0, 0.0, None, None), Counters(), {})
    assert row.max_vio is None


def test_terminal_shows_the_same_facts():
    text = run(range(1, 26), terminal=True)
    for fact in [*FACTS, "25/25", "100%"]:
        assert fact in text


def test_held_out_losses_show_in_both():
    held_out = dict(heldout_loss=3.25, heldout_mtp_losses=[3.5, 3.75])
    for terminal in (False, True):
        text = run(range(3, 4), terminal, **held_out)
        assert "3.2500" in text
        assert "3.5000/3.7500" in text
    before = dict(heldout_loss_before=4.25, heldout_mtp_losses_before=[4.5, 4.75])
    for terminal in (False, True):
        assert "4.2500 mtp 4.5000/4.7500 (step 0)" in run(range(1, 2), terminal, **before)


def test_resumed_run_shows_its_first_step():
    assert run(range(13, 20), terminal=False).startswith("step 13/19  ")


def test_unknown_mfu_and_dead_experts():
    text = run(range(1, 2), terminal=False, mfu=None, dead_experts=3)
    assert "mfu ?" in text
    assert "dead experts 3" in text
    assert "dead" not in run(range(1, 2), terminal=False)


def test_eta_follows_the_moving_average():
    progress = Progress(1000, 0, 1, Console(file=io.StringIO()))
    assert math.isnan(progress.eta_seconds(0))
    for step in range(1, 101):
        progress.update(metrics(step, seconds=10.0 if step <= 50 else 1.0))
    assert progress.eta_seconds(100) == pytest.approx(900.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (3600, "1:00:00"), (200_000, "2d 07:33"), (math.nan, "?")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
