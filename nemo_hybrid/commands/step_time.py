"""How long a training step takes on a GPU: modelled, not measured.

The objective and the model run forward and backward on a micro-batch without data, seen by a
`Meter`; what DeepSpeed's engine does besides is a table. ``docs/planning.md`` says what this leaves
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hybrid.chips import Device, rates
from nemo_hybrid.commands.memory import STATE_BYTES, Group, Layout, groups_of
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.meter import Meter, Scope, Work
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LatentMoE
from nemo_hybrid.model.layer import Layer
from nemo_hybrid.model.linear import Linear
from nemo_hybrid.model.mamba2 import CausalConv1d, Mamba2
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.mtp import MTPBlock
from nemo_hybrid.model.norm import GatedRMSNorm, RMSNorm
from nemo_hybrid.model.recompute import recompute_layers
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel.context import SequenceShards
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.train.flops import train_flops_per_token
from nemo_kernels import backend

OPS = ("ssd", "conv1d", "norm", "attention", "moe", "loss", "linear", "optimizer")
_OPS: dict[type[nn.Module], str] = {
    Mamba2: "ssd",
    CausalConv1d: "conv1d",
    RMSNorm: "norm",
    GatedRMSNorm: "norm",
    Layer: "norm",  # the residual stream's addition
    Attention: "attention",
    LatentMoE: "moe",
    Linear: "linear",
    nn.Embedding: "linear",
    MLP: "linear",
    MTPBlock: "linear",
    NextToken: "loss",
}
"""Of what a module does and no module within it."""
_COUNTED = ("triton", "grouped_mm", "varlen", "by_document")
"""Paths that tell of tensors without data what they would do; libraries' kernels need data."""
_OWN = ("ssd", "conv1d", "norm", "attention", "moe", "loss")

# What ZeRO-1 of DeepSpeed 0.19 does with each element of a process's share once per step: name,
# bytes, and whether parameter by parameter.
_UPDATE = (
    ("gradient into the bucket, divided, added to the share", 8 + 8 + 12, True),
    ("norm in fp64", 4 + 8 + 8, True),
    ("clipping", 8, False),
    ("fused AdamW", 28, False),
    ("rounded to weights", 6, False),
)


class Even(AllToAllDispatcher):
    """Sends every process as many rows; the network takes no time, that is planned apart."""

    def forward(self, x_TL: Tensor, topk_ids_TK: Tensor, *given: Any) -> Tensor:
        self.slots = topk_ids_TK.numel()
        return super().forward(x_TL, topk_ids_TK, *given)

    def exchange(self, *_: Any) -> None:
        pass

    def rows(self, counts_E: Tensor, received_counts_E: Tensor) -> tuple[list[int], list[int]]:
        super().rows(counts_E, received_counts_E)  # which waits
        each, more = divmod(self.slots, self.ep_size)
        rows = [each + (process < more) for process in range(self.ep_size)]
        return rows, rows


class Apart(SequenceShards):
    """The last part of every row; the network takes no time, that is planned apart."""

    def __init__(self, parts: int) -> None:
        self.part, self.parts = parts - 1, parts

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def _all_to_all(self, *_: Any) -> None:
        pass


@dataclass
class Counted:
    """What one micro-batch and the update after the last one do on one process."""

    at: Layout
    micro_batch: Counter[tuple[Work, Scope]]
    update: Counter[Work]
    kept: Counter[Scope]
    """Bytes for the backward pass."""
    waits: Counter[str]
    """Of the host, per micro-batch."""
    peak: int
    """Most bytes that are alive; of a sample of layers it means nothing."""

    def seconds(self, device: Device) -> tuple[float, float]:
        """Of a micro-batch and of an update."""
        at = rates(device)
        micro_batch = sum(n * work.seconds(at) for (work, _), n in self.micro_batch.items())
        return micro_batch, sum(n * work.seconds(at) for work, n in self.update.items())


def paths_of(which: str) -> dict[str, str]:
    """The path that each operation takes: ``gpu``, the best one that can be counted; ``reference``,
    but for experts, whose reference asks the device how many rows each has."""
    usable = {op: backend.importable(op, _COUNTED) for op in _OWN}
    if which == "reference":
        usable = {op: paths if op == "moe" else [] for op, paths in usable.items()}
    return {op: (paths or ["reference"])[0] for op, paths in usable.items()}


