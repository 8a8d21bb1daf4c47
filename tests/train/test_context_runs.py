"""Whole runs whose rows are divided over processes, against the same runs without."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import tune, write_base, write_chats
from helpers.commands import Commands, commands_in_one_process
from helpers.corpus import ALL_EXPERTS
from helpers.processes import TESTS, run_command
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config, load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.config.short import ShortOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.train.checks import check_precision
from nemo_hybrid.train.metrics import read_metrics

TOLERANCE = 4e-6
"""Of losses and gradient norms in fp32, as in test_elastic.py."""
TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, **ALL_EXPERTS}
LOW = TINY | {"hidden_size": 64, "mamba_num_heads": 16, "moe_intermediate_size": 32}
"""Of whole blocks of all formats."""


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


def figures(run_dir: Path) -> list[dict[str, Any]]:
    measured = ("tokens_per_s", "step_seconds", "data_seconds", "mfu", "memory_gb")
    rows = [asdict(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def compare(ours: Any, theirs: Any, path: str = "") -> None:
    """Numbers that are no integers within the tolerance, all else equal."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for key, value in theirs.items():
            compare(ours[key], value, f"{path}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        for i, value in enumerate(theirs):
            compare(ours[i], value, f"{path}[{i}]")
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs)), (path, ours, theirs)
    else:
        assert ours == theirs, path


def both(commands: Commands, word: str, config: Path, out: Path) -> str:
    """Trains alone and over two processes, compares all metrics; what the two said."""
    ended = commands(word, "--config", config, "--run_dir", out / "one")
    assert ended.status == 0, ended.err
    words = (word, "--config", config, "--run_dir", out / "two", "--parallel.cp", "2")
    said = run_command(*words, size=2)[0].stdout
    compare(figures(out / "two"), figures(out / "one"))
    return said


def test_a_run_and_its_evaluations(commands: Commands, store: Path, tmp_path: Path) -> None:
    train = {"max_steps": 3, "micro_batch_size": 2, "eps": 1e-4, "eval_every": 1, "log_every": 1}
    config = tiny_run(store, model=TINY, train=train | {"eval_sequences": 11})
    config.data.sequence_length = 31
    config.train.eval_positions = True
    (tmp_path / "run.yaml").write_text(dump_config(config))
    said = both(commands, "pretrain", tmp_path / "run.yaml", tmp_path)
    assert "2 processes on cpu, 2 rows at a time, each over 2 processes, expert parallel 1" in said
    rows = figures(tmp_path / "two")
    assert all(row["heldout_loss"] and row["further"]["heldout_loss_at_1"] for row in rows)
    state = read_json(tmp_path / "two/checkpoints/step_00000003/run_state.json")
    assert state["layout"] == {"world_size": 2, "ep": 1, "cp": 2, "zero": 2}


