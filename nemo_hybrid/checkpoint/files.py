"""Manifests of checkpoint directories, and the choice of a checkpoint or of the shape in one.

Layout of a run's checkpoints::

    RUN/checkpoints/step_00000100/...    one directory per checkpoint, with manifest.json
    RUN/checkpoints/latest               the name of the newest one, for people and tools
    RUN/checkpoints/.tmp-*               what a crashed writer left; removed at the next save

A directory appears under its final name by one rename, after everything in it was written,
hashed and synced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import ModelOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import (
    TEMPORARY,
    FileRecord,
    hash_file,
    naming,
    read_json,
    replace_file,
    side_by_side,
    sync_directory,
)

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
# A checkpoint saved again at the same step moves the old one aside until the new one stands.
_REPLACED = ".replaced"
_STEP = re.compile(r"step_(\d{8,})(\.replaced)?")


class CheckpointError(UserError):
    """A checkpoint that is damaged or incomplete; the message names the file."""


def to_json(value: Any) -> str:
    """Strict JSON (no Infinity), one line per entry, the same text for the same value."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def manifest_text(files: Mapping[str, FileRecord]) -> str:
    """The manifest, which also hashes itself, so that damage to it is blamed on it."""
    listing = {name: asdict(record) for name, record in files.items()}
    seal = hashlib.sha256(to_json(listing).encode()).hexdigest()
    return to_json({"files": listing, "sha256": seal})


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The files a checkpoint directory must hold. Raises CheckpointError naming the manifest."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"not a complete checkpoint: {path} is missing")
    try:
        listing = read_json(path)["files"]
        files = {name: FileRecord(**record) for name, record in listing.items()}
        sealed = path.read_text(encoding="utf-8") == manifest_text(files)
    except UserError as error:
        raise CheckpointError(f"damaged checkpoint: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"damaged checkpoint: {path} is not a manifest") from None
    if not sealed:
        raise CheckpointError(f"damaged checkpoint: {path} does not match its own checksum")
    for name in files:
        if name != Path(name).name:
            raise CheckpointError(f"{path} names {name!r}, which is not a file of its directory")
    return files


def verify(directory: Path, deep: bool = True) -> dict[str, FileRecord]:
    """Compare a checkpoint directory with its manifest, which is returned: presence and size of
    every file, and hashes if deep.

    Raises CheckpointError naming the damaged file.
    """
    records = read_manifest(directory)
    for name, record in records.items():
        path = directory / name
        try:
            found = path.lstat()
        except OSError:
            raise CheckpointError(f"damaged checkpoint: {path} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"damaged checkpoint: {path} is not a regular file")
        if found.st_size != record.size:
            raise CheckpointError(
                f"damaged checkpoint: {path} has {found.st_size} bytes, should have {record.size}"
            )
    damaged = damaged_file(directory, records) if deep else None
    if damaged is not None:
        raise CheckpointError(mismatch(damaged))
    return records


def damaged_file(directory: Path, records: Mapping[str, FileRecord]) -> Path | None:
    """The first file whose hash is not that of its record. Raises UserError for one that cannot be
    read."""
    hashes = side_by_side(lambda name: hash_file(directory / name), records)
    for (name, record), sha256 in zip(records.items(), hashes, strict=True):
        if sha256 != record.sha256:
            return directory / name
    return None


def mismatch(path: Path) -> str:
    return f"damaged checkpoint: {path} does not match its checksum"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The step of a checkpoint directory's name. Raises UserError for another name."""
    match = _STEP.fullmatch(directory.name)
    if match is None:
        raise UserError(f"{directory} is not a checkpoint directory (step_NNNNNNNN)")
    return int(match[1])


def list_steps(checkpoints_dir: Path) -> list[Path]:
    """Checkpoint directories, newest first, valid or not."""
    if not checkpoints_dir.is_dir():
        return []
    with naming("read", checkpoints_dir):
        found = [p for p in checkpoints_dir.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (step_of(p), not p.name.endswith(_REPLACED)), reverse=True)


def find_latest(
    checkpoints_dir: Path, deep: bool = True, damaged: set[Path] | None = None
) -> Path | None:
    """The newest valid checkpoint, or None where there are no checkpoints at all.

    Those in ``damaged`` are skipped; others that turn out to be are named in a warning, skipped and
    added to it. Raises UserError when every one is damaged.
    """
    steps = list_steps(checkpoints_dir)
    damaged = set() if damaged is None else damaged
    for directory in steps:
        if directory in damaged:
            continue
        try:
            verify(directory, deep)
        except UserError as error:
            skip(directory, error)
            damaged.add(directory)
        else:
            _check_pointer(checkpoints_dir)
            return directory
    if steps:
        raise UserError(
            f"none of the {len(steps)} checkpoints in {checkpoints_dir} is valid (see the warnings "
            "above); move them away to start afresh"
        )
    return None


def skip(directory: Path, why: object) -> None:
    """Say that a checkpoint is not used."""
    log.warning("skipping checkpoint %s: %s", directory.name, why)


def _check_pointer(checkpoints_dir: Path) -> None:
    if read_latest(checkpoints_dir) is None:
        log.warning("%s names no checkpoint; it is not used", checkpoints_dir / LATEST)


def read_latest(checkpoints_dir: Path) -> Path | None:
    """The directory that the pointer file names; None if it is absent, empty or dangling."""
    try:
        name = (checkpoints_dir / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    directory = checkpoints_dir / name
    return directory if _STEP.fullmatch(name) and directory.is_dir() else None


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


def remove_directory(directory: Path) -> bool:
    """Delete a directory; a kill half-way leaves no torn one under its name."""
    doomed = directory
    try:
        if not directory.name.startswith(TEMPORARY):
            # Not the name under which a successor is being written.
            doomed = directory.with_name(
                TEMPORARY + directory.name.removesuffix(_REPLACED) + _REPLACED
            )
            if doomed.exists():
                shutil.rmtree(doomed)
            os.replace(directory, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("cannot delete %s: %s", doomed, error.strerror or error)
        return False
    return True


def remove_stale(checkpoints_dir: Path) -> None:
    """Delete what crashed writers left, and replaced checkpoints whose successor is whole."""
    for path in checkpoints_dir.iterdir():
        name = path.name.removeprefix(TEMPORARY)
        if name != path.name and _STEP.fullmatch(name):
            remove_directory(path)
        elif path.name.endswith(_REPLACED) and _STEP.fullmatch(path.name):
            successor = path.with_name(path.name.removesuffix(_REPLACED))
            if successor.is_dir() and _is_valid(successor, deep=True):
                remove_directory(path)


def install_directory(temporary: Path, final: Path) -> None:
    """Rename a finished directory to its final name, replacing what an earlier one left there, such
    as a checkpoint of the same step."""
    aside = final.with_name(final.name + _REPLACED)
    if final.exists() and os.listdir(final):
        # An old one still set aside means that final is damaged (see remove_stale), unless it is
        # somebody else's.
        if aside.exists():
            remove_directory(final)
        else:
            os.replace(final, aside)
    os.replace(temporary, final)
    sync_directory(final.parent)
    # What somebody else has under that name stays.
    if aside.exists() and (_STEP.fullmatch(aside.name) or (aside / MANIFEST).is_file()):
        remove_directory(aside)


def resolve(path: str | Path) -> Path:
    """The directory with config.json that a user's path means.

    Accepts a Hugging Face directory, a checkpoint's step directory, RUN/checkpoints/latest,
    RUN/checkpoints, or RUN itself. Raises UserError saying what was looked for.
    """
    start = Path(path).expanduser()
    if not start.exists():
        raise UserError(
            f"{path} does not exist: give a local directory (what is on the Hugging Face hub has "
            "to be downloaded first)"
        )
    if start.is_dir() and (start / "config.json").is_file():
        return start
    pointer = start.name == LATEST and start.is_file()
    for candidate in (start.parent if pointer else start, start / "checkpoints"):
        if not list_steps(candidate):
            continue
        pointed = read_latest(candidate)
        if pointed is None or not (pointed / "config.json").is_file():
            pointed = find_latest(candidate, deep=False)
        if pointed is not None and (pointed / "config.json").is_file():
            return pointed
        raise UserError(f"{pointed} has no config.json")
    if (start / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter and no whole model: add it to its weights with nemo-hybrid "
            "merge and name the result"
        )
    cached = [place.parent for place in start.glob("snapshots/*/config.json")]
    hint = f"; perhaps {cached[0]}" if cached else ""
    raise UserError(
        f"{path} holds no checkpoint: expected a directory with config.json, or a run directory "
        f"with checkpoints{hint}"
    )


def model_shape(options: ModelOptions) -> HybridConfig:
    """The shape that model.from_hf holds, or without it the one that the options give.

    Raises UserError where from_hf cannot be read, and for options that were given (they are not
    the defaults) and say something else than it.
    """
    if not options.from_hf:
        return options.hybrid()
    shape, default = read_config(resolve(options.from_hf)), ModelConfig()
    contrary = []
    for f in fields(ModelConfig):
        given, there = getattr(options, f.name), getattr(shape, f.name)
        if given not in (there, getattr(default, f.name)):
            contrary.append(f"model.{f.name} is {given!r} here, {there!r} there")
    if contrary:
        raise UserError(
            f"model.from_hf gives the shape of the model, but {'; '.join(contrary)}: leave such "
            "options out"
        )
    return shape
