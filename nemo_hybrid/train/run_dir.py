"""The directory of a run: whose it is, and where it goes on.

RUN_DIR holds config.yaml (the resolved configuration of the first start), metrics, TensorBoard
files, plots, and checkpoints/step_NNNNNNNN.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from nemo_hybrid.checkpoint import files
from nemo_hybrid.config import RunConfig
from nemo_hybrid.config_load import dump_config
from nemo_hybrid.errors import UserError

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"

MAY_CHANGE = (
    "run_dir",
    "resume",
    "checkpoint",
    "kernels",
    "parallel",
    "data.workers",
    "data.prepare_default",
    "data.verify",
    "train.max_steps",
    "train.micro_batch_size",
    "train.recompute",
    "train.deterministic",
    "train.eval_every",
    "train.eval_sequences",
    "train.log_every",
)
"""Options that may differ when a run goes on; all others make it a different run."""


def open_run(config: RunConfig) -> Path | None:
    """Claim ``config.run_dir``; return the checkpoint to go on from, or None for a fresh start.

    For rank 0 alone. Raises UserError if the directory cannot be written, holds something that is
    not a run, or a different run.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        present = sorted(os.listdir(run_dir))
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise UserError(f"cannot use run_dir {run_dir}: {error.strerror or error}") from error
    saved = run_dir / CONFIG_FILE
    if present and config.resume == "never":
        raise UserError(f"run_dir {run_dir} is not empty; choose another, or use --resume auto")
    if saved.exists():
        _same_run(config, saved)
    elif present:
        raise UserError(
            f"run_dir {run_dir} holds {present[0]} but no {CONFIG_FILE}, so it is not a run; "
            "choose another directory"
        )
    else:
        files.replace_file(saved, dump_config(config))
    if config.resume in ("auto", "never"):
        return files.find_latest(run_dir / CHECKPOINTS)
    return files.resolve(Path(config.resume))


def _same_run(config: RunConfig, saved: Path) -> None:
    """Raise UserError naming the options in which the run in the directory differs."""
    before, now = (
        _flat(yaml.safe_load(saved.read_text())),
        _flat(yaml.safe_load(dump_config(config))),
    )
    different = [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]
    if different:
        raise UserError(
            f"run_dir {saved.parent} holds a different run ({'; '.join(different[:4])}"
            f"{'; ...' if len(different) > 4 else ''}); choose another run_dir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
