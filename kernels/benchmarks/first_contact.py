"""What this project does on a GPU that it has not met before, step by step.

    python kernels/benchmarks/first_contact.py STEP ... --out DIR

Steps: ``compiler``, can kernels be launched; ``ops``, every path of every operation on packed
documents against the reference on the CPU; ``training``, one step and 20 of a tiny model against
the CPU, checkpoints, and the same by `pretrain` and DeepSpeed; ``packed``, rows of 4096 and 4160
tokens, of which cuDNN is known to make NaN; ``deterministic``, the same gradients twice;
``profile``, the kernels that three steps of a model of 3.4 billion parameters take longest for.

Every check is a row: passed, FAILED or skipped, with the reason and figures; one that fails stops
no other. DIR/first_contact.json has all rows of all steps so far. ``--device cpu --tiny`` runs the
same code on tiny inputs, to test it. Exit status: 0; 1, a row failed; 2, wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contact_problems import Problem, deviation, problems, results
from measuring import machine, write_json
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.02
"""Of an operation in bf16, in the norm, as in self-checks."""
FP32_LIMIT = 2e-3
"""Of gradients of the tiny model in fp32, in which no rounding chooses an expert."""
BF16_LIMIT = 0.05  # nats per token
STEPS_TAKEN = 20
TOP = 15


class Skipped(Exception):
    """A row that cannot be here."""


class Given(NamedTuple):
    device: str
    tiny: bool
    out: Path

    @property
    def wait(self) -> Callable[[], object]:
        return torch.cuda.synchronize if self.device == "cuda" else lambda: None


Row = tuple[str, Callable[[], dict[str, Any]]]


def run(step: str, rows: Iterator[Row], given: Given) -> bool:
    """Do a step's rows; whether none failed."""
    path = given.out / "first_contact.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    done: list[dict[str, Any]] = []
    for name, check in begun(rows):
        start = time.monotonic()
        row: dict[str, Any] = {"name": name, "state": "passed"}
        try:
            row |= check()
            given.wait()
        except Skipped as reason:
            row |= {"state": "skipped", "reason": str(reason)}
        except Exception as error:  # whatever it is, the next row may tell more
            text = " ".join(str(error).split())[:400]
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            row |= {"state": "FAILED", "reason": f"{type(error).__name__}: {text} ({where})"}
        row["seconds"] = round(time.monotonic() - start, 2)
        done.append(row)
        figures = {k: v for k, v in row.items() if k not in ("name", "state", "kernels")}
        print(f"{row['state']:8} {name}  {json.dumps(figures)}", flush=True)
        write_json(path, found | {"machine": machine(given.device, ""), step: done})
    return all(row["state"] != "FAILED" for row in done)


