"""Where chat templates stand in a directory: one in a file of its own, several by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nemo_hybrid.data.tokenizer import CHAT_TEMPLATE, CONFIG
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, parse_json

DEFAULT = "default"
FURTHER = "additional_chat_templates"
"""Directory of the others, beside chat_template.jinja."""


def read_sources(directory: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Chat templates by name, from where transformers takes them: files of their own in a
    directory, else the settings among the tokenizer's files. Raises UserError."""
    named = {p.stem: p for p in sorted((directory / FURTHER).glob("*.jinja"))}
    paths = {DEFAULT: directory / CHAT_TEMPLATE, **named}
    if sources := {name: read_template(path) for name, path in paths.items() if path.is_file()}:
        return sources
    found = parse_json(files.get(CONFIG, b"{}"), directory / CONFIG).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    entries = [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []
    texts = {str(t.get("name")): t.get("template") for t in entries}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def files_with(sources: Mapping[str, str], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files with these templates as the only ones: in a file of its own if there is
    one, else all by name in the tokenizer's settings."""
    settings = json.loads(files.get(CONFIG, b"{}"))
    settings.pop("chat_template", None)
    others = {name: content for name, content in files.items() if name != CHAT_TEMPLATE}
    if sources.keys() == {DEFAULT}:
        others[CHAT_TEMPLATE] = sources[DEFAULT].encode()
    else:
        settings["chat_template"] = [
            {"name": name, "template": source} for name, source in sources.items()
        ]
    return {**others, CONFIG: json.dumps(settings, indent=2, ensure_ascii=False).encode()}


def read_template(path: Path) -> str:
    """Raises UserError for a file that is no text."""
    with naming("read", path):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"the chat template {path} is not UTF-8") from e
