#!/usr/bin/env python3
"""Does a long-context phase make a model find what it read 16,384 tokens before?

A tiny model learns, in rows of 32 to 512 tokens, to answer questions about key-value pairs
that lie in random filler. Then it goes on (continue_from) with rows of 16,384 tokens that alternate
with rows of 512 (data.short), over two processes (parallel.cp); and, as a control, with rows of 512
alone that hold as many tokens.
Prints accuracy by length and by distance, and whether what is asked of it holds; OUT/figures.json
has every figure. Random answers are right once in 32 times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.steps import resolve
from nemo_hybrid.config.read import dump_config, load_config
from nemo_hybrid.config.run import (
    DataOptions,
    GuardOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    PretrainOptions,
    RunConfig,
)
from nemo_hybrid.config.short import ShortOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.run import Run

VALUES, KEYS, FILLER = 32, 64, 32
PAIRS = 8
"""Of a row: as many needles, and as many questions at its end."""
MODEL = {
    "pattern": "ME*M*",
    "vocab_size": VALUES + KEYS + FILLER,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "mtp_num_depths": 0,
    "eos_token_id": 0,
    "initializer_range": 0.1,
}


class Stage(NamedTuple):
    """Steps on rows of one length."""

    length: int
    rows: int
    steps: int


class Sizes(NamedTuple):
    """What is trained and measured."""

    stages: tuple[Stage, ...]
    long: Stage
    short: int
    """Tokens of the rows that the model learnt with, and that alternate with long ones."""
    lengths: tuple[int, ...]
    questions: int


WHOLE = Sizes(
    stages=(Stage(32, 64, 300), Stage(64, 48, 200), Stage(192, 24, 200), Stage(512, 16, 300)),
    long=Stage(16_384, 1, 32),
    short=512,
    lengths=(512, 4096, 8192, 16_384, 32_768),
    questions=256,
)
QUICK = Sizes(
    stages=(Stage(32, 64, 100),),
    long=Stage(512, 1, 8),
    short=32,
    lengths=(32, 128, 512),
    questions=64,
)


# ---- rows ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    ids_S: np.ndarray
    asked_S: np.ndarray
    """Where the answers are."""
    distance_S: np.ndarray
    """There: tokens since the key was met."""


def make_row(sample: int, length: int, seed: int) -> Row:
    """Pairs of a key and its value at random places of the filler; then the keys once more, each
    followed by its value, the answer."""
    draw = np.random.default_rng((seed, length, sample))
    body = length - 2 * PAIRS
    ids_S = draw.integers(VALUES + KEYS, VALUES + KEYS + FILLER, length)
    asked_S, distance_S = np.zeros(length, bool), np.zeros(length, int)
    places = 2 * draw.choice(body // 2, PAIRS, replace=False)
    keys, values = VALUES + draw.choice(KEYS, PAIRS, replace=False), draw.integers(0, VALUES, PAIRS)
    for at in (places, body + 2 * draw.permutation(PAIRS)):
        ids_S[at], ids_S[at + 1] = keys, values
        distance_S[at + 1] = at - places
    asked_S[body + 1 :: 2] = True
    return Row(ids_S, asked_S, distance_S)


class Needles:
    """Rows by number, as training and data.short read them."""

    tokens = 0
    tokenizer_dir = Path()
    tokenizer_sha256 = ""
    digests = ("needles",)
    weights = (1.0,)
    later_weights = None

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        made = [make_row(sample, sequence_length, seed) for sample in samples]
        packs = [[(row.ids_S, row.asked_S)] for row in made]
        return Batch.from_packs(packs, sequence_length, 0, tuple(samples))


class Searching(Pretrain):
    """Pre-training that reads needles."""

    def _open_rows(self, world: World) -> Any:
        if self.config.data.short.sequence_length:
            self.short = Needles()  # type: ignore[assignment]
        return Needles()

    def companions(self) -> Companions:
        return Companions()

    def describe(self, run: Run) -> list[str]:
        return []


# ---- accuracy ------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """Of questions: how far back their needles lie, and whether the answer was right."""

    distance_Q: np.ndarray
    right_Q: np.ndarray

    def accuracy(self, near: float = 0, far: float = np.inf) -> float:
        return float(self.right_Q[(self.distance_Q > near) & (self.distance_Q <= far)].mean())


@torch.no_grad()
def answers(model: Any, length: int, questions: int, seed: int, closed: bool = False) -> Answers:
    """``closed``: nothing of a row's first half can be seen from its second half."""
    found: list[np.ndarray] = []
    for sample in range(-(-questions // PAIRS)):
        row = make_row(sample, length, seed)
        parts = np.split(np.arange(length), [length // 2] if closed else [])
        pack = [(row.ids_S[part], row.asked_S[part]) for part in parts]
        batch = Batch.from_packs([pack], length, 0)
        h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.packing)
        asked_S = torch.from_numpy(row.asked_S).nonzero()[:, 0]
        guessed = model.lm_head(h_BSD[0, asked_S - 1]).argmax(-1)
        right = (guessed == batch.ids_BS[0, asked_S]).numpy()
        found.append(np.stack([row.distance_S[row.asked_S], right]))
    distance_Q, right_Q = np.concatenate(found, 1)
    return Answers(distance_Q, right_Q.astype(bool))


def measure(directory: Path, sizes: Sizes, seed: int) -> dict[str, Any]:
    """Accuracies of a checkpoint: by length, and of the long rows by distance and with the border
    closed."""
    from nemo_hybrid.hub import HybridLM

    model, long = HybridLM.from_hf(str(resolve(directory))).eval(), sizes.long.length
    by_length = {n: answers(model, n, sizes.questions, seed) for n in sizes.lengths}
    quarters = {
        f"{q}/4 to {q + 1}/4": by_length[long].accuracy(q * long / 4, (q + 1) * long / 4)
        for q in range(4)
    }
    closed = answers(model, long, sizes.questions, seed, closed=True)
    return {
        "by_length": {str(n): found.accuracy() for n, found in by_length.items()},
        "by_distance": quarters,
        "closed, beyond the border": closed.accuracy(near=long / 2),
        "closed, before it": closed.accuracy(far=long / 2 - 2 * PAIRS),
        "open, beyond the border": by_length[long].accuracy(near=long / 2),
    }


# ---- runs ----------------------------------------------------------------------------------------


def configuration(out: Path, stage: Stage, seed: int, lr: float, from_: Path | None) -> RunConfig:
    return RunConfig(
        run_dir=str(out),
        continue_from=None if from_ is None else str(from_),
        model=ModelOptions(**({} if from_ else MODEL)),
        data=DataOptions(path="needles", sequence_length=stage.length),
        train=PretrainOptions(
            max_steps=stage.steps,
            seed=seed,
            global_batch_size=stage.rows,
            micro_batch_size=stage.rows,
            lr=lr,
            schedule="constant",
            warmup_steps=0 if from_ else 20,
            decay_steps=0,
            weight_decay=0.0,
            beta2=0.98,
            eval_sequences=0,
            log_every=50,
        ),
        parallel=ParallelOptions(),
        precision=PrecisionOptions(recipe="fp32"),
        guard=GuardOptions(spike_band=0.0),  # what learns suddenly spikes
    )


def run(config: RunConfig, processes: int) -> Path:
    """Train in processes of their own; the run's directory."""
    from nemo_hybrid.commands.launch import launch

    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".yaml")
    file.write_text(dump_config(config))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    status = launch(processes, [sys.executable, str(Path(__file__).absolute()), "--run", str(file)])
    if status:
        raise SystemExit(status)
    return directory


def worker(file: Path) -> None:
    from nemo_hybrid.train.loop import train

    torch.set_num_threads(1)
    train(Searching(load_config([file])), os.getppid())


def base_of(out: Path, sizes: Sizes) -> Path:
    """The model that has learnt with short rows; what is there already is not made again."""
    last: Path | None = None
    for number, stage in enumerate(sizes.stages):
        config = configuration(out / f"base_{stage.length}", stage, number, 3e-3, last)
        last = run(config, 1)
    assert last is not None
    return last


def phases(out: Path, sizes: Sizes, base: Path, seed: int, cp: int) -> dict[str, Any]:
    """What the long rows of a seed make of the model, and as many tokens in short rows."""
    found: dict[str, Any] = {}
    long = configuration(out / f"long_{seed}", sizes.long, seed, 1e-3, base)
    short = ShortOptions(sequence_length=sizes.short, path="needles")
    long = replace(
        long, data=replace(long.data, short=short), parallel=replace(long.parallel, cp=cp)
    )
    rows = sizes.long.rows * sizes.long.length // sizes.short
    stage = Stage(sizes.short, rows, sizes.long.steps)
    control = configuration(out / f"control_{seed}", stage, seed, 1e-3, base)
    for name, config, processes in (("long", long, cp), ("control", control, 1)):
        began = time.monotonic()
        directory = run(config, processes)
        found[name] = {"seconds": time.monotonic() - began}
        found[name] |= measure(directory, sizes, 1000 + seed)
    return found


def lines(figures: dict[str, Any], sizes: Sizes) -> Iterator[str]:
    """Tables, and what was asked."""
    lengths = [str(n) for n in sizes.lengths]
    seeds, named = figures["seeds"].items(), {"base": figures["base"]}
    for kind in ("long", "control"):
        named |= {f"{kind} {seed}": found[kind] for seed, found in seeds}
    yield f"accuracy by length, {sizes.questions} questions each"
    yield " " * 12 + "".join(f"{n:>9}" for n in lengths)
    for name, found in named.items():
        yield f"{name:12}" + "".join(f"{found['by_length'][n]:9.3f}" for n in lengths)
    yield f"accuracy in rows of {sizes.long.length} by distance, in quarters of the row"
    for name, found in named.items():
        yield f"{name:12}" + "".join(f"{a:9.3f}" for a in found["by_distance"].values())
    yield "needles in the other half of the row, before and after the border between them is closed"
    for name, found in named.items():
        pair = (found["open, beyond the border"], found["closed, beyond the border"])
        yield f"{name:12}" + "".join(f"{a:9.3f}" for a in pair)


def judged(figures: dict[str, Any], sizes: Sizes) -> list[tuple[str, float, str, bool]]:
    """What is asked of the whole run: figure, bar, and whether it holds."""
    length, short = str(sizes.long.length), str(sizes.short)
    seeds = list(figures["seeds"].values())
    after = [f["long"]["by_length"][length] for f in seeds]
    control = [f["control"]["by_length"][length] for f in seeds]
    closed = [f["long"]["closed, beyond the border"] for f in seeds]
    kept = [f["long"]["by_length"][short] for f in seeds]
    found = [
        (f"mean at {length}", mean(after), ">=", 0.95),
        (f"worst at {length}", min(after), ">=", 0.90),
        ("mean above the control", mean(after) - mean(control), ">=", 0.30),
        ("beyond the closed border", max(closed), "<=", 0.10),
        (f"worst at {short} afterwards", min(kept), ">=", 0.95),
    ]
    return [
        (name, value, f"{sign} {bar}", value >= bar if sign == ">=" else value <= bar)
        for name, value, sign, bar in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="directory of the runs; they go on there")
    parser.add_argument("--seeds", type=int, default=3, help="of the rows of the long phase")
    parser.add_argument("--cp", type=int, default=2, help="processes over which long rows go")
    parser.add_argument("--quick", action="store_true", help="up to 512 tokens: shows that it runs")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.run:
        worker(words.run)
        return
    if not words.out:
        parser.error("--out is missing")
    torch.set_num_threads(1)
    sizes, began = QUICK if words.quick else WHOLE, time.monotonic()
    base = base_of(words.out, sizes)
    figures: dict[str, Any] = {"base": measure(base, sizes, 1000), "seeds": {}}
    figures["base"]["seconds"] = time.monotonic() - began
    for seed in range(words.seeds):
        figures["seeds"][str(seed)] = phases(words.out, sizes, base, 78 + seed, words.cp)
    print(*lines(figures, sizes), sep="\n")
    if not words.quick:  # after which nothing is learnt yet
        for name, value, bar, holds in judged(figures, sizes):
            print(f"{name:28} {value:6.3f} {bar:8} {'holds' if holds else 'DOES NOT HOLD'}")
    print(f"{time.monotonic() - began:.0f} s in all")
    (words.out / "figures.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
