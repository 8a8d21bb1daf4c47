"""PNG plots of a run, made from its metrics files after it ends (or while it runs)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, replace_file
from nemo_hybrid.train.metrics import (
    EXPERT_LOAD_FILE,
    METRICS_FILE,
    StepMetrics,
    evaluations,
    read_expert_load,
    read_metrics,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PLOTS = "plots"
LAST_PLOT = "learning_rate.png"
"""The one that is written last."""

_TRAIN, _INK, _GRID = "#2f6fab", "#333333", "#e4e4e4"
_MTP = ("#d9822b", "#7a9a3b", "#9b5aa5", "#4fa3a5", "#b0604f")


def write_plots(run_dir: Path | str) -> list[Path]:
    """Write RUN_DIR/plots/{losses,learning_rate,expert_load}.png and return their paths.

    expert_load.png is left out where the run recorded no expert loads. Raises UserError where
    the run has no metrics or the directory cannot be written.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / METRICS_FILE)
    if not rows:
        raise UserError(f"{run_dir / METRICS_FILE} holds no step yet: nothing to plot")
    name = run_dir.resolve().name
    figures = {"losses.png": _losses(rows, name)}
    load_file = run_dir / EXPERT_LOAD_FILE
    steps, loads = read_expert_load(load_file) if load_file.exists() else ([], {})
    if loads:
        figures["expert_load.png"] = _expert_load(
            steps, {layer: np.asarray(counts) for layer, counts in loads.items()}
        )
    figures[LAST_PLOT] = _learning_rate(rows)
    plots = run_dir / PLOTS
    with naming("write plots in", plots):
        plots.mkdir(exist_ok=True)
        for name, figure in figures.items():
            replace_file(plots / name, png(figure))
    return [plots / name for name in figures]


def write_missing_plots(run_dir: Path | str) -> None:
    """Write the plots of a run that was killed before it had written all of them."""
    run_dir = Path(run_dir)
    if (run_dir / METRICS_FILE).exists() and not (run_dir / PLOTS / LAST_PLOT).exists():
        write_plots(run_dir)


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Mean over about ``span`` values around each one; the window shrinks on both sides near the
    start, where losses fall steeply, and on one side near the end. Values that are not finite
    stay out of it; NaN where a window holds nothing else.
    """
    array = np.asarray(values, dtype=float)
    finite = np.isfinite(array)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(array))
    half = np.minimum(span // 2, place)
    first, last = place - half, np.minimum(place + half + 1, len(array))
    n = counts[last] - counts[first]
    return np.where(n > 0, (totals[last] - totals[first]) / np.maximum(n, 1), np.nan)


def _losses(rows: list[StepMetrics], name: str) -> Figure:
    figure, (axes,) = styled(1, height=5.0)
    steps = [m.step for m in rows]
    train = [[m.loss, *m.mtp_losses] for m in rows]
    axes.plot(steps, [losses[0] for losses in train], color=_TRAIN, lw=0.8, alpha=0.3)
    held_out = evaluations(rows)
    for k in range(max(map(len, train))):
        color = _MTP[(k - 1) % len(_MTP)] if k else _TRAIN
        label = f"train, MTP depth {k} (token t+{k + 1})" if k else "train, next token"
        values = smooth(_column(train, k), len(rows) // 50)
        axes.plot(steps, values, color=color, lw=1.3 if k else 1.6, label=label)
        axes.plot(
            [step for step, _ in held_out], _column([losses for _, losses in held_out], k),
            color=color, ls="none", marker="o", ms=6, mec=_INK, mew=1.0, zorder=4,
        )  # fmt: skip
    if held_out:
        axes.plot([], [], color="white", ls="none", marker="o", ms=6, mec=_INK, label="held-out")
        last = (held_out[-1][0], held_out[-1][1][0])
        axes.annotate(
            f"{last[1]:.3f}", last, xytext=(7, 0), textcoords="offset points", va="center",
            color=_INK, fontsize=9, annotation_clip=False,
        )  # fmt: skip
    axes.set_title(f"Loss of {name}".replace("$", r"\$"), loc="left", fontweight="bold")
    _count_steps(axes)
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    return figure


def _column(rows: list[list[float]], k: int) -> list[float]:
    return [row[k] if k < len(row) else np.nan for row in rows]


def _learning_rate(rows: list[StepMetrics]) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (upper, lower) = styled(2, height=5.5, sharex=True)
    steps = [m.step for m in rows]
    upper.plot(steps, [m.lr for m in rows], color=_TRAIN, lw=1.8)
    upper.set_ylim(bottom=0)
    upper.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    upper.set_title("Learning rate", loc="left", fontweight="bold")
    norms = [m.grad_norm for m in rows]
    lower.plot(steps, norms, color=_TRAIN, lw=0.8, alpha=0.35)
    lower.plot(steps, smooth(norms, len(rows) // 50), color=_TRAIN, lw=1.6)
    if any(np.isfinite(norm) and norm > 0 for norm in norms):
        lower.set_yscale("log")
        lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_formatter(NullFormatter())
    lower.set_title("Gradient norm before clipping", loc="left", fontweight="bold")
    _count_steps(lower)
    return figure


def _expert_load(steps: list[int], loads: dict[str, np.ndarray]) -> Figure:
    """Above: all layers at the last recorded step. Below: the least balanced layer over time."""
    final = {layer: _relative(counts[-1]) for layer, counts in loads.items()}
    worst = max(final, key=lambda layer: float(final[layer].max()))
    width = max(len(row) for row in final.values())
    last = np.full((len(final), width), np.nan)
    for i, row in enumerate(final.values()):
        last[i, : len(row)] = row

    figure, (upper, lower) = styled(2, height=min(12.0, 5.0 + 0.25 * len(final)), grid=False)
    _heat_map(upper, last, (-0.5, width - 0.5, len(final) - 0.5, -0.5))
    upper.set_title(f"Expert load at step {steps[-1]}", loc="left", fontweight="bold")
    upper.set_xlabel("expert")
    every = -(-len(final) // 30)
    upper.set_yticks(range(0, len(final), every), list(final)[::every])

    over_time = np.stack([_relative(counts) for counts in loads[worst]], axis=1)
    pad = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5  # half a cell
    extent = (steps[0] - pad, steps[-1] + pad, len(over_time) - 0.5, -0.5)
    image = _heat_map(lower, over_time, extent)
    lower.set_title(f"Least balanced layer over time: {worst}", loc="left", fontweight="bold")
    lower.set_xlabel("step")
    lower.set_ylabel("expert")
    bar = figure.colorbar(image, ax=[upper, lower], shrink=0.6, extend="max")
    bar.set_label("tokens relative to the layer's mean")
    return figure


def _count_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _heat_map(
    axes: Axes, values: np.ndarray, extent: tuple[float, float, float, float]
) -> AxesImage:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(
        values, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2,
        extent=extent,
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def _relative(counts: np.ndarray) -> np.ndarray:
    mean = counts.mean()
    return counts / mean if mean else np.zeros(len(counts))


def styled(
    rows: int, height: float, columns: int = 1, *, sharex: bool = False, grid: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of our own, ``height`` in inches: pyplot would keep it in a global list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=sharex, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(colors=_INK, labelsize=9)
        if grid:
            each.grid(color=_GRID, lw=0.8)
            each.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
