"""`profile`: what a few steps of a run spend their time on, recorded by torch.profiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import replace_file, whole_directory

_ROWS = 40


class Profile:
    """Records some steps of one process, batches that are passed over among them included, in
    RUN_DIR/profile/: a trace for chrome://tracing or Perfetto, a table of the operations, and on
    CUDA a snapshot of the allocator for pytorch.org/memory_viz."""

    def __init__(self, steps: range, run_dir: Path, device: torch.device) -> None:
        self._steps, self._cuda = steps, device.type == "cuda"
        self._out = run_dir / "profile"
        self._recording: profile | None = None

    def start_step(self, step: int) -> None:
        """Before step ``step``."""
        if self._recording is not None or step not in self._steps:
            return
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        on_device = [ProfilerActivity.CUDA] if self._cuda else []
        self._recording = profile(activities=[ProfilerActivity.CPU, *on_device])
        self._recording.__enter__()

    def end_step(self, step: int) -> str:
        """After step ``step``: once the record is complete where it stands, or why it could not be
        written; else nothing."""
        if self._recording is None or step + 1 in self._steps:
            return ""
        if self._cuda:
            torch.cuda.synchronize()
        self._recording.__exit__(None, None, None)
        by = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = self._recording.key_averages().table(sort_by=by, row_limit=_ROWS)
        out = self._out / f"steps_{self._steps.start}-{step}"
        recording, self._recording = self._recording, None
        try:
            with whole_directory(out, _install) as place:
                recording.export_chrome_trace(str(place / "trace.json"))
                replace_file(place / "operations.txt", table)
                if self._cuda:
                    torch.cuda.memory._dump_snapshot(str(place / "memory.pickle"))
        except UserError as error:
            return f"no profile: {error}"
        return f"profile of steps {self._steps.start} to {step}: {out}"


def _install(made: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)  # of the same steps, made again
    made.rename(final)
