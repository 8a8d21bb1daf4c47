"""`import`: a Hugging Face directory into a new one of our layout, shard by shard."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import torch

from nemo_hybrid.checkpoint import files
from nemo_hybrid.checkpoint.directory import OneProcess, Writer, new_directory, write_directory
from nemo_hybrid.checkpoint.files import resolve
from nemo_hybrid.checkpoint.load import Source, read_source, tensors_by_name
from nemo_hybrid.checkpoint.names import expert_name
from nemo_hybrid.checkpoint.tensors import TensorFile
from nemo_hybrid.checkpoint.weights import INDEX, Read, Report, log_report, reopen
from nemo_hybrid.checkpoint.writing import Shards, write_model_files
from nemo_hybrid.files import naming
from nemo_hybrid.terminal import progress_bar

REPORT = "import_report.json"


def import_directory(source: Path, out: Path, *, show_progress: bool = True) -> Report:
    """Copy a Hugging Face directory into our layout: the names of `checkpoint.names`, the fp32
    list in fp32, every other weight in the dtype that it has.

    Every tensor is accounted for before anything is written; the account is returned, and stands
    in import_report.json beside the names of the files that were not carried along. Each file
    becomes one file, and no more than one tensor is in memory. ``out`` is whole or absent.

    Raises UserError when a tensor is neither mapped nor skipped, when source cannot be read, and
    when out exists and is not empty, or cannot be written.
    """
    out = new_directory(out)
    read, model = read_source(resolve(source), as_stored=True)
    read.report.raise_errors()

    def write(writer: Writer) -> Shards:
        headers = read.stored.headers.values()
        total = sum(entry.nbytes for entries in headers for entry in entries.values())
        with progress_bar(f"importing {read.stored.directory}", total, show_progress) as done:
            return _write(writer, read, tensors_by_name(model), done)

    def finish(writer: Writer, parts: list[Shards]) -> None:
        write_model_files(writer, read.config, parts, read.companions)
        report = {
            "source": str(read.stored.directory),
            "summary": read.report.summary(),
            "tensors": [asdict(finding) for finding in read.report.findings],
            "not_carried": _not_carried(read),
        }
        writer.write_text(REPORT, files.to_json(report))

    write_directory(out, OneProcess(), write, finish)
    log_report(read.report)
    return read.report


def _not_carried(source: Source) -> list[str]:
    """What the source directory holds beside what was read of it."""
    used = {*source.stored.headers, *source.companions.files, "config.json", INDEX}
    with naming("read", source.stored.directory):
        return sorted(set(os.listdir(source.stored.directory)) - used)


def _write(
    writer: Writer, source: Source, targets: dict[str, torch.Tensor], done: Callable[[float], None]
) -> Shards:
    shards = Shards()
    bytes_read = 0
    for file_name, group in groupby(source.reads, key=lambda read: read.file):
        like: dict[str, torch.Tensor] = {}
        reads: dict[str, Read] = {}
        for read in group:
            for name, part in split_experts(read):
                own = targets[read.own]
                own = own if part.expert is None else own[part.expert]
                like[name] = own.to(part.dtype)
                reads[name] = part
        with reopen(source.stored, file_name) as file:

            def fetch(
                name: str,
                file: TensorFile = file,
                reads: dict[str, Read] = reads,
                like: dict[str, torch.Tensor] = like,
            ) -> torch.Tensor:
                nonlocal bytes_read
                tensor = file.read(reads[name].name, reads[name].rows)
                bytes_read += tensor.nbytes
                done(bytes_read)
                return tensor.to(like[name].dtype)

            shards.write(writer, like, fetch)
    return shards


def split_experts(read: Read) -> list[tuple[str, Read]]:
    """Names on disk that a read is written under: one for each expert."""
    if read.rows is None:
        name = read.own if read.expert is None else expert_name(read.own, read.expert)
        return [(name, read)]
    return [
        (expert_name(read.own, e), replace(read, expert=e, rows=range(e, e + 1))) for e in read.rows
    ]
