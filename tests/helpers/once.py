"""Expensive results that several tests, and several pytest-xdist workers, share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that ``make`` filled, by whichever worker came first. Tests must not write it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers' own directories lie in one of the session
    directory = base / name
    with FileLock(base / f"{name}.lock"):
        if not (base / f"{name}.done").exists():
            directory.mkdir()
            make(directory)
            (base / f"{name}.done").touch()
    return directory
