"""What a run measures and records about itself: RUN_DIR/metrics.jsonl, expert_load.jsonl and
TensorBoard.

``metrics.jsonl`` holds one JSON object per optimizer step, with the fields of StepMetrics in full
precision (the shortest decimal that reads back as the same float). JSON has no NaN and no
infinities: they are written as the strings "NaN", "Infinity" and "-Infinity"; null means that
something was not measured. MFU follows flops.MFU_FORMULA, which TensorBoard shows as a text.

``expert_load.jsonl`` holds, for the steps that the loop chose, ``{"step": n, "load": {layer:
[tokens of expert 0, tokens of expert 1, ...]}}``: what each expert got from that global batch.

Steps count from 1: row n tells of the n-th optimizer step, and checkpoint n comes after row n.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, replace_file, sync
from nemo_hybrid.objectives.base import mtp_losses
from nemo_hybrid.train.flops import MFU_FORMULA, utilization
from nemo_hybrid.train.guard import Counters
from nemo_hybrid.train.optim import max_violation

if TYPE_CHECKING:
    from nemo_hybrid.train.run import Outcome

METRICS_FILE = "metrics.jsonl"
EXPERT_LOAD_FILE = "expert_load.jsonl"
TENSORBOARD_DIR = "tensorboard"

_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class StepMetrics:
    """One optimizer step. Losses are in nats per target, times in seconds."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """What the run minimises, but for depths and balance: next-token cross-entropy of the global
    batch, in distillation the mixture with the divergence."""
    mtp_losses: list[float]
    """Cross-entropy of each multi-token-prediction depth; entry k - 1 predicts token t + 1 + k."""
    aux_loss: float
    """Sequence-wise load-balancing loss, before its weight."""
    lr: float
    """Learning rate that the step used."""
    grad_norm: float
    """Global gradient norm before clipping."""
    tokens: int
    """Tokens of the global batch, the padding of packs included."""
    tokens_total: int
    """Tokens since the start of the run, this step included."""
    tokens_per_s: float
    """Tokens of the global batch over step_seconds."""
    step_seconds: float
    """Wall time of the step, waiting for data included; evaluation and checkpoints are not."""
    data_seconds: float
    """Part of step_seconds spent waiting for data."""
    mfu: float | None
    """Model FLOP utilization as a fraction (flops.MFU_FORMULA); None: the peak is unknown."""
    memory_gb: float
    """Peak memory of rank 0, in 1e9 bytes: of the device, or resident on CPU."""
    max_vio: float | None
    """Largest of max_vio_per_layer; None without MoE layers."""
    max_vio_per_layer: dict[str, float]
    """Per MoE layer: (load of the busiest expert - mean load) / mean load, 0 when balanced."""
    dead_experts: int
    """Experts, over all layers, that got no token in this step."""
    skipped_batches: int = 0
    """Batches that the guard passed over since the run began."""
    rollbacks: int = 0
    """Returns to a checkpoint since the run began."""
    low_precision: dict[str, dict[str, float]] | None = None
    """By layer group, shares of what NVFP4 lost and of zero gradients (precision.health.Probe);
    None: this step was not sampled."""
    loss_parts: dict[str, float] = field(default_factory=dict)
    """Every part of the loss by name, before its weight (ce, mtp_1 ..., kl, aux)."""
    heldout_loss: float | None = None
    """Held-out cross-entropy of the weights after this step, where they were evaluated."""
    heldout_mtp_losses: list[float] | None = None
    """The same for each multi-token-prediction depth."""
    heldout_loss_before: float | None = None
    """In row 1: held-out cross-entropy of the initial weights, if the run evaluates."""
    heldout_mtp_losses_before: list[float] | None = None
    """The same for each multi-token-prediction depth."""
    sample_hash: str = ""
    """Digest of the global batch's sample numbers or tokens, to compare the order of two runs."""
    further: dict[str, float] = field(default_factory=dict)
    """Figures of the kind of run; in metrics.jsonl each is a field of its own."""


def evaluations(rows: Iterable[StepMetrics]) -> list[tuple[int, list[float]]]:
    """(Steps done, held-out losses: next token, then each depth) of every evaluation; that of the
    initial weights is at step 0."""
    found = []
    for m in rows:
        if m.heldout_loss_before is not None:
            losses = [m.heldout_loss_before, *(m.heldout_mtp_losses_before or [])]
            found.append((m.step - 1, losses))
        if m.heldout_loss is not None:
            found.append((m.step, [m.heldout_loss, *(m.heldout_mtp_losses or [])]))
    return found


