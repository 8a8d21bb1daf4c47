#!/usr/bin/env python3
"""Does a long-context phase make a model find what it read 16,384 tokens before?

A tiny model learns, in rows of 16 to 512 tokens, to answer questions about keys whose values lie in
random filler. Rows have sections, each with a name at its beginning, and every key has a value in
each; a question names section and key. So attention finds the key, but which section a value is of
only the state of the Mamba-2 layer can tell, which has to keep the name until the next one: a model
that has kept it for some hundred tokens need not keep it for thousands.

Then the model goes on (continue_from) with rows of 16,384 tokens that alternate with rows of 512
(data.short), divided over processes (parallel.cp); and, as a control, with rows of 512 alone that
hold as many tokens.

Then every model answers questions, rows being divided over as many processes, and prints accuracy
by length, by distance, and with the border between processes closed: each process then reads its
part without any exchange, so that neither states nor convolutions' inputs nor keys and values of
the first part reach the questions, which stand at the end of the last one. Random answers are right
once in 32 times, and one of the key's values once in 4.

OUT/figures.json has every figure. Status 1 where what is asked of them does not hold.
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
from nemo_hybrid.checkpoint.load import load
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
from nemo_hybrid.files import replace_file
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.context import SequenceShards
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.metrics import METRICS_FILE, read_metrics
from nemo_hybrid.train.run import Run
from nemo_kernels.documents import Shard, divided

VALUES, KEYS, SECTIONS, FILLER = 32, 16, 4, 32
"""Tokens of each kind; their ids follow one another."""
ASKED = 8
"""Keys of a row that is measured, and questions at its end."""
MODEL = {
    "pattern": "M*E",
    "vocab_size": VALUES + KEYS + SECTIONS + FILLER,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "mtp_num_depths": 0,
    "eos_token_id": 0,
    "initializer_range": 0.03,
    "chunk_size": 16,
}


class Stage(NamedTuple):
    """Steps on rows of one length, with so many keys and sections."""

    length: int
    rows: int
    steps: int
    keys: int = ASKED
    sections: int = SECTIONS


class Sizes(NamedTuple):
    """What is trained and measured."""

    learning: tuple[Stage, ...]
    """In which a model begins to look for what it is asked, instead of guessing among the values of
    the row, then of the key: rows with little filler, of one section first, then of two. From
    longer rows it learns that later or never. When it does depends on the weights that it begins
    with and on roundings: where it has not, weights of another seed are taken."""
    growing: tuple[Stage, ...]
    long: Stage
    short: int
    """Tokens of the rows that the model learnt with, and that alternate with long ones."""
    lengths: tuple[int, ...]
    questions: int


LEARNT, TRIES = 0.3, 5
"""Loss below which a model has learnt to look (a guess between two sections costs 0.69), and seeds
of weights that are tried."""
LEARNING = (Stage(16, 128, 400, 2, 1), Stage(32, 96, 1000, 3, 2))
GROWING = (Stage(64, 48, 100, 8, 2), Stage(128, 32, 150))
WHOLE = Sizes(
    learning=LEARNING,
    growing=(*GROWING, Stage(256, 24, 100), Stage(512, 16, 100)),
    long=Stage(16_384, 1, 96, KEYS),
    short=512,
    lengths=(512, 4096, 16_384),
    questions=256,
)
QUICK = Sizes(
    learning=LEARNING,
    growing=GROWING,
    long=Stage(512, 1, 8, KEYS),
    short=128,
    lengths=(128, 512),
    questions=64,
)


# ---- rows ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    ids_S: np.ndarray
    asked_S: np.ndarray
    """Where the answers are."""
    distance_S: np.ndarray
    """There: tokens since the key was met in its section."""


def make_row(
    sample: int, length: int, seed: int, keys: int = ASKED, sections: int = SECTIONS
) -> Row:
    """Sections (N) at random places of the filler: a name, then all keys (K), each followed by its
    value. Then, for every key, the name of one of the sections, the key, and its value there, the
    answer."""
    draw = np.random.default_rng((seed, length, sample))
    body = length - 3 * keys
    names_N = VALUES + KEYS + draw.permutation(sections)
    keys_K = VALUES + draw.choice(KEYS, keys, replace=False)
    values_NK = draw.integers(0, VALUES, (sections, keys))
    places = 2 * np.sort(draw.choice(body // 2, sections * (1 + keys), replace=False))
    starts_N1, places_NK = np.split(places.reshape(sections, 1 + keys), [1], axis=1)
    places_NK = draw.permuted(places_NK, axis=1)
    ids_S = draw.integers(VALUES + KEYS + SECTIONS, MODEL["vocab_size"], length)
    ids_S[starts_N1[:, 0]] = names_N
    ids_S[places_NK], ids_S[places_NK + 1] = keys_K, values_NK
    asked = n_K, k_K = draw.integers(sections, size=keys), draw.permutation(keys)
    ids_S[body:] = np.stack([names_N[n_K], keys_K[k_K], values_NK[asked]], 1).flatten()
    asked_S, distance_S = np.zeros(length, bool), np.zeros(length, int)
    asked_S[body + 2 :: 3] = True
    distance_S[body + 2 :: 3] = np.arange(body + 1, length, 3) - places_NK[asked]
    return Row(ids_S, asked_S, distance_S)


class Needles:
    """Rows by number, as training and data.short read them; ``path``: see `path_of`."""

    tokens = 0
    tokenizer_dir = Path()
    tokenizer_sha256 = ""
    weights = (1.0,)
    later_weights = None

    def __init__(self, path: str) -> None:
        self.digests = [Path(path).name]
        _, keys, sections = self.digests[0].split("_")
        self.keys, self.sections = int(keys), int(sections)

    @staticmethod
    def path_of(keys: int = ASKED, sections: int = SECTIONS) -> str:
        return f"needles_{keys}_{sections}"

    def rows(self, samples: Sequence[int], sequence_length: int, seed: int) -> Batch:
        made = [make_row(n, sequence_length, seed, self.keys, self.sections) for n in samples]
        packs = [[(row.ids_S, row.asked_S)] for row in made]
        return Batch.from_packs(packs, sequence_length, 0, tuple(samples))


class Searching(Pretrain):
    """Pre-training that reads needles."""

    def _open_rows(self, world: World) -> Any:
        data = self.config.data
        if data.short.path:
            self.short = Needles(data.short.path)  # type: ignore[assignment]
        assert data.path
        return Needles(data.path)

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
        right_Q = self.right_Q[(self.distance_Q > near) & (self.distance_Q <= far)]
        return float(right_Q.mean()) if len(right_Q) else float("nan")


class Part(NamedTuple):
    """Which of how many parts of every row a process has."""

    number: int
    parts: int

    def sizes(self, length: int) -> list[int]:
        return divided(length, self.parts)


@torch.no_grad()
def answers(
    model: Any, length: int, questions: int, seed: int, part: Part, closed: bool = False
) -> Answers:
    """Of the process that has the last part of every row, and with it the questions; none of the
    others. All processes call it.

    ``closed``: each takes its part for a row of its own, and nothing is exchanged.
    """
    found, sizes = [np.empty((2, 0), int)], part.sizes(length)
    low = sum(sizes[: part.number])
    tokens = slice(low, low + sizes[part.number])
    for sample in range(-(-questions // ASKED)):
        row = make_row(sample, length, seed)
        batch = Batch.from_packs([[(row.ids_S, row.asked_S)]], length, 0)
        shard = None
        if part.parts > 1 and not closed:
            reach = model.config.conv_kernel - 1
            shard = Shard.cut(batch.documents, sizes, part.number, reach)
        ids_T = batch.ids_BS[0, tokens]
        h_BTD, _ = model.forward_hidden(ids_T[None], shard)
        asked_Q = row.asked_S[tokens].nonzero()[0]
        right_Q = model.lm_head(h_BTD[0, asked_Q - 1]).argmax(-1) == ids_T[asked_Q]
        found.append(np.stack([row.distance_S[tokens][asked_Q], right_Q.numpy()]))
    distance_Q, right_Q = np.concatenate(found, 1)
    return Answers(distance_Q, right_Q.astype(bool))


def measure(model: Any, sizes: Sizes, seed: int, part: Part) -> dict[str, Any]:
    """Accuracies by length, and of the long rows by distance and with the borders closed; of what
    the last part's process answers. All processes call it."""
    long, last = sizes.long.length, part.sizes(sizes.long.length)[-1]
    by_length = {n: answers(model, n, sizes.questions, seed, part) for n in sizes.lengths}
    closed = answers(model, long, sizes.questions, seed, part, closed=True)
    quarters = {
        f"{q}/4 to {q + 1}/4": by_length[long].accuracy(q * long / 4, (q + 1) * long / 4)
        for q in range(4)
    }
    return {
        "questions": {str(n): len(found.right_Q) for n, found in by_length.items()},
        "by_length": {str(n): found.accuracy() for n, found in by_length.items()},
        "by_distance": quarters,
        "closed, beyond the border": closed.accuracy(near=last),
        "closed, before it": closed.accuracy(far=last - 3 * ASKED),
        "open, beyond the border": by_length[long].accuracy(near=last),
    }


