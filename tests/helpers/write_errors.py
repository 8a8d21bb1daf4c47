"""Runs that meet a write error, one after the other in one process, which starting each would make
slow: ``python write_errors.py CONFIG OUT CASES``.

CASES is JSON: [[label, file name, errno (0: a ValueError), asynchronous], ...]. For each, a run in
OUT/label whose second checkpoint meets the error in that file, and then the run again without it.
What came of each goes to OUT/label.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from nemo_hybrid import cli, files
from nemo_hybrid.checkpoint.steps import find_latest
from nemo_hybrid.parallel.world import World


def meet(config: str, run_dir: Path, name: str, code: int, asynchronous: bool) -> dict[str, Any]:
    """Statuses of both runs; message and checkpoints after the first."""
    sync, checkpoints = files.sync, run_dir / "checkpoints"
    words = ["pretrain", "--config", config, "--run_dir", str(run_dir)]
    words += ["--checkpoint.asynchronous", str(asynchronous).lower()]

    def failing(file: IO[bytes]) -> None:
        if Path(file.name).name == name and (checkpoints / "latest").exists():
            raise OSError(code, os.strerror(code)) if code else ValueError("a defect")
        sync(file)

    files.sync = failing
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            first: int | str = cli.main(words)
        except ValueError as error:
            first = repr(error)
    files.sync = sync
    newest = find_latest(checkpoints)
    return {
        "message": said.getvalue(),
        "left": sorted(p.name for p in checkpoints.iterdir()),
        "newest": newest.name if newest else None,
        "statuses": [first, cli.main(words)],
    }


if __name__ == "__main__":
    # DeepSpeed keeps process groups and cannot start anew in a process that destroyed them.
    World.stop = staticmethod(lambda: None)  # type: ignore[method-assign]
    for label, *case in json.loads(sys.argv[3]):
        out = Path(sys.argv[2]) / label
        out.with_suffix(".json").write_text(json.dumps(meet(sys.argv[1], out, *case)))
