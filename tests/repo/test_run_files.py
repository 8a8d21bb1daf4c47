"""Recipes of configs/run: each is planned as its header says, and holds what was published."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_hybrid.commands.plan import COMMANDS, Plan, PlanOptions, make_plan, ready
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import RunConfig, TrainingConfig

ROOT = Path(__file__).parents[2]
RUNS = sorted(path.name for path in (ROOT / "configs" / "run").glob("*.yaml"))
ON_A_CPU = (
    "finetune_digits_cpu", "finetune_tiny_cpu", "long_context_tiny_cpu", "nvfp4_gap",
    "pretrain_tiny_cpu", "pretrain_tiny_nvfp4", "rl_tiny_cpu",
)  # fmt: skip
REAL = [name for name in RUNS if name.removesuffix(".yaml") not in ON_A_CPU]


KINDS = {RunConfig: "pretrain", FinetuneConfig: "finetune", RlConfig: "rl"}


def header(name: str) -> str:
    """The comment that a recipe begins with, its continued lines joined."""
    lines = (ROOT / "configs" / "run" / name).read_text(encoding="utf-8").splitlines()
    beginning = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return re.sub(r"\\\n\s*", "", "\n".join(line.removeprefix("#") for line in beginning))


def command(name: str, beginning: str) -> list[str]:
    (found,) = re.findall(rf"^\s+{beginning} (.*)$", header(name), re.MULTILINE)
    return shlex.split(found)


def planned(name: str) -> tuple[TrainingConfig, Plan]:
    read: list[Any] = []
    COMMANDS["plan"]._replace(run=lambda *given: read.extend(given)).start(
        "plan", command(name, "nemo-hybrid plan")
    )
    options = read[1]
    config, shape = ready(read[0], options)
    return config, make_plan(config, shape, options)


@pytest.mark.parametrize("name", REAL)
def test_the_layout_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, plan = planned(name)
    assert plan.fits, f"{plan.needed / 1e9:.4g} of {plan.capacity / 1e9:.4g} GB"
    # Started with as many processes, as the same kind of run, from the same files.
    text = header(name)
    processes = plan.at.processes
    slurm = r"sbatch --nodes=(\d+)(?: --gpus-per-node=(\d))? scripts/slurm.sh (\w+) (.*)"
    if nodes := re.search(slurm, text):
        assert int(nodes[1]) * int(nodes[2] or 8) == processes
        started, words = nodes[3], nodes[4]
        assert f" {nodes[1]} nodes of {nodes[2] or 8} " in text.replace("\n", "")
    elif several := re.search(r"--nproc_per_node=(\d+) -m nemo_hybrid (\w+) (.*)", text):
        assert int(several[1]) == processes
        started, words = several[2], several[3]
    else:
        started, words = "pretrain", " ".join(command(name, "nemo-hybrid pretrain"))
        assert processes == 1
    assert started == KINDS[type(config)]
    files = re.compile(r"--config (\S+)")
    assert files.findall(words) == files.findall(" ".join(command(name, "nemo-hybrid plan")))


def test_the_tiny_phase_fits_two_processes_of_a_cpu() -> None:
    files = ROOT / "configs/run/long_context_tiny_cpu.yaml", ROOT / "configs/model/tiny.yaml"
    heads = ["--model.num_attention_heads", "4"]
    config = load_config(files[:1], ["--model", str(files[1]), *heads])
    before = load_config([ROOT / "configs/run/pretrain_tiny_cpu.yaml"], heads)
    assert " ".join(heads) in header(files[0].name)
    assert f"--run_dir runs/{Path(str(config.continue_from)).name}" in header(files[0].name)
    assert before.model == replace(config.model, from_hf=None)
    assert (config.data.path, config.data.short.path) == (before.data.path,) * 2
    assert config.data.short.sequence_length == before.data.sequence_length
    options = PlanOptions(processes=2, device="cpu")
    config, shape = ready(config, options)  # type: ignore[assignment]
    plan = make_plan(config, shape, options)
    assert plan.fits
    assert (plan.at.cp, plan.at.accumulation, plan.at.tokens) == (2, 1, 8192)


PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrain_nano": {
        "tokens": 25e12, "warmup": 8.4e9, "decay": 5e12, "lr": (1e-3, 1e-5), "phases": [23.5e12],
    },
    "pretrain_super": {
        "tokens": 25e12, "warmup": 200e9, "decay": 5e12, "lr": (4.5e-4, 4.5e-6), "mtp": 0.3,
        "phases": [20e12], "steps": (993_404, 7_949, 198_682), "recipe": "nvfp4_super",
    },
    "pretrain_ultra": {
        "tokens": 20e12, "warmup": 200e9, "decay": 5e12, "lr": (2.5e-4, 2.5e-6), "mtp": 0.1,
        "phases": [15e12], "steps": (794_728, 7_947, 198_682), "recipe": "nvfp4_ultra",
    },
    "long_context_super": {
        "tokens": 34e9, "step": 16 << 20, "lr": (4.5e-6, None), "mtp": 0.3,
    },
    "long_context_super_short": {
        "tokens": 17e9, "step": 16 << 20, "lr": (4.5e-6, None), "mtp": 0.3, "short": (4096, 0.5),
    },
    "long_context_ultra": {
        "tokens": 33e9, "step": 25_165_824, "lr": (2.5e-6, None), "mtp": 0.1,
        "short": (4096, 0.08),
    },
    "sft_nano": {"tokens": 13_000 * 64 * 262_144, "step": 64 * 262_144},
    "sft_super": {
        "tokens": 80e9, "step": 64 * 262_144, "warmup": 30_000 * 262_144, "lr": (1e-5, None),
        "mtp": 0.3, "loss": "two_stage",
    },
    "sft_ultra": {
        "tokens": 204_800 * 294_912, "step": 64 * 294_912, "warmup": 9_600 * 294_912,
        "lr": (1.5e-5, 1e-6), "mtp": 0.1,
    },
}  # fmt: skip
"""Tokens, of the whole run or of a step; rates at the peak and at the end; steps: of the run, its
warm-up and its decay, by Megatron's files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = PUBLISHED[name]
    config, _ = planned(f"{name}.yaml")
    train = config.train
    step = train.global_batch_size * config.data.sequence_length
    assert step == known.get("step", 3072 * 8192)
    if name.startswith("pretrain"):
        assert (train.schedule, train.aux_loss_weight, train.router_bias_rate) == (
            "wsd", 1e-4, 1e-3,
        )  # fmt: skip
        assert (train.beta1, train.beta2, train.eps) == (0.9, 0.95, 1e-8)
        assert (train.weight_decay, train.clip_grad_norm) == (0.1, 1.0)
        assert isinstance(config, RunConfig)
        assert list(config.data.phases) == known["phases"]
        assert config.precision.recipe == known.get("recipe", "bf16")
    if "long_context" in name:
        short, phase = config.data.short, name.removesuffix("_short")  # type: ignore[attr-defined]
        assert (short.sequence_length, short.share) == known.get("short", (0, 0.5))
        assert (train.schedule, config.data.sequence_length) == ("constant", 1 << 20)
        before = phase if name != phase else name.replace("long_context", "pretrain")
        assert Path(str(config.continue_from)).name == before
    # Steps are whole ones, and Megatron's differ in their rounding.
    counted = [("tokens", train.max_steps), ("warmup", train.warmup_steps)]
    for what, steps in [*counted, ("decay", train.decay_steps)]:
        if what in known:
            assert abs(steps * step - known[what]) < step
    if "steps" in known:
        ours = (train.max_steps, train.warmup_steps, train.decay_steps)
        assert all(
            abs(a - b) <= max(2, 1e-5 * b) for a, b in zip(ours, known["steps"], strict=True)
        )
    peak, last = known.get("lr", (None, None))
    if peak:
        assert train.lr == peak
    if last:
        assert math.isclose(train.lr * train.min_lr_ratio, last, rel_tol=1e-5)
    if "mtp" in known:
        assert train.mtp_loss_weight == known["mtp"]
        assert config.model.mtp_num_depths == 2
    assert getattr(train, "loss", "tokens") == known.get("loss", "tokens")


