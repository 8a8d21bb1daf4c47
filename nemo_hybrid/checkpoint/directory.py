"""A directory written by all ranks together that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from nemo_hybrid.checkpoint import files
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import (
    TEMPORARY,
    FileRecord,
    make_directories,
    naming,
    sync_directory,
    write_file,
)

P = ParamSpec("P")
T = TypeVar("T")


class World(Protocol):
    """What checkpoints need to know about the other processes; see `parallel.agreement`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, item: Any) -> list[Any]: ...

    def agreed(self) -> AbstractContextManager[None]: ...

    def from_rank_0(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


class OneProcess:
    """The world of a process that works alone."""

    rank = 0
    size = 1

    def gather(self, item: Any) -> list[Any]:
        return [item]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        try:
            yield
        except (OSError, MemoryError) as error:
            raise UserError(str(error) or "out of memory") from error

    def from_rank_0(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with self.agreed():
            return action(*args, **kwargs)


class Writer:
    """Writes files of one rank into the unfinished directory and keeps their records."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: dict[str, FileRecord] = {}

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write one file. Raises UserError when it exists already or cannot be written."""
        self.records[name] = write_file(self.directory / name, parts)

    def write_text(self, name: str, text: str) -> None:
        self.write(name, [text.encode()])


def verify_together(world: World, directory: Path) -> None:
    """`files.verify`, in which every rank hashes its share: one alone would take minutes for a
    large model. Raises UserError on every rank."""
    records = world.from_rank_0(files.verify, directory, deep=False)
    damaged = _hash_together(world, directory, records)
    if damaged is not None:
        raise files.CheckpointError(files.mismatch(damaged))


def find_latest_together(world: World, checkpoints_dir: Path) -> Path | None:
    """`files.find_latest`, in which every rank hashes its share.

    What is there says rank 0 alone, and only a wrong checksum counts as damage afterwards: another
    rank that cannot read a file shall not send the run back to an older checkpoint. Raises
    UserError on every rank.
    """
    damaged: set[Path] = set()

    def newest() -> tuple[Path, dict[str, FileRecord]] | None:
        directory = files.find_latest(checkpoints_dir, deep=False, damaged=damaged)
        return None if directory is None else (directory, files.read_manifest(directory))

    while (found := world.from_rank_0(newest)) is not None:
        file = _hash_together(world, *found)
        if file is None:
            return found[0]
        damaged.add(found[0])
        if world.rank == 0:
            files.skip(found[0], files.mismatch(file))
    return None


def _hash_together(world: World, directory: Path, records: dict[str, FileRecord]) -> Path | None:
    """The first file that one of the ranks found damaged. Raises UserError on every rank if one
    cannot read its share."""
    names = list(records)[world.rank :: world.size]
    share = {name: records[name] for name in names}
    with world.agreed():
        damaged = files.damaged_file(directory, share)
    return next((path for path in world.gather(damaged) if path is not None), None)


def write_directory(
    final: Path,
    world: World,
    write: Callable[[Writer], T],
    finish: Callable[[Writer, list[T]], None],
) -> None:
    """Write ``final`` so that it is whole or absent, whatever dies on the way.

    ``write`` runs on every rank, must not communicate, and returns what rank 0 needs to know;
    ``finish`` runs on rank 0 with the results of all ranks and writes the files that describe
    them. Then the manifest is written, everything synced, and the directory renamed.

    Raises UserError on every rank when one cannot write, or another process writes final; what
    stood under final stays.
    """
    temporary = final.with_name(TEMPORARY + final.name)
    writer = Writer(temporary)

    def create() -> int | None:
        with naming("create", final.parent):
            make_directories(final.parent)
        with naming("write into", final.parent):
            if temporary.exists():
                _close(_lock(temporary, final))
                files.remove_directory(temporary)  # left by a writer that was killed
            temporary.mkdir()
            return _lock(temporary, final)

    lock = world.from_rank_0(create)
    try:
        with world.agreed():
            result = write(writer)
        parts = world.gather((result, writer.records))

        def complete() -> None:
            finish(writer, [result for result, _ in parts])
            records = dict(writer.records)
            for _, others in parts[1:]:
                records |= others
            writer.write_text(files.MANIFEST, files.manifest_text(records))
            with naming("write", final):
                sync_directory(temporary)
                files.install_directory(temporary, final)

        world.from_rank_0(complete)
    except BaseException:  # Ctrl-C as well: nobody would look for a hidden directory
        if world.rank == 0 and temporary.exists():
            files.remove_directory(temporary)
        raise
    finally:
        if world.rank == 0:
            _close(lock)


def _lock(temporary: Path, final: Path) -> int | None:
    """A descriptor that holds an unfinished directory; None where the file system has no locks.
    Raises UserError if another process holds it."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process is writing {final}: wait for it, or name another directory"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def new_directory(path: str | Path) -> Path:
    """The absolute path of a directory that is about to be written, which links lead to.

    Raises UserError when something stands there, for a mount point, and for the working directory:
    it would be replaced under the feet of whoever is in it.
    """
    with naming("write", Path(path)):
        directory = Path(os.path.realpath(os.path.expanduser(path)))
        if directory.exists() and (not directory.is_dir() or os.listdir(directory)):
            raise UserError(f"{path} exists and is not empty; name another directory or remove it")
        if directory == Path.cwd():
            raise UserError(f"{path} is the working directory; name another one")
        if os.path.ismount(directory):  # nothing can be renamed to it
            raise UserError(f"{path} is a mount point; name a directory in it")
    return directory
