"""The documentation builds as a site, and no link or anchor in it leads nowhere."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(place / "site")],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.sweep
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is missing")
def test_the_site_builds_with_strict_links(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert all((tmp_path / "site" / page / "index.html").is_file() for page in pages)
    for broken in ("[x](nowhere.md)", "[x](data.md#nothing)"):
        text = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
        (tmp_path / "docs/rl.md").write_text(f"{text}\n{broken}\n", encoding="utf-8")
        done = build(tmp_path)
        assert done.returncode != 0
        assert "rl.md" in done.stderr
