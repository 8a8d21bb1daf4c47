"""A directory written by all ranks together that appears whole or not at all."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from nemo_hybrid.agreement import ALONE, Agreement
from nemo_hybrid.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    manifest_text,
    read_manifest,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import (
    TEMPORARY,
    FileRecord,
    hash_file,
    naming,
    refuse_pointer,
    side_by_side,
    sync_directory,
    whole_directory,
    write_file,
)

log = logging.getLogger(__name__)

# A checkpoint saved again at the same step moves the old one aside until the new one stands.
REPLACED = ".replaced"
STEP = re.compile(r"step_(\d{8,})(\.replaced)?")
T = TypeVar("T")


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

    def write_manifest(self) -> None:
        """Write what the others are, last of all."""
        self.write(MANIFEST, [manifest_text(self.records).encode()])


def write_directory(
    final: Path,
    world: Agreement,
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
    with ExitStack() as stack:  # of rank 0, which makes the directory, and renames it in the end
        whole = whole_directory(final, _install)
        writer = Writer(world.from_rank_0(stack.enter_context, whole))
        with world.agreed():
            result = write(writer)
        parts = world.gather((result, writer.records))

        def complete() -> None:
            finish(writer, [result for result, _ in parts])
            for _, others in parts[1:]:
                writer.records |= others
            writer.write_manifest()
            stack.close()

        world.from_rank_0(complete)


@contextmanager
def writing(final: Path) -> Iterator[Writer]:
    """The same by one process: a directory that is whole when the block ends well, else absent.
    Raises UserError."""
    with ALONE.agreed(), whole_directory(final, _install) as temporary:
        writer = Writer(temporary)
        yield writer
        writer.write_manifest()


def _install(temporary: Path, final: Path) -> None:
    """Rename a finished directory to its final name, replacing what an earlier one left there, such
    as a checkpoint of the same step."""
    aside = final.with_name(final.name + REPLACED)
    if final.exists() and os.listdir(final):
        # An old one still set aside means that final is damaged (see steps.remove_stale), unless
        # it is somebody else's.
        if aside.exists():
            remove_directory(final)
        else:
            os.replace(final, aside)
    os.replace(temporary, final)
    sync_directory(final.parent)
    # What somebody else has under that name stays.
    if aside.exists() and (STEP.fullmatch(aside.name) or (aside / MANIFEST).is_file()):
        remove_directory(aside)


def remove_directory(directory: Path) -> bool:
    """Delete a directory; a kill half-way leaves no torn one under its name."""
    doomed = directory
    try:
        if not directory.name.startswith(TEMPORARY):
            # Not the name under which a successor is being written.
            doomed = directory.with_name(
                TEMPORARY + directory.name.removesuffix(REPLACED) + REPLACED
            )
            if doomed.exists():
                shutil.rmtree(doomed)
            os.replace(directory, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("cannot delete %s: %s", doomed, error.strerror or error)
        return False
    return True


def verify(directory: Path, deep: bool = True, world: Agreement = ALONE) -> dict[str, FileRecord]:
    """Compare a directory with its manifest, which is returned: presence and size of every file,
    and hashes if deep. Of several ranks every one hashes its share: one alone would take minutes
    for a large model.

    Raises CheckpointError naming the damaged file.
    """
    records = world.from_rank_0(_check_sizes, directory)
    damaged = damaged_file(world, directory, records) if deep else None
    if damaged is not None:
        raise CheckpointError(mismatch(damaged))
    return records


def _check_sizes(directory: Path) -> dict[str, FileRecord]:
    records = read_manifest(directory)
    for name, record in records.items():
        path = directory / name
        try:
            found = path.lstat()
        except OSError:
            raise CheckpointError(f"damaged checkpoint: {path} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"damaged checkpoint: {path} is not a regular file")
        if found.st_size != record.size:
            refuse_pointer(path)
            raise CheckpointError(
                f"damaged checkpoint: {path} has {found.st_size} bytes, should have {record.size}"
            )
    return records


def damaged_file(
    world: Agreement, directory: Path, records: Mapping[str, FileRecord]
) -> Path | None:
    """The first file whose hash is not that of its record. Raises UserError on every rank if one
    cannot read its share."""
    names = list(records)[world.rank :: world.size]
    with world.agreed():
        hashes = side_by_side(lambda name: hash_file(directory / name), names)
    damaged = (n for n, sha256 in zip(names, hashes, strict=True) if sha256 != records[n].sha256)
    found = world.gather(next(damaged, None))
    return next((directory / name for name in found if name is not None), None)


def mismatch(path: Path) -> str:
    return f"damaged checkpoint: {path} does not match its checksum"


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
