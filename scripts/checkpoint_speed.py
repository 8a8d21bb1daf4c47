"""Time writing and reading a checkpoint against a plain safetensors file of the same bytes.

    python scripts/checkpoint_speed.py --dir /path/on/the/disk --out checkpoint_speed.json

One process holds a model whose weights, masters and moments make about ``--gib``. In turns,
``--repeat`` times: a synchronous checkpoint, hashed and synced (ours), and the same tensors in one
file by ``safetensors.torch.save_file``, synced (plain); then both are read back, ours after every
checksum was compared: first from the disk, then from the page cache, where hashing and memory are
all that is left. Last: how long an asynchronous checkpoint keeps the training waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.steps import step_name
from nemo_hybrid.commands.doctor import environment
from nemo_hybrid.config.run import DataOptions, ModelOptions, PretrainOptions, RunConfig
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.files import replace_file, sync_directory
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.build import build_run
from nemo_hybrid.train.resume import Saver, restore
from nemo_hybrid.train.run import Position, Run

BYTES_PER_PARAMETER = 16  # fp32 weights, masters and two moments
EXPERT_PARAMETERS = 2 * 512 * 512  # up and down, of one expert below


def build(directory: Path, gib: float) -> Run:
    """A run whose state is at least this large, with moments that are not zero."""
    text = directory / "text"
    text.mkdir()
    for number in range(50):
        (text / f"{number}.txt").write_text(f"document {number} " * 200)
    store = str(directory / "store")
    prepare(store, [str(text)], vocab_size=300, heldout=0)
    experts = int(gib * 2**30 / BYTES_PER_PARAMETER / EXPERT_PARAMETERS) + 1
    config = RunConfig(
        run_dir=str(directory / "run"),
        model=ModelOptions(
            pattern="ME*", vocab_size=512, hidden_size=512, n_routed_experts=experts,
            moe_latent_size=512, moe_intermediate_size=512, mtp_num_depths=0,
        ),
        data=DataOptions(path=str(directory / "store")),
        train=PretrainOptions(eval_sequences=0),
    )  # fmt: skip
    config.precision.recipe = "fp32"
    recipe, world = Pretrain(config), World.start()
    run = build_run(recipe, world, recipe.open_data(world, None))
    for fragment in run.engine.fragments():
        for kind in ("exp_avg", "exp_avg_sq"):
            fragment.tensors[kind].uniform_()
    return run


def all_tensors(run: Run) -> dict[str, Tensor]:
    tensors = dict(run.model.state_dict())
    for fragment in run.engine.fragments():
        for kind, tensor in fragment.tensors.items():
            tensors[f"{kind}|{fragment.name}|{fragment.start}"] = tensor
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def forget(*paths: Path) -> None:
    """Drop files from the page cache, so that reading them takes the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(directory: Path, gib: float, repeat: int, pause: float) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    run = build(directory, gib)
    saver, checkpoints, plain = Saver(run), directory / "checkpoints", directory / "plain"
    tensors = all_tensors(run)

    def rested(action: Callable[[], object]) -> float:
        """Virtual disks slow down after a burst, which would count against whoever comes second."""
        os.sync()
        time.sleep(pause)
        return seconds(action)

    def save_plain() -> None:
        save_file(tensors, plain)
        with plain.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(directory)

    def read_plain() -> None:
        for name, tensor in load_file(plain).items():
            tensors[name].copy_(tensor)

    def read_ours() -> None:
        verify(checkpoints / step_name(step))
        restore(checkpoints / step_name(step), run)

    times: dict[str, list[float]] = {
        name: [] for kind in ("write", "read", "read_cached") for name in (kind, f"{kind}_plain")
    }
    times["blocked"] = []
    for step in range(1, repeat + 2):  # the first round is not counted
        at = Position(step, step)
        turn = 1 if step % 2 else -1  # who goes first changes: freed memory favours the first
        writes = {
            "write": partial(saver.save, checkpoints, at, keep=0, wait=True),
            "write_plain": save_plain,
        }
        reads = {"read": read_ours, "read_plain": read_plain}
        row = {name: rested(action) for name, action in [*writes.items()][::turn]}
        forget(plain, *(checkpoints / step_name(step)).iterdir())
        row |= {name: rested(action) for name, action in [*reads.items()][::turn]}
        row |= {"read_cached": seconds(read_ours), "read_cached_plain": seconds(read_plain)}
        shutil.rmtree(checkpoints)
        row["blocked"] = seconds(partial(saver.save, checkpoints, at, keep=0))
        saver.wait()
        # Both sides write new files; old ones are deleted together, outside of the timing.
        shutil.rmtree(checkpoints)
        plain.unlink()
        for name, value in row.items() if step > 1 else ():
            times[name].append(value)
        print(f"round {step - 1} of {repeat}: {row}", flush=True)
    World.stop()
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "seconds": times,
        "median": middle,
        "write_ratio": middle["write_plain"] / middle["write"],
        "read_ratio": middle["read_plain"] / middle["read"],
        "read_cached_ratio": middle["read_cached_plain"] / middle["read_cached"],
        "blocked_share": middle["blocked"] / middle["write"],
        "environment": environment(),
    }


def table(result: dict[str, Any]) -> str:
    gib, middle = result["bytes"] / 2**30, result["median"]
    lines = [
        f"{gib:.2f} GiB of state, median of {len(result['seconds']['write'])}",
        "",
        "| | checkpoint | plain safetensors | ratio of throughput | bar |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, bar in (("write", "0.7"), ("read", "0.7"), ("read_cached", "")):
        ours, theirs = middle[name], middle[f"{name}_plain"]
        lines.append(
            f"| {name.replace('_', ', ')} | {gib / ours:.2f} GiB/s | {gib / theirs:.2f} GiB/s | "
            f"{theirs / ours:.2f} | {bar} |"
        )
    lines.append(
        f"\nAn asynchronous checkpoint keeps the training waiting for {middle['blocked']:.2f} s: "
        f"{result['blocked_share']:.0%} of a synchronous one (bar 20 %)."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", help="directory on the disk to measure; default: temporary files")
    parser.add_argument("--gib", type=float, default=1.1)
    parser.add_argument("--repeat", type=int, default=6, help="even: each side goes first as often")
    parser.add_argument("--pause", type=float, default=10, help="seconds of rest for the disk")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        result = measure(Path(directory), arguments.gib, arguments.repeat, arguments.pause)
    print(table(result))
    if arguments.out:
        replace_file(arguments.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
