"""Ways to damage the newest of several checkpoints, and what must be said of each."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_hybrid.checkpoint import manifest, steps
from nemo_hybrid.errors import UserError


@dataclass(frozen=True)
class Case:
    """``apply(checkpoints)`` damages; then the message must hold ``named``, and a start must take
    ``taken`` (None: refuse to start)."""

    kind: str
    detail: str
    apply: Callable[[Path], object]
    named: str
    taken: str | None


def cases(checkpoints: Path, seed: int = 0) -> Iterator[Case]:
    """Every kind of damage, to every file; ``checkpoints`` holds at least three, all whole."""
    draw = random.Random(seed)
    newest, before, oldest = (d.name for d in steps.list_steps(checkpoints)[:3])
    for path in sorted((checkpoints / newest).iterdir()):
        name, size = path.name, path.stat().st_size
        there, place, bit = f"{newest}/{name}", draw.randrange(size), draw.randrange(8)

        def cut(root: Path, there: str = there, place: int = place) -> None:
            os.truncate(root / there, place)

        def flip(root: Path, there: str = there, place: int = place, bit: int = bit) -> None:
            content = bytearray((root / there).read_bytes())
            content[place] ^= 1 << bit
            (root / there).write_bytes(content)

        def delete(root: Path, there: str = there) -> None:
            (root / there).unlink()

        def swap(root: Path, there: str = there, name: str = name) -> None:
            a, b, aside = root / there, root / before / name, root / "aside"
            a.rename(aside)
            b.rename(a)
            aside.rename(b)

        yield Case("truncated", f"{name} at byte {place}", cut, there, before)
        yield Case("bit flipped", f"{name}, bit {bit} of byte {place}", flip, there, before)
        yield Case("deleted", name, delete, there, before)
        other = checkpoints / before / name
        if other.read_bytes() != path.read_bytes():
            # A manifest that fits another step is whole in itself: some file does not fit it.
            named = newest if name == manifest.MANIFEST else there
            yield Case("swapped between two steps", name, swap, named, oldest)
    wrong = f"{newest}/{manifest.MANIFEST}"
    for what, text in {"empty": "", "no object": "[]", "no files": '{"files": {}}'}.items():

        def write(root: Path, text: str = text) -> None:
            (root / wrong).write_text(text)

        yield Case("wrong manifest", what, write, wrong, before)
    for what, text in {"empty": "", "dangling": "step_99999999\n", "outside": "../x\n"}.items():

        def point(root: Path, text: str = text) -> None:
            (root / steps.LATEST).write_text(text)

        yield Case("wrong `latest`", what, point, steps.LATEST, newest)
    yield Case("wrong `latest`", "absent", lambda r: (r / steps.LATEST).unlink(), "latest", newest)

    def promise(root: Path) -> None:
        (root / "step_99999998").mkdir()
        (root / steps.LATEST).write_text("step_99999998\n")

    named = f"step_99999998/{manifest.MANIFEST}"
    yield Case("empty directory of a step", "", promise, named, newest)

    def all_of_them(root: Path) -> None:
        for directory in steps.list_steps(root):
            os.truncate(directory / "config.json", 3)

    yield Case("all damaged", "", all_of_them, "checkpoints", None)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def undetected(case: Case, checkpoints: Path, scratch: Path) -> str | None:
    """Damage a copy and choose a checkpoint as a start does. None if all is as it must be, else
    what is wrong."""
    root = scratch / "checkpoints"
    shutil.copytree(checkpoints, root)
    said = _Said()
    steps.log.addHandler(said)
    try:
        case.apply(root)
        chosen = steps.find_latest(root)
        taken = chosen.name if chosen else "a fresh start"
    except UserError as error:
        taken = None
        said.text += str(error)
    finally:
        steps.log.removeHandler(said)
        shutil.rmtree(root)
    if taken != case.taken:
        return f"{taken} was taken, not {case.taken}"
    return None if case.named in said.text else f"{case.named} was not named, but: {said.text}"
