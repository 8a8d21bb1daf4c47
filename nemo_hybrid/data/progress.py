"""A progress bar on a terminal, a few plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(title: str, total: float, show: bool) -> Iterator[Callable[[float], None]]:
    """Show how far a stage is on stderr; yields a function to call with what is done so far."""
    if not show:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _rich_bar(title, total) as update:
            yield update
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


@contextmanager
def _rich_bar(title: str, total: float) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
        bar.update(task, completed=total)
