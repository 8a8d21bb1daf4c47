"""The routed experts of a MoE layer alone, forward and backward on a CPU, beside transformers'.

Both sides get the same tokens, routing and weights. Before anything is timed, output and gradients
of each are compared with a computation in float64.

    python kernels/benchmarks/cpu_moe.py      # this project's paths and transformers', by shape

prints the least CPU time of each in turns, by one thread, which other work on a machine disturbs
less than the clock on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from measuring import Meter, deviation
from moe_peers import nemo_kernels_layer, transformers_layer
from moe_problem import UNIFORM, Problem, Shape, draw
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.moe import moe_mlp

OURS = "nemo_hybrid"
FIRST_ROUNDS = 3
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest accepted deviation, see ``measuring.deviation``."""


def measure(shape: Shape, threads: int, rounds: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Times of both sides in turns, in fp32 and in bf16; ``peers`` are transformers'
    experts_implementations.

    Raises AssertionError when results are wrong.
    """
    torch.set_num_threads(threads)
    dtypes = {dtype: _in_turns(shape, dtype, rounds, peers) for dtype in TOLERANCES}
    return {
        "shape": asdict(shape),
        "path": backend.path("moe", "cpu").name,
        "dtypes": dtypes,
        "speedups": {dtype: speedup(rows) for dtype, rows in dtypes.items()},
    }


def _in_turns(shape: Shape, dtype: str, rounds: int, peers: tuple[str, ...]) -> dict[str, Any]:
    """Deviation and time of each; of ours and the best peer from more rounds of only these two."""
    p = draw(shape, UNIFORM, "cpu", getattr(torch, dtype))
    layers = {f"transformers ({name})": transformers_layer(name, p) for name in peers}
    layers[OURS] = partial(moe_mlp, p.x_TL, p.ids_TK, p.weights_TK, p.up_EFL, p.down_ELF)
    calls = {name: partial(_with_gradients, layer, p) for name, layer in layers.items()}
    expected = _in_float64(p)
    found = {name: {"deviation": deviation(call(), expected)} for name, call in calls.items()}
    for name, row in found.items():
        assert row["deviation"] <= TOLERANCES[dtype], (
            f"{name} in {dtype} deviates by {row['deviation']:.2g} ({TOLERANCES[dtype]})"
        )
    meter = Meter("cpu", budget_s=600)
    times = meter.times(calls, seconds=0, least=FIRST_ROUNDS)
    # The slow ones would leave the others cold caches.
    pair = {name: calls[name] for name in (best_peer(times), OURS)}
    times |= meter.times(pair, seconds=0, least=rounds)
    return {name: row | times[name] for name, row in found.items()}


def _with_gradients(layer: Callable[[], Tensor], p: Problem) -> tuple[Tensor, ...]:
    y_TL = layer()
    return y_TL, *torch.autograd.grad(y_TL, p.leaves, p.dy_TL)


def _in_float64(p: Problem) -> tuple[Tensor, ...]:
    x_TL, weights_TK, up_EFL, down_ELF = leaves = tuple(
        t.detach().double().requires_grad_() for t in p.leaves
    )
    y_TL = moe_mlp(x_TL, p.ids_TK, weights_TK, up_EFL, down_ELF)
    return y_TL, *torch.autograd.grad(y_TL, leaves, p.dy_TL.double())


def best_peer(rows: dict[str, Any]) -> str:
    """The fastest of transformers' implementations."""
    return min(rows.keys() - {OURS}, key=lambda name: rows[name]["median_ms"])


def speedup(rows: dict[str, Any]) -> float:
    """Time of the best peer over ours."""
    return rows[best_peer(rows)]["median_ms"] / rows[OURS]["median_ms"]


def summary(result: dict[str, Any]) -> str:
    """The result in words."""
    s = Shape(**result["shape"])
    lines = [
        f"Routed experts alone, forward and backward ({s.tokens} tokens, {s.k} of {s.experts} "
        f"experts each, {s.width} -> {s.inner} -> {s.width}; path {result['path']}):"
    ]
    for dtype, rows in result["dtypes"].items():
        peer = best_peer(rows)
        lines.append(
            f"{dtype}: {rows[OURS]['median_ms']:.2f} ms, {peer} {rows[peer]['median_ms']:.2f} ms: "
            f"**{result['speedups'][dtype]:.2f} x**."
        )
    return "\n".join(lines)


SHAPES = (
    Shape("16 of 64 x 128", 2048, 256, 16, 4, 64, 128),
    Shape("128 of 64 x 64", 2048, 256, 128, 8, 64, 64),
    Shape("32 of 512 x 512", 1024, 1024, 32, 4, 512, 512),
    Shape("16 of 1024 x 1024", 512, 2048, 16, 2, 1024, 1024),
)
"""Experts of width x inner width."""


def least_ms(shape: Shape, dtype: str, seconds: float = 8.0) -> dict[str, float]:
    """CPU time of output and gradients, by path, and of transformers' grouped_mm."""
    p = draw(shape, UNIFORM, "cpu", getattr(torch, dtype))
    layers = {name: nemo_kernels_layer(name, p) for name in ("reference", "grouped_mm")}
    layers["transformers"] = transformers_layer("grouped_mm", p)
    least = dict.fromkeys(layers, float("inf"))
    stop = time.monotonic() + seconds
    while time.monotonic() < stop or float("inf") in least.values():
        for name, layer in layers.items():
            began = time.process_time()
            _with_gradients(layer, p)
            least[name] = min(least[name], 1e3 * (time.process_time() - began))
    return least


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| experts | dtype | reference | grouped_mm | transformers |\n|---|---|---:|---:|---:|")
    for shape in SHAPES:
        for dtype in TOLERANCES:
            row = " | ".join(f"{ms:.1f}" for ms in least_ms(shape, dtype).values())
            print(f"| {shape.name} | {dtype} | {row} |", flush=True)
