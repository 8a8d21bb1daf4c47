"""Measure NVFP4 on this machine's GPU: its quantizers beside a copy, and a training step beside
bf16's.

    python kernels/benchmarks/nvfp4.py --budget 150 --out DIR [--commit ID]

Quantizers: every way in which training makes an operand, compared first with the PyTorch reference
(what is not equal to the bit gets no time), then timed in turns with the eager reference. The limit
is the time in which a copy would move what cannot be avoided: x read once for the largest value and
once to quantize it, and the results written. Step: forward, backward and AdamW of a model of
Nano's proportions with fewer layers and experts, in bf16 and in recipe nvfp4_super, in turns; the
matrix products of both are the same bf16 ones where a GPU has no FP4 units.

DIR/nvfp4.json and DIR/nvfp4.md are rewritten after each row. ``--device cpu --tiny`` runs the same
code on tiny inputs, to test it; the times mean nothing.

Exit status: 0, all rows were measured; 1, one was not; 2, wrong arguments or no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of an uninstalled nemo_hybrid
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # and nemo_kernels

import torch
from measuring import UNUSABLE, DeviceLost, Meter, machine, write_json, write_whole
from torch import Tensor

from nemo_kernels import backend, lowp
from nemo_kernels.lowp.operand import Rounding

NEAREST, SQUARE, RHT = Rounding(), Rounding((16, 16)), Rounding(rht=True)
SIDES: dict[str, tuple[Rounding | None, Rounding | None]] = {
    "x, forward: 1x16": (NEAREST, None),
    "weight: 16x16": (SQUARE, None),
    "x, wgrad: 1x16 along tokens, RHT": (None, RHT),
    "dy, dgrad: 1x16, SR": (Rounding(seed=1), None),
    "dy, dgrad and wgrad in one read: SR, RHT": (Rounding(seed=1), Rounding(rht=True, seed=2)),
}
SHAPES = {"cuda": ((16384, 4096), (16384, 17152)), "cpu": ((64, 96),)}
TOKENS = {"cuda": (2, 8192), "cpu": (2, 64)}
SECONDS = {"cuda": 1.0, "cpu": 0.01}
OURS = {"cuda": "triton", "cpu": "reference"}
SECONDS_OF_A_ROW = 8
NO_CLAIM = "Tiny inputs on a CPU: shows that the benchmark runs; no time here says anything."


class Unequal(RuntimeError):
    """A quantizer does not give the reference's bits."""


def quantizer(path: str, x: Tensor, sides: tuple[Rounding | None, Rounding | None]) -> Any:
    """The operands that a path makes of x."""
    backend.choose(nvfp4=path)
    return lowp.operands(x, *sides)


def check_equal(found: Any, expected: Any) -> None:
    """Raise Unequal where decoded values or tensor scales differ; packed ones are not compared."""
    for a, b in zip(found, expected, strict=True):
        if a is None or type(a) is not type(b):
            continue
        if not torch.equal(a.values, b.values) or not torch.equal(a.tensor_scale, b.tensor_scale):
            raise Unequal("differs from the reference")


