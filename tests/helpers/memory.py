"""How much memory an action takes of its own, beside pages of mapped files, which the system may
drop again whenever others need the place."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

PAGE = os.sysconf("SC_PAGE_SIZE")


def peak_of(action: Callable[[], object]) -> int:
    """Bytes that it takes at most beyond those of the start, its result included.

    Looked up at every call and return of a function, so that the answer does not hang on time.
    """
    with open("/proc/self/statm", "rb", buffering=0) as statm:

        def own() -> int:
            resident, shared = os.pread(statm.fileno(), 256, 0).split()[1:3]
            return (int(resident) - int(shared)) * PAGE

        most = before = own()

        def look(*_: object) -> None:
            nonlocal most
            most = max(most, own())

        threading.setprofile(look)
        sys.setprofile(look)
        try:
            result = action()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        most = max(most, own())
        del result
    return most - before


def with_helpers() -> dict[str, str]:
    """The environment of a program that imports this file."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
