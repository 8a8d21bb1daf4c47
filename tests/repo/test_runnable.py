"""The blocks of README and documents that say they run, run: those below `<!-- runnable -->`, and
in the longest lane those below `<!-- runnable: slow -->` too. test_repository.py reads all others.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.processes import HANG_S

ROOT = Path(__file__).parents[2]
PRODUCT = ("nemo_hybrid", "kernels", "configs", "docs", "scripts", "README.md")
COMMANDS = {"nemo-hybrid": "nemo_hybrid", "torchrun": "torch.distributed.run"}
_BLOCK = re.compile(r"^<!-- runnable(: slow)? -->\n```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    slow: bool
    language: str
    code: str


def blocks_of(text: str) -> list[Block]:
    found = [Block(bool(slow), *rest) for slow, *rest in _BLOCK.findall(text)]
    assert len(found) == text.count("<!-- runnable"), "a mark without a block behind it"
    return found


def run(blocks: list[Block], place: Path) -> None:
    """One after the other in ``place``, which gets what a clone has."""
    for name in PRODUCT:
        (place / name).symlink_to(ROOT / name)
    programs = place / "bin"
    programs.mkdir()
    for name, module in COMMANDS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    for block in blocks:
        start = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}
        done = subprocess.run(
            [*start[block.language], block.code], cwd=place, env=environment, capture_output=True,
            text=True, timeout=HANG_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"


DOCUMENTS = {
    p.relative_to(ROOT).as_posix(): blocks
    for p in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    if (blocks := blocks_of(p.read_text(encoding="utf-8")))
}
QUICK = {name: found for name, b in DOCUMENTS.items() if (found := [x for x in b if not x.slow])}


@pytest.mark.parametrize("name", QUICK)
def test_quick_blocks_run(name: str, tmp_path: Path) -> None:
    run(QUICK[name], tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in DOCUMENTS if DOCUMENTS[n] != QUICK.get(n)])
def test_all_blocks_run(name: str, tmp_path: Path) -> None:
    run(DOCUMENTS[name], tmp_path)


def test_what_does_not_run_is_seen(tmp_path: Path) -> None:
    bash, python = "<!-- runnable -->\n```bash\n", "<!-- runnable: slow -->\n```python\n"
    text = f"{bash}echo 1 > a\nfalse | cat\n```\n\n{python}assert open('a').read() == '2'\n```\n"
    first, second = blocks_of(text + "```bash\nnot run\n```\n")
    assert (first.slow, second.slow) == (False, True)
    for number, blocks in enumerate(([first], [first._replace(code="echo 1 > a"), second])):
        (place := tmp_path / str(number)).mkdir()
        with pytest.raises(AssertionError, match="false" if blocks == [first] else "assert open"):
            run(blocks, place)
    with pytest.raises(AssertionError, match="without a block"):
        blocks_of("<!-- runnable -->\n\n```bash\ntrue\n```\n")
    assert "README.md" in DOCUMENTS
    assert QUICK
