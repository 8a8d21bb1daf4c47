"""Files that travel with weights unchanged: tokenizer, generation settings, end-of-sequence ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_hybrid.config.hf import blaming, eos_token_ids
from nemo_hybrid.data.template_files import FURTHER, files_with, read_sources
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, parse_json, read_json

GENERATION = "generation_config.json"
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)


@dataclass(frozen=True)
class Companions:
    """``files``: contents by name. ``eos_token_ids``: config.json's, where it holds a list; a
    model's configuration keeps the first alone. ``stop_ids``: generation_config.json's."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    eos_token_ids: list[int] | None = None
    stop_ids: list[int] | None = None

    @property
    def ends(self) -> list[int]:
        """All ids that end a text as the lists have it."""
        return [*(self.eos_token_ids or ()), *(self.stop_ids or ())]

    def stops(self, default: int) -> list[int]:
        """Ids that end what is generated: the last list, else the first, else ``default``."""
        return self.stop_ids or self.eos_token_ids or [default]


def read_companions(directory: Path) -> Companions:
    """Read what a Hugging Face directory, or a token store, holds of them.

    Raises UserError for a generation_config.json, or end-of-sequence ids, that are none.
    """
    files = {}
    with naming("read", directory):
        directory.stat()  # one that is gone has no files either
    for path in (directory / name for name in _FILES):
        if path.is_file():
            with naming("read", path):
                files[path.name] = path.read_bytes()
    if (directory / FURTHER).is_dir():  # whose files have no place beside weights
        files = files_with(read_sources(directory, files), files)
    stop_ids = None
    if GENERATION in files:
        ids = parse_json(files[GENERATION], directory / GENERATION).get("eos_token_id")
        if ids is not None:
            with blaming(str(directory / GENERATION)):
                stop_ids = eos_token_ids(ids)
    config = directory / "config.json"
    ids = read_json(config).get("eos_token_id") if config.is_file() else None
    with blaming(str(config)):
        listed = eos_token_ids(ids) if isinstance(ids, list) else None
    return Companions(files, listed, stop_ids)


def read_tokenizer(directory: Path) -> Companions:
    """The same from a directory that must hold a tokenizer. Raises UserError."""
    companions = read_companions(directory)
    if "tokenizer.json" not in companions.files:
        raise UserError(f"{directory} holds no tokenizer.json")
    return companions
