"""Measure the MoE operations on this machine's GPU beside their peers and the hardware's limits.

    python kernels/benchmarks/run.py --budget 540 --out DIR [--peers DIR] [--commit ID]

First the speed of a copy and of a bf16 matrix product: the limits that rows are compared with. Then
row by row, the most important first: every contender's results are compared with an fp32 PyTorch
reference (who is wrong or fails gets no time), then the contenders run in turns, in an order that
rotates. DIR/moe.json and the table in DIR/moe.md are rewritten after each row. What the budget
(seconds) does not suffice for is listed as not measured.

Peers: F.grouped_mm, transformers' experts if it is installed, and scattermoe if it is, or if its
tree stands in the folder given by --peers: the only other one that is known to take experts of two
matrices without a gate and to need no build.

``--device cpu --tiny`` runs the same code on tiny inputs, to test it; the times mean nothing.

Exit status: 0, all of our rows that the budget sufficed for were measured; 1, one was not or was
wrong; 2, wrong arguments or no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of an uninstalled nemo_kernels

import moe_rows
import torch
from measuring import UNUSABLE, DeviceLost, Meter, machine, write_json, write_whole
from moe_problem import CASES, TINY_CASES, Shape, draw

OURS = {"cuda": "triton", "cpu": "reference"}
SECONDS_OF_A_ROW = 8
"""Left in the budget, or no row is begun."""
FIRST_CALLS = (
    "First calls of a second and more: imports, compilation and tuning, as far as no earlier row "
    "and no cache on the disk saved them:"
)
NO_CLAIM = "Tiny inputs on a CPU: shows that the benchmark runs; no time here says anything."


def main() -> int:
    arguments = parse()
    device, ours = arguments.device, arguments.path or OURS[arguments.device]
    if arguments.peers is not None:
        sys.path.append(str(arguments.peers.resolve()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    meter = Meter(device, arguments.budget)
    result: dict[str, Any] = {
        "note": NO_CLAIM if arguments.tiny else "",
        "machine": machine(device, arguments.commit),
        "ours": ours,
        "budget_s": arguments.budget,
        "limits": meter.limits(),
        "rows": [],
        "not_measured": [],
        "lost": "",
    }
    cases = TINY_CASES if arguments.tiny else CASES
    try:
        for row in chain.from_iterable(measure_case(meter, ours, *c, result) for c in cases):
            result["rows"].append(row)
            write(arguments.out, result)
            print(line_of_progress(row, ours), flush=True)
    except DeviceLost as error:
        result["lost"] = str(error)
    write(arguments.out, result)
    print(table(result))
    measured = ["median_ms" in row["found"][ours] for row in result["rows"]]
    return 0 if measured and all(measured) and not result["lost"] else 1


def write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "moe.json", result)
    write_whole(folder / "moe.md", table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--peers", type=Path, help="folder with a tree of scattermoe")
    parser.add_argument("--commit", default="", help="where the checkout has no git history")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--path", help="path of op moe to measure (default: triton; on CPU reference)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, to test the benchmark")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tests the benchmark without")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("on a CPU only --tiny")
    return arguments


def measure_case(
    meter: Meter, ours: str, shape: Shape, routing: str, result: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one shape and routing, as far as the budget goes."""
    if meter.left() < SECONDS_OF_A_ROW:
        result["not_measured"].append(f"{shape.name}, {routing}: no time left")
        return
    try:
        problem = draw(shape, routing, meter.device)
        busiest, used = problem.busiest(), problem.used()
    except UNUSABLE as error:
        result["not_measured"].append(f"{shape.name}, {routing}: {meter.reason(error)}")
        return
    for row in moe_rows.rows(problem, ours):
        if meter.left() < SECONDS_OF_A_ROW:
            result["not_measured"].append(f"{shape.name}, {routing}, {row.name}: no time left")
            continue
        yield {
            "row": row.name,
            "shape": shape.name,
            "routing": routing,
            "busiest_expert": busiest,
            "experts_used": used,
            "flops": row.flops,
            "bytes": row.bytes,
            "limit_ms": row.limit_ms(result["limits"]),
            "found": moe_rows.measure(row, meter),
        }
        if meter.on_gpu:
            torch.cuda.empty_cache()