class Timing(NamedTuple):
    """Wall time of a step in seconds, and the evaluations around it."""

    seconds: float
    waited: float
    """Part of it that was spent waiting for data."""
    before: dict[str, float] | None
    """Figures on held-out data before the first step."""
    heldout: dict[str, float] | None
    """The same after this step."""


@dataclass(frozen=True)
class Meter:
    """Turns what a step did into its row of metrics; for rank 0 alone.

    ``flops`` per token, by `Batch.in_one`; ``peak`` FLOP/s of one of ``processes``.
    """

    flops: Callable[[int], float]
    peak: float | None
    processes: int
    device: torch.device

    def metrics(
        self,
        done: int,
        tokens_total: int,
        lr: float,
        outcome: Outcome,
        timing: Timing,
        counters: Counters,
        further: dict[str, float],
    ) -> StepMetrics:
        """The row of step ``done``; ``counters`` are the guard's, ``further`` figures the data's
        and those of the evaluation."""
        violations = {name: max_violation(c) for name, c in outcome.loads.items()}
        rate = outcome.tokens / timing.seconds
        before, heldout = timing.before or {}, timing.heldout or {}
        parts = {name: v for name, v in outcome.means.items() if name != "loss"}
        return StepMetrics(
            step=done,
            loss=outcome.means["loss"],
            mtp_losses=mtp_losses(outcome.means),
            aux_loss=outcome.means.get("aux", 0.0),
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens=outcome.tokens,
            tokens_total=tokens_total,
            tokens_per_s=rate,
            step_seconds=timing.seconds,
            data_seconds=timing.waited,
            mfu=utilization(rate, self.flops(outcome.in_one), self.peak, self.processes),
            memory_gb=_peak_memory(self.device) / 1e9,
            max_vio=max(violations.values(), default=None),
            max_vio_per_layer=violations,
            dead_experts=sum(int((c == 0).sum()) for c in outcome.loads.values()),
            skipped_batches=counters.skipped,
            rollbacks=counters.rollbacks,
            low_precision=outcome.low_precision,
            loss_parts=parts,
            heldout_loss=heldout.get("loss"),
            heldout_mtp_losses=mtp_losses(heldout) if heldout else None,
            heldout_loss_before=before.get("loss"),
            heldout_mtp_losses_before=mtp_losses(before) if before else None,
            sample_hash=f"{outcome.sample_hash & (2**64 - 1):016x}",
            further={**further, **_others(heldout, "heldout"), **_others(before, "before")},
        )


def _others(figures: Mapping[str, float], what: str) -> dict[str, float]:
    """Those that are no cross-entropies, under names of their own."""
    known = ("loss", *(f"mtp_{k}" for k in range(1, len(figures))))
    return {f"{what}_{name}": v for name, v in figures.items() if name not in known}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


