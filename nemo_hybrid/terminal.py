"""What commands show: tables, and how far a stage is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


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
