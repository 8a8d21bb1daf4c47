"""A run's checkpoints, and the choice of one, or of the shape in it.

Layout::

    RUN/checkpoints/step_00000100/...    one directory per checkpoint, with manifest.json
    RUN/checkpoints/latest               the name of the newest one, for people and tools
    RUN/checkpoints/.tmp-*               what a crashed writer left; removed at the next save

A directory appears under its final name by one rename, after everything in it was written,
hashed and synced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from nemo_hybrid.agreement import ALONE, Agreement
from nemo_hybrid.checkpoint.directory import (
    REPLACED,
    STEP,
    damaged_file,
    mismatch,
    remove_directory,
    verify,
)
from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.read import CHECKPOINTS, CONFIG_FILE, flatten
from nemo_hybrid.config.run import CheckpointOptions, ModelOptions
from nemo_hybrid.config.yaml_text import read_yaml
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import TEMPORARY, FileRecord, naming, replace_file

log = logging.getLogger(__name__)

T = TypeVar("T")

LATEST = "latest"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The step of a checkpoint directory's name. Raises UserError for another name."""
    match = STEP.fullmatch(directory.name)
    if match is None:
        raise UserError(f"{directory} is not a checkpoint directory (step_NNNNNNNN)")
    return int(match[1])


def list_steps(checkpoints_dir: Path) -> list[Path]:
    """Checkpoint directories, newest first, valid or not."""
    if not checkpoints_dir.is_dir():
        return []
    with naming("read", checkpoints_dir):
        found = [p for p in checkpoints_dir.iterdir() if STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (step_of(p), not p.name.endswith(REPLACED)), reverse=True)


def find_latest(checkpoints_dir: Path, deep: bool = True, world: Agreement = ALONE) -> Path | None:
    """The newest valid checkpoint, or None where there are no checkpoints at all; others are named
    in a warning. Of several ranks every one hashes its share.

    What is there says rank 0 alone, and only a wrong checksum counts as damage afterwards: another
    rank that cannot read a file shall not send the run back to an older checkpoint. Raises
    UserError, on every rank, when all of them are damaged.
    """
    damaged: set[Path] = set()

    def skip(directory: Path, why: object) -> None:
        log.warning("skipping checkpoint %s: %s", directory.name, why)
        damaged.add(directory)

    def newest() -> tuple[Path, dict[str, FileRecord]] | None:
        steps = list_steps(checkpoints_dir)
        for directory in steps:
            if directory in damaged:
                continue
            try:
                records = verify(directory, deep=False)
            except UserError as error:
                skip(directory, error)
                continue
            if read_latest(checkpoints_dir) is None:
                pointer = checkpoints_dir / LATEST
                log.warning("%s names no checkpoint; it is not used", pointer)
            return directory, records
        if steps:
            raise UserError(
                f"none of the {len(steps)} checkpoints in {checkpoints_dir} is valid (see the "
                "warnings above): bring a whole one back, or begin anew in another directory"
            )
        return None

    while (found := world.from_rank_0(newest)) is not None:
        file = damaged_file(world, *found) if deep else None
        if file is None:
            return found[0]
        if world.rank == 0:
            skip(found[0], mismatch(file))
    return None


