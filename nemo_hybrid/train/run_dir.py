"""The directory of a run: whose it is, and where it goes on.

RUN_DIR holds config.yaml (the resolved configuration of the last start), metrics, TensorBoard
files, plots, and checkpoints/step_NNNNNNNN; of fine-tuning also data (the samples, made before all
else) and at the end model.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_hybrid.checkpoint import steps
from nemo_hybrid.checkpoint.manifest import read_manifest
from nemo_hybrid.checkpoint.names import RESOLVED
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.read import (
    BLENDS,
    CHECKPOINTS,
    CONFIG_FILE,
    dump_config,
    flatten,
    read_keys,
)
from nemo_hybrid.config.run import PrecisionOptions, TrainingConfig
from nemo_hybrid.config.yaml_text import parse_yaml, read_yaml
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import TEMPORARY, hash_file, naming, replace_file
from nemo_hybrid.process import number_of
from nemo_hybrid.train.metrics import METRICS_FILE, read_metrics

log = logging.getLogger(__name__)

DIAGNOSIS = "diagnosis"
SAMPLES = "data"
MODEL = "model"
ROLLOUTS = "rollouts"
ENGINE = "engine"
BEGINNINGS = ("model.from_hf", "continue_from")
_LOCK = ".lock"

MAY_CHANGE = (
    "run_dir",
    "resume",
    "track",
    "profile",
    "checkpoint",
    "guard",
    "kernels",
    "parallel",
    *(f"precision.{f.name}" for f in fields(PrecisionOptions) if f.name != "recipe"),
    "rollout.engine",
    "rollout.engine_timeout_s",
    "rollout.slots",
    "data.path",
    "data.short.path",
    "data.workers",
    "data.default_corpus",
    "data.verify",
    "train.max_steps",
    "train.epochs",
    "train.micro_batch_size",
    "train.recompute",
    "train.tile",
    "train.offload",
    "train.deterministic",
    "train.eval_every",
    "train.eval_sequences",
    "train.eval_positions",
    "train.log_every",
    "train.hang_timeout_s",
)
"""Options that may differ when a run goes on; all others make it a different run. Data may move:
checkpoints know it by its checksums. So of data.blend and data.phases only the weights are
compared; and of precision.recipe only the dtype of the weights, because all else of it leaves no
trace in the state.
"""


# How often torchrun's agent and Slurm have started this job again.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


class RunLock:
    """Holds a run's directory for this process; a context manager.

    The operating system drops the lock with the process, so no crash leaves one.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._run_dir = Path(config.run_dir)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def take(self) -> bool:
        """Lock the directory, which exists; whether it was not locked by this before. Raises
        UserError if another process holds it."""
        if self._descriptor is not None:
            return False
        path = self._run_dir / _LOCK
        with naming("use run_dir", self._run_dir):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                raise UserError(
                    f"run_dir {self._run_dir} is in use by another run ({holder}); wait for it, "
                    "or choose another directory"
                ) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        self._descriptor = descriptor
        return True


def open_run(config: TrainingConfig, lock: RunLock) -> Path | None:
    """The checkpoint that is asked for, None for the newest one; nothing is written but the lock.

    Where torchrun or Slurm starts the same command once more, ``resume`` says how it began: the
    run then goes on from its own newest checkpoint, if it has one. For rank 0 alone. Raises
    UserError if the directory cannot be used, holds something that is not a run, or a different
    run.
    """
    run_dir = Path(config.run_dir)
    with naming("use run_dir", run_dir):
        present = _contents(run_dir)
    restarted = any(number_of(os.environ, name, 0) for name in _RESTARTS)
    if present and config.resume == "never" and not restarted:
        raise UserError(f"run_dir {run_dir} is not empty; choose another, or use --resume auto")
    own = steps.list_steps(run_dir / CHECKPOINTS)
    if CONFIG_FILE in present:
        _same_run(config, own)
        lock.take()
    elif present:
        raise UserError(
            f"run_dir {run_dir} holds {present[0]} but no {CONFIG_FILE}, so it is not a run; "
            "choose another directory"
        )
    if not own and CONFIG_FILE in present:
        _nothing_lost(config)
    if config.resume in ("auto", "never") or (own and (restarted or _began_so(config))):
        return None
    checkpoint = steps.resolve(Path(config.resume))
    step, last = steps.step_of(checkpoint), config.train.max_steps
    if not own and 0 < last <= step:
        raise UserError(
            f"{checkpoint} is behind the last step of this run: set train.max_steps ({last}) above "
            f"{step}"
        )
    if own and checkpoint.resolve().parent != (run_dir / CHECKPOINTS).resolve():
        raise UserError(
            f"run_dir {run_dir} holds checkpoints of its own, the newest {own[0].name}, and "
            f"{checkpoint} is another run's: go on from the newest with --resume auto, or use "
            "another run_dir"
        )
    later = [d.name for d in reversed(own) if steps.step_of(d) > step]
    if later:
        raise UserError(
            f"{run_dir / CHECKPOINTS} holds checkpoints beyond step {step} ({', '.join(later)}), "
            "one of which the next start would take: go on from the newest with --resume auto, "
            "use another run_dir, or remove them"
        )
    return checkpoint


def _began_so(config: TrainingConfig) -> bool:
    """Whether the last start in this directory was told to go on from the same checkpoint: the same
    command given again."""
    saved = Path(config.run_dir) / CONFIG_FILE
    return saved.is_file() and read_keys(saved, type(config)).get("resume") == config.resume


