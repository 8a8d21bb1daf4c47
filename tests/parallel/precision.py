"""What the processes do for the tests of number formats (see worker.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helpers.runs import built, read_steps, tiny_run
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.model.mamba2 import Mamba2
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.parallel import engine
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import Engine, prepare_deepspeed
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.optim import parameter_groups
from nemo_hybrid.train.run import Run
from nemo_hybrid.train.step import train_step

LR = 1e-5
SHARES = (1.0, 2.0**-12, 2.0**-11, 2.0**-10)  # of (rank 0, rank 1) in micro-batch 0, then in 1

IN_BF16: dict[str, dict[str, Any]] = {
    "communication": {"communication_data_type": "bf16"},
    "accumulation": {"data_types": {"grad_accum_dtype": "bf16"}},
}
"""Settings of DeepSpeed that would round sums."""


def run(world: World, store: Path, out: Path, zero: int, rounded: str) -> None:
    """Write precision-ZERO.json on rank 0; with ``rounded``, a key of IN_BF16, the sums alone."""
    given = engine._deepspeed_config
    settings = IN_BF16[rounded] if rounded else {}
    with patch.object(engine, "_deepspeed_config", lambda *a: given(*a) | settings):
        results: dict[str, Any] = {"accumulated": world.gather(_accumulated(world, store, zero))}
    if not rounded:
        results |= _kept_in_fp32(world, store, zero)
    if world.rank == 0:
        name = f"precision-{zero}-{rounded}" if rounded else f"precision-{zero}"
        (out / f"{name}.json").write_text(json.dumps(results))


def _kept_in_fp32(world: World, store: Path, zero: int) -> dict[str, Any]:
    """Train the bf16 recipe for two tiny steps, and look at the parameters that stay fp32."""
    # Long time steps: then dt_bias and A_log matter as much as they do late in a training.
    config = tiny_run(
        store,
        model={"time_step_min": 0.1, "time_step_max": 0.5},
        train={"micro_batch_size": 4},
        ep=world.size,
        zero=zero,
        recipe="bf16",
    )
    hybrid = config.model.hybrid()
    blend = open_blend(config.data, hybrid)
    run = built(config, world)
    seen: list[dict[str, str]] = []
    named = dict(run.model.named_parameters())
    kept = {name: p for name, p in named.items() if name.rsplit(".", 1)[-1] in FP32_NAMES}

    def look(module: nn.Module, _: Any) -> None:
        own = module.named_parameters(recurse=False)
        seen.append({name: str(p.dtype) for name, p in own})

    for module in run.model.modules():
        if isinstance(module, Mamba2):
            module.register_forward_pre_hook(look)
    data = read_steps(config, blend, world.rank, world.size)
    batches = next(data)
    before = {name: p.detach().clone() for name, p in kept.items()}
    train_step(run, batches, LR)
    moved = {n: float((p.detach() - before[n]).abs().max()) for n, p in kept.items()}
    train_step(run, batches, LR)
    more = [batch for _ in range(4) for batch in next(data)]

    def notices(dtype: torch.dtype) -> dict[str, bool]:
        # A list: every rank runs every forward pass, however early one sees the update.
        return {name: any([_shows(run, batch, name, dtype) for batch in more]) for name in kept}

    return {
        "dtypes": seen,
        "moved": moved,
        "shows": notices(torch.float32),
        "shows_in_bf16": notices(torch.bfloat16),
        "other_dtypes": sorted({str(p.dtype) for name, p in named.items() if name not in kept}),
    }


@torch.no_grad()
def _shows(run: Run, batch: Batch, name: str, dtype: torch.dtype) -> bool:
    """Whether the mixer's output inside the engine notices that a parameter, held in dtype, grows
    by LR."""
    mixer, _, own = name.rpartition(".")
    module = run.model.get_submodule(mixer)
    parameter = module.get_parameter(own)
    held = parameter.clone()
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda *call: outputs.append(call[2]))
    unit = Normalizer(run.objective.count(batch, 0), len(batch.ids_BS))
    for value in (held.to(dtype), held.to(dtype) + LR):
        parameter.copy_(value)
        run.engine(batch, unit)
    hook.remove()
    parameter.copy_(held)
    return not torch.equal(outputs[0], outputs[1])


class _Linear(nn.Module):
    """Parameters whose gradient is whatever number the forward pass is given."""

    def __init__(self, dispatcher: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.matrix = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        self.A_log = nn.Parameter(torch.ones(64))
        self.experts = nn.ParameterDict({"up_proj": torch.ones(1, 8, 8, dtype=torch.bfloat16)})
        self.dispatcher = dispatcher

    def forward(self, gradient: float) -> Tensor:
        total = torch.zeros(())
        for parameter in self.parameters():
            total = total + parameter.float().sum()
        return total * gradient


def _accumulated(world: World, store: Path, zero: int) -> dict[str, list[float]]:
    """Summed gradients (from the first moments after one step) by parameter."""
    prepare_deepspeed(world)
    config = tiny_run(store, train={"micro_batch_size": 2, "clip_grad_norm": 0.0}, zero=zero)
    dispatcher = AllToAllDispatcher(world.size, world.size, world.rank)
    model = nn.ModuleDict({"layer": _Linear(dispatcher)})
    groups = parameter_groups(model, config.train)
    ours = Engine(model["layer"], model, groups, config, world, 2, dispatcher)
    for micro in range(2):
        share = SHARES[micro * 2 + world.rank]
        ours.backward(ours(share))
        if micro == 0:
            ours.end_micro_batch()
    ours.update(1e-3)
    return {
        f.name: (f.tensors["exp_avg"].double() / (1 - config.train.beta1)).unique().tolist()
        for f in ours.fragments()
    }
