"""The model of a training checkpoint as a directory of its own, without the training state."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from nemo_hybrid.checkpoint.directory import writing
from nemo_hybrid.checkpoint.manifest import read_manifest
from nemo_hybrid.checkpoint.names import is_training_state
from nemo_hybrid.files import sync

CARD = "README.md"


def publish(checkpoint: Path, out: Path, card: str, left_out: Collection[str] = ()) -> None:
    """Make ``out`` hold the model files of ``checkpoint`` and a model card, in place of what a
    former publication left there. Weights are linked where the file system can, not copied.

    Raises UserError when it cannot be written; what stood there stays.
    """
    records = read_manifest(checkpoint)

    with writing(out) as writer:
        for name, record in records.items():
            if is_training_state(name) or name in (CARD, *left_out):
                continue
            _link(checkpoint / name, writer.directory / name)
            writer.records[name] = record
        writer.write_text(CARD, card)


def _link(source: Path, target: Path) -> None:
    # Small files are copied: editing them in place shall not damage the checkpoint.
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        sync(file)