REINFORCED: dict[str, dict[str, Any]] = {
    "rl_nano": {
        "batch": (128, 16), "lr": 3e-6, "tokens": 49_152, "advantage_clip": 0, "overlong": "mask",
        "importance": "icepop",
    },
    "rl_super": {
        "batch": (256, 16), "lr": 3e-6, "tokens": 49_152, "advantage_clip": 50,
        "importance_low": 0,
    },
    "rl_ultra": {"batch": (512, 16), "lr": 4e-6},
    "rl_ultra_mopd": {"batch": (1024, 1), "lr": 2e-6},
}  # fmt: skip
"""Prompts and answers to each, per step; what is not named of `rl` is as in Ultra's."""


@pytest.mark.parametrize("name", REINFORCED)
def test_published_figures_of_reinforcement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = REINFORCED[name]
    config, _ = planned(f"{name}.yaml")
    assert isinstance(config, RlConfig)
    train, rl = config.train, config.rl
    assert (config.prompts_per_step, config.rollout.samples) == known["batch"]
    assert train.lr == known["lr"]
    assert config.data.sequence_length == known.get("tokens", 32_768)
    assert (train.schedule, train.warmup_steps, train.weight_decay) == ("constant", 10, 0)
    assert (train.beta1, train.beta2, train.eps, train.clip_grad_norm) == (0.9, 0.999, 1e-8, 1)
    assert (rl.updates, rl.kl, rl.std, rl.average) == (1, 0, "others", "tokens")
    assert rl.sequence_filter == 2
    assert rl.importance == known.get("importance", "tis")
    assert rl.importance_high == 5
    assert rl.advantage_clip == known.get("advantage_clip", 20)
    assert rl.overlong == known.get("overlong", "keep")
    if rl.importance == "tis":
        assert rl.importance_low == known.get("importance_low", 0.2)
