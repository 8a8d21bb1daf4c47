"""How full packs are, and what an adapter saves against fine-tuning all weights.

    python scripts/finetune_figures.py [--out FILE] [--steps N] [--models FILE ...] [--rank N]

Packing: samples of log-normal lengths in rows of one length: best fit, samples in their order until
a row is full, one sample per row, and batches padded to their longest sample. Training: steps of
one process on random weights and packs of such samples, everything trained or a LoRA adapter
alone, each in a process of its own: tokens per second of the median step, and the process's peak
resident memory, with and without what it held once everything was imported.

Exit status: 0 done, 1 a process failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.files import replace_file
from nemo_hybrid.terminal import print_table

ROOT = Path(__file__).resolve().parents[1]
MODELS = [ROOT / "configs" / "model" / name for name in ("tiny.yaml", "300m.yaml")]
CAPACITY, SAMPLES, BATCH = 2048, 20_000, 16
"""Tokens of a row, samples that are packed, samples of a padded batch."""
MEDIAN, SIGMA, SHORTEST = 200, 1.0, 8
"""Of the lengths in tokens; SIGMA: of their logarithm."""
WARM_UP = 2


@dataclass(frozen=True)
class Work:
    """One process's measurement."""

    model: str
    rank: int
    """Of the adapter; 0: everything is trained."""
    steps: int
    sequence_length: int = 512
    rows: int = 4
    """Packs of a step, one micro-batch each."""


def lengths(count: int, longest: int, seed: int = 0) -> NDArray[np.int64]:
    """Log-normal numbers of tokens, those outside of [SHORTEST, longest] drawn again."""
    rng = np.random.default_rng(seed)
    found = np.empty(0, np.int64)
    while len(found) < count:
        more = np.exp(rng.normal(np.log(MEDIAN), SIGMA, count)).astype(np.int64)
        found = np.concatenate([found, more[(more >= SHORTEST) & (more <= longest)]])
    return found[:count]


