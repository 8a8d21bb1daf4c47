"""Runs whose batches grow, against runs of one size: the same sequences, the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.commands import Commands
from helpers.runs import tiny_run
from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.data.loader import Share
from nemo_hybrid.train.metrics import StepMetrics, read_metrics

LENGTH = 32
WARMUP = {8.0 * LENGTH: 4, 13.0 * LENGTH: 8}
"""4, 4, 8, and then 16 sequences: the second stage ends with the batch that reaches its tokens."""
SIZES = [4, 4, 8, 16, 16]


def test_batches_follow_each_other_without_gap() -> None:
    sizes = BatchSizes.of(16, WARMUP, LENGTH)
    assert sizes == BatchSizes(16, ((2, 4), (1, 8)))
    batches = [sizes.sequences(number) for number in range(6)]
    assert [n for batch in batches for n in batch] == list(range(64))
    assert [len(batch) for batch in batches] == [*SIZES, 16]
    read = 0
    for number, batch in enumerate(batches):
        assert sizes.holding(read * LENGTH, LENGTH) == number
        assert sizes.holding(read * LENGTH + 1, LENGTH) == number + 1
        read += len(batch)
    assert sizes.split(1) == [(1, 4)]
    assert sizes.split(5) == [(2, 4), (1, 8), (2, 16)]
    # A stage that the one before it has outrun is none.
    assert BatchSizes.of(16, {1.0: 4, 100.0: 8}, LENGTH) == BatchSizes(16, ((1, 4),))
    assert BatchSizes.of(16, {}, LENGTH) == BatchSizes(16)


def test_processes_share_every_batch() -> None:
    sizes = BatchSizes.of(16, WARMUP, LENGTH)
    for number in range(5):
        shares = [Share(rank, 2, sizes, 2).samples(number) for rank in range(2)]
        assert {len(share) for share in shares} == {SIZES[number] // 4}
        both = sorted(n for share in shares for samples in share for n in samples)
        assert both == list(sizes.sequences(number))


@pytest.fixture(scope="module")
def run_file(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 48 sequences, with the balance loss strong enough to be seen."""
    config = tiny_run(
        store,
        recipe="bf16",
        train={
            "max_steps": 5,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "batch_warmup": WARMUP,
            "aux_loss_weight": 0.1,
            "eval_sequences": 0,
        },
    )
    config.checkpoint = replace(config.checkpoint, every=1, keep=0, asynchronous=False)
    path = tmp_path_factory.mktemp("warmup") / "run.yaml"
    path.write_text(dump_config(config))
    return path


@pytest.fixture(scope="module")
def grown(commands: Commands, run_file: Path) -> Path:
    run_dir = run_file.parent / "grown"
    said = commands("pretrain", "--config", run_file, "--run_dir", run_dir)
    assert said.status == 0, said.err
    assert "up to step 2 only 4 sequences\nup to step 3 only 8 sequences\n" in said.out
    return run_dir


def metrics(run_dir: Path) -> list[StepMetrics]:
    return list(read_metrics(run_dir / "metrics.jsonl"))


def state(run_dir: Path, step: int) -> dict[str, bytes]:
    """Weights, masters and moments of a checkpoint."""
    checkpoint = run_dir / f"checkpoints/step_{step:08d}"
    return {p.name: p.read_bytes() for p in checkpoint.glob("*.safetensors")}


def test_steps_count_the_sequences_of_their_batch(grown: Path) -> None:
    rows = metrics(grown)
    assert [row.tokens for row in rows] == [LENGTH * size for size in SIZES]
    assert [row.tokens_total for row in rows] == [LENGTH * sum(SIZES[:n]) for n in range(1, 6)]


def test_small_steps_are_those_of_a_run_of_small_batches(
    commands: Commands, run_file: Path, grown: Path, tmp_path: Path
) -> None:
    """Byte by byte, the balance loss included; DeepSpeed accumulates as many micro-batches in the
    one run and at most as many in the other."""
    words = ("--train.batch_warmup", "{}", "--train.max_steps", "3")
    for name, size in (("small", "4"), ("other", "8")):
        run = ("--run_dir", tmp_path / name, "--train.global_batch_size", size)
        assert commands("pretrain", "--config", run_file, *run, *words).status == 0
    for step in (1, 2):
        assert state(grown, step) == state(tmp_path / "small", step)
        assert state(grown, step) != state(tmp_path / "other", step)
    assert state(grown, 3) != state(tmp_path / "small", 3)


def test_the_samples_are_those_of_full_batches_in_their_order(
    commands: Commands, run_file: Path, grown: Path, tmp_path: Path
) -> None:
    words = ("--train.batch_warmup", "{}", "--train.max_steps", "3", "--run_dir", tmp_path / "full")
    assert commands("pretrain", "--config", run_file, *words).status == 0
    ours, full = metrics(grown), metrics(tmp_path / "full")
    together = sum(int(row.sample_hash, 16) for row in ours[:3]) % 2**64
    assert together == int(full[0].sample_hash, 16)
    assert [row.sample_hash for row in ours[3:]] == [row.sample_hash for row in full[1:]]


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_run_that_goes_on_is_bit_identical(
    commands: Commands, run_file: Path, grown: Path, tmp_path: Path, after: int
) -> None:
    """Stopped inside a stage, at its end, and behind all of them."""
    first = ("--resume", grown / f"checkpoints/step_{after:08d}")
    said = commands("pretrain", "--config", run_file, "--run_dir", tmp_path / "run", *first)
    assert said.status == 0, said.err
    assert state(tmp_path / "run", 5) == state(grown, 5)


def test_other_sizes_are_another_run(commands: Commands, run_file: Path, grown: Path) -> None:
    words = ("--config", run_file, "--train.batch_warmup", "{500: 4}", "--train.max_steps", "6")
    said = commands("pretrain", *words, "--run_dir", grown)
    assert said.status == 2
    assert "train.batch_warmup: {256.0: 4, 416.0: 8} there, {500.0: 4} here" in said.err
    resume = ("--resume", grown / "checkpoints/step_00000002")
    said = commands("pretrain", *words, "--run_dir", grown.parent / "other", *resume)
    assert said.status == 2
    assert "smaller_batches [[2, 4], [1, 8]], this run has [[4, 4]]" in said.err
