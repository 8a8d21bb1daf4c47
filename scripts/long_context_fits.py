#!/usr/bin/env python3
"""Print what fits: the table of docs/long_context.md, by the formulas of `plan`.

    python scripts/long_context_fits.py [--model NAME] [--tokens N]    # all of it: a minute

For each model, length and memory of a device the smallest parallel.cp of each choice of what is
recomputed, and in brackets the GB that it needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from nemo_hybrid.commands.fit import CHOICES, fitting
from nemo_hybrid.commands.plan import PlanOptions
from nemo_hybrid.config.read import load_config

MODELS = Path(__file__).parents[1] / "configs" / "model"
LAYOUTS = {"nano": (64, 8), "super": (128, 64), "ultra": (512, 128)}
"""Devices and expert parallelism."""
TOKENS = tuple(1 << n for n in range(17, 21))
GB = (80.0, 141.0, 192.0)


def lines(model: str | None = None, tokens: int | None = None) -> Iterator[str]:
    """The rows of the table; of one model and length alone, where these are given."""
    for name, (devices, ep) in LAYOUTS.items():
        for length in TOKENS:
            if model in (None, name) and tokens in (None, length):
                of = f"{name.capitalize()} {devices}, {ep}" if length == TOKENS[0] else ""
                cells = (cell(name, devices, ep, length, memory) for memory in GB)
                yield f"| {of} | {length:,} | {' | '.join(cells)} |"


def cell(name: str, devices: int, ep: int, length: int, memory: float) -> str:
    words = f"--model {MODELS / name}.yaml --parallel.ep {ep} --data.path none"
    words += f" --data.sequence_length {length} --train.micro_batch_size 1"
    config = load_config([], [*words.split(), "--train.global_batch_size", str(devices)])
    options = PlanOptions(processes=devices, device="h200", memory_gb=memory)
    found = fitting(config, options, config.model.hybrid())
    sizes = map(found.get, CHOICES)
    told = [f"{size[0]} ({size[1].needed / 1e9:.0f})" if size else "-" for size in sizes]
    return ", ".join(told) if found else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=LAYOUTS)
    parser.add_argument("--tokens", type=int, choices=TOKENS)
    words = parser.parse_args()
    for line in lines(words.model, words.tokens):
        print(line, flush=True)


if __name__ == "__main__":
    main()
