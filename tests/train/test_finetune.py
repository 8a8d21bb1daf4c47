"""Fine-tuning runs through the command line: what is trained, what stays, what comes out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from helpers.bands import SABOTAGE
from helpers.chats import conversations, tune, write_base
from helpers.commands import Commands
from helpers.nemotron_h_oracle import load_theirs
from helpers.processes import run_command
from helpers.tiny_models import loud
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.read import dump_config, read_keys
from nemo_hybrid.data.packing import best_fit
from nemo_hybrid.data.store import Store
from nemo_hybrid.files import read_json
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.train.metrics import read_metrics
from train.conftest import Finetune

DIVISIBLE = {"mamba_num_heads": 16, "mamba_head_dim": 4, "moe_intermediate_size": 32}
"""By 16, as NVFP4 wants."""


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but for two experts a token."""
    return write_base(tmp_path_factory.mktemp("choosing") / "hf")


def tensors(directory: Path, pattern: str = "model-*") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob(f"{pattern}.safetensors"):
        found |= load_file(path)
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def changed(base: Path, made: Path) -> set[str]:
    before, after = tensors(base), tensors(made)
    assert before.keys() == after.keys()
    return {name for name in before if not same_bytes(before[name], after[name])}


@torch.no_grad()
def mean_loss(model: HybridLM, store: Store) -> float:
    """Over all learnt tokens of a store, one sample at a time."""
    total, count = 0.0, 0
    for i in range(len(store.lengths)):
        ids, targets = (torch.from_numpy(part) for part in store.sample(i))
        logits = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits[targets[1:]], ids[1:][targets[1:]], reduction="sum"))
        count += int(targets[1:].sum())
    return total / count


def is_router(name: str) -> bool:
    return ".gate." in name


