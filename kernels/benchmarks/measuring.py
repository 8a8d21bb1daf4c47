"""Time, memory and limits of operations on a GPU.

On a CPU the same code runs with a host clock, so that the harness can be tested without a GPU; its
times there say nothing about a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLUSH_BYTES = 1 << 30
"""Written before every timed call: empties the L2 cache, and keeps the GPU busy while the host
queues the call, so that launch latency is not timed."""
WARM_UP = {"cuda": 10, "cpu": 3}
"""Calls of each contender before the first that is timed."""
LEAST = {"cuda": 30, "cpu": 10}
"""Timed calls of each contender, if the deadline allows."""
TOLERANCE = 0.05
"""Largest accepted deviation; see :func:`deviation`. bf16 keeps 8 bits; a slot that is lost or
counted twice moves a token's sum of K slots by about 1 / sqrt(K), 0.21 for K = 22."""


UNUSABLE: tuple[type[Exception], ...] = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    OSError,
)
"""What libraries raise that are missing, broken, or made for other versions and GPUs, or that have
too little memory."""
try:
    from triton import TritonError

    UNUSABLE = (*UNUSABLE, TritonError)
except ImportError:
    pass


class DeviceLost(Exception):
    """The GPU runs nothing any more in this process."""


class CallFailed(Exception):
    """One of several calls raised an error that concerns it alone."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Meter:
    """Measures calls on one device, until a deadline."""

    def __init__(self, device: str, budget_s: float) -> None:
        self.device = device
        self.on_gpu = device == "cuda"
        self._deadline = time.monotonic() + budget_s
        size = FLUSH_BYTES if self.on_gpu else 1024
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def works(self) -> bool:
        """Whether the device still runs anything: an illegal access breaks it for this process."""
        try:
            torch.zeros(1, device=self.device).item()
        except RuntimeError:
            return False
        return True

    def reason(self, error: Exception) -> str:
        """An error in one line. Raises DeviceLost when the device works no more."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        if not self.works():
            raise DeviceLost(text) from error
        return text

    def first(self, build: Callable[[], Callable[[], T]]) -> tuple[Callable[[], T], T, float]:
        """What ``build`` makes, the result of its first call, and the seconds that both took: with
        imports, compilation and tuning, as far as no cache on the disk had them."""
        self._wait()
        start = time.monotonic()
        call = build()
        found = call()
        self._wait()
        return call, found, time.monotonic() - start

    def times(
        self, calls: Mapping[str, Callable[[], object]], seconds: float, least: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """Median, 10th and 90th percentile of each call in ms. The calls take turns, each round
        begins with the next of them, until they have run for ``seconds`` together and each
        ``least`` times (default: LEAST), or the deadline has come; at least once.

        Raises:
            CallFailed: a call raised one of UNUSABLE.
            DeviceLost: the device works no more.
        """
        least = LEAST[self.device] if least is None else least
        names = list(calls)
        for _ in range(WARM_UP[self.device] if self.left() > 0 else 0):
            for name in names:
                self._run(name, calls[name])
        taken: dict[str, list[float]] = {name: [] for name in names}
        rounds, spent = 0, 0.0
        while calls and (not rounds or ((rounds < least or spent < seconds) and self.left() > 0)):
            start, at = time.monotonic(), rounds % len(names)
            for name, ms in self._round({n: calls[n] for n in names[at:] + names[:at]}):
                taken[name].append(ms)
            rounds, spent = rounds + 1, spent + time.monotonic() - start
        return {name: summary(ms) for name, ms in taken.items()}

    def _round(self, calls: Mapping[str, Callable[[], object]]) -> list[tuple[str, float]]:
        if not self.on_gpu:
            return [(name, self._host_ms(name, call)) for name, call in calls.items()]
        events = []
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            self._run(name, call)
            end.record()
            events.append((name, start, end))
        self._wait()
        return [(name, start.elapsed_time(end)) for name, start, end in events]

    def _host_ms(self, name: str, call: Callable[[], object]) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        self._run(name, call)
        return (time.perf_counter() - start) * 1e3

    def _run(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except UNUSABLE as error:
            raise CallFailed(name, self.reason(error)) from error

    def _wait(self) -> None:
        """Until the GPU is done. What it reports only now has broken it."""
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(" ".join(str(error).split())[:200]) from error

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Most memory that a call allocates above what is there; None on a CPU."""
        if not self.on_gpu:
            return None
        self._wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self._wait()
        return torch.cuda.max_memory_allocated() - before

    def limits(self) -> dict[str, float]:
        """Measured bytes per second (read + written) of a copy and FLOP per second of a bf16 matrix
        product, of random data: zeros run faster."""
        n, side = (4_300_000_000 // 2, 8192) if self.on_gpu else (1 << 20, 128)
        generator = torch.Generator(self.device).manual_seed(0)
        source = torch.empty(n, dtype=torch.bfloat16, device=self.device)
        source.normal_(generator=generator)
        target = torch.empty_like(source)
        left, right = source[: 2 * side * side].view(2, side, side)
        product = torch.empty_like(left)
        calls = {
            "copy": lambda: target.copy_(source),
            "matmul": lambda: torch.mm(left, right, out=product),
        }
        found = self.times(calls, seconds=2.0)
        return {
            "bytes_per_s": 4 * n / found["copy"]["median_ms"] * 1e3,
            "flops_per_s": 2 * side**3 / found["matmul"]["median_ms"] * 1e3,
        }


def summary(ms: list[float]) -> dict[str, Any]:
    ordered, tenth = sorted(ms), (len(ms) - 1) // 10
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[tenth],
        "p90_ms": ordered[-1 - tenth],
        "repeats": len(ordered),
    }


def kept_bytes(forward: Callable[[], Tensor], leaves: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside its leaves."""
    owned = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = forward()
    del y
    return sum(kept.values())


def deviation(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The worst of all slices along the first dimension (tokens, experts): norm of the difference
    over the norm of the expected slice, or over a tenth of the average one if that is more.
    Integers must be equal; infinite if they are not, or for what is not finite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        a_NM, b_NM = (t.detach().float().reshape(t.shape[0], -1) for t in (a, b))
        norm_N = b_NM.norm(dim=1)
        floor = 0.1 * norm_N.square().mean().sqrt().clamp_min(1e-30)
        ratio = ((a_NM - b_NM).norm(dim=1) / norm_N.clamp_min(floor)).max().item()
        worst = max(worst, ratio if ratio < float("inf") else float("inf"))  # also NaN
    return worst


def machine(device: str, commit: str) -> dict[str, Any]:
    """Machine, versions, commit and day of a measurement."""
    found: dict[str, Any] = {"python": platform.python_version(), "commit": commit or _commit()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["gpu"] = about.name
        found["capability"] = f"{about.major}.{about.minor}"
        found["gpu_memory_gib"] = round(about.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = (_output(query) or "unknown").splitlines()[0]
    else:
        found["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores"
    found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    return found


def _commit() -> str:
    commit = _output(["git", "rev-parse", "HEAD"])
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return (commit or "unknown") + (" + changes" if commit and changes else "")


def _output(command: list[str]) -> str:
    """What a command prints; empty if it fails or is not there."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write_whole(path: Path, text: str) -> None:
    """Readers see the old content or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, result: dict[str, Any]) -> None:
    write_whole(path, json.dumps(result, indent=1) + "\n")
