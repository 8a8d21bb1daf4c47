"""Files of records, and the samples that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.making import Summary
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.data.store import Store

Sample = tuple[list[int], list[bool]]
"""Ids, and which of them are learnt."""


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def lines(path: Path, *records: object) -> Path:
    """A jsonl file; texts are lines as they are."""
    written = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(written) + "\n")
    return path


def make(
    model: Path, out: Path, *paths: Path, heldout_paths: tuple[Path, ...] = (), **options: Any
) -> Summary:
    how = {k: options.pop(k) for k in ("reuse", "vocab_size") if k in options}
    chosen = SampleOptions(**{"heldout": 0.0, **options})
    return prepare_samples(
        chosen, paths, model, out, heldout_paths=heldout_paths, seed=0, progress=False, **how
    )


def stored(out: Path, split: str = "train") -> list[Sample]:
    store = Store.open(out / split, samples=True)
    found = [store.sample(i) for i in range(len(store.lengths))]
    assert [len(ids) for ids, _ in found] == store.lengths.tolist()
    return [(ids.tolist(), targets.tolist()) for ids, targets in found]
