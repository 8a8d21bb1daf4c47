"""Failures with a message for the user instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: bad option, missing file, impossible layout.

    The command line prints its message without a traceback and exits with status 2.
    """


class Unavailable(UserError):
    """What all processes of a run need is not there, between two steps: a run that has made some
    writes a checkpoint first."""


class TrainingError(Exception):
    """The run itself failed: its loss diverges again and again.

    The command line prints its message without a traceback and exits with status 3.
    """


class Stopped(Exception):
    """A signal asked the run to end, and it did so at a step boundary, with a checkpoint.

    The command line prints its message without a traceback and exits with status 4.
    """


def suggest(key: str, known: Iterable[str], otherwise: str = "; see `--help`") -> str:
    """``; did you mean X?`` for the known key nearest to key, else a pointer to the help."""
    import difflib  # which mistakes alone need

    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not nearest:
        # A right name in a wrong place: lr for train.lr.
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        name = key.rsplit(".", 1)[-1].lstrip("-")
        leaf = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
        nearest = [leaves[found] for found in leaf]
    return f"; did you mean {nearest[0]}?" if nearest else otherwise
