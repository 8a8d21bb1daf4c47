"""A training step of a model of some billion parameters on one GPU: ours beside transformers'.

    python kernels/benchmarks/train_step.py --budget 100 --out DIR

One step is forward and backward of some micro-batches of one row, and AdamW on bf16 weights; both
sides have the same weights, drawn on the GPU, and read the same random tokens. No gradient
checkpointing, no DeepSpeed, no multi-token prediction. Every contender runs in a process of its
own, as it would alone: first ours, with one document and with many, then each way in which
transformers computes experts; the best of these counts. DIR/train_step.json is rewritten after
each; who fails is listed with the reason. The first losses of both sides must agree, or there is no
comparison.

``--device cpu --tiny`` runs the same code on a tiny model in this process, to test it; the times
mean nothing. Exit status: 0; 1, one of ours failed or the losses differ; 2, wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from measuring import UNUSABLE, machine, summary, write_json
from torch import Tensor, nn

if TYPE_CHECKING:
    from nemo_hybrid.config.hf import HybridConfig

ROOT = Path(__file__).resolve().parents[2]
LOSS_TOLERANCE = 0.05  # nats per token, between two ways to compute in bf16
NO_CLAMP = 1e-30  # transformers clamps Mamba's time steps from below, ours have no clamp
TINY = {
    "pattern": "ME*", "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 32, "mtp_num_depths": 0, "initializer_range": 0.15,
}  # fmt: skip


class Contender(NamedTuple):
    """``experts``: transformers' experts_implementation; empty: our model, with so many documents
    in the row."""

    name: str
    experts: str = ""
    documents: int = 1


CONTENDERS = {
    c.name: c
    for c in (
        Contender("ours"),
        Contender("ours, 80 documents", documents=80),
        Contender("transformers, grouped_mm", "grouped_mm"),
        Contender("transformers, eager", "eager"),
    )
}


class Task(NamedTuple):
    """What everyone does. ``seconds``: for timed steps; at least three are taken."""

    config: str
    tokens: int
    micro_batches: int
    device: str
    seconds: float

    def shape(self) -> HybridConfig:
        from nemo_hybrid.config.hf import HybridConfig
        from nemo_hybrid.config.read import load_config

        if self.config == "tiny":
            return HybridConfig(**TINY)  # type: ignore[arg-type]
        return load_config([], ["--model", self.config]).model.hybrid()


def build_ours(shape: HybridConfig, device: str) -> nn.Module:
    """In bf16 but for what always is fp32, drawn on the device: on the CPU it takes a minute."""
    from nemo_hybrid.model.hybrid import HybridLM

    with torch.device("meta"):
        model = HybridLM(shape).to(torch.bfloat16)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    draw_weights(model, shape)
    return model.train()


def build_peer(shape: HybridConfig, device: str, experts: str) -> nn.Module:
    """transformers' model with the same weights."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from nemo_hybrid.config.hf import config_json

    fields = config_json(shape, dtype="bfloat16") | {"time_step_min": NO_CLAMP}
    config = NemotronHConfig(**fields)
    with torch.device(device):
        model = NemotronHForCausalLM._from_config(
            config, dtype=torch.bfloat16, experts_implementation=experts
        )
    draw_weights(model, shape)
    return model.train()


def draw_weights(model: nn.Module, shape: HybridConfig) -> None:
    """Every parameter by its name in our model, whatever model it is; the head larger than usual,
    so that the loss tells models apart."""
    from nemo_hybrid.model.init import draw_parameter

    for name, parameter in model.named_parameters():
        name = name.removeprefix("model.").removeprefix("backbone.")
        generator = torch.Generator(parameter.device).manual_seed(sum(name.encode()))
        draw_parameter(parameter, f"backbone.{name}", shape, generator)
        if name == "lm_head.weight":
            parameter.data.mul_(10)


def losses(model: nn.Module, contender: Contender, ids_BS: Tensor) -> Callable[[], Tensor]:
    """What computes the mean cross-entropy of the next tokens."""
    from nemo_kernels.documents import Documents
    from nemo_kernels.loss import linear_cross_entropy

    if contender.experts:
        return lambda: model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    documents = None
    if contender.documents > 1:
        numbers_BS = torch.arange(ids_BS.shape[1])[None] * contender.documents // ids_BS.shape[1]
        documents = Documents.from_numbers(numbers_BS).to(ids_BS.device)
    labels_R = ids_BS.roll(-1, 1).flatten()
    scale_BS = torch.full(ids_BS.shape, 1 / (ids_BS.numel() - len(ids_BS)), device=ids_BS.device)
    scale_BS[:, -1] = 0
    scale_R = scale_BS.flatten()

    def loss() -> Tensor:
        h_BSD, _ = model.forward_hidden(ids_BS, documents)  # type: ignore[operator]
        head = model.get_parameter("lm_head.weight")
        return linear_cross_entropy(h_BSD.flatten(0, 1), head, labels_R, scale_R)[0]

    return loss


