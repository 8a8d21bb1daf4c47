"""Exports of every kind, each written once in a session."""

import shutil
from pathlib import Path

import pytest

from helpers.exported import KINDS, Made, write_export
from helpers.once import once


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Gives the directory of a kind, in which are ``base`` and ``export``; not to be written."""

    def one(kind: str = "mixed") -> Path:
        return once(tmp_path_factory, f"kind-{kind}", lambda d: write_export(d, KINDS[kind]))

    return one


@pytest.fixture
def made(exported: Made, tmp_path: Path) -> Made:
    """Gives a copy of an export, whose base stands beside it."""

    def copy(kind: str = "mixed") -> Path:
        for name in ("base", "export"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(exported(kind) / name, tmp_path / name)
        return tmp_path / "export"

    return copy
