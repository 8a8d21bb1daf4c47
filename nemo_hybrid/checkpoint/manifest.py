"""Manifests: what a directory must hold, and the checksums of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import FileRecord, read_json

MANIFEST = "manifest.json"


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