def read_latest(checkpoints_dir: Path) -> Path | None:
    """The directory that the pointer file names; None if it is absent, empty or dangling."""
    try:
        name = (checkpoints_dir / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    directory = checkpoints_dir / name
    return directory if STEP.fullmatch(name) and directory.is_dir() else None


def point_latest(checkpoints_dir: Path, directory: Path) -> None:
    """Move the pointer file to a checkpoint directory; the last act of a save."""
    replace_file(checkpoints_dir / LATEST, directory.name + "\n")


def prune(checkpoints_dir: Path, keep: int, trusted: Path | None = None) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints (0: delete none); return what was deleted.

    ``trusted`` is known to be whole (just written) and stays, however old its step. Nothing is
    deleted unless one of those that stay is trusted or verified to the last byte. What cannot be
    deleted is named in a warning.
    """
    if keep <= 0:
        return []
    steps = list_steps(checkpoints_dir)
    stay = [d for d in steps if d == trusted or _is_valid(d, deep=False)][:keep]
    older = steps[steps.index(stay[-1]) + 1 :] if stay else []
    doomed = [d for d in older if d != trusted]
    if not doomed or not (trusted in steps or any(_is_valid(d, deep=True) for d in stay)):
        return []
    return [d for d in doomed if remove_directory(d)]


def _is_valid(directory: Path, deep: bool) -> bool:
    try:
        verify(directory, deep)
    except UserError:
        return False
    return True


def remove_stale(checkpoints_dir: Path) -> None:
    """Delete what crashed writers left, and replaced checkpoints whose successor is whole."""
    for path in checkpoints_dir.iterdir():
        name = path.name.removeprefix(TEMPORARY)
        if name != path.name and STEP.fullmatch(name):
            remove_directory(path)
        elif path.name.endswith(REPLACED) and STEP.fullmatch(path.name):
            successor = path.with_name(path.name.removesuffix(REPLACED))
            if successor.is_dir() and _is_valid(successor, deep=True):
                remove_directory(path)


def require(path: str | Path) -> None:
    """Raise UserError where nothing stands at a path that shall be read; see `resolve`."""
    start = Path(path).expanduser()
    if os.path.exists(start) or (start.name == LATEST and list_steps(start.parent)):
        return
    there = Path(os.path.realpath(start))  # where a link leads
    if run := next((p.parent for p in there.parents if p.name == CHECKPOINTS), None):
        raise UserError(f"{path} is not there: {_kept(run)}")
    raise UserError(
        f"{path} does not exist: give a local directory (what is on the Hugging Face hub has "
        "to be downloaded first)"
    )


def resolve(path: str | Path) -> Path:
    """The directory with config.json that a user's path means.

    Accepts a Hugging Face directory, a checkpoint's step directory, RUN/checkpoints/latest,
    RUN/checkpoints, or RUN itself. Raises UserError saying what was looked for.
    """
    require(path)
    start = Path(path).expanduser()
    if start.is_dir() and (start / "config.json").is_file():
        return start
    pointer = start.name == LATEST and not start.is_dir()
    for candidate in (start.parent if pointer else start, start / CHECKPOINTS):
        while found := list_steps(candidate):
            try:
                return _pointed(candidate)
            except UserError:
                if found == list_steps(candidate):
                    raise  # else the run, which goes on, has removed some of them meanwhile
    require(path)  # a run may have removed it meanwhile
    if (start / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no whole model: add it to its weights with nemo-hybrid "
            "merge and name the result"
        )
    if start.is_file():
        raise UserError(f"{path} is a file: name its directory, {start.parent}")
    cached = [place.parent for place in start.glob("snapshots/*/config.json")]
    hint = f"; perhaps {cached[0]}" if cached else ""
    raise UserError(
        f"{path} holds no checkpoint: expected a directory with config.json, or a run directory "
        f"with checkpoints{hint}"
    )


def _pointed(checkpoints_dir: Path) -> Path:
    """The newest checkpoint of a run, as it says itself. Raises UserError."""
    pointed = read_latest(checkpoints_dir)
    if pointed is None or not (pointed / "config.json").is_file():
        pointed = find_latest(checkpoints_dir, deep=False)
    if pointed is None or not (pointed / "config.json").is_file():
        raise UserError(f"{pointed} has no config.json")
    return pointed


def _kept(run: Path) -> str:
    """What to know of a run that lacks a checkpoint."""
    names = [directory.name for directory in list_steps(run / CHECKPOINTS)]
    return (
        f"a run that goes on removes its older checkpoints (checkpoint.keep); {run} has "
        f"{', '.join(names) or 'none'} now"
    )


def keeps(checkpoint: Path) -> int:
    """How many checkpoints the run keeps whose checkpoint this is, and removes it when as many are
    newer; 0: it stays, or is of no run."""
    checkpoint = checkpoint.resolve()
    settings = checkpoint.parent.parent / CONFIG_FILE
    if checkpoint.parent.name != CHECKPOINTS or not settings.is_file():
        return 0
    try:
        return int(read_yaml(settings)["checkpoint"]["keep"])
    except (UserError, KeyError, TypeError, ValueError):
        return CheckpointOptions().keep


def reading(
    path: str | Path, read: Callable[[Path], T], find: Callable[[str | Path], Path] = resolve
) -> T:
    """What ``read`` makes of the directory that ``find`` gives for a path. If a run that goes on
    removes this checkpoint meanwhile, once more with the one that the path means then.

    Raises UserError as both do, and for a checkpoint that was removed.
    """
    directory = find(path)
    try:
        return read(directory)
    except (UserError, OSError):
        if directory.exists():
            raise
    newer = find(path)
    log.warning("%s was removed while it was read; reading %s in its place", directory, newer)
    with saying_if_removed(newer):
        return read(newer)


@contextmanager
def saying_if_removed(directory: Path) -> Iterator[None]:
    """Raise UserError that says so where a run removes the checkpoint that is being read."""
    try:
        yield
    except (UserError, OSError):
        if directory.exists() or directory.parent.name != CHECKPOINTS:
            raise
        run = directory.parent.parent
        raise UserError(f"{directory} was removed while it was read: {_kept(run)}") from None


def remembered(checkpoint: Path) -> dict[str, Any]:
    """Dotted keys of the run's configuration that a checkpoint of it holds; none for another
    directory."""
    from nemo_hybrid.checkpoint.names import RESOLVED  # which imports torch

    try:
        return flatten(read_yaml(checkpoint / RESOLVED))
    except UserError:
        return {}


def model_shape(options: ModelOptions) -> HybridConfig:
    """The shape that model.from_hf holds, or without it the one that the options give.

    Raises UserError where from_hf cannot be read, and for options that were given (they are not
    the defaults) and say something else than it. Of initializer_range released models have another
    value than was trained with; no weight is drawn by it here.
    """
    if not options.from_hf:
        return options.hybrid()
    shape, default = reading(options.from_hf, read_config), ModelConfig()
    contrary = []
    for f in fields(ModelConfig):
        if f.name == "initializer_range":
            continue
        given, there = getattr(options, f.name), getattr(shape, f.name)
        if given not in (there, getattr(default, f.name)):
            contrary.append(f"model.{f.name} is {given!r} here, {there!r} there")
    if contrary:
        raise UserError(
            f"model.from_hf gives the shape of the model, but {'; '.join(contrary)}: leave such "
            "options out"
        )
    return shape