def count(at: Layout, paths: Mapping[str, str], documents: int = 1, whole: bool = True) -> Counted:
    """Count a step. ``whole`` False: one layer of each kind stands for all of its kind, which is
    faster. ``documents``: of each row, equally long."""
    cfg = at.cfg if whole else replace(at.cfg, pattern="".join(dict.fromkeys(at.cfg.pattern)))
    model = _model(cfg, at)
    objective = NextToken(model, TrainOptions())
    batch, groups = _batch(at, documents), groups_of(at)
    with Meter("optimizer") as meter, backend.choosing(**paths):
        meter.owned("", [*model.parameters(), *model.buffers()])
        for layer in model.backbone.layers:
            meter.owned(layer.letter, layer.parameters())
        sizes = (STATE_BYTES * group.part for group in groups)
        state = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        for parameter in model.parameters():
            gradient = torch.empty(parameter.shape, device="meta")
            parameter.register_post_accumulate_grad_hook(partial(_accumulate, gradient))
        with meter.following(objective, _scopes(model)):
            with meter.scope(op="loss"):
                counts_N = objective.count(batch.to("meta"), 0)
                if at.cp > 1:
                    batch = objective.cut(batch, at.cp - 1, at.cp, 0)
                batch = batch.to("meta")
            normalizer = Normalizer(counts_N, at.rows * at.accumulation * at.processes)
            objective(batch, normalizer).loss.backward()
        del state
    times = Counter("" if whole else at.cfg.pattern)
    return Counted(
        at=at,
        micro_batch=Counter(
            {(w, s): n * (times[s.part] or 1) for (w, s), n in meter.works.items()}
        ),
        update=_update(groups),
        kept=Counter({s: n * (times[s.part] or 1) for s, n in meter.kept.items()}),
        waits=meter.waits,
        peak=meter.peak,
    )


def _accumulate(gradient: Tensor, parameter: Tensor) -> None:
    """As DeepSpeed does, before the next gradient comes."""
    assert parameter.grad is not None
    gradient.add_(parameter.grad.to(torch.float32))
    parameter.grad = None


def _model(cfg: ModelConfig, at: Layout) -> HybridLM:
    shape = HybridConfig(*(getattr(cfg, f.name) for f in fields(ModelConfig)))
    with torch.device("meta"):
        even = Even(cfg.n_routed_experts, at.ep, 0) if at.ep > 1 else None
        parts = Apart(at.cp) if at.cp > 1 else None
        model = HybridLM(shape, dispatcher=even, sequence=parts).to(
            torch.float32 if at.width == 4 else torch.bfloat16
        )
    recompute_layers(model, at.recompute, at.tile)
    return model


def _batch(at: Layout, documents: int) -> Batch:
    starts_BW = torch.zeros(at.rows, at.length + 1, dtype=torch.bool)
    starts_BW[:, [i * at.length // documents for i in range(documents)]] = True
    return Batch.from_windows(torch.zeros(starts_BW.shape, dtype=torch.int64), starts_BW)


def _scopes(model: HybridLM) -> Callable[[nn.Module], tuple[str | None, str | None] | None]:
    """Layers are parts by their letters, and so is the MTP block."""
    mtp = set() if model.mtp is None else set(model.mtp.layers)

    def scope(module: nn.Module) -> tuple[str | None, str | None] | None:
        if type(module) not in _OPS:
            return None
        part = None
        if isinstance(module, Layer):
            part = "mtp" if module in mtp else module.letter
        return part, _OPS[type(module)]

    return scope


def _update(groups: Sequence[Group]) -> Counter[Work]:
    works: Counter[Work] = Counter()
    for group in groups:
        for name, size, by_parameter in _UPDATE:
            launches = len(group.sizes) if by_parameter else 1
            works[Work(name, launches, size * group.part)] += 1
    return works


def report(counted: Counted, device: Device) -> dict[str, Any]:
    """Figures of one process on a device, by the names that results have. Bytes and launches of
    operations are those of a micro-batch, with its share of the update; their times add up."""
    at, rate = counted.at, rates(device)
    ops = {
        op: dict.fromkeys(("us", "bytes_per_token", "launches", "kept_bytes"), 0.0) for op in OPS
    }
    units: dict[str, dict[str, float]] = {}
    done = [(op, work, float(n)) for (work, (_, op)), n in counted.micro_batch.items()]
    done += [("optimizer", work, n / at.accumulation) for work, n in counted.update.items()]
    for op, work, n in done:
        us = n * work.seconds(rate) * 1e6 / at.tokens
        ops[op]["us"] += us
        ops[op]["bytes_per_token"] += n * work.bytes / at.tokens
        ops[op]["launches"] += n * work.launches
        if work.flop:
            unit = units.setdefault(f"{work.unit}, {work.dtype}", {"flop_per_token": 0, "us": 0})
            unit["flop_per_token"] += n * work.flop / at.tokens
            unit["us"] += us
    for (_, op), size in counted.kept.items():
        ops[op]["kept_bytes"] += size
    us = sum(found["us"] for found in ops.values())
    multiplied = sum(unit["flop_per_token"] for unit in units.values())
    fp32 = sum(unit["flop_per_token"] for name, unit in units.items() if name.startswith("fp32"))
    return {
        "us_per_token": us,
        "tokens_per_s": 1e6 / us,
        "mfu": train_flops_per_token(at.cfg, at.length) * 1e6 / us / (device.matmul_tflops * 1e12),
        "fp32_matmul_flop_share": fp32 / multiplied,
        "host_syncs_per_micro_batch": sum(counted.waits.values()),
        "peak_bytes": counted.peak,
        "ops": ops,
        "units": units,
        "waits": dict(counted.waits),
    }
