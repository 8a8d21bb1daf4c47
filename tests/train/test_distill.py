"""Quantization-aware distillation: its loss by the formula, and runs that bring the model back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.chats import tune, write_base, write_chats
from helpers.commands import Commands, commands_in_one_process
from helpers.corpus import ALL_EXPERTS, TINY_MODEL
from helpers.processes import run_command
from helpers.tiny_models import loud_model
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.store import Store
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.precision.assign import assign
from nemo_hybrid.precision.simulate import quantization_aware
from nemo_hybrid.recipes.distill import teacher_inputs
from nemo_hybrid.train.metrics import read_metrics

DIVISIBLE = {"mamba_num_heads": 16, "mamba_head_dim": 4, "moe_intermediate_size": 32}
PRESET = "nano"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "hf", **DIVISIBLE, **ALL_EXPERTS)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 60)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


@torch.no_grad()
def divergence(teacher: Path, student: Path, store: Path) -> float:
    """Mean KL over learnt tokens of the student with quantized weights and inputs."""
    a, b = load_model(teacher), load_model(student)
    total, count, samples = 0.0, 0, Store.open(store, samples=True)
    rows = [samples.sample(i) for i in range(len(samples.lengths))]
    seen = calibrate(b, [torch.from_numpy(ids)[None] for ids, _ in rows])
    quantization_aware(b, assign(b.config, PRESET, {}), seen.amax)
    for ids, learnt in (map(torch.from_numpy, row) for row in rows):
        p, q = (m(ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (a, b))
        total += float((p.exp() * (p - q)).sum(-1)[learnt[1:]].sum())
        count += int(learnt[1:].sum())
    return total / count


def run(
    commands: Commands, base: Path, chats: Path, out: Path, **sections: dict[str, Any]
) -> tuple[int | None, str]:
    file = out.with_suffix(".yaml")
    file.write_text(dump_config(tune(base, chats, **sections)))
    ended = commands("finetune", "--config", file, "--run_dir", out)
    return ended.status, ended.err


@pytest.mark.slow
def test_a_run_brings_the_quantized_model_back_to_its_teacher(
    commands: Commands, base: Path, chats: Path, tmp_path: Path
) -> None:
    """On held-out samples; cross-entropy alone on the same samples leads elsewhere."""
    found = {}
    for weight in (1.0, 0.01):
        out = tmp_path / f"run{weight}"
        status, err = run(
            commands, base, chats, out,
            distill={"preset": PRESET, "weight": weight},
            data={"heldout": 0.2},
            train={"max_steps": 25, "micro_batch_size": 4, "mtp_loss_weight": 0.0},
        )  # fmt: skip
        assert status == 0, err
        heldout = out / "data/heldout"
        losses = [row.loss for row in read_metrics(out / "metrics.jsonl")]
        assert (losses[0] < 1) == (weight == 1)  # a divergence, or nearly a cross-entropy
        assert 0 < losses[-1] < losses[0]
        found[weight] = divergence(base, out / "model", heldout)
        card = (out / "model/README.md").read_text()
        assert "learnt the probabilities of `hf`" in card
        assert f"export --preset {PRESET}`. Use it" in card
    before = divergence(base, base, heldout)
    assert found[1.0] < 0.85 * before
    assert found[0.01] > 2 * before


def test_a_resumed_run_has_the_same_teacher(
    commands: Commands, base: Path, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sections: dict[str, Any] = {
        "distill": {"preset": PRESET},
        "checkpoint": {"every": 2},
        "train": {"max_steps": 4, "micro_batch_size": 4},
    }
    assert run(commands, base, chats, out, **sections)[0] == 0
    whole = [load_file(path) for path in sorted((out / "model").glob("*.safetensors"))]
    shutil.rmtree(out / "checkpoints/step_00000004")
    assert run(commands, base, chats, out, **sections)[0] == 0
    again = [load_file(path) for path in sorted((out / "model").glob("*.safetensors"))]
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_with_another_teacher_is_refused(
    commands: Commands, base: Path, chats: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(base, tmp_path / "teacher")
    sections: dict[str, Any] = {"distill": {"preset": PRESET}, "train": {"max_steps": 1}}
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(tune(teacher, chats, **sections)))
    first = commands("finetune", "--config", file, "--run_dir", tmp_path / "run")
    assert first.status == 0
    count = list(assign(HybridConfig.from_hf(str(teacher)), PRESET, {}).values()).count("nvfp4")
    said = f"distilled from {teacher} for nano ({count} weights in nvfp4): the loss is the KL"
    assert said in first.out
    path = next(teacher.glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: weight * 1.3 for name, weight in weights.items()}, path, {"format": "pt"})
    sections["train"]["max_steps"] = 2
    status, err = run(commands, teacher, chats, tmp_path / "run", **sections)
    assert status == 2
    assert "was written with base" in err


@pytest.mark.slow
def test_experts_divided_over_processes_learn_the_same(
    commands: Commands, base: Path, chats: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"distill": {"preset": PRESET}, "train": {"max_steps": 2}}
    assert run(commands, base, chats, tmp_path / "one", **sections)[0] == 0
    sections["parallel"] = {"ep": 2}
    file = tmp_path / "two.yaml"
    file.write_text(dump_config(tune(base, chats, **sections)))
    run_command("finetune", "--config", file, "--run_dir", tmp_path / "two", size=2)
    before, one, two = (
        dict(load_model(path).named_parameters())
        for path in (base, tmp_path / "one/model", tmp_path / "two/model")
    )
    for name, start in before.items():
        step = (one[name] - start).norm()
        assert (one[name] - two[name]).norm() <= 0.02 * step + 1e-6, name


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distill": {"weight": 0.5}}, "no effect without distill.preset"),
        ({"distill": {"preset": "nano", "weight": 0.0}}, "distill.weight"),
        ({"distill": {"preset": "nano"}, "lora": {"rank": 2}}, "lora.rank freezes"),
        ({"distill": {"preset": "nano"}, "precision": {"recipe": "nvfp4_all"}}, "other formats"),
        ({"distill": {"preset": "nano"}, "train": {"trained": "mtp"}}, "trained mtp"),
        ({"distill": {"preset": "nano", "formats": {"*.k_prj": "fp8"}}}, "*.k_prj"),
        ({"distill": {"preset": "nano", "formats": {"lm_head": "fp8"}}}, "lm_head"),
        (
            {
                "distill": {"preset": "nano", "formats": {"mtp*": "fp8"}},
                "train": {"mtp_loss_weight": 0.0},
            },
            "does not run",
        ),
    ],
)
def test_a_mistake_is_named(
    commands: Commands,
    base: Path,
    chats: Path,
    tmp_path: Path,
    sections: dict[str, dict[str, Any]],
    words: str,
) -> None:
    status, err = run(commands, base, chats, tmp_path / "run", **sections)
    assert status == 2
    assert words in err
    assert err.count("error: ") == 1


def test_the_teacher_reads_parts_of_divided_rows() -> None:
    """Whole ones would be too long for a process."""
    shape = HybridConfig(**TINY_MODEL | DIVISIBLE | {"mtp_num_depths": 0})
    ids_BW = torch.arange(33).remainder(shape.vocab_size)[None]
    batch = Batch.from_windows(ids_BW, torch.zeros_like(ids_BW, dtype=torch.bool))
    half = Batch.from_windows(ids_BW[:, 16:], torch.zeros(1, 17, dtype=torch.bool))
    cut: list[tuple[int, ...]] = []

    def divide(given: Batch, *at: int) -> Batch:
        assert given is batch
        cut.append(at)
        return half

    teacher, seen = loud_model(shape), []
    teacher.backbone.embeddings.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = teacher_inputs(
        teacher,
        assign(shape, PRESET, {}),
        SimpleNamespace(tokens=64, rows=lambda *_: batch),  # type: ignore[arg-type]
        32,
        0,
        SimpleNamespace(reader=0, readers=1, part=1, cp=2, gather=lambda x: [x]),  # type: ignore[arg-type]
        SimpleNamespace(cut=divide),  # type: ignore[arg-type]
    )
    assert cut == [(1, 2, 0)] * 2
    assert all(torch.equal(ids_BS, half.ids_BS) for ids_BS in seen)
    assert len(seen) == 2
    assert found
