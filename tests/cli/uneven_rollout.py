"""`rollout` by processes that fare differently: ``python uneven_rollout.py HOW WORDS``.

HOW "full": files of process 1 can hold no more than its first lines. HOW "late": after its own
samples process 0 would wait for nobody, but where it waits for samples of process 1.
"""

from __future__ import annotations

import os
import resource
import sys
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

from nemo_hybrid import cli
from nemo_hybrid.commands import rollout
from nemo_hybrid.parallel.world import TIMEOUT

FULL = 1000
"""Bytes."""
REAL_WRITE, REAL_FINISH = rollout._write, rollout.Work.finish


def patience(of: timedelta) -> None:
    distributed_c10d._set_pg_timeout(of, distributed_c10d._get_default_group())


def impatient(*words: Any, **more: Any) -> int:
    tokens = REAL_WRITE(*words, **more)
    patience(timedelta(milliseconds=1))
    return tokens


def patient(*words: Any) -> None:
    patience(TIMEOUT)
    REAL_FINISH(*words)


if __name__ == "__main__":
    how, *words = sys.argv[1:]
    first = os.environ["RANK"] == "0"
    if how == "full" and not first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))
    if how == "late" and first:
        rollout._write, rollout.Work.finish = impatient, patient  # type: ignore[method-assign]
    sys.exit(cli.main(words))