def begun(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows; a step that cannot begin, or go on, is a row that fails."""
    try:
        yield from rows
    except Exception as error:
        broken = error

        def fail() -> dict[str, Any]:
            raise broken

        yield "the step itself", fail


def within(found: float, limit: float, **more: Any) -> dict[str, Any]:
    """The figures of a row. Raises AssertionError: it deviates by more."""
    assert found <= limit, f"deviates by {found:.3g}, limit {limit:.3g} {more or ''}"
    return {"deviation": found, "limit": limit, **more}


def compiler(given: Given) -> Iterator[Row]:
    def builds() -> dict[str, Any]:
        from nemo_hybrid.commands.doctor import c_compiler

        said = c_compiler()
        assert "builds what" in said, said
        return {"compiler": said}

    def launches() -> dict[str, Any]:
        from nemo_kernels.moe import kernel

        if given.device not in kernel.DEVICE_TYPES:
            raise Skipped("CPU tensors need Triton's interpreter")
        y_RL = torch.ones(4, 8, device=given.device)
        inverse_TK = torch.arange(4, device=given.device).view(2, 2)
        assert kernel.combine_slots(y_RL, inverse_TK).eq(2).all()
        return {}

    yield "C compiler and Python.h", builds
    yield "a kernel is launched", launches


def ops(given: Given) -> Iterator[Row]:
    from nemo_kernels import backend

    found = problems(given.tiny)
    for op in backend.OPS:
        names = [*backend.importable(op, backend.paths(op)), "reference"]
        for name in names:
            for problem in found.get(op, []):
                yield (
                    f"{op} {name}, {problem.name}",
                    lambda o=op, n=name, p=problem: by_path(o, n, p, given),
                )
    for op in backend.OPS:  # at Nano's sizes, with the time that compilation takes

        def choice(op: str = op) -> dict[str, Any]:
            chosen = backend.path(op, given.device)
            return {"path": chosen.name, "why": chosen.reason}

        yield f"choice of {op}", choice


def by_path(op: str, name: str, problem: Problem, given: Given) -> dict[str, Any]:
    """A path's results in bf16 against the reference's on the CPU in fp32."""
    from nemo_kernels import backend

    expected = results(problem, "cpu", torch.float32)
    try:
        with backend.choosing(**{op: name}):
            found = results(problem, given.device, torch.bfloat16)
    except ValueError as error:
        if "does not run on" in str(error):
            raise Skipped(str(error)) from error
        raise
    return within(*worst(found, expected), path=name)


def worst(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    return max(deviation(a, b) for a, b in zip(found, expected, strict=True)), LIMIT


def training(given: Given) -> Iterator[Row]:
    from contact_training import AfterSteps, gradients, stored

    yield "a step in fp32", lambda: within(gradients(given.device, torch.float32), FP32_LIMIT)
    yield "a step in bf16", lambda: within(gradients(given.device, torch.bfloat16), 0.2)

    def steps(dtype: torch.dtype, limit: float) -> dict[str, Any]:
        count = 3 if given.tiny else STEPS_TAKEN
        here, there = (
            AfterSteps.of(d, t, count) for d, t in ((given.device, dtype), ("cpu", torch.float32))
        )
        apart = max(abs(a - b) for a, b in zip(here.losses, there.losses, strict=True))
        assert here.losses[-1] < here.losses[0], f"it does not learn: {here.losses}"
        return within(apart, limit, losses=[round(x, 4) for x in here.losses])

    yield "steps in fp32", lambda: steps(torch.float32, 0.01)
    yield "steps in bf16", lambda: steps(torch.bfloat16, BF16_LIMIT)
    yield "weights saved and loaded", lambda: stored(given.device, given.out / "stored")
    yield "pretrain, DeepSpeed, resume", lambda: pretrained(given)


def pretrained(given: Given) -> dict[str, Any]:
    """`pretrain` of the tests' tiny model on the device and on the CPU, and resumed half-way."""
    if find_spec("deepspeed") is None:
        raise Skipped("DeepSpeed is not installed")
    from helpers.corpus import write_corpus
    from helpers.runs import tiny_run
    from nemo_hybrid.config.read import dump_config

    steps = 4 if given.tiny else STEPS_TAKEN
    place = given.out / "pretrained"
    shutil.rmtree(place, ignore_errors=True)
    write_corpus(place / "store")
    train = {"max_steps": steps, "eval_sequences": 0, "deterministic": True}
    config = tiny_run(place / "store", train=train, recipe="fp32", zero=None)
    config.checkpoint.every = steps // 2
    (place / "run.yaml").write_text(dump_config(config))

    def losses(name: str, device: str) -> list[float]:
        words = ["pretrain", "--config", str(place / "run.yaml"), "--run_dir", str(place / name)]
        hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-m", "nemo_hybrid", *words],
            env=os.environ | hidden, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-300:]
        rows = (place / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    here, there = losses("device", given.device), losses("cpu", "cpu")
    shutil.copytree(place / "device", place / "resumed")
    shutil.rmtree(place / f"resumed/checkpoints/step_{steps:08d}")
    resumed = losses("resumed", given.device)
    found = within(max(abs(a - b) for a, b in zip(here, there, strict=True)), 0.01)
    assert resumed == here, f"resumed: {resumed[steps // 2 :]}, unbroken: {here[steps // 2 :]}"
    shutil.rmtree(place)
    return {**found, "losses": here, "resumed": "equal to the last bit"}


def packed(given: Given) -> Iterator[Row]:
    from contact_training import packed_attention, packed_model

    for length in (64, 80) if given.tiny else (4096, 4160):
        yield (
            f"attention, {length} tokens",
            lambda n=length: within(packed_attention(given.device, n, given.tiny), LIMIT),
        )
        yield f"a tiny model, {length} tokens", lambda n=length: packed_model(given.device, n)


def deterministic(given: Given) -> Iterator[Row]:
    from contact_training import twice

    for dtype in (torch.bfloat16, torch.float32):
        yield f"twice the same gradients in {dtype}", lambda d=dtype: twice(given.device, d)


def profile(given: Given) -> Iterator[Row]:
    yield "three steps", lambda: profiled(given)


def profiled(given: Given) -> dict[str, Any]:
    """Of the model of ``train_step.py``; prints and keeps the kernels that took longest."""
    import train_step
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    config = "tiny" if given.tiny else str(ROOT / "configs" / "model" / "nano_3b.yaml")
    task = train_step.Task(config, 128 if given.tiny else 8192, 2, given.device, 0.0)
    _, step = train_step.prepared(task, train_step.CONTENDERS["ours"])
    for _ in range(2):
        step()
    given.wait()
    on_gpu = given.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with recording(activities=kinds) as recorded:
        start = time.perf_counter()
        for _ in range(3):
            step()
        given.wait()
        wall_us = (time.perf_counter() - start) * 1e6
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [(e.key[:90], getattr(e, name), e.count) for e in recorded.key_averages()
             if not on_gpu or "CUDA" in str(e.device_type)]  # fmt: skip
    found.sort(key=lambda row: -row[1])
    busy = sum(us for _, us, _ in found)
    print(f"{'us per step':>12}  {'share':>6}  {'calls':>6}  kernel")
    for key, us, calls in found[:TOP]:
        print(f"{us / 3:12,.0f}  {us / max(busy, 1e-9):6.1%}  {calls / 3:6.0f}  {key}")
    return {
        "ms_per_step": wall_us / 3e3,
        "busy": busy / wall_us,
        "tokens_per_s": 3e6 * task.tokens * task.micro_batches / wall_us,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "kernels": [{"name": k, "us_per_step": us / 3, "calls": n / 3} for k, us, n in found[:40]],
    }


STEPS: dict[str, Callable[[Given], Iterator[Row]]] = {
    step.__name__: step for step in (compiler, ops, training, packed, deterministic, profile)
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=STEPS, metavar="STEP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(words)
    asked.out.mkdir(parents=True, exist_ok=True)
    given = Given(asked.device, asked.tiny, asked.out)
    # Here, so that also the references multiply and add as training does.
    from nemo_kernels.products import sum_in_fp32

    sum_in_fp32()
    return 0 if all([run(step, STEPS[step](given), given) for step in asked.steps]) else 1


if __name__ == "__main__":
    sys.exit(main())
