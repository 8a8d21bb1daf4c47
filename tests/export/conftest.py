"""Exports made by hand."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.exported import KINDS, Made, build, save_base


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Builds an export of a kind, whose base stands beside it."""

    def build_one(kind: str = "mixed", **changes: Any) -> Path:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        source, _ = build(tmp_path / "export", **(KINDS[kind] | changes))
        save_base(source, tmp_path)
        return tmp_path / "export"

    return build_one
