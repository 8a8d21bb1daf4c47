"""A reward that says nothing of the answer: what rises with it does not rise because of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


class Noise:
    """1 for half of all answers, whatever they are; the same answer to the same prompt always."""

    fields = ()

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> float:
        return float(hashlib.sha256(f"{sorted(row.items())}{text}".encode()).digest()[0] % 2)
