"""Prompts for reinforcement learning, and runs over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_hybrid.config.rl import RlConfig

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "letters": {"kind": "regex", "pattern": "[a-z]"},
    "digits": {"kind": "regex"},
    "own": {"kind": "helpers.verifiers:Faulty"},
}


def write_questions(path: Path) -> Path:
    """Prompts of unequal lengths; one cannot be judged."""
    rows: list[dict[str, Any]] = [
        {"prompt": "ab " * n + "cde", "environment": "letters"} for n in range(6)
    ]
    rows += [
        {
            "prompt": [{"role": "user", "content": "fg" * n}],
            "environment": "digits",
            "pattern": "[0-9]",
        }
        for n in range(1, 4)
    ]
    rows.append({"prompt": "q", "environment": "own", "answer": "", "fault": "fail"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(base: Path, questions: Path, run_dir: Path, **changes: Any) -> RlConfig:
    """A run of 3 steps of 5 prompts x 4 answers; ``changes`` by dotted keys with __ for dots."""
    config = RlConfig(run_dir=str(run_dir), environments=ENVIRONMENTS)
    given: dict[str, Any] = {
        "model__from_hf": str(base),
        "data__path": str(questions),
        "data__sequence_length": 64,
        "train__max_steps": 3,
        "train__global_batch_size": 20,
        "train__micro_batch_size": 2,
        "train__lr": 1e-3,
        "train__eps": 1e-4,
        "train__warmup_steps": 0,
        "train__eval_sequences": 0,
        "rollout__samples": 4,
        "rollout__response_tokens": 8,
        "rollout__slots": 16,
        "precision__recipe": "fp32",
        "checkpoint__every": 0,
    }
    for name, value in (given | changes).items():
        *section, key = name.split("__")
        owner = getattr(config, section[0]) if section else config
        assert hasattr(owner, key), name
        setattr(owner, key, value)
    return config