@pytest.mark.slow
def test_what_comes_out(
    base: Path, chats: Path, tmp_path: Path, finetune: Finetune, commands: Commands
) -> None:
    """All but the routers is trained; MTP tensors are the roundings of their own masters; and
    transformers loads model, tokenizer and template."""
    run = tmp_path / "run"
    data = {"heldout": 0.2}
    train = {"max_steps": 0, "epochs": 2, "eval_sequences": 9, "mtp_loss_weight": 0.5}
    ended = finetune(base, chats, "--run_dir", run, data=data, train=train)
    assert ended.status == 0, ended.err
    model = run / "model"

    names = tensors(base).keys()
    assert changed(base, model) == {name for name in names if not is_router(name)}
    assert any(name.startswith("mtp.") and is_router(name) for name in names)

    rows = list(read_metrics(run / "metrics.jsonl"))
    store = Store.open(run / "data/train", samples=True)
    packs = int(ended.out.split(" packs of 128")[0].rsplit(" ", 1)[-1])
    assert len(rows) == -(-packs * 2 // 4)  # two epochs of packs, four to a step
    assert rows[-1].heldout_loss is not None
    assert rows[0].heldout_loss_before is not None
    assert rows[-1].heldout_loss < rows[0].heldout_loss_before
    heldout = Store.open(run / "data/heldout", samples=True)
    assert len(store.lengths) + len(heldout.lengths) == 30
    assert f"data {len(store.lengths)} samples" in ended.out
    assert len(best_fit(heldout.lengths, 128)) <= train["eval_sequences"]
    assert rows[-1].heldout_loss == pytest.approx(mean_loss(load_model(run), heldout), rel=1e-5)
    assert mean_loss(load_model(run), store) != pytest.approx(rows[-1].heldout_loss, rel=1e-3)

    step = run / f"checkpoints/step_{len(rows):08d}"
    masters = tensors(step, "optimizer-r*-master")
    saved = tensors(model)
    compared = 0
    for key, master in masters.items():
        name = key.split("|")[0]
        if name.startswith("mtp.") and ".experts." not in name:
            assert torch.equal(master, saved[name].flatten())
            compared += 1
    assert compared > 5

    twin, info = load_theirs(model, torch.float32)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    ids = torch.tensor([[5, 9, 33, 70, 71, 72, 5]])
    ours = load_model(run).eval()
    torch.testing.assert_close(twin(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = conversations(1)[0]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(base).apply_chat_template(
        messages, return_dict=True)["input_ids"]  # fmt: skip
    card = (model / "README.md").read_text()
    assert "fine-tuned" in card
    length = read_keys(run / "config.yaml", FinetuneConfig)["data.sequence_length"]
    assert f"sequences of {length} tokens" in card
    heldout = len(Store.open(run / "data/heldout", samples=True).lengths)
    assert 0 < heldout < 10
    assert re.search(rf"; of {heldout} samples?; so few say little", card)
    assert not list(model.glob("optimizer*"))
    assert not (model / "run_state.json").exists()

    # What the run measured last is what `eval` finds.
    seen = commands("eval", "--from", run, "--data", run / "data")
    assert seen.status == 0, seen.err
    assert f"{rows[-1].heldout_loss:.4f}" in seen.out

    # Started once more it is finished, and makes the model anew where it was lost.
    shutil.rmtree(model)
    again = finetune(base, chats, "--run_dir", run, data=data, train=train)
    assert "already finished" in again.out
    assert tensors(model).keys() == names


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ({"mtp_loss_weight": 0.0}, lambda n: not n.startswith("mtp.") and not is_router(n)),
        ({"trained": "mtp"}, lambda n: n.startswith("mtp.") and not is_router(n)),
        ({"train_router": True, "router_bias_rate": 0.1}, lambda n: True),
    ],
)
def test_what_is_frozen_keeps_its_bytes(
    choosing: Path,
    chats: Path,
    tmp_path: Path,
    finetune: Finetune,
    train: dict[str, Any],
    trained: Callable[[str], bool],
) -> None:
    run = tmp_path / "run"
    assert finetune(choosing, chats, "--run_dir", run, train=train | {"max_steps": 2}).status == 0
    names = tensors(choosing).keys()
    assert changed(choosing, run / "model") == {name for name in names if trained(name)}


def test_padding_is_no_load_of_experts(
    choosing: Path, chats: Path, tmp_path: Path, finetune: Finetune
) -> None:
    run = tmp_path / "run"
    train = {"max_steps": 1, "global_batch_size": 20, "train_router": True, "mtp_loss_weight": 0}
    assert finetune(choosing, chats, "--run_dir", run, train=train).status == 0
    row = json.loads((run / "expert_load.jsonl").read_text().splitlines()[-1])
    store = Store.open(run / "data/train", samples=True)
    state = read_json(run / "checkpoints/step_00000001/run_state.json")
    assert state["batches"] == 1
    slots = 20 * 128
    for load in row["load"].values():
        assert sum(load) % 2 == 0  # two experts a token
        assert sum(load) / 2 < slots  # packs are never quite full
    # 20 sequences read every pack at least once; what all packs hold is known.
    per_epoch = int(store.lengths.sum())
    assert all(sum(load) / 2 >= per_epoch for load in row["load"].values())


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"loss": "two_stage", "second_stage_step": 3, "lr": 1e-3}},
        {"lora": {"rank": 2, "target_parameters": ["experts.up_proj"]}},
    ],
    ids=["full", "lora"],
)
def test_a_resumed_run_has_the_bytes_of_an_unbroken_one(
    base: Path, chats: Path, tmp_path: Path, finetune: Finetune, sections: dict[str, dict[str, Any]]
) -> None:
    sections = {
        "train": {"max_steps": 4} | sections.get("train", {}),
        "precision": {"recipe": "bf16"},
        "lora": sections.get("lora", {}),
    }
    whole, parts = tmp_path / "unbroken", tmp_path / "resumed"
    assert (
        finetune(base, chats, "--run_dir", whole, "--checkpoint.every", 2, **sections).status == 0
    )
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/step_00000004")
    assert (
        finetune(base, chats, "--run_dir", parts, "--checkpoint.every", 2, **sections).status == 0
    )
    compared = 0
    for pattern in ("model-*", "adapter_model", "optimizer-*"):
        a, b = (tensors(run / "checkpoints/step_00000004", pattern) for run in (whole, parts))
        assert a.keys() == b.keys()
        assert all(same_bytes(a[name], b[name]) for name in a)
        compared += len(a)
    assert compared > 20
    early = tensors(whole / "checkpoints/step_00000002", "optimizer-*")
    assert not all(same_bytes(early[name], tensor) for name, tensor in a.items())


