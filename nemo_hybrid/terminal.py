"""What commands show: tables, how far a stage is, and the streams that it goes to."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nemo_hybrid.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0


class ReaderGone(Exception):
    """Nobody reads the standard output any more: `head` has seen enough."""


class _Stream(io.FileIO):
    """A standard stream that fails once, and then takes everything for written."""

    def __init__(self, number: int, what: str, *, needed: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._what, self._needed, self._failed = what, needed, False

    def write(self, part: Any) -> int:
        try:
            # A pipe that does not block may be full.
            while not self._failed and (count := super().write(part)) is None:
                select.select([], [self], [])
        except OSError as error:
            self._failed = True
            if not self._needed:
                if self.fileno() != 2:
                    print(f"{self._what}: {error.strerror}; going on without it", file=sys.stderr)
            elif not isinstance(error, BrokenPipeError):  # `head` has seen enough: so be it
                raise UserError(f"{self._what}: {error.strerror}") from None
        return len(part) if self._failed else count


def open_streams(*, needed: bool) -> None:
    """Make streams of this process that can be written whatever they are: what is closed becomes
    /dev/null, characters that a stream does not have are escaped.

    ``needed``: standard output is what the command is for, so that writing it raises UserError
    unless its reader has ended; elsewhere it is a log, which says once that it cannot be written.
    For the first thing that a program does.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        raw = _Stream(number, f"cannot write {name}", needed=needed and number == 1)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            getattr(before, "encoding", "utf-8"),
            "backslashreplace",
            line_buffering=number == 2 or raw.isatty() or getattr(before, "write_through", False),
        )
        setattr(sys, name, stream)


def say_phase(text: str) -> None:
    """Say at once on stderr what begins that may take a while: the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{text} ...", file=sys.stderr, flush=True)


def check_reader() -> None:
    """For what goes on as long as somebody reads it. Raises `ReaderGone`."""
    asked = select.poll()
    asked.register(1, 0)  # what is wrong with it is told unasked
    if any(event & select.POLLERR for _, event in asked.poll(0)):
        raise ReaderGone


def table_text(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    right: Collection[str] = (),
    ruled: Collection[int] = (),
) -> str:
    """A table as it is to be printed: as wide as the terminal, or 100 columns elsewhere.

    ``right``: columns whose cells end at the right; ``ruled``: rows that a line follows.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), end_section=number in ruled)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def print_table(*header_and_rows: Any, **options: Any) -> None:
    """Print what `table_text` gives."""
    print(table_text(*header_and_rows, **options), end="")


@contextmanager
def progress_bar(title: str, total: float, show: bool) -> Iterator[Callable[[float], None]]:
    """Show on stderr how far a stage is: a bar on a terminal, a few plain lines otherwise. Yields a
    function to call with what is done so far."""
    if not show:
        yield lambda done: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
            bar.update(task, completed=total)
    else:
        begun = last = time.monotonic()
        print(f"{title} ...", file=sys.stderr, flush=True)

        def line(done: float) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"{title}: {done / total:.0%}", file=sys.stderr, flush=True)

        yield line
        seconds = time.monotonic() - begun
        print(f"{title}: done in {seconds:.1f} s", file=sys.stderr, flush=True)