def best_peer(row: dict[str, Any], ours: str) -> str:
    """The fastest of the others; empty if there is none."""
    times = {n: f["median_ms"] for n, f in row["found"].items() if n != ours and "median_ms" in f}
    return min(times, key=lambda name: times[name]) if times else ""


def line_of_progress(row: dict[str, Any], ours: str) -> str:
    name, peer = f"{row['shape']}, {row['routing']}: {row['row']}", best_peer(row, ours)
    other = f"; {peer} {row['found'][peer]['median_ms']:.3f} ms" if peer else ""
    mine = row["found"][ours]
    return f"{name}: " + (
        f"{mine['median_ms']:.3f} ms{other}" if "median_ms" in mine else mine["unavailable"]
    )


def first_calls(row: dict[str, Any]) -> str:
    """Of the contenders that took a second or more."""
    seconds = {name: found.get("first_s", 0.0) for name, found in row["found"].items()}
    return ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items() if s >= 1)


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    limits, ours = result["limits"], result["ours"]
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = [
        f"# MoE operations: path {ours} of nemo_kernels",
        *(["", f"**{result['note']}**"] if result["note"] else []),
        "",
        f"{about}. Measured limits: copy {limits['bytes_per_s'] / 1e12:.2f} TB/s (read + write), "
        f"bf16 matrix product {limits['flops_per_s'] / 1e12:.0f} TFLOP/s. Medians of calls in "
        "turns, 10th to 90th percentile in brackets; the limit is the longer of the times in which "
        "the copy would move the row's bytes and the matrix product do its FLOP.",
        "",
        "| row | shape | routing (busiest / mean) | ours, ms | speed | best peer | peer, ms | "
        "peer / ours | limit, ms | limit / ours | kept, MiB: ours, peer | peak, MiB: ours, peer |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
        *(line(row, ours, limits) for row in result["rows"]),
    ]
    absent = {
        f"- {row['shape']}, {row['routing']}, {row['row']}: {name}: {found['unavailable']}"
        for row in result["rows"]
        for name, found in row["found"].items()
        if "unavailable" in found
    }
    lines += ["", "Not available:", *sorted(absent)] if absent else []
    first = [
        f"- {row['shape']}, {row['routing']}, {row['row']}: {first_calls(row)}"
        for row in result["rows"]
        if first_calls(row)
    ]
    lines += ["", FIRST_CALLS, "", *first] if first else []
    missing = [f"- {name}" for name in result["not_measured"]]
    if result["lost"]:
        missing.append(f"- all that follows, because the GPU was lost: {result['lost']}")
    lines += ["", "Not measured:", *missing] if missing else []
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any], ours: str, limits: dict[str, float]) -> str:
    peer = best_peer(row, ours)
    mine, other = row["found"][ours], row["found"].get(peer, {})
    ms = mine.get("median_ms")
    # What the limit is about.
    by_flops = row["flops"] / limits["flops_per_s"] > row["bytes"] / limits["bytes_per_s"]
    unit, amount = ("TFLOP/s", row["flops"]) if by_flops else ("TB/s", row["bytes"])
    cells = [
        row["row"],
        row["shape"],
        f"{row['routing']} ({row['busiest_expert']:.1f})",
        f"{ms:.3f} [{mine['p10_ms']:.3f}, {mine['p90_ms']:.3f}]" if ms else "n/a",
        f"{amount / ms / 1e9:.{0 if by_flops else 2}f} {unit}" if ms else "n/a",
        peer or "n/a",
        f"{other['median_ms']:.3f}" if peer else "n/a",
        f"{other['median_ms'] / ms:.2f}" if peer and ms else "n/a",
        f"{row['limit_ms']:.3f}",
        f"{row['limit_ms'] / ms:.2f}" if ms else "n/a",
        *(f"{mib(mine, key)}, {mib(other, key)}" for key in ("kept_bytes", "peak_bytes")),
    ]
    return f"| {' | '.join(cells)} |"


def mib(found: dict[str, Any], key: str) -> str:
    size = found.get(key)
    return "n/a" if size is None else f"{size / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())