ADAPTED = 5e-4
"""Relative, of adapters after a few steps at other layouts. They start from nothing, so that their
gradients do too, and AdamW makes of small differences larger ones (found: 3e-5)."""
LORA = {
    "rank": 2,
    "target_modules": ["q_proj", "in_proj", "fc1_latent_proj", "*.shared_experts.*"],
    "target_parameters": ["experts.up_proj", "experts.down_proj"],
}


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, base: Path, chats: Path
) -> tuple[Path, list[Any]]:
    """A LoRA run of three steps on two processes with the experts divided, and what it printed."""
    out = tmp_path_factory.mktemp("adapted")
    config = tune(base, chats, lora=LORA, train={"lr": 1e-2}, parallel={"ep": 2})
    (out / "run.yaml").write_text(dump_config(config))
    words = ["finetune", "--config", out / "run.yaml", "--run_dir", out / "run"]
    return out / "run", run_command(*words, size=2)


def test_an_adapter_is_all_that_is_trained_and_saved(
    base: Path, chats: Path, adapted: tuple[Path, list[Any]]
) -> None:
    """Every matrix of every adapter moves, and PEFT's model computes what ours does."""
    run, finished = adapted
    assert "backbone.layers.*.mixer.experts.up_proj" in finished[0].stdout
    assert not list(run.glob("checkpoints/*/model-*.safetensors"))
    saved = load_file(run / "model/adapter_model.safetensors")
    # B begins as zero, and A's gradient is zero as long as B is.
    assert all(tensor.abs().max() > 1e-4 for name, tensor in saved.items() if "lora_B" in name)
    moments = tensors(run / "checkpoints/step_00000003", "optimizer-r*-exp_avg_sq")
    for name, tensor in moments.items():
        share = (tensor > 0).float().mean()
        assert share > (0.2 if ".experts." in name else 0.9), name

    from peft import PeftModel

    theirs, _ = load_theirs(base, torch.float32)
    ids = torch.tensor([[5, 9, 33, 70, 71, 72, 5, 100, 101]])
    plain = theirs(ids).logits
    theirs = PeftModel.from_pretrained(theirs, run / "model").eval()
    logits = theirs(ids).logits
    ours = load_model(run).eval()(ids).logits
    assert (logits - plain).abs().max() > 1e-2
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.slow
def test_an_adapter_goes_on_at_another_layout_but_not_beside_other_weights(
    base: Path, chats: Path, adapted: tuple[Path, list[Any]], tmp_path: Path, finetune: Finetune
) -> None:
    run, train = tmp_path / "run", {"lr": 1e-2, "max_steps": 4}
    shutil.copytree(adapted[0], run)
    before = base.with_name("before")
    shutil.copytree(base, before)
    weights = next(base.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    try:
        refused = finetune(base, chats, "--run_dir", run, lora=LORA, train=train)
        assert refused.status == 2
        assert "was written with base" in refused.err
    finally:
        shutil.rmtree(base)
        before.rename(base)
    ended = finetune(base, chats, "--run_dir", run, lora=LORA, train=train)
    assert ended.status == 0, ended.err
    assert "going on from" in ended.out
    assert [r.step for r in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]

    # A twin that never changed its layout, and another that goes the other way.
    whole, other = tmp_path / "whole", tmp_path / "other"
    words = ("--checkpoint.every", 3)
    ended = finetune(base, chats, "--run_dir", whole, *words, lora=LORA, train=train)
    assert ended.status == 0, ended.err
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints/step_00000004")
    config = tune(base, chats, lora=LORA, train=train, parallel={"ep": 2})
    (tmp_path / "two.yaml").write_text(dump_config(config))
    run_command("finetune", "--config", tmp_path / "two.yaml", "--run_dir", other, size=2)
    made = [load_file(d / "model/adapter_model.safetensors") for d in (whole, run, other)]
    early = load_file(whole / "checkpoints/step_00000003/adapter_model.safetensors")
    for name, tensor in made[0].items():
        apart = [float((tensor - found[name]).norm() / tensor.norm()) for found in made[1:]]
        assert max(apart) < ADAPTED, name
        assert (tensor - early[name]).norm() > SABOTAGE * ADAPTED * tensor.norm(), name
    louder = LORA | {"alpha": 40.0}
    refused = finetune(
        base, chats, "--run_dir", tmp_path / "louder", "--resume",
        whole / "checkpoints/step_00000003", lora=louder, train=train,
    )  # fmt: skip
    assert refused.status == 2
    assert "count 2 times" in refused.err


def test_merging_with_other_weights_is_refused(
    base: Path, adapted: tuple[Path, list[Any]], tmp_path: Path, commands: Commands
) -> None:
    loud(HybridLM.from_hf(str(base)), seed=5).save_hf(str(tmp_path / "drawn"))
    words = ("merge", "--from", adapted[0] / "model", "--base")
    said = [
        commands(*words, directory, "--out", tmp_path / f"merged {i}")
        for i, directory in enumerate((base, tmp_path / "drawn"))
    ]
    assert [one.status for one in said] == [0, 2], said
    assert ["beside other weights" in one.err + one.out for one in said] == [False, True]


@pytest.mark.slow
def test_frozen_experts_may_be_divided_too(
    base: Path, chats: Path, tmp_path: Path, finetune: Finetune
) -> None:
    """DeepSpeed knows no expert parallelism without experts that are trained."""
    lora = {"rank": 2, "target_modules": ["q_proj", "fc1_latent_proj"]}
    train = {"lr": 1e-2}
    alone, divided = tmp_path / "alone", tmp_path / "divided"
    assert finetune(base, chats, "--run_dir", alone, lora=lora, train=train).status == 0
    config = tune(base, chats, lora=lora, train=train, parallel={"ep": 2})
    (tmp_path / "two.yaml").write_text(dump_config(config))
    run_command("finetune", "--config", tmp_path / "two.yaml", "--run_dir", divided, size=2)
    rows = [list(read_metrics(run / "metrics.jsonl")) for run in (alone, divided)]
    for one, other in zip(*rows, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    a, b = (load_file(run / "model/adapter_model.safetensors") for run in (alone, divided))
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() < ADAPTED * tensor.norm(), name


def test_frozen_experts_of_every_rank_keep_their_bytes(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    """DeepSpeed would give all ranks the first one's."""
    train = {"trained": "mtp", "max_steps": 1}
    config = tune(base, chats, train=train, parallel={"ep": 2})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ["--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run"]
    run_command("finetune", *words, size=2)
    names = tensors(base).keys()
    trained = {name for name in names if name.startswith("mtp.") and not is_router(name)}
    assert changed(base, tmp_path / "run/model") == trained


@pytest.mark.slow
def test_nvfp4_runs_with_and_without_adapters(
    chats: Path, tmp_path: Path, finetune: Finetune
) -> None:
    base = write_base(tmp_path / "base", **DIVISIBLE)
    for name, lora in (("full", {}), ("lora", {"rank": 2})):
        run = tmp_path / name
        train = {"max_steps": 6, "lr": 5e-3, "recompute": "ME*"}
        recipe = {"recipe": "nvfp4_super"}
        ended = finetune(base, chats, "--run_dir", run, lora=lora, precision=recipe, train=train)
        assert ended.status == 0, ended.err
        assert "nvfp4" in ended.out
        losses = [row.loss for row in read_metrics(run / "metrics.jsonl")]
        assert losses[-1] < losses[0]
