"""The processes of a run, as the small object the other packages see."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_hybrid.agreement import Agreement
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import launched, torchrun_listens
from nemo_kernels.products import sum_in_fp32

TIMEOUT = timedelta(minutes=30)
"""Longest wait for what another process computes."""
_PATIENCE = timedelta(days=365)
"""Longest wait for what one does on its host: it may make samples, or have more to generate."""
_POLL_S = 0.05
_SILENT_S = 10.0


@dataclass(frozen=True)
class World(Agreement):
    """``rank`` of ``size`` processes, computing on ``device``; ``group``: None for all of them.
    What is no tensor goes through ``host`` (None: as tensors do), which waits longer and not on a
    GPU.

    ``cp`` processes after each other read the same rows, of which each has one part; together they
    are one reader."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    cp: int = 1
    host: dist.ProcessGroup | None = None

    @property
    def reader(self) -> int:
        return self.rank // self.cp

    @property
    def readers(self) -> int:
        return self.size // self.cp

    @property
    def part(self) -> int:
        return self.rank % self.cp

    @staticmethod
    def start(cp: int = 1) -> World:
        """Join the processes torchrun started, or form a world of one. Call once per process.

        Raises UserError where a node has more processes than GPUs, and as `launched`.
        """
        rank, size = launched()
        # Torchrun may stand below mpirun; DeepSpeed would hold its number against ours.
        os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
        if size == 1:  # DeepSpeed must not see what is left over of another program
            os.environ.pop("RANK", None)
            os.environ.pop("WORLD_SIZE", None)
            os.environ["LOCAL_RANK"] = "0"
        if torch.cuda.is_available():
            gpus, local_rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= gpus:
                raise UserError(
                    f"process {local_rank} of this node has no GPU, there are {gpus}: start "
                    f"torchrun with --nproc_per_node={gpus}"
                )
            # Sizes of what experts get differ from step to step. Read when CUDA starts.
            if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            backend = "nccl"
        else:
            device, backend = torch.device("cpu"), "gloo"
            _keep_freed_memory()
        sum_in_fp32()
        if not dist.is_initialized():
            with _saying_who_waits(rank, size):
                dist.init_process_group(
                    backend, store=_store(rank, size), rank=rank, world_size=size, timeout=TIMEOUT
                )
        host = _channel(_PATIENCE) if size > 1 else None
        return World(rank, size, device, cp=cp, host=host)

    def side(self) -> World:
        """The same processes with a channel of their own, for a thread beside the training; for CPU
        tensors. All processes call this together."""
        return replace(self, group=_channel(TIMEOUT), host=None)

    @staticmethod
    def stop() -> None:
        """Leave the process group together; without this torchrun may report a failed child."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, self.host or self.group)
        return items

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; the tensor is returned."""
        dist.all_reduce(tensor, group=self.group)
        return tensor


def _channel(timeout: timedelta) -> dist.ProcessGroup:
    """Between all processes, for CPU tensors; they call this together."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # a number only for those who are no members
    return group


def _store(rank: int, size: int) -> dist.Store | None:
    """Where processes find each other: torchrun's store, or one of its own for a world of one.

    A restarted group must not find the addresses of the one that died, so every attempt has names
    of its own (gloo hangs or fails without this).
    """
    if size == 1:
        return dist.HashStore()  # needs no environment variables and no port
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not torchrun_listens():
        raise UserError(
            f"no torchrun listens at {address}:{port}, where MASTER_ADDR and MASTER_PORT send this "
            "process: start it with torchrun, or unset its variables"
        )
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    return dist.PrefixStore(attempt_name(store, rank, size), store)


@contextmanager
def _saying_who_waits(rank: int, size: int) -> Iterator[None]:
    """Print a line if the others keep this process waiting."""
    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    line = (
        f"process {rank} of {size} waits for the others at {where}, "
        f"{TIMEOUT.seconds // 60} minutes at most (if there are none: unset RANK and WORLD_SIZE)\n"
    )
    timer = threading.Timer(_SILENT_S, sys.stderr.write, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def attempt_name(store: dist.Store, rank: int, size: int) -> str:
    """A name on which the processes of this attempt agree, and none of an earlier one.

    The agents' restart counts do not serve: after a fault on one node only that node's goes up
    (https://github.com/pytorch/pytorch/issues/108158). So everyone leaves a token; rank 0 answers
    with all that it sees, again and again, until all have confirmed an answer with their own token
    in it. Raises RuntimeError after TIMEOUT.
    """
    own, others = uuid.uuid4().hex, range(1, size)
    store.set(f"token/{rank}", own)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        if rank:
            answer = json.loads(store.get("answer"))
            if answer[rank] == own:
                store.set(f"confirmed/{rank}", answer[0])
                if store.check(["complete"]) and store.get("complete").decode() == answer[0]:
                    return str(answer[0])
        else:
            tokens = [own, *(store.get(f"token/{other}").decode() for other in others)]
            store.set("answer", json.dumps(tokens))
            confirmed = [f"confirmed/{other}" for other in others]
            if not confirmed or (
                store.check(confirmed) and all(store.get(c).decode() == own for c in confirmed)
            ):
                store.set("complete", own)
                return own
        time.sleep(_POLL_S)
    raise RuntimeError(f"not all of the {size} processes have appeared within {TIMEOUT}")


def _keep_freed_memory() -> None:
    """Ask glibc not to hand freed memory back to the system.

    A training step frees and allocates the same tensors again and again; the page faults of fresh
    memory cost a few percent of it. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of <malloc.h>
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)
        mallopt(mmap_threshold, 32 << 20)
