"""A run's curves in a service, beside TensorBoard: Weights & Biases or trackio, whose functions
have the same names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from nemo_hybrid.checkpoint.manifest import to_json
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json, replace_file

log = logging.getLogger(__name__)

PROJECT = "nemo_hybrid"
NAME_FILE = "tracker.json"


def check(track: str) -> None:
    """Raise UserError for a service whose library is not installed."""
    if track != "none" and find_spec(track) is None:
        raise UserError(f"track is {track}, which is not installed: pip install {track}")


class Tracker:
    """A run in the service ``track``, "none" for nowhere; on rank 0 alone.

    The run has the name that stands in RUN_DIR/tracker.json, so that a resumed one goes on in the
    same curves. What library, network or service do wrong is one warning, after which the run goes
    on without them.
    """

    def __init__(self, track: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._track = track
        self._library: Any = None
        if track != "none":
            self._attempt(lambda: self._begin(run_dir, settings))

    def log(self, curves: Mapping[int, Mapping[str, float]]) -> None:
        """Add points: values by name, by step."""
        for step, values in curves.items():
            if self._library:
                self._attempt(partial(self._library.log, values, step=step))

    def close(self) -> None:
        if self._library:
            self._attempt(self._library.finish)

    def _begin(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._library = import_module(self._track)
        path = run_dir / NAME_FILE
        if not path.exists():
            replace_file(path, to_json({"name": f"{run_dir.resolve().name}-{uuid4().hex[:8]}"}))
        name = read_json(path)["name"]
        own = {"id": name, "dir": str(run_dir)} if self._track == "wandb" else {}
        self._library.init(project=PROJECT, name=name, config=dict(settings), resume="allow", **own)

    def _attempt(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: curves are no reason to lose a run
            self._library = None
            log.warning("%s failed (%s): the run goes on without it", self._track, error)
