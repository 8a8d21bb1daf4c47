"""What NVFP4 costs where it is emulated, on a CPU: per operand, and per training step.

    python kernels/benchmarks/cpu_nvfp4.py --out cpu_nvfp4.json

Operands: nanoseconds per element of a bf16 matrix for each way in which training quantizes one,
beside a cast of the same matrix to fp32, the least that a product on a CPU needs. Steps: forward,
backward and AdamW of the tiny model (16 Mamba heads of 32 instead of 8 of 64, whose in_proj has no
whole blocks) in bf16, in fp32 and in each NVFP4 recipe, in turns; medians. Before they are timed,
the recipes' losses must be near bf16's, but not equal to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cpu_step import Workload, batch, loss_of_ours, stepper, write_json
from torch import Tensor

from nemo_hybrid import HybridConfig, HybridLM
from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.config.run import PrecisionOptions
from nemo_hybrid.precision import policy
from nemo_kernels.lowp import mxfp8
from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.lowp.reference import operands

ROWS, COLUMNS = 2048, 1152
NEAREST, RHT = Rounding(), Rounding(rht=True)
OPERANDS: dict[str, Callable[[Tensor], Any]] = {
    "cast to fp32 (limit)": lambda x: x.float(),
    "x, forward: 1x16 along features": lambda x: operands(x, NEAREST, None),
    "weight: 16x16": lambda x: operands(x, Rounding((16, 16)), None),
    "x, wgrad: 1x16 along tokens, RHT": lambda x: operands(x, None, RHT),
    "dy, dgrad: 1x16 along features, SR": lambda x: operands(x, Rounding(seed=1), None),
    "dy, wgrad: 1x16 along tokens, RHT, SR": lambda x: operands(x, None, RHT._replace(seed=1)),
    "MXFP8: 1x32 along features": lambda x: mxfp8.operand(x, columnwise=False),
    "MXFP8: 1x32 along tokens": lambda x: mxfp8.operand(x, columnwise=True),
}
RECIPES = ("bf16", "fp32", "nvfp4_super", "nvfp4_all")
LEAST_EFFECT, MOST_EFFECT = 1e-5, 0.5
"""Nats by which a recipe may move the loss; less would mean that nothing is quantized."""


def model_shape() -> HybridConfig:
    return HybridConfig(mtp_num_depths=0, mamba_num_heads=16, mamba_head_dim=32)


def operand_costs(rounds: int) -> dict[str, float]:
    """Nanoseconds per element, the median of calls in turns."""
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in OPERANDS}
    for _ in range(rounds + 2):
        for name, make in OPERANDS.items():
            start = time.perf_counter()
            make(x)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[2:]) * 1e9 / x.numel() for name, t in times.items()}


def build(recipe: str) -> HybridLM:
    """The tiny model with the recipe's formats; the same weights, rounded to its dtype."""
    options, shape = PrecisionOptions(recipe=recipe), model_shape()  # type: ignore[arg-type]
    model = HybridLM(shape, seed=0).to(policy.weight_dtype(options))
    policy.Precision(model, options, shape, seed=0, rank=0, device_type="cpu")
    return model


def step_times(work: Workload) -> dict[str, dict[str, Any]]:
    """Per recipe its loss before the first step, the seconds of its steps and their median.

    Raises AssertionError where a recipe's loss is not what it should be.
    """
    ids_BS = batch(work)
    models = {recipe: build(recipe) for recipe in RECIPES}
    losses = {r: lambda m=m: loss_of_ours(m, ids_BS)[0] for r, m in models.items()}
    found: dict[str, dict[str, Any]] = {r: {"loss": loss().item()} for r, loss in losses.items()}
    for recipe, row in found.items():
        effect = abs(row["loss"] - found["bf16"]["loss"])
        if recipe.startswith("nvfp4"):
            assert LEAST_EFFECT < effect < MOST_EFFECT, f"{recipe} moves the loss by {effect:.2g}"
    steps = {recipe: stepper(models[recipe], losses[recipe]) for recipe in RECIPES}
    times = [[step() for step in steps.values()] for _ in range(work.steps + 2)][2:]
    for recipe, seconds in zip(RECIPES, zip(*times, strict=True), strict=True):
        found[recipe] |= {"median_s": statistics.median(seconds), "steps_s": list(seconds)}
    return found


def measure(work: Workload) -> dict[str, Any]:
    torch.set_num_threads(work.threads)
    steps = step_times(work)
    bf16 = steps["bf16"]["median_s"]
    return {
        "environment": environment(),
        "work": asdict(work),
        "shape": asdict(model_shape()),
        "operands_ns_per_element": operand_costs(3 * work.steps),
        "steps": steps,
        "over_bf16": {recipe: row["median_s"] / bf16 for recipe, row in steps.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    work, machine = Workload(**result["work"]), result["environment"]
    lines = [
        f"NVFP4 emulated on {machine['cpu']}, {work.threads} threads, torch {machine['torch']}, "
        f"commit {machine['commit'][:10]}{' + changes' if machine['uncommitted_changes'] else ''}",
        "",
        "| operand | ns per element |",
        "|---|---:|",
    ]
    costs = result["operands_ns_per_element"].items()
    lines += [f"| {name} | {nanoseconds:.2f} |" for name, nanoseconds in costs]
    lines += [
        "",
        f"| step of {work.batch} x {work.length} tokens | ms | over bf16 | first loss |",
        "|---|---:|---:|---:|",
    ]
    for recipe, row in result["steps"].items():
        over = result["over_bf16"][recipe]
        lines.append(f"| {recipe} | {row['median_s'] * 1e3:.0f} | {over:.2f} | {row['loss']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--steps", type=int, default=Workload.steps, help="timed steps per recipe")
    parser.add_argument("--threads", type=int, default=Workload.threads)
    arguments = parser.parse_args()
    if arguments.steps < 3 or arguments.threads < 1:
        parser.error("--steps must be at least 3 and --threads at least 1")
    result = measure(Workload(steps=arguments.steps, threads=arguments.threads))
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
