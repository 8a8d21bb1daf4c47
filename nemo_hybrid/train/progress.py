"""What a person sees of a run: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nemo_hybrid.train.metrics import StepMetrics, evaluations

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_AVERAGED_STEPS = 50
_SHOWN = ("reward", "mismatch", "filtered", "verifier_failures")
"""Further figures that a person wants to see."""


class Progress:
    """Show a run's progress; for rank 0 alone. A context manager.

    On a terminal: a bar and the figures of the newest step, redrawn in place. Elsewhere: one line
    per ``log_every`` steps, and for the first step shown, the last step, and those with a held-out
    loss. ``start_step`` is the number of steps already done. ``console`` defaults to rich's on
    the standard output.
    """

    def __init__(
        self, max_steps: int, start_step: int, log_every: int, console: Console | None = None
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._max_steps, self._start_step, self._log_every = max_steps, start_step, log_every
        self._console = console or Console()
        self._seconds: deque[float] = deque(maxlen=_AVERAGED_STEPS)
        self._elapsed = 0.0
        self._heldout: tuple[int, list[float]] | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            bar = self._bar(start_step)
            self._live = Live(bar, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def eta_seconds(self, step: int) -> float:
        """Time that the steps after ``step`` will take, from the mean of the last 50 steps."""
        if not self._seconds:
            return float("nan")
        return (self._max_steps - step) * sum(self._seconds) / len(self._seconds)

    def update(self, metrics: StepMetrics) -> None:
        """Take in one finished step."""
        self._seconds.append(metrics.step_seconds)
        self._elapsed += metrics.step_seconds
        held_out = evaluations([metrics])
        if held_out:
            self._heldout = held_out[-1]
        if self._live:
            self._live.update(self._table(metrics))
        elif (
            metrics.step % self._log_every == 0
            or metrics.step in (self._start_step + 1, self._max_steps)
            or held_out
        ):
            self._console.print(self._line(metrics), markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line, above the display where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, metrics: StepMetrics) -> str:
        parts = [f"step {metrics.step}/{self._max_steps}"]
        parts += [f"{name} {value}" for name, value in _figures(metrics).items()]
        for step, losses in evaluations([metrics]):
            when = "" if step == metrics.step else f" (step {step})"
            parts.append(f"held-out {_losses(losses)}{when}")
        return "  ".join([*parts, f"eta {clock(self.eta_seconds(metrics.step))}"])

    def _bar(self, step: int) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        left = clock(self.eta_seconds(step))
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column()
        row.add_column(ratio=1)
        row.add_row(
            f"[bold]step[/bold] {step}/{self._max_steps}",
            ProgressBar(self._max_steps, step),
            f"{step / self._max_steps:.0%} elapsed {clock(self._elapsed)}, left {left}",
        )
        return row

    def _table(self, metrics: StepMetrics) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        figures = _figures(metrics)
        if self._heldout is not None:
            step, losses = self._heldout
            figures["held-out"] = f"{_losses(losses)} (step {step})"
        table = Table.grid(padding=(0, 2), expand=False)
        cells = [f"[dim]{name}[/dim] {value}" for name, value in figures.items()]
        for start in range(0, len(cells), 3):
            table.add_row(*cells[start : start + 3])
        return Group(self._bar(metrics.step), table)


def clock(seconds: float) -> str:
    """A duration as m:ss, h:mm:ss or "2d 03:04"; "?" for one that is not known."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def _losses(losses: list[float]) -> str:
    return f"{losses[0]:.4f}" + (f" mtp {_list(losses[1:])}" if losses[1:] else "")


def _list(values: list[float]) -> str:
    return "/".join(f"{value:.4f}" for value in values)


def _figures(metrics: StepMetrics) -> dict[str, str]:
    """The facts of one step as short texts, for both displays."""
    figures = {"loss": f"{metrics.loss:.4f}"}
    if metrics.mtp_losses:
        figures["mtp"] = _list(metrics.mtp_losses)
    figures |= {
        "lr": f"{metrics.lr:.3g}",
        "grad norm": f"{metrics.grad_norm:.3g}",
        "tokens/s": f"{metrics.tokens_per_s:,.0f}",
        "mfu": "?" if metrics.mfu is None else f"{metrics.mfu:.1%}",
        "memory": f"{metrics.memory_gb:.2f} GB",
    }
    figures |= {n: f"{metrics.further[n]:.3g}" for n in _SHOWN if n in metrics.further}
    if metrics.max_vio is not None and metrics.max_vio_per_layer:
        figures["max vio"] = f"{metrics.max_vio:.2f}"
    if metrics.dead_experts:
        figures["dead experts"] = str(metrics.dead_experts)
    return figures
