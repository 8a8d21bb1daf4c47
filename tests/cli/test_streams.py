"""Standard streams that are closed, full, left by their reader, or know few characters."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chats import write_base
from helpers.corpus import write_corpus
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
COMMAND = f"{shlex.quote(sys.executable)} -m nemo_hybrid"
FULL = "No space left on device"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


def bash(line: str, **environment: str) -> tuple[int, str, str]:
    """Status of the last command that ended badly, and what was printed."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=ROOT, capture_output=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@needs_full
@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 2, f"error: cannot write stdout: {FULL}\n"),
        (">/dev/full 2>&-", 2, ""),
        (">/dev/full 2>/dev/full", 2, ""),
        ("| true", 0, ""),
        ("2>&1 | true", 0, ""),
    ],
)
def test_output_of_a_command(streams: str, status: int, said: str) -> None:
    assert bash(f"{COMMAND} pretrain --help {streams}") == (status, "", said)


@pytest.mark.slow
def test_generate_ends_with_its_reader(tmp_path: Path) -> None:
    """`head` ends after its first line, long before this text would."""
    model = write_base(tmp_path / "model")
    words = f"generate --from {model} --prompt $'a\\n' --max_new_tokens 100000"
    assert bash(f"{COMMAND} {words} | head -n 1") == (0, "a\n", "")


@pytest.mark.parametrize("streams", ["", "2>&-", "2>/dev/full"])
def test_a_mistake_is_one_message_or_none(streams: str) -> None:
    said = "" if streams else "error: unknown command tran\\xe9; see `--help`\n"
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    assert bash(f"{COMMAND} tran\u00e9 {streams}", **ascii_only) == (2, "", said)


def test_unbuffered_output_appears_at_once() -> None:
    program = (
        "from nemo_hybrid.terminal import open_streams\nopen_streams(needed=True)\n"
        "print('ready')\nimport sys, time\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.communicate("")


LOG = """
import os, sys
from contextlib import suppress
from nemo_hybrid.terminal import open_streams, print_table
open_streams(needed=False)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print_table(("a", "b"), [("\\u65e5", "\\U0001f600")])
for _ in range(3):
    print("\\xe9", flush=True)
with suppress(OSError):
    os.write(1, b"of another library")
assert os.fstat(file).st_size == 0
print("\\xe8", file=sys.stderr)
"""


@needs_full
@pytest.mark.parametrize(
    ("streams", "out", "err"),
    [
        (">&-", "", "\\xe8\n"),
        (">&- 2>&-", "", ""),
        (">/dev/full", "", f"cannot write stdout: {FULL}; going on without it\n\\xe8\n"),
        ("2>/dev/full", "\\u65e5|\\U0001f600|\\xe9", ""),
        ("", "\\u65e5|\\U0001f600|\\xe9", "\\xe8\n"),
    ],
)
def test_a_log_is_written_as_far_as_it_can(
    tmp_path: Path, streams: str, out: str, err: str
) -> None:
    """And no file takes the place of a closed stream, for other libraries to write into."""
    program = f"{shlex.quote(sys.executable)} -c {shlex.quote(LOG)} {tmp_path / 'file'}"
    status, *printed = bash(f"{program} {streams}", PYTHONIOENCODING="ascii")
    assert (status, printed[1]) == (0, err)
    assert all(part in printed[0] for part in out.split("|"))
    assert bool(out) == bool(printed[0])


@needs_full
@pytest.mark.slow
def test_a_run_goes_on_without_its_log(tmp_path: Path) -> None:
    store = write_corpus(tmp_path / "store")
    config = tmp_path / "r\u00e9sum\u00e9.yaml"
    config.write_text(dump_config(tiny_run(store, train={"max_steps": 3})))
    line = f"{COMMAND} pretrain --config {config} --run_dir {tmp_path / 'run'} >/dev/full"
    status, _, said = bash(line, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert status == 0, said
    assert said.count(f"cannot write stdout: {FULL}; going on without it") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3