# ---- runs ----------------------------------------------------------------------------------------


def configuration(out: Path, stage: Stage, seed: int, from_: Path | None) -> RunConfig:
    return RunConfig(
        run_dir=str(out),
        continue_from=None if from_ is None else str(from_),
        model=ModelOptions(**({} if from_ else MODEL)),
        data=DataOptions(
            path=Needles.path_of(stage.keys, stage.sections), sequence_length=stage.length
        ),
        train=PretrainOptions(
            max_steps=stage.steps,
            seed=seed,
            global_batch_size=stage.rows,
            micro_batch_size=stage.rows,
            lr=2e-3,
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


def in_processes(processes: int, *words: str) -> None:
    """This script with other words."""
    from nemo_hybrid.commands.launch import launch

    status = launch(processes, [sys.executable, str(Path(__file__).absolute()), *words])
    if status:
        raise SystemExit(status)


def run(config: RunConfig, processes: int) -> Path:
    """Train in processes of their own; the run's directory."""
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".yaml")
    file.write_text(dump_config(config))
    in_processes(processes, "--run", str(file))
    return directory


def worker(file: Path) -> None:
    from nemo_hybrid.train.loop import train

    train(Searching(load_config([file])), os.getppid())


def base_of(out: Path, sizes: Sizes) -> Path:
    """The model that has learnt with short rows; what is there already is not made again."""
    for attempt in range(TRIES):
        last = stages_of(out / f"weights_{attempt}", sizes.learning, 10 * attempt, None)
        if loss_of(last) < LEARNT:
            return stages_of(out / "base", sizes.growing, 100, last)
        print(f"weights of seed {10 * attempt} have not learnt to look: others are taken")
    raise SystemExit(f"none of {TRIES} seeds of weights has learnt to look")


def stages_of(out: Path, stages: Sequence[Stage], seed: int, last: Path | None) -> Path:
    """Runs that go on from one another."""
    for number, stage in enumerate(stages):
        config = configuration(out / str(number), stage, seed + number, last)
        last = run(config, 1)
    assert last is not None
    return last


def loss_of(directory: Path) -> float:
    """Over the last 50 steps of a run."""
    return mean(row.loss for row in read_metrics(directory / METRICS_FILE)[-50:])


def phases(out: Path, sizes: Sizes, base: Path, seed: int, cp: int) -> dict[str, Path]:
    """The runs that went on with the long rows of a seed, and with as many tokens in short rows."""
    long = configuration(out / f"long_{seed}", sizes.long, seed, base)
    short = ShortOptions(sequence_length=sizes.short, path=Needles.path_of())
    long = replace(
        long, data=replace(long.data, short=short), parallel=replace(long.parallel, cp=cp)
    )
    rows = sizes.long.rows * sizes.long.length // sizes.short
    stage = Stage(sizes.short, rows, sizes.long.steps)
    control = configuration(out / f"control_{seed}", stage, seed, base)
    return {"long": run(long, cp), "control": run(control, 1)}


def measured(directory: Path, quick: bool, seed: int, cp: int) -> dict[str, Any]:
    """What is in the directory after processes have measured its model, unless it is already."""
    file = directory / "needles.json"
    if not file.exists():
        words = ["--measure", str(directory), "--seed", str(seed), "--cp", str(cp)]
        in_processes(cp, *words, *["--quick"] * quick)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def measurer(directory: Path, sizes: Sizes, seed: int, cp: int) -> None:
    world = World.start(cp)
    sequence = SequenceShards.of(world)
    model, _ = load(resolve(directory), build=lambda config: HybridLM(config, sequence=sequence))
    found = measure(model, sizes, seed, Part(world.part, cp))
    if world.part == cp - 1:
        replace_file(directory / "needles.json", json.dumps(found, indent=1).encode())
    World.stop()


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


class Bar(NamedTuple):
    name: str
    value: float
    bar: str
    holds: bool


def judged(figures: dict[str, Any], sizes: Sizes) -> list[Bar]:
    """What is asked of the whole run: figure, bar, and whether it holds."""
    length, short = str(sizes.long.length), str(sizes.short)
    seeds = list(figures["seeds"].values())
    after = [f["long"]["by_length"][length] for f in seeds]
    quarters = [accuracy for f in seeds for accuracy in f["long"]["by_distance"].values()]
    control = [f["control"]["by_length"][length] for f in seeds]
    closed = [f["long"]["closed, beyond the border"] for f in seeds]
    kept = [f["long"]["by_length"][short] for f in seeds]
    found = [
        (f"mean at {length}", mean(after), ">=", 0.95),
        (f"worst at {length}", min(after), ">=", 0.90),
        ("worst quarter there", min(quarters), ">=", 0.90),
        ("mean above the control", mean(after) - mean(control), ">=", 0.30),
        ("beyond the closed border", max(closed), "<=", 0.10),
        (f"worst at {short} afterwards", min(kept), ">=", 0.95),
    ]
    return [
        Bar(name, value, f"{sign} {bar}", value >= bar if sign == ">=" else value <= bar)
        for name, value, sign, bar in found
    ]


def verdict(bars: Sequence[Bar]) -> int:
    """Says which bars hold. The status: 1 where one does not."""
    for name, value, bar, holds in bars:
        print(f"{name:28} {value:6.3f} {bar:8} {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if all(bar.holds for bar in bars) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="directory of the runs; they go on there")
    parser.add_argument("--seeds", type=int, default=3, help="of the rows of the long phase")
    parser.add_argument(
        "--cp", type=int, choices=(2, 4), default=2, help="processes over which long rows go"
    )
    parser.add_argument("--quick", action="store_true", help="up to 512 tokens, no bars")
    for hidden in ("--run", "--measure"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(1)
    sizes, began = QUICK if words.quick else WHOLE, time.monotonic()
    if words.run:
        worker(words.run)
        return 0
    if words.measure:
        measurer(words.measure, sizes, words.seed, words.cp)
        return 0
    if not words.out:
        parser.error("--out is missing")
    base = base_of(words.out, sizes)
    figures: dict[str, Any] = {"base": measured(base, words.quick, 1000, words.cp), "seeds": {}}
    for seed in range(words.seeds):
        runs = phases(words.out, sizes, base, 78 + seed, words.cp)
        figures["seeds"][str(seed)] = {
            name: measured(directory, words.quick, 1001 + seed, words.cp)
            for name, directory in runs.items()
        }
    print(*lines(figures, sizes), sep="\n")
    bars = [] if words.quick else judged(figures, sizes)
    status = verdict(bars)
    figures["seeds_of_weights_tried"] = len([*words.out.glob("weights_*")])
    figures["bars"] = [bar._asdict() for bar in bars]
    figures["seconds"] = time.monotonic() - began
    print(f"{figures['seconds']:.0f} s in all")
    replace_file(words.out / "figures.json", json.dumps(figures, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
