"""A whole run of boosting, on what `rollout` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.chats import write_base
from helpers.commands import Commands, Said, commands_in_one_process
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.samples import SampleMaker
from nemo_hybrid.data.sources import Record
from nemo_hybrid.train.metrics import read_metrics

WORDS = [
    "--precision.recipe", "fp32", "--data.sequence_length", "64", "--data.heldout", "0.3",
    "--train.max_steps", "4", "--train.global_batch_size", "2", "--train.lr", "1e-2",
    "--train.warmup_steps", "0", "--train.eval_sequences", "8", "--checkpoint.every", "0",
]  # fmt: skip
BOOST = ["--train.trained", "mtp", "--boost.loss", "kl", "--boost.depths", "2"]


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "hf", vocab_size=280)


@pytest.fixture(scope="module")
def rollouts(commands: Commands, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rollouts")
    prompts = [json.dumps({"prompt": "ab" * n}) + "\n" for n in range(1, 16)]
    (out / "prompts.jsonl").write_text("".join(prompts))
    said = commands(
        "rollout", "--from", base, "--data", out / "prompts.jsonl", "--out", out / "said.jsonl",
        "--max_new_tokens", "12",
    )  # fmt: skip
    assert said.status == 0, said.err
    return out / "said.jsonl"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("model*.safetensors"):
        found |= load_file(path)
    return found


Boosted = Callable[..., Said]


@pytest.fixture
def boosted(commands: Commands, base: Path, rollouts: Path, tmp_path: Path) -> Boosted:
    """A run with these words more."""

    def run(*words: str) -> Said:
        said = commands(
            "finetune", "--run_dir", tmp_path / "run", "--model.from_hf", base, "--data.path",
            rollouts, *WORDS, *BOOST, *words,
        )  # fmt: skip
        assert said.status == 0, said.err
        return said

    return run


def test_only_the_block_learns_and_acceptance_is_measured(
    boosted: Boosted, base: Path, tmp_path: Path
) -> None:
    said = boosted()
    assert "boosting by kl over 2 depths" in said.out
    assert "rounds them" not in said.out
    before, after = tensors(base), tensors(tmp_path / "run/model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        moved = name.startswith("mtp.") and ".gate." not in name
        assert torch.equal(tensor, after[name]) != moved, name
    found = list(read_metrics(tmp_path / "run/metrics.jsonl"))
    assert all(len(row.mtp_losses) == 2 and row.mtp_losses[0] > 0 for row in found)
    assert found[0].loss == pytest.approx(sum(found[0].mtp_losses) / 2)
    for row, when in ((found[0], "before"), (found[-1], "heldout")):
        assert 1 <= row.further[f"{when}_acceptance_length"] <= 3


def test_a_run_that_rounds_the_backbone_says_so(boosted: Boosted, base: Path) -> None:
    said = boosted("--precision.recipe", "bf16", "--train.max_steps", "1")
    assert (
        f"warning: {base} has weights in float32, and this run rounds them to bfloat16" in said.out
    )


def test_a_rollout_is_a_sample_whose_own_tokens_are_learnt(base: Path, rollouts: Path) -> None:
    maker = SampleMaker(SampleOptions(), base, 0)
    row = json.loads(rollouts.read_text().splitlines()[0])
    made = maker.make(Record("key", "there", row, 0.0))
    assert (made.kind, made.unusable, made.unread) == ("rollout", [], set())
    (sample,) = made.samples
    assert sample.ids.tolist() == row["prompt_ids"] + row["ids"]
    assert sample.targets.tolist() == [False] * len(row["prompt_ids"]) + row["chosen"]
    forced = [False, *row["chosen"][1:]]
    (sample,) = maker.make(Record("key", "there", {**row, "chosen": forced}, 0.0)).samples
    assert sample.targets.tolist()[len(row["prompt_ids"]) :] == forced
    for change, why in (
        ({"chosen": [True]}, "1 entries of chosen"),
        ({"ids": [10**6] * len(row["ids"])}, "token id 1000000 lies outside"),
    ):
        (unusable,) = maker.make(Record("key", "there", {**row, **change}, 0.0)).unusable
        assert why in str(unusable)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--boost.loss", "kl"], "boost.loss kl trains the MTP block alone: set train.trained mtp"),
        (["--boost.depths", "3"], "boost options have no effect without boost.loss"),
        ([*BOOST, "--boost.loss", "ce", "--boost.temperature", "3"], "boost.temperature has no"),
    ],
)
def test_mistakes(
    commands: Commands, base: Path, rollouts: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    said = commands(
        "finetune", "--run_dir", tmp_path / "run", "--model.from_hf", base, "--data.path", rollouts,
        *WORDS, *words,
    )  # fmt: skip
    assert said.status == 2
    assert message in said.err