def _nothing_lost(config: TrainingConfig) -> None:
    """Raise UserError where there are no checkpoints, although the pointer to the newest one or the
    rows of metrics say that there were: a fresh start would cut those away.

    A run that dies while its first checkpoint is being written has made the steps of an interval
    without one, and those of a second one if it writes beside them: the next save waits.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / METRICS_FILE
    rows = [row.step for row in read_metrics(path)] if path.is_file() else []
    pointer = run_dir / CHECKPOINTS / steps.LATEST
    if not rows and not pointer.exists():
        return
    # How often it saved, which may change now.
    saved = read_keys(run_dir / CONFIG_FILE, type(config))
    every = int(saved.get("checkpoint.every", 0))
    pending = every * (2 if saved.get("checkpoint.asynchronous", True) else 1)
    if pointer.exists() or (every and len(rows) > pending):
        holds = f"metrics up to step {rows[-1]}" if rows else pointer.name
        raise UserError(
            f"run_dir {run_dir} holds {holds}, but no checkpoints: were they moved, or is a disk "
            "missing? Bring them back, or use another run_dir"
        )
    log.warning(
        "%s holds metrics of %d steps, but no checkpoint: the run begins anew and replaces them",
        run_dir, len(rows),
    )  # fmt: skip


def claim_run(config: TrainingConfig, lock: RunLock) -> None:
    """Make ``config.run_dir`` the directory of this run: write its configuration.

    For rank 0 alone, when nothing else can go wrong any more: a directory that was claimed by a
    mistaken configuration would refuse the mended one. Raises UserError.
    """
    run_dir = Path(config.run_dir)
    with naming("use run_dir", run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    if lock.take() and (present := _contents(run_dir)):
        raise UserError(
            f"run_dir {run_dir} was empty when this run began to start, and now holds "
            f"{present[0]}, of a run that was faster: start again to go on from it, or choose "
            "another directory"
        )
    replace_file(run_dir / CONFIG_FILE, dump_config(config, in_run_dir=True))


def _contents(run_dir: Path) -> list[str]:
    """Names in the directory, what a killed writer and the start of a fine-tuning run left aside;
    none if it does not exist yet.

    Raises OSError if it cannot be written, or not be made.
    """
    existing = next(p for p in (run_dir, *run_dir.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{existing} may not be written")
    if existing != run_dir:
        return []
    aside = (_LOCK, SAMPLES)
    names = (n for n in os.listdir(run_dir) if n not in aside and not n.startswith(TEMPORARY))
    return sorted(names)


def _same_run(config: TrainingConfig, checkpoints: list[Path]) -> None:
    """Raise UserError naming the options in which the run in the directory differs: as its newest
    checkpoint remembers them, because config.yaml may have been edited since."""
    kind = type(config)
    there = _flat(_read_saved(Path(config.run_dir) / CONFIG_FILE), kind)
    remembered = next((d / RESOLVED for d in checkpoints if _is_intact(d, RESOLVED)), None)
    if remembered is not None:
        # Weights to begin with may have moved; those that matter later are known by their digest.
        named = {key: there.get(key) for key in BEGINNINGS}
        there = _flat(_read_saved(remembered), kind) | named
    # What an older configuration does not say had its default.
    before, now = _compared(kind()) | there, _compared(config)
    if config.model.from_hf:
        before = _without_shape(before)
    different = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]
    if different:
        raise UserError(
            f"run_dir {config.run_dir} holds a different run ({'; '.join(different[:4])}"
            f"{'; ...' if len(different) > 4 else ''}); choose another run_dir"
        )


def _read_saved(path: Path) -> dict[str, Any]:
    """The contents of a configuration file. Raises UserError for what is none."""
    with suppress(UserError):
        if content := read_yaml(path):
            return content
    raise UserError(f"{path} is not the configuration of a run; choose another run_dir")


def _is_intact(checkpoint: Path, name: str) -> bool:
    """Whether a file of a checkpoint is the one that was written."""
    try:
        return read_manifest(checkpoint)[name].sha256 == hash_file(checkpoint / name)
    except (UserError, KeyError):
        return False


def _compared(config: TrainingConfig) -> dict[str, Any]:
    options = _flat(parse_yaml(dump_config(config)), type(config))
    return _without_shape(options) if config.model.from_hf else options


def _without_shape(options: dict[str, Any]) -> dict[str, Any]:
    """Without the shape's options: with model.from_hf the shape comes from there."""
    names = {f"model.{f.name}" for f in fields(ModelConfig)}
    return {key: value for key, value in options.items() if key not in names}


def _flat(content: dict[str, Any], kind: type[TrainingConfig]) -> dict[str, Any]:
    """Dotted keys; of data.blend and data.phases the weights, of precision.recipe their dtype."""
    flat = flatten(content, kind)
    if recipe := flat.get("precision.recipe"):
        flat["precision.recipe"] = f"{'fp32' if recipe == 'fp32' else 'bf16'} weights"
    for blend in BLENDS:
        if isinstance(flat.get(blend), dict):
            flat[blend] = [*flat[blend].values()]
    if isinstance(flat.get("data.phases"), dict):
        flat["data.phases"] = {t: [*blend.values()] for t, blend in flat["data.phases"].items()}
    return flat
