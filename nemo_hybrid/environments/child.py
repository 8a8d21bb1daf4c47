"""The process in which environments score: lines of JSON in, lines of JSON out (see `pool`).

What a verifier prints goes elsewhere, what it raises is an answer, and a copy of the process that
it leaves behind ends before it reads a request.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nemo_hybrid.environments import Environment, Score, make
from nemo_hybrid.errors import UserError

Answer = dict[str, Any]


def main(answers: int) -> None:
    """Answer on the open file of this number. The first line names the environments."""
    own = os.getpid()
    with os.fdopen(answers, "w") as out, suppress(BrokenPipeError):
        environments: dict[str, Environment] = {}
        for line in sys.stdin:
            request = json.loads(line)
            if "environments" in request:
                answer = _made(request["environments"], environments)
            else:
                answer = _scored(environments[request["environment"]], request)
            if os.getpid() != own:
                os._exit(0)
            print(json.dumps({"number": request["number"], **answer}), file=out, flush=True)


def _made(named: Mapping[str, Mapping[str, Any]], into: dict[str, Environment]) -> Answer:
    try:
        into |= {name: make(name, options) for name, options in named.items()}
    except UserError as error:
        return {"error": str(error)}
    return {"fields": {name: list(getattr(e, "fields", ())) for name, e in into.items()}}


def _scored(environment: Environment, request: Mapping[str, Any]) -> Answer:
    try:
        found = environment.score(request["row"], request["text"], request["ended"])
        score = found if isinstance(found, Score) else Score(float(found))
        reward = float(score.reward)
        parts = {str(name): float(value) for name, value in score.parts.items()}
        extracted = None if score.extracted is None else str(score.extracted)
    except BaseException as error:  # timeouts of some libraries are no Exception
        return {"error": f"{type(error).__name__}: {error}"}
    if not all(map(math.isfinite, (reward, *parts.values()))):
        return {"error": f"the reward {reward} or a part of it is not finite"}
    return {"reward": reward, "parts": parts, "extracted": extracted}