def prepared(task: Task, contender: Contender) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """What computes the loss, and what takes a step."""
    shape = task.shape()
    if contender.experts:
        model = build_peer(shape, task.device, contender.experts)
    else:
        model = build_ours(shape, task.device)
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(shape.vocab_size, (1, task.tokens), generator=generator).to(task.device)
    loss = losses(model, contender, ids_BS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        for _ in range(task.micro_batches):
            (loss() / task.micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return loss, step


def measure(task: Task, contender: Contender) -> dict[str, Any]:
    """Figures of one contender; raises what it raises."""
    from nemo_hybrid.chips import DEVICES
    from nemo_hybrid.model.operations import operations, sizes
    from nemo_hybrid.train.flops import peak_flops, train_flops_per_token
    from nemo_kernels import backend
    from nemo_kernels.products import sum_in_fp32

    sum_in_fp32()
    shape, on_gpu = task.shape(), task.device == "cuda"
    backend.check_at(sizes(shape))
    start = time.monotonic()
    ops = [] if contender.experts else operations(shape)
    paths = {op: path for op, path, _ in backend.report(task.device, ops)}
    loss, step = prepared(task, contender)
    with torch.no_grad():
        first_loss = loss().item()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    step()
    wait()
    first_s = time.monotonic() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    begin = time.monotonic()
    while len(times) < 3 or time.monotonic() - begin < task.seconds:
        before = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - before) * 1e3)
    found = summary(times)
    rate = task.tokens * task.micro_batches / found["median_ms"] * 1e3
    # On a CPU the figures are only there to be seen.
    peak = peak_flops("cuda", torch.bfloat16) if on_gpu else DEVICES["cpu"].matmul_tflops * 1e12
    flops = train_flops_per_token(shape, task.tokens)
    return {
        **found,
        "tokens_per_s": rate,
        "mfu": rate * flops / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "first_loss": first_loss,
        "first_step_s": first_s,
        "paths": paths,
    }


def measured(task: Task, contender: Contender, limit_s: float) -> dict[str, Any]:
    """The figures, or ``failed`` with the reason: on a GPU of a process of its own."""
    if task.device == "cpu":
        try:
            return measure(task, contender)
        except UNUSABLE as error:
            return {"failed": f"{type(error).__name__}: {error}"[:300]}
    words = [sys.executable, str(Path(__file__).resolve()), "--child", contender.name]
    words += ["--task", json.dumps(task)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit_s:.0f} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": " / ".join(said[-2:])[-300:] or f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours over the fastest of transformers', where both ran and their losses agree."""
    ran = {name: row for name, row in rows.items() if "failed" not in row}
    peers = [row for name, row in ran.items() if CONTENDERS[name].experts]
    if "ours" not in ran or not peers:
        return {}
    ours, peer = ran["ours"], max(peers, key=lambda row: row["tokens_per_s"])
    memory = ours["peak_gib"] and ours["peak_gib"] / peer["peak_gib"]
    difference = abs(ours["first_loss"] - peer["first_loss"])
    return {
        "speedup": ours["tokens_per_s"] / peer["tokens_per_s"],
        "memory": memory,
        "loss_difference": difference,
        "agree": difference <= LOSS_TOLERANCE,
    }


def line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:26} FAILED: {row['failed']}"
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "?"
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] else "-"
    return (
        f"{name:26} {row['tokens_per_s']:>10,.0f} tokens/s   MFU {mfu:>6}   {memory:>10}   "
        f"loss {row['first_loss']:.4f}   first step {row['first_step_s']:.0f} s"
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "model" / "nano_3b.yaml"))
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=4, help="per step")
    parser.add_argument("--budget", type=float, default=150, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.child:
        print(json.dumps(measure(Task(*json.loads(given.task)), CONTENDERS[given.child])))
        return 0
    if min(given.tokens, given.micro_batches) < 1:
        parser.error("--tokens and --micro_batches must be at least 1")
    task = Task(given.config, given.tokens, given.micro_batches, given.device, 8.0)
    if given.tiny:
        task = Task("tiny", 128, 2, given.device, 0.0)
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + given.budget
    result: dict[str, Any] = {"machine": machine(given.device, ""), "task": task._asdict()}
    rows = result["rows"] = {}
    for name, contender in CONTENDERS.items():
        left = until - time.monotonic()
        rows[name] = measured(task, contender, left) if left > 0 else {"failed": "no time was left"}
        result["compared"] = compared(rows)
        write_json(given.out / "train_step.json", result)
        print(line(name, rows[name]), flush=True)
    found = result["compared"]
    if found:
        memory = f", {found['memory']:.2f} x the memory" if found["memory"] else ""
        print(
            f"ours: {found['speedup']:.2f} x the tokens/s of transformers' best{memory}; first "
            f"losses differ by {found['loss_difference']:.4f} nats per token"
        )
    broken = any("failed" in row for name, row in rows.items() if not CONTENDERS[name].experts)
    return 1 if broken or not found.get("agree", True) else 0


if __name__ == "__main__":
    sys.exit(main())