def packing() -> dict[str, Any]:
    """Slots of every way to make rows, and the share of them that holds tokens."""
    from nemo_hybrid.data.packing import best_fit

    sizes = lengths(SAMPLES, CAPACITY)
    began = time.perf_counter()
    packs = len(best_fit(sizes, CAPACITY))
    seconds = time.perf_counter() - began
    in_order, room = 0, 0
    for size in sizes.tolist():
        if size > room:
            in_order, room = in_order + 1, CAPACITY
        room -= size
    padded = [sizes[i : i + BATCH] for i in range(0, SAMPLES, BATCH)]
    slots = {
        "best fit": packs * CAPACITY,
        "in their order, until a row is full": in_order * CAPACITY,
        f"batches of {BATCH}, padded to the longest": sum(int(b.max()) * len(b) for b in padded),
        "one sample per row": SAMPLES * CAPACITY,
    }
    tokens = int(sizes.sum())
    return {
        "samples": SAMPLES,
        "tokens": tokens,
        "capacity": CAPACITY,
        "lengths": {"median": MEDIAN, "sigma": SIGMA, "shortest": SHORTEST},
        "slots": slots,
        "efficiency": {name: tokens / count for name, count in slots.items()},
        "best_fit_seconds": seconds,
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(work: Work) -> dict[str, Any]:
    """Steps of one process; call it in a fresh one."""
    import torch

    from nemo_hybrid.checkpoint.steps import model_shape
    from nemo_hybrid.config.finetune import FinetuneConfig
    from nemo_hybrid.config.read import load_config
    from nemo_hybrid.data.store import StoreWriter
    from nemo_hybrid.model.hybrid import HybridLM
    from nemo_hybrid.parallel.world import World
    from nemo_hybrid.recipes.adapt import Adapt
    from nemo_hybrid.recipes.finetune import Finetune
    from nemo_hybrid.train.build import build_run
    from nemo_hybrid.train.step import train_step

    class RandomWeights:
        """In the place of those that a checkpoint would hold."""

        def _load(self, model: HybridLM, world: World) -> dict[str, torch.Tensor]:
            return {}

    class Tuned(RandomWeights, Finetune):
        pass

    class Adapted(RandomWeights, Adapt):
        pass

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    given = {
        "lora.rank": work.rank,
        "data.sequence_length": work.sequence_length,
        "train.global_batch_size": work.rows,
        "precision.recipe": "fp32",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = load_config([], ["--model", work.model, *words], FinetuneConfig)
    shape = model_shape(config.model)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "tokenizer.json"):
            (Path(folder) / name).touch()
        writer = StoreWriter(
            Path(folder) / "train",
            vocab_size=shape.vocab_size,
            eos_id=shape.eos_token_id,
            tokenizer_sha256=hashlib.sha256(b"").hexdigest(),
        )
        for size in lengths(50 * work.rows, work.sequence_length).tolist():
            # The second half of a sample is its answer.
            learnt = np.arange(size) >= size // 2
            writer.add(rng.integers(3, shape.vocab_size, size), learnt)
        writer.finish(sources={})
        config.data.path, config.train.eval_sequences = folder, 0
        recipe, world = (Adapted if work.rank else Tuned)(config), World.start()
        config.model.from_hf = folder  # only now: it gives no shape
        imported = peak_mib()
        run = build_run(recipe, world, recipe.open_data(world, None))
        seconds = []
        for step in range(WARM_UP + work.steps):
            batches = run.data.step(step, run.share)
            began = time.perf_counter()
            train_step(run, batches, config.train.lr)  # ends with numbers on the host
            if step >= WARM_UP:
                seconds.append(time.perf_counter() - began)
        World.stop()
    trained = [p.numel() for p in run.model.parameters() if p.requires_grad]
    return {
        **asdict(work),
        "model": Path(work.model).name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "trained": sum(trained),
        "seconds": seconds,
        "tokens_per_s": work.rows * work.sequence_length / statistics.median(seconds),
        "peak_mib": peak_mib(),
        "peak_mib_over_imports": peak_mib() - imported,
    }


def in_child(work: Work, threads: int) -> dict[str, Any]:
    """Measure in a fresh process. Raises ChildProcessError if it fails."""
    words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(asdict(work))]
    done = subprocess.run(
        words, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if done.returncode:
        raise ChildProcessError(f"the process for {work} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(result: dict[str, Any]) -> None:
    packed = result["packing"]
    about = f"{packed['samples']:,} samples of {packed['tokens']:,} tokens, rows of {CAPACITY}"
    rows = [
        (name, f"{slots:,}", f"{packed['efficiency'][name]:.1%}")
        for name, slots in packed["slots"].items()
    ]
    print_table(("rows", "slots", "tokens over slots"), rows, about, right=("slots",))
    head = ("model", "trained", "parameters", "tokens/s", "peak MiB", "over imports")
    cells = [
        (
            f"{row['model']}, {row['parameters'] - (row['trained'] if row['rank'] else 0):,}",
            f"adapter of rank {row['rank']}" if row["rank"] else "everything",
            f"{row['trained']:,}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['peak_mib_over_imports']:.0f}",
        )
        for row in result["training"]
    ]
    where = result["environment"]
    title = f"{where['cpu']}, {result['threads']} threads, torch {where['torch']}, fp32"
    print_table(head, cells, title, right=head[2:])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--models", type=Path, nargs="*", default=MODELS, help="model YAML files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.child:
        print(json.dumps(train(Work(**json.loads(given.child)))))
        return 0
    if given.steps < 1 or given.rank < 1 or given.threads < 1:
        parser.error("--steps, --rank and --threads must be positive")
    result: dict[str, Any] = {
        "environment": environment(),
        "threads": given.threads,
        "training": [],
    }
    try:
        for model in given.models:
            for rank in (0, given.rank):
                work = Work(str(model.resolve()), rank, given.steps)
                result["training"].append(in_child(work, given.threads))
    except ChildProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Not before: processes inherit the peak memory of the one that starts them.
    result["packing"] = packing()
    show(result)
    if given.out:
        replace_file(given.out, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
