"""Files that are whole or not there: the only place that writes, syncs and hashes them; and JSON.

A new file is written under a name that nobody reads yet, synced, and then renamed: by
``replace_file`` for one file, by ``whole_directory`` for a directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from nemo_hybrid.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

TEMPORARY = ".tmp-"
"""Start of the names of unfinished files and directories."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK = 16 << 20
_CHUNKS_AHEAD = 64  # written, but not hashed yet
_HASHED_AT_ONCE = 1 << 18  # bytes; they stay in the core's cache
_WORTH_A_THREAD = 1 << 20  # bytes; smaller pieces are hashed before a thread would have started
MAX_JSON = 100_000_000  # bytes of any file: thrice an index of a million tensors


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a written file."""

    size: int
    sha256: str


@contextmanager
def naming(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, permission, ...) into a UserError that names the path; a file to
    "read" must be more than a pointer to itself."""
    try:
        if action == "read":
            refuse_pointer(path)
        yield
    except OSError as error:
        raise UserError(f"cannot {action} {path}: {error.strerror or error}") from error


def refuse_pointer(path: Path) -> None:
    """Raise UserError for what git leaves in place of a large file that was not fetched. Whatever
    else is wrong with the path is left to its reader."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(
                    f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in "
                    "the clone that it came with"
                )


class NewFile:
    """A file that did not exist, written piece by piece and hashed on the way; a context manager.

    Its ``record`` stands once ``finish`` has synced the file to the disk. Every method raises
    UserError naming the path, also where the file exists already.
    """

    record: FileRecord

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming("write", path):
            self._file = open(path, "xb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._size = 0
        # Hashing is slower than writing; a second thread goes on with it while the disk syncs.
        self._hasher = ThreadPoolExecutor(1)
        self._unhashed: deque[Future[None]] = deque()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def write(self, part: bytes | memoryview) -> int:
        """Append bytes; returns their number, as files do."""
        with naming("write", self.path):
            for i in range(0, len(part), _CHUNK):
                chunk = part[i : i + _CHUNK]
                if len(chunk) < _WORTH_A_THREAD and not self._unhashed:
                    self._digest.update(chunk)
                else:
                    self._unhashed.append(self._hasher.submit(self._digest.update, chunk))
                self._file.write(chunk)
                self._wait_for_hashes(_CHUNKS_AHEAD)
        self._size += len(part)
        return len(part)

    def finish(self) -> FileRecord:
        """Sync and close the file."""
        with naming("write", self.path):
            sync(self._file)
        self._wait_for_hashes(0)
        self.close()
        self.record = FileRecord(self._size, self._digest.hexdigest())
        return self.record

    def _wait_for_hashes(self, most: int) -> None:
        """Until at most this many chunks are not hashed yet: they are kept in memory."""
        while len(self._unhashed) > most or (self._unhashed and self._unhashed[0].done()):
            self._unhashed.popleft().result()

    def close(self) -> None:
        """Close the file, finished or not; for the way out after an error."""
        self._hasher.shutdown()
        with naming("write", self.path):
            self._file.close()


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, hashed on the way and synced to the disk.

    Raises UserError naming path when the file exists already or cannot be written.
    """
    with NewFile(path) as file:
        for part in parts:
            file.write(part)
    return file.record


def replace_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Give path new content, or its parts in order, by way of a temporary file: readers see the old
    or the new one.

    Raises UserError naming path.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(TEMPORARY + path.name)
    with naming("write", path):
        temporary.unlink(missing_ok=True)
        write_file(temporary, [content] if isinstance(content, bytes) else content)
        os.replace(temporary, path)
        sync_directory(path.parent)


def sync(file: IO[bytes]) -> None:
    """Make what was written to an open file survive a power cut. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames and new names inside a directory survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Make a directory and those above it so that their names survive a power cut. Raises
    OSError."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)


@contextmanager
def whole_directory(
    final: Path, install: Callable[[Path, Path], None] | None = None
) -> Iterator[Path]:
    """A hidden directory beside ``final`` that becomes it on success and disappears otherwise.
    ``install`` renames it where more than an empty directory may stand there.

    It is locked as long: what a killed process left is removed, what another one writes is not.
    Raises UserError naming final where it cannot be written, or is being written already.
    """
    temporary = final.with_name(TEMPORARY + final.name)
    with naming("write", final):
        missing = [p for p in final.parents if not p.exists()]
        make_directories(final.parent)
        if temporary.exists():
            os.close(lock(temporary, final))
            shutil.rmtree(temporary)
        temporary.mkdir()
        held = lock(temporary, final)
        try:
            yield temporary
            sync_directory(temporary)
            (install or os.rename)(temporary, final)
            sync_directory(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(held)
            with suppress(OSError):  # what holds something stays
                for made in missing:
                    made.rmdir()


def lock(path: Path, final: Path) -> int:
    """A descriptor that holds a file or directory, from which ``final`` comes to be, until it is
    closed or the process ends; where the file system has no locks, it holds nothing. Raises
    UserError if another process holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is writing {final}: wait for it, or name another place"
        ) from None
    except OSError:
        pass
    return descriptor


def side_by_side(action: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of action for every item, in their order, by several threads: reading, copying
    and hashing keep more than one core busy, and most disks. Raises what the first item raises."""
    items = list(items)
    workers = max(1, min(8, os.cpu_count() or 1, len(items)))
    with _sharing_cores(workers) as start, ThreadPoolExecutor(workers, initializer=start) as pool:
        return list(pool.map(action, items))


@contextmanager
def _sharing_cores(workers: int) -> Iterator[Callable[[], None]]:
    """What each of so many threads calls first: torch's operations in it then take its share of
    the cores. All of them in each thread keep waiting for one another."""
    torch = sys.modules.get("torch")  # not imported for this: hashing does without
    if torch is None:
        yield lambda: None
        return
    before = torch.get_num_threads()
    try:
        yield partial(torch.set_num_threads, max(1, before // workers))
    finally:
        torch.set_num_threads(before)  # threads to come take the number that was set last


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASHED_AT_ONCE))
    with naming("read", path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file, or a key given twice, is a UserError."""
    return parse_json(json_bytes(path), path)


def json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file. Raises UserError for one that is absent, or absurdly large."""
    with naming("read", path):
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is larger than {MAX_JSON} bytes; no such file is")
        return path.read_bytes()


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in content, which came from path; UserError as in `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path}: the key {twice!r} appears twice")
        return out

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