class MetricsWriter:
    """Append the metrics of a run; for rank 0 alone.

    ``resume_step`` is the number of steps that the checkpoint holds, 0 for a fresh start: rows of
    later steps, left by the run that was interrupted, are cut away first. Raises UserError where
    the directory cannot be written or the files hold something else than metrics.
    """

    def __init__(self, run_dir: Path | str, resume_step: int) -> None:
        run_dir = Path(run_dir)
        with naming("write metrics in", run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, EXPERT_LOAD_FILE):
                cut_back(run_dir / name, resume_step)
            self._metrics = _Appender(run_dir / METRICS_FILE)
            self._expert_load = _Appender(run_dir / EXPERT_LOAD_FILE)
            from torch.utils.tensorboard import SummaryWriter

            # Points at or after purge_step that an interrupted run left are hidden; that of step 0
            # belongs to row 1.
            purge_step = resume_step + 1 if resume_step else 0
            self._board = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=purge_step)
        self._board.add_text("mfu formula", MFU_FORMULA, resume_step + 1)

    def write(
        self, metrics: StepMetrics, expert_load: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Append one row, and the tokens per expert of each layer where given.

        The lines are handed to the operating system before this returns, so a killed process
        loses none of them.
        """
        row = asdict(metrics)
        self._metrics.append({**row.pop("further"), **row})
        if expert_load is not None:
            load = {layer: [int(n) for n in counts] for layer, counts in expert_load.items()}
            self._expert_load.append({"step": metrics.step, "load": load})
        for step, values in curves(metrics).items():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Force everything to the disk; call it before a checkpoint is given its final name."""
        self._metrics.sync()
        self._expert_load.sync()
        self._board.flush()

    def close(self) -> None:
        """Sync and close all files."""
        self.sync()
        self._metrics.close()
        self._expert_load.close()
        self._board.close()


def read_metrics(path: Path | str) -> list[StepMetrics]:
    """Read a metrics.jsonl; a torn last line is left out, unknown fields are further figures.

    Raises UserError where the file is missing or another line is damaged.
    """
    known = {f.name for f in fields(StepMetrics)} - {"further"}
    rows = []
    for _, record in _records(Path(path)):
        values = {name: _from_json(value) for name, value in record.items() if name in known}
        values["sample_hash"] = record.get("sample_hash", "")
        values["further"] = {n: _from_json(v) for n, v in record.items() if n not in known}
        try:
            rows.append(StepMetrics(**values))
        except TypeError as error:
            raise UserError(f"{path}: step {record['step']} is not a row of metrics") from error
    return rows


def read_expert_load(
    path: Path | str, most: int = 400
) -> tuple[list[int], dict[str, list[list[int]]]]:
    """Read an expert_load.jsonl: the steps, and per layer the tokens of [step][expert].

    At most about ``most`` evenly spaced records, the last one among them, so that a long run fits
    in memory. Raises UserError where the file is missing or damaged.
    """
    path = Path(path)
    with naming("read", path), path.open("rb") as file:
        count = sum(line.endswith(b"}\n") for line in file)
    every = max(1, math.ceil(count / most))
    steps: list[int] = []
    loads: dict[str, list[list[int]]] = {}
    for _, record in _records(path, keep=lambda i: (count - 1 - i) % every == 0):
        steps.append(record["step"])
        for layer, counts in record["load"].items():
            loads.setdefault(layer, []).append(counts)
    return steps, loads


def cut_back(path: Path, step: int) -> None:
    """Remove the rows after ``step``, and a torn last line, by an atomic rewrite.

    A missing file stays missing; a file that needs no cut is left as it is. Raises UserError
    where a line before the last is damaged.
    """
    if not path.exists():
        return
    kept = b"".join(line for line, record in _records(path) if record["step"] <= step)
    if len(kept) == path.stat().st_size:
        return
    replace_file(path, kept)


class _Appender:
    """A file of JSON lines that is appended to without a buffer of our own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("ab", buffering=0)

    def append(self, record: dict[str, Any]) -> None:
        # json writes NaN and the infinities as bare words; reading them back as texts quotes them.
        quoted = json.loads(json.dumps(record), parse_constant=str)
        left = memoryview(json.dumps(quoted, separators=(",", ":")).encode() + b"\n")
        with naming("write", self._path):
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> None:
        sync(self._file)

    def close(self) -> None:
        self._file.close()


def _records(
    path: Path, keep: Callable[[int], bool] | None = None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines (each with its newline) and what they hold; those that ``keep(line index)`` chooses."""
    with naming("read", path), path.open("rb") as file:
        for i, line in enumerate(file):
            if keep is not None and not keep(i):
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line.rstrip(b"\n") + b"\n", record
            elif file.readline():
                raise UserError(
                    f"{path}: line {i + 1} is damaged; restore the file or move it away"
                )


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value


_CURVES = {
    "loss/train": "loss",
    "loss/aux": "aux_loss",
    "optimizer/lr": "lr",
    "optimizer/grad_norm": "grad_norm",
    "speed/tokens_per_s": "tokens_per_s",
    "speed/step_seconds": "step_seconds",
    "speed/data_seconds": "data_seconds",
    "speed/mfu": "mfu",
    "speed/memory_gb": "memory_gb",
    "experts/max_vio": "max_vio",
    "experts/dead": "dead_experts",
}


def curves(m: StepMetrics) -> dict[int, dict[str, float]]:
    """The points that a row adds to the curves of TensorBoard and trackers: by step, by name."""
    now = {name: getattr(m, field) for name, field in _CURVES.items()}
    now |= {f"loss/{name}": part for name, part in m.loss_parts.items()}
    now |= {f"loss/mtp_{k}": loss for k, loss in enumerate(m.mtp_losses, 1)}
    now |= {f"run/{name}": value for name, value in m.further.items()}
    now |= {f"max_vio/{layer}": value for layer, value in m.max_vio_per_layer.items()}
    for group, shares in (m.low_precision or {}).items():
        now |= {f"precision/{group}/{name}": share for name, share in shares.items()}
    if not m.max_vio_per_layer:
        now = {name: v for name, v in now.items() if not name.startswith("experts/")}
    points = {step: _heldout(losses) for step, losses in evaluations([m])}
    measured = {name: value for name, value in now.items() if value is not None}
    return points | {m.step: measured | points.get(m.step, {})}


def _heldout(losses: list[float]) -> dict[str, float]:
    return {f"heldout/mtp_{k}" if k else "heldout/loss": loss for k, loss in enumerate(losses)}