def written_bytes(operands: Any) -> int:
    tensors = {t.data_ptr(): t for o in operands if o for t in o if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def quantizer_row(
    meter: Meter, ours: str, shape: tuple[int, int], name: str, limits: dict[str, float]
) -> dict[str, Any]:
    generator = torch.Generator(meter.device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=meter.device).bfloat16()
    sides = SIDES[name]
    row: dict[str, Any] = {"row": name, "shape": list(shape)}
    try:
        call, found, row["first_s"] = meter.first(lambda: partial(quantizer, ours, x, sides))
        check_equal(found, quantizer("reference", x, sides))
        moved = 2 * 2 * x.numel() + written_bytes(found)
        del found
        calls = {ours: call}
        if ours != "reference":
            calls["reference"] = partial(quantizer, "reference", x, sides)
        times = meter.times(calls, seconds=SECONDS[meter.device] * len(calls))
    except UNUSABLE as error:
        return row | {"unavailable": meter.reason(error)}
    limit_ms = moved / limits["bytes_per_s"] * 1e3
    return row | {"bytes": moved, "limit_ms": limit_ms, "found": times}


class Step(NamedTuple):
    """A model and its optimizer."""

    model: Any
    optimizer: torch.optim.Optimizer
    ids_BS: Tensor

    def __call__(self) -> float:
        h_BSD, _ = self.model.forward_hidden(self.ids_BS)
        logits = self.model.lm_head(h_BSD).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), self.ids_BS.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def build_step(device: str, recipe: str) -> Step:
    from nemo_hybrid import HybridConfig, HybridLM
    from nemo_hybrid.config.run import PrecisionOptions
    from nemo_hybrid.precision import policy

    if device == "cuda":
        shape = HybridConfig(
            pattern="MEMEM*EMEMEM*EME", vocab_size=32768, hidden_size=2688, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, mamba_num_heads=64, mamba_head_dim=64,
            ssm_state_size=128, n_groups=8, chunk_size=128, n_routed_experts=32,
            num_experts_per_tok=6, moe_intermediate_size=1856, moe_latent_size=None,
            moe_shared_expert_intermediate_size=3712, mtp_num_depths=0,
        )  # fmt: skip
    else:
        shape = HybridConfig(mtp_num_depths=0, mamba_num_heads=16, mamba_head_dim=32)
    options = PrecisionOptions(recipe=recipe)  # type: ignore[arg-type]
    model = HybridLM(shape, seed=0).to(device, torch.bfloat16)
    policy.Precision(model, options, shape, seed=0, rank=0, device_type=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(shape.vocab_size, TOKENS[device], generator=generator)
    return Step(model, optimizer, ids_BS.to(device))


def step_row(meter: Meter, ours: str) -> dict[str, Any]:
    batch, length = TOKENS[meter.device]
    row: dict[str, Any] = {"row": "training step", "shape": [batch, length]}
    backend.choose(nvfp4=ours)
    try:
        calls: dict[str, Callable[[], object]] = {}
        for recipe in ("bf16", "nvfp4_super"):
            calls[recipe], loss, seconds = meter.first(partial(build_step, meter.device, recipe))
            row |= {f"{recipe}_first_loss": loss, f"{recipe}_first_s": seconds}
        times = meter.times(calls, seconds=10 * SECONDS[meter.device], least=3)
    except UNUSABLE as error:
        return row | {"unavailable": meter.reason(error)}
    over = times["nvfp4_super"]["median_ms"] / times["bf16"]["median_ms"]
    return row | {"found": times, "over_bf16": over}


def measure(meter: Meter, ours: str, result: dict[str, Any], folder: Path) -> None:
    """Fill ``result`` row by row. Raises DeviceLost when the GPU can run nothing any more."""
    rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (
            f"{name} {list(shape)}",
            partial(quantizer_row, meter, ours, shape, name, result["limits"]),
        )
        for shape in SHAPES[meter.device]
        for name in SIDES
    ]
    rows.insert(len(SIDES), ("training step", partial(step_row, meter, ours)))
    for name, make in rows:
        if meter.left() < SECONDS_OF_A_ROW:
            result["not_measured"].append(f"{name}: no time left")
            continue
        result["rows"].append(make())
        print(line(result["rows"][-1], ours), flush=True)
        write(folder, result)


def line(row: dict[str, Any], ours: str) -> str:
    name = f"{row['row']} | {' x '.join(map(str, row['shape']))}"
    if "unavailable" in row:
        return f"| {name} | n/a: {row['unavailable']} | | | |"
    if "over_bf16" in row:
        bf16, low = (row["found"][recipe]["median_ms"] for recipe in ("bf16", "nvfp4_super"))
        return f"| {name} | {low:.1f} | {bf16:.1f} (bf16) | {row['over_bf16']:.2f} x bf16 | |"
    mine = row["found"][ours]["median_ms"]
    peer = row["found"].get("reference", {}).get("median_ms") if ours != "reference" else None
    limit = row["limit_ms"]
    other = f"{peer:.3f}" if peer else "n/a"
    return f"| {name} | {mine:.3f} | {other} | {limit:.3f} | {limit / mine:.2f} |"


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    copy = result["limits"]["bytes_per_s"] / 1e12
    lines = [
        f"# NVFP4: path {result['ours']} of nemo_kernels",
        *(["", f"**{result['note']}**"] if result["note"] else []),
        "",
        f"{about}. Measured limit: copy {copy:.2f} TB/s (read + write). Medians of calls in turns.",
        "",
        "| row | shape | ours, ms | eager reference, ms | limit, ms | limit / ours |",
        "|---|---|---:|---:|---:|---:|",
        *(line(row, result["ours"]) for row in result["rows"]),
    ]
    missing = [f"- {name}" for name in result["not_measured"]]
    return "\n".join([*lines, *(["", "Not measured:", *missing] if missing else [])]) + "\n"


def write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "nvfp4.json", result)
    write_whole(folder / "nvfp4.md", table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=150, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to test the benchmark")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tests the benchmark without")
    if (arguments.device == "cpu") != arguments.tiny:
        parser.error("--tiny is for --device cpu, and the only size there")
    return arguments


def main() -> int:
    arguments = parse()
    device, ours = arguments.device, OURS[arguments.device]
    arguments.out.mkdir(parents=True, exist_ok=True)
    meter = Meter(device, arguments.budget)
    result: dict[str, Any] = {
        "note": NO_CLAIM if arguments.tiny else "",
        "machine": machine(device, arguments.commit),
        "ours": ours,
        "limits": meter.limits(),
        "rows": [],
        "not_measured": [],
    }
    try:
        measure(meter, ours, result, arguments.out)
    except DeviceLost as error:
        result["not_measured"].append(f"all that follows: the GPU was lost: {error}")
    write(arguments.out, result)
    whole = not result["not_measured"] and all("found" in row for row in result["rows"])
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
