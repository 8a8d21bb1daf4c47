"""Time one CPU training step of our model and of transformers' NemotronHForCausalLM.

    python kernels/benchmarks/cpu_step.py --out cpu_step.json

One step is forward, backward and AdamW on the same batch from the same weights; no gradient
checkpointing, no multi-token prediction. Every candidate (ours, also with the path of the routed
experts that ``auto`` leaves, and each ``experts_implementation`` of transformers; in fp32 and bf16)
first runs alone in a process of its own, which gives its peak memory and a first time. The fastest
of each side then run in turns in one process; their medians make the result. Losses must agree to
1e-3 in fp32, and the check must be able to fail: routing is spread over the experts, and without
the routed experts the loss is another. The routed experts of one layer are timed alone as well
(``cpu_moe``), and so are the matrix products of each step, in turns with it (``step_products``):
what a step takes beside them is what can be saved.

transformers clamps Mamba time steps from below by ``time_step_min``; ours have no clamp. The peer's
configuration gets a ``time_step_min`` so small that the clamp never acts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_hybrid.commands.doctor import environment

if TYPE_CHECKING:  # The parent process stays small: children inherit its peak memory.
    import torch
    from torch import nn

    from nemo_hybrid import HybridConfig, HybridLM

LOSS_TOLERANCE = 1e-3
BF16_LOSS_TOLERANCE = 0.05  # nats per token; bf16 keeps 8 bits, and may choose other experts
MIN_EXPERT_EFFECT = 0.1  # nats by which a token's loss must move without the routed experts
MAX_LOAD = 4.0  # busiest expert's slots over the mean
NO_CLAMP = 1e-30


class Candidate(NamedTuple):
    """``experts`` is transformers' experts_implementation; empty for our model, whose op moe takes
    ``path``."""

    experts: str
    dtype: str
    path: str = "auto"

    @property
    def name(self) -> str:
        chosen = "" if self.path == "auto" else f" ({self.path})"
        return f"transformers ({self.experts})" if self.experts else f"nemo_hybrid{chosen}"


PEER_EXPERTS = ("eager", "grouped_mm", "batched_mm")
DTYPES = ("float32", "bfloat16")
OTHER_PATH = "grouped_mm"
CANDIDATES = [
    *(Candidate("", d) for d in DTYPES),
    *(Candidate("", d, OTHER_PATH) for d in DTYPES),
    *(Candidate(e, d) for e in PEER_EXPERTS for d in DTYPES),
]


@dataclass(frozen=True)
class Workload:
    """Tokens of one step and how often it is timed."""

    batch: int = 8
    length: int = 256
    steps: int = 15
    threads: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def tiny_config() -> HybridConfig:
    from nemo_hybrid import HybridConfig

    # The defaults of HybridConfig are the tiny model: MEM*EMEM*E, hidden 256, 16 experts top-4 …
    return HybridConfig(mtp_num_depths=0)


def build_ours() -> HybridLM:
    """Our model with weights large enough for every part to show in the loss."""
    import torch

    from nemo_hybrid import HybridLM

    model = HybridLM(tiny_config(), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "lm_head.weight":
                weight.mul_(10)
            elif ".mixer." in name and weight.dim() >= 2 and "conv1d" not in name:
                weight.mul_(2 if "gate" in name else 5)
    return model


def build_peer(ours: HybridLM, experts: str) -> nn.Module:
    """transformers' model with the weights of ours."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from nemo_hybrid.config.hf import config_json

    fields = config_json(ours.config, dtype="float32") | {"time_step_min": NO_CLAMP}
    config = NemotronHConfig(**fields)
    model = NemotronHForCausalLM._from_config(config, experts_implementation=experts)
    state = {
        name.replace("backbone.", "model.", 1): tensor
        for name, tensor in ours.state_dict().items()
        if not name.startswith("mtp.")
    }
    model.load_state_dict(state)
    return model


