"""The objective of docs/extending.md with rows over all processes: ``python divided_words.py STORE
OUT [without_cut]``. Prints the losses of two steps as JSON, or what is wrong."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.pages import code_of
from helpers.runs import tiny_run
from nemo_hybrid.errors import UserError
from nemo_hybrid.train.loop import train
from nemo_hybrid.train.metrics import read_metrics


def main(store: Path, out: Path, *words: str) -> None:
    torch.set_num_threads(1)
    page = code_of("A new objective", "A new kind of run")
    if words:
        del page["Entropy"].cut
    config = tiny_run(store, train={"max_steps": 2}, cp=int(os.environ.get("WORLD_SIZE", 1)))
    try:
        train(page["SelfTrain"](replace(config, run_dir=str(out))), os.getppid())
    except UserError as error:
        print(error)
    else:
        print(json.dumps([row.loss_parts for row in read_metrics(out / "metrics.jsonl")]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
