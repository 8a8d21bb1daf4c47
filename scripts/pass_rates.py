#!/usr/bin/env python3
"""Give prompts the share of their answers that are right, for the curriculum of `rl`.

    nemo-hybrid rollout --from DIR --data prompts.jsonl --samples 16 --out rollouts.jsonl
    python scripts/pass_rates.py --config rl.yaml prompts.jsonl rollouts.jsonl rated.jsonl

rated.jsonl has the rows of prompts.jsonl (JSON lines) with a field pass_rate: the mean reward of
their answers, which the environments of the configuration judge, within 0 and 1. Rows of which no
answer could be judged have none.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.data.prompts import Prompt
from nemo_hybrid.environments import Score
from nemo_hybrid.environments.pool import Job, Pool


def rated(
    rows: list[dict[str, Any]], rollouts: list[dict[str, Any]], config: RlConfig
) -> list[dict[str, Any]]:
    """Rows of prompts with their pass rates; rollouts name a prompt by its id or its place."""
    names = {row.get("id", place): place for place, row in enumerate(rows)}
    places = [names[rollout["prompt"]] for rollout in rollouts]
    only = next(iter(config.environments)) if len(config.environments) == 1 else None
    jobs = []
    for place, rollout in zip(places, rollouts, strict=True):
        row = rows[place]
        environment = Prompt(place, [], row=row).environment or only
        jobs.append(Job(str(environment), row, rollout["text"] or "", rollout["ended"]))
    rewards: dict[int, list[float]] = defaultdict(list)
    with Pool(config.environments, config.rl.verifiers, config.rl.deadline_s) as pool:
        for place, score in zip(places, pool.score(jobs), strict=True):
            if isinstance(score, Score):
                rewards[place].append(min(1.0, max(0.0, score.reward)))
    rates = {place: sum(found) / len(found) for place, found in rewards.items()}
    return [
        {**row, **({"pass_rate": rates[place]} if place in rates else {})}
        for place, row in enumerate(rows)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--config", type=Path, required=True)
    for name in ("prompts", "rollouts", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    config = load_config([options.config], kind=RlConfig)
    rows = rated(read(options.prompts), read(options.rollouts), config)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = [row["pass_rate"] for row in rows if "pass_rate" in row]
    print(
        f"{options.out}: {len(rows)} prompts, {known.count(1)} solved always, {known.count(0)} "
        f"never, {len(rows) - len(known)} without a rate"
    )


if __name__ == "__main__":
    main()