def build(candidate: Candidate, work: Workload) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """A model in training mode and a function that computes the loss of the batch."""
    import torch

    from nemo_kernels import backend

    backend.choose(moe=candidate.path)
    ours = build_ours()
    ids_BS = batch(work)
    if not candidate.experts:
        ours.to(getattr(torch, candidate.dtype)).train()
        return ours, lambda: loss_of_ours(ours, ids_BS)[0]
    peer = build_peer(ours, candidate.experts).to(getattr(torch, candidate.dtype)).train()
    return peer, lambda: peer(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss


def loss_of_ours(model: HybridLM, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy and that of every predicted token."""
    import torch

    from nemo_kernels.loss import linear_cross_entropy

    h_BSD, _ = model.forward_hidden(ids_BS)
    h_RD = h_BSD[:, :-1].flatten(0, 1)
    scale_R = torch.full((h_RD.shape[0],), 1 / h_RD.shape[0])
    return linear_cross_entropy(h_RD, model.lm_head.weight, ids_BS[:, 1:].flatten(), scale_R)


def batch(work: Workload) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (work.batch, work.length)
    return torch.randint(tiny_config().vocab_size, shape, generator=generator)


def stepper(model: nn.Module, loss_function: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        loss_function().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def check_comparison(work: Workload) -> dict[str, float]:
    """Losses of both models in fp32 and what shows that comparing them says something.

    Differences are means over tokens of the absolute difference of a token's cross-entropy.
    Raises AssertionError when the models differ or the comparison is blind.
    """
    import torch

    ids_BS = batch(work)
    ours = build_ours().train()
    peer, peer_loss = build(Candidate(PEER_EXPERTS[0], "float32"), work)
    with torch.no_grad():
        loss, ce_R = loss_of_ours(ours, ids_BS)
        logits_RV = peer(input_ids=ids_BS, use_cache=False).logits[:, :-1].flatten(0, 1)
        peer_ce_R = torch.nn.functional.cross_entropy(
            logits_RV, ids_BS[:, 1:].flatten(), reduction="none"
        )
        _, stats = ours.forward_hidden(ids_BS)
        for name, weight in ours.named_parameters():
            if name.endswith("experts.down_proj"):
                weight.zero_()
        _, ce_without_R = loss_of_ours(ours, ids_BS)
        counts = [layer.counts_BE.sum(0) for (layer,) in stats.values()]
        loads = [counts_E / counts_E.float().mean() for counts_E in counts]
        found = {
            "loss_ours": loss.item(),
            "loss_peer": peer_loss().item(),
            "token_difference": (ce_R - peer_ce_R).abs().mean().item(),
            "experts_effect": (ce_R - ce_without_R).abs().mean().item(),
            "max_load": max(load.max().item() for load in loads),
            "unused_experts": sum(int((load == 0).sum()) for load in loads),
        }
    difference = max(abs(found["loss_ours"] - found["loss_peer"]), found["token_difference"])
    effect, unused, busiest = (found[k] for k in ("experts_effect", "unused_experts", "max_load"))
    assert difference <= LOSS_TOLERANCE, f"the models' losses differ by {difference:.2g}"
    assert effect >= MIN_EXPERT_EFFECT, f"routed experts move a token's loss by {effect:.2g} only"
    assert unused == 0, f"{unused} experts receive no token"
    assert busiest <= MAX_LOAD, f"an expert has {busiest:.1f} x the mean load"
    return found


def check_pair(pair: tuple[Candidate, Candidate], losses: list[float]) -> list[float]:
    """The losses of the two that are timed. Raises AssertionError when they differ by more than
    LOSS_TOLERANCE, or BF16_LOSS_TOLERANCE where one of them computes in bf16."""
    in_bf16 = any(candidate.dtype == "bfloat16" for candidate in pair)
    limit = BF16_LOSS_TOLERANCE if in_bf16 else LOSS_TOLERANCE
    difference = abs(losses[0] - losses[1])
    assert difference <= limit, f"the timed models' losses differ by {difference:.2g} ({limit})"
    return losses


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_alone(candidate: Candidate, work: Workload) -> dict[str, Any]:
    """Median time and peak memory of one candidate; call it in a fresh process."""
    import torch
    import transformers.models.nemotron_h.modeling_nemotron_h  # noqa: F401  both sides pay for it
    from step_products import replay

    torch.set_num_threads(work.threads)
    imported = peak_mib()
    model, loss_function = build(candidate, work)
    loss = loss_function().item()
    step = stepper(model, loss_function)
    step()
    seconds = [step() for _ in range(max(3, work.steps // 3))]
    peak = peak_mib()
    products, flop = replay(step)
    products()
    turns = [step() / products() for _ in range(max(3, work.steps // 3))]
    return {
        "side": candidate.name,
        "dtype": candidate.dtype,
        "loss": loss,
        "seconds_alone": statistics.median(seconds),
        "peak_mib": peak,
        "peak_mib_over_imports": peak - imported,
        "product_flop": flop,
        "over_products": statistics.median(turns),
    }


def run_pair(ours: Candidate, peer: Candidate, work: Workload) -> dict[str, Any]:
    """Steps of both sides in turns, after the comparison is checked."""
    import torch

    torch.set_num_threads(work.threads)
    result: dict[str, Any] = {"check": check_comparison(work)}
    built = [build(candidate, work) for candidate in (ours, peer)]
    result["losses"] = check_pair((ours, peer), [loss().item() for _, loss in built])
    steps = [stepper(*pair) for pair in built]
    for step in steps * 2:
        step()
    times = [[step() for step in steps] for _ in range(work.steps)]
    for key, seconds in zip(("ours", "peer"), zip(*times, strict=True), strict=True):
        result[key] = {"median_s": statistics.median(seconds), "steps_s": seconds}
    return result


def moe_layer(work: Workload) -> dict[str, Any]:
    """The routed experts of one layer of the tiny model on the tokens of a step."""
    import cpu_moe
    from moe_problem import Shape

    c = tiny_config()
    sizes = (c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, c.expert_size)
    shape = Shape("tiny model", work.tokens, *sizes, c.moe_intermediate_size)
    return cpu_moe.measure(shape, work.threads, 2 * work.steps, PEER_EXPERTS)


def in_child(call: dict[str, Any], work: Workload) -> dict[str, Any]:
    """Run this file in a fresh process with its threads limited; return the result."""
    threads = str(work.threads)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(call)]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmark process failed on {call}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def child(call: dict[str, Any]) -> dict[str, Any]:
    work = Workload(**call["work"])
    candidates = [Candidate(*c) for c in call["candidates"]]
    if not candidates:
        return moe_layer(work)
    if len(candidates) == 1:
        return run_alone(candidates[0], work)
    return run_pair(candidates[0], candidates[1], work)


def fastest(rows: list[dict[str, Any]], ours: bool) -> Candidate:
    """Of ours with the path that ``auto`` takes."""
    times = {
        candidate: row["seconds_alone"]
        for candidate, row in zip(CANDIDATES, rows, strict=True)
        if bool(candidate.experts) != ours and candidate.path == "auto"
    }
    return min(times, key=lambda candidate: times[candidate])


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    from cpu_moe import summary  # the parent may import torch now: no child follows

    work, machine = Workload(**result["work"]), result["environment"]
    pair, check = result["pair"], result["pair"]["check"]
    lines = [
        f"CPU training step: {work.batch} x {work.length} tokens, {work.threads} threads, "
        f"{machine['cpu']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"commit {machine['commit'][:10]}{' + changes' if machine['uncommitted_changes'] else ''}",
        "",
        "| side | dtype | ms, alone | ms, in turns | tokens/s | peak MiB | over imports | loss | "
        "over its products |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for candidate, row in zip(CANDIDATES, result["alone"], strict=True):
        key = {tuple(pair["candidates"][0]): "ours", tuple(pair["candidates"][1]): "peer"}.get(
            candidate
        )
        seconds = pair[key]["median_s"] if key else row["seconds_alone"]
        turns = f"**{seconds * 1e3:.0f}**" if key else ""
        lines.append(
            f"| {row['side']} | {row['dtype']} | {row['seconds_alone'] * 1e3:.0f} | {turns} | "
            f"{work.tokens / seconds:.0f} | {row['peak_mib']:.0f} | "
            f"{row['peak_mib_over_imports']:.0f} | {row['loss']:.4f} | "
            f"{row['over_products']:.2f} x |"
        )
    lines += [
        "",
        f"Fastest against fastest, in turns, median of {work.steps} steps: "
        f"**{result['speedup']:.2f} x** tokens/s of transformers.",
        f"fp32 losses {check['loss_ours']:.5f} and {check['loss_peer']:.5f}; "
        f"a token's loss differs by {check['token_difference']:.1e} on average, "
        f"by {check['experts_effect']:.2f} without the routed experts; "
        f"busiest expert {check['max_load']:.2f} x the mean, none unused.",
        "",
        summary(result["moe_layer"]),
    ]
    return "\n".join(lines)


def measure(work: Workload) -> dict[str, Any]:
    rows = []
    for candidate in CANDIDATES:
        rows.append(in_child({"candidates": [candidate], "work": asdict(work)}, work))
        print(f"{candidate.name} {candidate.dtype}: {rows[-1]['seconds_alone'] * 1e3:.0f} ms",
              file=sys.stderr)  # fmt: skip
    best = [fastest(rows, ours=True), fastest(rows, ours=False)]
    pair = in_child({"candidates": best, "work": asdict(work)}, work) | {"candidates": best}
    return {
        "environment": environment(),
        "work": asdict(work),
        "alone": rows,
        "pair": pair,
        "moe_layer": in_child({"candidates": [], "work": asdict(work)}, work),
        "speedup": pair["peer"]["median_s"] / pair["ours"]["median_s"],
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    from nemo_hybrid.files import replace_file

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--steps", type=int, default=Workload.steps, help="timed steps per side")
    parser.add_argument("--threads", type=int, default=Workload.threads)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    if arguments.steps < 10 or arguments.threads < 1:
        parser.error("--steps must be at least 10 and --threads at least 1")
    result = measure(Workload(steps=arguments.steps, threads=arguments.threads))
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
