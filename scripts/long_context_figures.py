"""What dividing rows, tiles and offloading save, each figure beside the bar that it is held to.

    python scripts/long_context_figures.py [--only NAME ...]    # minutes on two cores

On a CPU, with gloo, one thread per process. Memory is the high-water mark of resident pages of
fresh processes during a step, above what they held before it, gradients included; bytes sent and
kept are counted; times are compared in turns, because other programs may run beside. Nothing here
tells of GPUs or networks. Exit status: 0 where all bars hold, else 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from cli import plan_memory  # noqa: E402
from helpers.corpus import write_corpus  # noqa: E402
from helpers.processes import run_python  # noqa: E402
from nemo_hybrid.commands import memory  # noqa: E402
from nemo_hybrid.commands.plan import gb  # noqa: E402
from nemo_hybrid.commands.step_time import paths_of  # noqa: E402
from nemo_hybrid.config.hf import HybridConfig  # noqa: E402
from nemo_hybrid.config.run import TrainOptions  # noqa: E402
from nemo_hybrid.data.batch import Batch  # noqa: E402
from nemo_hybrid.meter import Meter  # noqa: E402
from nemo_hybrid.model.hybrid import HybridLM  # noqa: E402
from nemo_hybrid.model.recompute import recompute_layers  # noqa: E402
from nemo_hybrid.objectives.base import Normalizer  # noqa: E402
from nemo_hybrid.objectives.next_token import NextToken  # noqa: E402
from nemo_hybrid.parallel.context import SequenceShards  # noqa: E402
from nemo_hybrid.parallel.world import World  # noqa: E402
from nemo_kernels import backend  # noqa: E402
from nemo_kernels.documents import Packing, Shard  # noqa: E402
from nemo_kernels.ssd import ssd_scan  # noqa: E402

SHAPE = HybridConfig(
    pattern="ME*-ME*-", vocab_size=1024, hidden_size=256, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=64,
    n_groups=4, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=256,
    moe_latent_size=128, moe_shared_expert_intermediate_size=512, intermediate_size=1024,
    mtp_num_depths=0,
)  # fmt: skip


class ByHeads(SequenceShards):
    """Mamba-2 as it would be if it traded tokens for heads, as attention does."""

    def scan(
        self, x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor,
        D_H: Tensor, chunk_size: int, documents: Packing,
    ) -> Tensor:  # fmt: skip
        assert isinstance(documents, Shard)
        sizes, own = list(documents.sizes), [x_BSHP.shape[1]] * self.parts

        def trade(t_BTHX: Tensor) -> Tensor:
            """All tokens of some heads or groups."""
            by_process = t_BTHX.unflatten(2, (self.parts, -1)).permute(2, 1, 0, 3, 4)
            return self._exchange(by_process.flatten(0, 1).contiguous(), own, sizes).transpose(0, 1)

        heads = slice(self.part * len(A_H) // self.parts, (self.part + 1) * len(A_H) // self.parts)
        x, dt, B, C = (trade(t) for t in (x_BSHP, dt_BSH[..., None], B_BSGN, C_BSGN))
        given = (x, dt[..., 0], A_H[heads], B, C, D_H[heads], chunk_size, documents.whole)
        y_RTBhP = self._exchange(ssd_scan(*given)[0].transpose(0, 1).contiguous(), sizes, own)
        parts = y_RTBhP.unflatten(0, (self.parts, -1))
        return parts.permute(2, 1, 0, 3, 4).flatten(2, 3)


class Step:
    """Forward and backward passes on one row, of which each process may have a part."""

    def __init__(
        self, shape: HybridConfig, sequence: SequenceShards | None = None, recompute: str = "",
        tile: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.sequence = sequence
        self.model = HybridLM(shape, sequence=sequence, seed=0).to(dtype)
        recompute_layers(self.model, recompute, tile)
        self.objective = NextToken(self.model, TrainOptions())

    def __call__(self, tokens: int) -> None:
        ids_BW = torch.arange(tokens + 1).remainder(1009)[None]
        batch = Batch.from_windows(ids_BW, torch.zeros_like(ids_BW, dtype=torch.bool))
        counts_N = self.objective.count(batch, 0)
        if self.sequence:
            batch = self.objective.cut(batch, self.sequence.part, self.sequence.parts, 0)
        self.objective(batch, Normalizer(counts_N, 1)).loss.backward()


# ---- what each process measures ------------------------------------------------------------------


def sequence_of(world: World, kind: type[SequenceShards] = SequenceShards) -> SequenceShards | None:
    return kind(SequenceShards.of(world).group) if world.cp > 1 else None


def peak(world: World, pattern: str, recompute: str, tile: int = 0) -> int:
    """Bytes at most above what is there between steps."""
    plan_memory.exact_malloc()  # what is freed shall not count
    step = Step(replace(SHAPE, pattern=pattern), sequence_of(world), recompute, tile)
    step(512)
    gc.collect()
    plan_memory.exact_malloc()
    before = plan_memory.resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(8192)
    return plan_memory.resident("VmHWM") - before


def sent(world: World, dtype: str) -> list[int]:
    """Bytes that leave this process for others in a Mamba-2 layer, forward and backward, by states
    and by heads; gradients show that the layer is the same."""
    shape = replace(SHAPE, pattern="M", ssm_state_size=128)
    totals, gradients = [0, 0], []
    exchange = SequenceShards._all_to_all

    def counting(self: SequenceShards, out: Tensor, x: Tensor, *sizes: list[int]) -> None:
        to = sizes[1]
        totals[isinstance(self, ByHeads)] += (sum(to) - to[self.part]) * x[:1].nbytes
        exchange(self, out, x, *sizes)

    SequenceShards._all_to_all = counting  # type: ignore[method-assign]
    for kind in (SequenceShards, ByHeads):
        step = Step(shape, sequence_of(world, kind), dtype=getattr(torch, dtype))
        step(16384)
        gradients.append(step.model.backbone.layers[0].mixer.in_proj.weight.grad.float())
    off = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert off < (1e-4 if dtype == "float32" else 0.05), off
    return totals


def ratios(world: World, rounds: int) -> list[float]:
    """Time of a step over both processes, over that of process 0 alone, taken in turns."""
    alone, divided = Step(SHAPE), Step(SHAPE, sequence_of(world))
    found = []
    for number in range(rounds + 1):
        seconds = []
        for step in (alone, divided):
            dist.barrier()
            began = time.perf_counter()
            if step is divided or world.rank == 0:
                step(8192)
            dist.barrier()
            seconds.append(time.perf_counter() - began)
        if number:  # the first one warms up
            found.append(seconds[1] / seconds[0])
    return found


def measure(what: str, cp: int, arguments: list[Any]) -> None:
    torch.set_num_threads(1)
    world = World.start(cp)
    print(json.dumps({"peak": peak, "sent": sent, "ratios": ratios}[what](world, *arguments)))
    World.stop()


# ---- figures -------------------------------------------------------------------------------------


Figure = tuple[str, float, float]
"""What it is, its value, and how large it may be."""


def run(what: str, processes: int, *arguments: Any) -> list[Any]:
    """What each of so many fresh processes found."""
    words = [__file__, "--measure", json.dumps([what, processes, arguments])]
    finished = run_python(words, processes, fresh=True)
    return [json.loads(f.stdout.splitlines()[-1]) for f in finished]


def peaks() -> Iterator[Figure]:
    for recompute, bars in (("", (0.62, 0.35)), ("ME*-", (0.55, 0.30))):
        name = f"peak above base, 8k tokens, recompute {recompute or 'nothing'}"
        one = max(run("peak", 1, SHAPE.pattern, recompute))
        for cp, bar in zip((2, 4), bars, strict=True):
            most = max(run("peak", cp, SHAPE.pattern, recompute))
            yield f"{name}, cp {cp} ({gb(most)}) over 1 ({gb(one)})", most / one, bar


def tiles() -> Iterator[Figure]:
    whole, tiled = (run("peak", 1, "EEEE", "E", tile)[0] for tile in (0, 2048))
    name = f"the same of E layers, recomputed, tile 2048 ({gb(tiled)}) over none ({gb(whole)})"
    yield name, tiled / whole, 0.65


def offload() -> Iterator[Figure]:
    """Counted on tensors without data, as a GPU would keep them."""
    for layers in (8, 24):
        shape = replace(SHAPE, pattern="ME*-" * (layers // 4))
        with torch.device("meta"):
            model = HybridLM(shape).bfloat16()
        recompute_layers(model, "ME*-", offload=True)
        with Meter() as meter, backend.choosing(**paths_of("gpu")):
            h_BSD, _ = model.forward_hidden(torch.zeros(1, 8192, dtype=torch.int64, device="meta"))
            kept = meter.live
        one = 2 * 8192 * shape.hidden_size
        yield f"inputs left on the device by {layers} recomputed layers, offload", kept / one, 3
        del h_BSD


def states() -> Iterator[Figure]:
    for dtype in ("float32", "bfloat16"):
        for cp, bar in ((2, 1 / 50), (4, 1 / 25)):
            by_states, by_heads = map(max, zip(*run("sent", cp, dtype), strict=True))
            name = f"sent by an M layer, 16k tokens, {dtype}, cp {cp}, states ({gb(by_states)})"
            yield f"{name} over heads ({gb(by_heads)})", by_states / by_heads, bar


def times() -> Iterator[Figure]:
    found = run("ratios", 2, 12)[0]
    low, *_, high = statistics.quantiles(found, n=10)
    name = f"step of cp 2 over cp 1, {len(found)} turns (80% in {low:.2f} to {high:.2f})"
    yield name, statistics.median(found), 0.75


def plan() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as out:
        store, name = write_corpus(Path(out) / "store"), "2 processes, CP 2, ZeRO-2"
        finished = run_python([plan_memory.__file__, store, name], 2, fresh=True)
    measured = max(json.loads(f.stdout.splitlines()[-1])["peak"] for f in finished)
    config = plan_memory.run_of(name)
    predicted = memory.peak(memory.layout_of(config, config.model, 2, cpu=True)).device
    off = abs(predicted / measured - 1)
    yield f"plan at cp 2 ({gb(predicted)}) off measured ({gb(measured)})", off, 0.15


FIGURES: dict[str, Callable[[], Iterator[Figure]]] = {
    f.__name__: f for f in (peaks, tiles, offload, states, times, plan)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        measure(*json.loads(words.measure))
        return 0
    missed = 0
    for name in words.only:
        for text, value, bar in FIGURES[name]():
            missed += value > bar
            held = "MISSED" if value > bar else "held"
            print(f"{value:7.3f}  {text}; at most {bar:.3g}: {held}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
