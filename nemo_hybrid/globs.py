"""Globs over names of modules, by which options choose what they change."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

Value = TypeVar("Value")


def matched(glob: str, names: Iterable[str]) -> list[str]:
    """Those of the names that a glob matches, as a whole and with regard to case."""
    return [name for name in names if fnmatchcase(name, glob)]


def last_rule(rules: Sequence[tuple[str, Value]], name: str) -> Value | None:
    """What the last glob says that matches a name; None: there is none."""
    return next((value for glob, value in reversed(rules) if fnmatchcase(name, glob)), None)


def nearest(glob: str, names: Iterable[str]) -> str | None:
    """The name most like a glob, of equal ones the first: compared by as many last parts as the
    glob has. None: there are no names."""
    wanted = glob.removeprefix("*").strip(".")
    last = -len(wanted.split("."))
    ends = {".".join(name.split(".")[last:]): name for name in reversed(list(names))}
    found = difflib.get_close_matches(wanted, ends, n=1, cutoff=0.0)
    return ends[found[0]] if found else None


def unmatched(glob: str, choices: Sequence[str], others: Iterable[str]) -> str:
    """Why a glob chooses no format, and the choice that is most like it. ``others``: names that
    have no choice of formats."""
    near = f"the nearest name is {nearest(glob, map(of_all_layers, choices))}"
    found = matched(glob, others)
    if not found:
        return f"{glob} matches nothing in the model, whose layers are counted from 0; {near}"
    inside = [name for name in choices if name.startswith(f"{found[0]}.")]
    near = f"in it is {of_all_layers(inside[0])}" if inside else near
    return (
        f"{glob} matches {found[0]}, whose format cannot be chosen: linear layers and all experts "
        f"of a layer together have one; {near}"
    )


def of_all_layers(name: str) -> str:
    """The glob for the same module of every layer."""
    return re.sub(r"\.\d+\.", ".*.", name)
