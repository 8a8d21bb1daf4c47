"""The Python code of pages of docs/extending.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def section(title: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if part.startswith(f"{title}\n"):
            return part
    raise LookupError(f"{PAGE} has no section {title!r}")


def code_of(*titles: str) -> dict[str, Any]:
    """What the Python blocks of sections define, one after the other in one namespace."""
    names: dict[str, Any] = {"__name__": "extending"}
    for text in map(section, titles):
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names
