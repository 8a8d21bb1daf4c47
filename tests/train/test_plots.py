"""Plots: what they draw is checked on the figure's data, and that the files are whole PNGs."""

import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from nemo_hybrid.errors import UserError
from nemo_hybrid.train import plots
from nemo_hybrid.train.metrics import MetricsWriter, StepMetrics
from nemo_hybrid.train.plots import smooth, write_plots


def metrics(step: int, heldout: float | None = None, loss: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=10.0 - step if loss is None else loss,
        mtp_losses=[11.0 - step, 12.0 - step],
        aux_loss=1.0,
        lr=1e-3,
        grad_norm=1.0,
        tokens=64,
        tokens_total=64 * step,
        tokens_per_s=1.0,
        step_seconds=1.0,
        data_seconds=0.0,
        mfu=None,
        memory_gb=1.0,
        max_vio=0.5,
        max_vio_per_layer={},
        dead_experts=0,
        heldout_loss=heldout,
        heldout_mtp_losses=None if heldout is None else [heldout + 1, heldout + 2],
    )


def make_run(run_dir: Path, rows: list[StepMetrics], loads: bool = True) -> None:
    with closing(MetricsWriter(run_dir, 0)) as writer:
        for row in rows:
            load = {"layers.1": [1, 3, 2, 2], "layers.3": [0, 8, 0, 0]} if loads else None
            writer.write(row, load)


def test_files_are_whole_pngs(tmp_path):
    make_run(tmp_path, [metrics(s, heldout=9.0 if s in (1, 8) else None) for s in range(1, 9)])
    paths = write_plots(tmp_path)
    assert sorted(p.name for p in paths) == ["expert_load.png", "learning_rate.png", "losses.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert data.endswith(b"IEND\xaeB`\x82")
    assert len(list((tmp_path / "plots").iterdir())) == 3
    before = (tmp_path / "plots" / "losses.png").stat().st_mtime_ns
    write_plots(tmp_path)
    assert (tmp_path / "plots" / "losses.png").stat().st_mtime_ns > before


@pytest.mark.parametrize("rows", [[metrics(1)], [metrics(1, loss=math.nan), metrics(2)]])
def test_short_and_broken_runs_still_plot(tmp_path, rows):
    make_run(tmp_path, rows, loads=False)
    assert [p.name for p in write_plots(tmp_path)] == ["losses.png", "learning_rate.png"]


def test_no_metrics_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        write_plots(tmp_path)
    make_run(tmp_path, [])
    with pytest.raises(UserError, match="nothing to plot"):
        write_plots(tmp_path)


def test_losses_figure_draws_every_series():
    rows = [metrics(s, heldout=20.0 + s if s in (1, 5) else None) for s in range(1, 6)]
    rows[0].heldout_loss_before, rows[0].heldout_mtp_losses_before = 30.0, [31.0, 32.0]
    axes = plots._losses(rows, "a$b$").axes[0]
    assert axes.get_title(loc="left") == r"Loss of a\$b\$"  # without mathematics
    assert all(tick == int(tick) for tick in axes.get_xticks())
    drawn = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_allclose(drawn["train, next token"].get_ydata(), [9, 8, 7, 6, 5])
    depth_2 = drawn["train, MTP depth 2 (token t+3)"]
    np.testing.assert_allclose(depth_2.get_ydata(), [11, 10, 9, 8, 7])
    points = [line.get_xydata() for line in axes.get_lines() if line.get_marker() == "o"]
    for k in range(3):
        np.testing.assert_allclose(points[k], [[0, 30 + k], [1, 21 + k], [5, 25 + k]])


def test_heat_map_shows_load_over_the_mean_and_picks_the_worst_layer():
    loads = {
        "layers.1": np.array([[4, 0, 2, 2], [1, 3, 2, 2]]),
        "layers.3": np.array([[2, 2, 2, 2], [0, 8, 0, 0]]),
    }
    figure = plots._expert_load([10, 20], loads)
    upper, lower = figure.axes[:2]
    np.testing.assert_allclose(upper.get_images()[0].get_array(), [[0.5, 1.5, 1, 1], [0, 4, 0, 0]])
    np.testing.assert_allclose(lower.get_images()[0].get_array(), [[1, 0], [1, 4], [1, 0], [1, 0]])
    assert "layers.3" in lower.get_title(loc="left")
    assert lower.get_images()[0].get_extent() == [5, 25, 3.5, -0.5]


def test_smooth():
    line = [2.0 * i for i in range(40)]
    middle = smooth(line, 9)[:-5]
    np.testing.assert_allclose(middle, line[: len(middle)])  # no lag on a slope
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    assert np.std(smooth(noise, 101)) == pytest.approx(1 / math.sqrt(101), rel=0.3)
    np.testing.assert_allclose(smooth([1.0, math.nan, 3.0, math.inf, 5.0], 3), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(smooth(line, 0), line)


def test_plots_leave_no_global_figures(tmp_path):
    import matplotlib.pyplot as plt

    make_run(tmp_path, [metrics(s) for s in range(1, 4)])
    write_plots(tmp_path)
    assert plt.get_fignums() == []
