"""Measures what a training process really holds: ``python plan_memory.py STORE NAME``.

Started once per process of a layout. Prints a JSON object of bytes: resident memory above what the
process held before the model was built (at the high-water mark of the last step, between steps, and
at that of building and the first step), and what the engine's own tensors take.

Further words: ``keep`` leaves the allocator as training sets it, ``copy`` makes the copy for an
asynchronous checkpoint first, ``fp32`` takes that recipe.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_hybrid.config.parallel import ParallelOptions
from nemo_hybrid.config.run import (
    DataOptions,
    ModelOptions,
    PrecisionOptions,
    PretrainOptions,
    RunConfig,
)

STEPS = 1
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 process, ZeRO-1": {"processes": 1, "ep": 1, "zero": 1, "rows": 8},
    "2 processes, EP 2, ZeRO-2": {"processes": 2, "ep": 2, "zero": 2, "accumulation": 2, "rows": 3},
    "2 processes, ZeRO-2, recompute ME*-": {
        "processes": 2, "ep": 1, "zero": 2, "recompute": "ME*-", "length": 512,
        "rows": 3,
    },
    "2 processes, CP 2, ZeRO-2": {
        "processes": 2, "ep": 1, "cp": 2, "zero": 2, "length": 2048, "rows": 1,
    },
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "pattern": "ME*EM-",
    "vocab_size": 8192,
    "n_routed_experts": 16,
    "moe_intermediate_size": 256,
    "moe_latent_size": 128,
    "moe_shared_expert_intermediate_size": 512,
    "intermediate_size": 1024,
    "mtp_num_depths": 1,
}
TINY = {
    "hidden_size": 32, "moe_intermediate_size": 8, "moe_latent_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "mamba_num_heads": 2, "moe_shared_expert_intermediate_size": 8,
}  # fmt: skip


def run_of(name: str, store: str = "none", recipe: Any = "bf16") -> RunConfig:
    """The run of a layout."""
    layout = LAYOUTS[name]
    rows, cp = layout["rows"], layout.get("cp", 1)
    return RunConfig(
        model=ModelOptions(**SHAPE),
        data=DataOptions(path=store, sequence_length=layout.get("length", 256)),
        train=PretrainOptions(
            max_steps=STEPS + 1,
            micro_batch_size=rows,
            global_batch_size=rows * layout["processes"] // cp * layout.get("accumulation", 1),
            recompute=layout.get("recompute", ""),
            eval_sequences=0,
        ),
        parallel=ParallelOptions(ep=layout["ep"], cp=cp, zero=layout["zero"]),
        precision=PrecisionOptions(recipe=recipe),
    )


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def exact_malloc() -> None:
    """Hand everything large straight back to the system, so that resident is what is in use.

    Training itself keeps freed memory on CPUs, because fresh pages cost time.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 16)  # M_TRIM_THRESHOLD
    libc.mallopt(-2, 0)  # M_TOP_PAD
    libc.malloc_trim(0)


def main(store: str, name: str, *options: str) -> None:
    from helpers.runs import built, read_steps
    from nemo_hybrid.data.loader import open_blend
    from nemo_hybrid.parallel.engine import prepare_deepspeed
    from nemo_hybrid.parallel.world import World
    from nemo_hybrid.train.resume import Saver
    from nemo_hybrid.train.run import Position
    from nemo_hybrid.train.step import train_step

    config = run_of(name, store, **({"recipe": "fp32"} if "fp32" in options else {}))
    world = World.start(config.parallel.cp)
    if "keep" not in options:
        exact_malloc()
    prepare_deepspeed(world)  # imports that are not memory of the run
    blend = open_blend(config.data, config.model.hybrid())
    # A tiny run first: imports, threads and the like are not memory of the model.
    tiny = replace(config, model=replace(config.model, **TINY))
    tiny = replace(tiny, data=replace(config.data, sequence_length=32))
    run = built(tiny, world)
    train_step(run, next(read_steps(tiny, blend, world.reader, world.readers)), 1e-3)
    del run
    gc.collect()
    before = resident("VmRSS")
    run = built(config, world)
    batches = read_steps(config, blend, world.reader, world.readers)
    train_step(run, next(batches), 1e-3)
    if "copy" in options:
        saver = Saver(run)
        saver.save(Path(store) / "out", Position(1, 1), 1)
        saver.wait()
    gc.collect()
    built = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(STEPS):
        train_step(run, next(batches), 1e-3)
    most = resident("VmHWM")
    between = resident("VmRSS")
    flat = run.engine.engine.optimizer.bit16_groups_flat
    counted = {
        "peak": most - before,
        "between": between - before,
        "first step": built - before,
        "optimizer": sum(3 * 4 * m.numel() for m in run.engine.zero.masters),
        "weights": sum(t.numel() * t.element_size() for t in flat),
    }
    print(json.dumps(counted), flush=True)
    World.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
