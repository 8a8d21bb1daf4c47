"""`import`: a Hugging Face directory into a new one of our layout, shard by shard."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint import manifest
from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.checkpoint.directory import Writer, new_directory, writing
from nemo_hybrid.checkpoint.load import plan_model
from nemo_hybrid.checkpoint.steps import resolve
from nemo_hybrid.checkpoint.tensors import TensorFile, check_finite
from nemo_hybrid.checkpoint.weights import INDEX, Plan, Read
from nemo_hybrid.checkpoint.writing import Shards, write_model_files
from nemo_hybrid.files import naming
from nemo_hybrid.terminal import progress_bar

REPORT = "import_report.json"


def import_directory(source: Path, out: Path, *, show_progress: bool = True) -> Plan:
    """Copy a Hugging Face directory into our layout: the names of `checkpoint.names`, the fp32
    list in fp32, every other weight in the dtype that it has.

    Every tensor is accounted for before anything is written; the account is returned, and stands
    in import_report.json beside the names of the files that were not carried along. Each file
    becomes one file, and no more than one tensor is in memory. ``out`` is whole or absent.

    Raises UserError when a tensor is neither mapped nor skipped, when source cannot be read, and
    when out exists and is not empty, or cannot be written.
    """
    out = new_directory(out)
    directory = resolve(source)
    model, plan = plan_model(directory, as_stored=True)
    companions = read_companions(directory)
    plan.raise_errors()

    used = {*plan.stored.files, *companions.files, "config.json", INDEX}
    with naming("read", directory):
        not_carried = sorted(set(os.listdir(directory)) - used)

    def fetch(file: TensorFile, read: Read) -> Tensor:
        tensor = file.read(read.name, read.row)
        check_finite(tensor, read.hub_name, file.path)
        return tensor.to(read.dtype)

    with writing(out) as writer:
        shards = write_as_stored(writer, plan, fetch, f"importing {directory}", show_progress)
        write_model_files(writer, model.config, [shards], companions)
        report = {
            "source": str(directory),
            "summary": plan.summary(),
            "tensors": [asdict(finding) for finding in plan.findings],
            "not_carried": not_carried,
        }
        writer.write_text(REPORT, manifest.to_json(report))
    plan.log()
    return plan


def write_as_stored(
    writer: Writer,
    plan: Plan,
    fetch: Callable[[TensorFile, Read], Tensor],
    label: str,
    show_progress: bool,
) -> Shards:
    """Write the tensors of a plan, of each file into one file; ``fetch`` gives each, in its dtype,
    when its turn comes, so that no more than one has to be in memory."""
    total = sum(entry.nbytes for _, entry in plan.stored.entries())
    shards, copied = Shards(), 0

    def take(file: TensorFile, reads: dict[str, Read], name: str) -> Tensor:
        nonlocal copied
        tensor = fetch(file, reads[name])
        copied += plan.entry(reads[name]).nbytes
        done(copied)
        return tensor

    with progress_bar(label, total, show_progress) as done:
        for file_name, group in groupby(plan.reads, key=lambda read: read.file):
            reads = {read.hub_name: read for read in group}
            like = {
                name: torch.empty(plan.entry(read).shape, dtype=read.dtype, device="meta")
                for name, read in reads.items()
            }
            with plan.stored.open(file_name) as file:
                shards.write(writer, like, partial(take, file, reads))
    return shards
