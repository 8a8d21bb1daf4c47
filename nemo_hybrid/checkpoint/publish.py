"""The model of a training checkpoint as a directory of its own, without the training state; and
what model cards have in common."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from nemo_hybrid.checkpoint.adapter import CONFIG as ADAPTER
from nemo_hybrid.checkpoint.directory import STEP, writing
from nemo_hybrid.checkpoint.manifest import read_manifest
from nemo_hybrid.checkpoint.names import is_training_state
from nemo_hybrid.checkpoint.steps import remembered
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.files import sync

CARD = "README.md"
_CLAMPED = (
    "transformers keeps Mamba-2 time steps above `time_step_min`; Megatron-LM, SGLang and the "
    "program that trained this model do not, so its probabilities differ from theirs. `nemo-hybrid "
    "compare-logprobs DIR --backend transformers` measures by how much."
)
_LICENCE = ("license", "license_name", "license_link")
_CACHED = "models--"
_LONGEST = 200


def origin_name(directory: Path) -> str:
    """What to call the model of a directory: within the hub's cache the name that it has there,
    such as ORGANISATION/NAME, else that of the directory."""
    cached = next((part for part in directory.parts if part.startswith(_CACHED)), None)
    return cached.removeprefix(_CACHED).replace("--", "/") if cached else directory.name


def card_head(tags: Iterable[str], base: Path, library: str = "transformers") -> str:
    """What the hub reads first of a model card, with the licence that the card of ``base`` names. A
    run's checkpoint is no base model."""
    head: dict[str, Any] = {"library_name": library}
    if (name := origin_name(base)) and not STEP.fullmatch(name):
        head["base_model"] = name
    head |= {key: value for key, value in _head_of(base).items() if key in _LICENCE}
    head["tags"] = ["nemotron_h", *tags]
    # JSON is YAML, whatever stands in it.
    return "\n".join(
        ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"]
    )


def about(shape: ModelConfig, learnt: object = None) -> str:
    """What every card says of its model. ``learnt``: tokens of the sequences of its last training,
    where that is known."""
    trained = f"; last trained on sequences of {learnt:,} tokens" if isinstance(learnt, int) else ""
    return (
        f"Context length: declared for {shape.max_position_embeddings:,} tokens "
        f"(`max_position_embeddings`){trained}. No position embedding limits it; how far the model "
        f"holds beyond what it was trained on has to be measured.\n\n{_CLAMPED}"
    )


def short_card(
    tags: Iterable[str], base: Path, title: str, told: str, shape: ModelConfig, run: Path
) -> str:
    """A model card that tells one thing more. ``run``: the checkpoint of a run that trained it, or
    any directory."""
    learnt = remembered(run).get("data.sequence_length")
    return f"{card_head(tags, base)}\n# {title}\n\n{told}\n\n{about(shape, learnt)}\n"


def code(text: str) -> str:
    """A text of unknown origin as inline code that no character of it can end."""
    shown = printable(text)[:_LONGEST]
    shown = shown.replace("`", "'").replace("|", "\\|").strip() or "?"
    return f"`{shown}`"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _head_of(directory: Path) -> dict[str, Any]:
    """Texts that a directory's card begins with; nothing where it has none that can be read."""
    try:
        text = (directory / CARD).read_text(encoding="utf-8")[:20_000]
        content = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    found = content if isinstance(content, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def publish(checkpoint: Path, out: Path, card: str) -> None:
    """Make ``out`` hold the model files of ``checkpoint`` and a model card, in place of what a
    former publication left there. Weights are linked where the file system can, not copied.

    Raises UserError when it cannot be written; what stood there stays.
    """
    records = read_manifest(checkpoint)
    left_out = {CARD}
    if ADAPTER in records:  # beside which transformers would take it for that of a whole model
        left_out.add("config.json")

    with writing(out) as writer:
        for name, record in records.items():
            if is_training_state(name) or name in left_out:
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