def test_short_rows_stay_whole(commands: Commands, store: Path, tmp_path: Path) -> None:
    """In steps on short rows every process has its own; the steps alternate."""
    train = {"max_steps": 4, "micro_batch_size": 2, "eps": 1e-4, "eval_sequences": 0}
    config = tiny_run(store, model=TINY, train=train)
    config.data.short = ShortOptions(sequence_length=8, path=str(store))
    (tmp_path / "run.yaml").write_text(dump_config(config))
    both(commands, "pretrain", tmp_path / "run.yaml", tmp_path)
    lengths = [row["further"]["sequence_length"] for row in figures(tmp_path / "two")]
    assert sorted(lengths) == [8, 8, 32, 32]


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"rank": 4, "target_modules": ["*.3.mixer.*"]}},  # layers below are frozen
        {"train": {"loss": "conversations"}},
        pytest.param({"distill": {"preset": "nano", "weight": 0.7}}, marks=pytest.mark.slow),
    ],
    ids=["lora", "per document", "distillation"],
)
def test_fine_tuning(
    commands: Commands, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    shape = {"mamba_num_heads": 16, "mamba_head_dim": 4, "moe_intermediate_size": 32}
    base = write_base(tmp_path / "hf", **TINY, **shape)
    chats = write_chats(tmp_path / "chats.jsonl", 30)
    given = {"micro_batch_size": 2, "max_steps": 2, "eval_sequences": 4}
    data = {"sequence_length": 127, "heldout": 0.2}
    sections = sections | {"train": given | sections.get("train", {}), "data": data}
    (tmp_path / "run.yaml").write_text(dump_config(tune(base, chats, **sections)))
    both(commands, "finetune", tmp_path / "run.yaml", tmp_path)


@pytest.mark.parametrize(
    ("words", "processes", "said"),
    [
        ("--parallel.cp 3 --model.pattern M --model.mtp_num_depths 0", 4,
         "parallel.cp (3) does not divide the number of processes (4)"),
        ("--parallel.cp 4", 4,
         "model.num_attention_heads (2) is not divisible by parallel.cp (4): attention trades "
         "tokens for heads, so parallel.cp can be one of 1, 2"),
        ("--parallel.cp 4 --model.num_attention_heads 12 --model.num_key_value_heads 6", 4,
         "neither of model.num_key_value_heads (6) and parallel.cp (4) divides the other"),
        ("--parallel.cp 2 --data.sequence_length 5", 2,
         "data.sequence_length / parallel.cp (2 tokens) is below model.conv_kernel - 1 (3)"),
        ("--parallel.cp 4 --model.num_attention_heads 4 --data.short 16", 4,
         "data.sequence_length (32) must be a multiple of parallel.cp (4) x "
         "data.short.sequence_length (16), so that short steps hold the same tokens"),
        ("--model.pattern M* --model.mtp_num_depths 0 --train.tile 8", 1,
         "train.tile has no effect: no layer of M* is E or -"),
        ("--train.offload 1", 1, "train.offload has no effect without layers that are recomputed"),
        ("--parallel.cp 2 --train.micro_batch_size 8", 4,
         "train.global_batch_size (8) is not divisible by train.micro_batch_size (8) x readers "
         "(4 processes / parallel.cp 2) = 16"),
        ("--parallel.cp 4 --model.pattern M --model.mtp_num_depths 0 --model.conv_kernel 1 "
         "--data.sequence_length 3", 4,
         "data.sequence_length / parallel.cp (0 tokens) is below one (1)"),
        ("--parallel.cp 2 --data.sequence_length 67108864 --kernels.ssd mamba_ssm", 2,
         "reaches 2**31, where the library's offsets wrap: raise parallel.cp or take auto"),
        ("--data.sequence_length 67108864 --kernels.ssd mamba_ssm", 1,
         "reaches 2**31, where the library's offsets wrap: raise parallel.cp or take auto"),
    ],
)  # fmt: skip
def test_mistakes_are_named(store: Path, words: str, processes: int, said: str) -> None:
    config = tiny_run(store)
    for option, value in zip(words.split()[::2], words.split()[1::2], strict=True):
        section, name = option.removeprefix("--").split(".")
        given: Any = int(value) if value.isdigit() else value
        if name == "short":
            given = ShortOptions(sequence_length=given, path="elsewhere")
        setattr(getattr(config, section), name, given)
    with pytest.raises(UserError, match=re.escape(said)):
        check(config, processes)


def check(config: RunConfig, processes: int) -> None:
    config.validate()
    config.validate_world(processes)


def test_a_phase_is_new_or_goes_on(store: Path) -> None:
    config = replace(tiny_run(store), continue_from="a", resume="b")
    with pytest.raises(UserError, match="a new phase and resume goes on with the old one"):
        config.validate()


def test_pieces_fit_the_blocks_of_formats(store: Path) -> None:
    config = load_config([TESTS.parent / "configs/run/pretrain_tiny_nvfp4.yaml"])
    shape = config.model.hybrid()
    check_precision(config, shape)
    config.train.micro_batch_size, config.data.sequence_length = 4, 256
    config.train.tile = 256
    check_precision(config, shape)
    config.train.tile = 200  # six pieces, of 42 and 43 tokens of each row
    with pytest.raises(UserError, match=r"and train\.tile make them \(\d+\), is no"):
        check_precision(config, shape)


def test_pieces_of_short_rows_fit_them_too(store: Path) -> None:
    """Six rows of 16 tokens in three pieces, where one row of 96 has three of 32."""
    config = tiny_run(store, model=LOW, train={"micro_batch_size": 1}, recipe="nvfp4_all")
    config.data.sequence_length, config.train.tile = 96, 32
    check_precision(config, config.model.hybrid())
    config.data.short = ShortOptions(sequence_length=16, path=str(store))
    with pytest.raises(UserError, match=r"data\.short and train\.tile make them \(30\), is not"):
        check_precision(config, config.model.hybrid())
    config.train.tile = 48
    check_precision(config, config.model.hybrid())


def test_a_mistake_ends_before_data_and_processes(commands: Commands, tmp_path: Path) -> None:
    """There is no data, and there are no others."""
    (tmp_path / "run.yaml").write_text(dump_config(tiny_run(tmp_path / "absent", cp=2)))
    ended = commands("pretrain", "--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run")
    assert ended.status == 2
    assert "parallel.cp (2) does not divide the number of processes (1)" in ended.err
    assert not (tmp_path / "run").exists()


def test_what_needs_whole_sequences_says_so(tmp_path: Path) -> None:
    config = tune(tmp_path, tmp_path, train={"trained": "mtp"}, boost={"loss": "kl"})
    config.parallel.cp = 2
    with pytest.raises(UserError, match=r"boost\.loss kl cannot be had with parallel\.cp \(2\)"):
        config.validate(tiny_run(tmp_path, model=TINY).model)


def test_low_precision_runs_too(store: Path, tmp_path: Path) -> None:
    """Its scales are those of parts then, so that nothing is equal."""
    train = {"max_steps": 2, "eval_sequences": 0, "micro_batch_size": 4}
    config = tiny_run(store, model=LOW, train=train, recipe="nvfp4_all", cp=2)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ("pretrain", "--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run")
    run_command(*words, size=2)
    losses = [row["loss"] for row in figures(tmp_path / "run")]
    assert len(losses) == 2
    assert min(losses) > 3
    assert max(losses) < 6
