"""scripts/gpu_check.sh without a GPU: it says so; and with a Python that only pretends to work:
what it runs, where the output goes and what its status says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

PRETENDER = """#!/bin/bash
case "$*" in
    -) cat >/dev/null; echo 'NVIDIA H000' ;;
    '-c import '*) [[ " $ABSENT " != *" ${2#import } "* ]] ;;
    *) echo "ran $*"; for part in $BROKEN; do [[ "$*" != *"$part"* ]] || exit 1; done ;;
esac
"""


def gpu_check(python: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    script = ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments]
    environment = os.environ | {"PYTHON": python} | more
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    python = tmp_path / "python"
    python.write_text(PRETENDER)
    python.chmod(0o755)
    return str(python)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = gpu_check(sys.executable, str(tmp_path / "results"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: there is no CUDA device; nothing was run\n"
    assert not (tmp_path / "results").exists()


def test_everything_passes(tmp_path: Path, pretender: str) -> None:
    done = gpu_check(pretender, str(tmp_path / "results"), "--peers", "somewhere", ABSENT="")
    assert done.returncode == 0, done.stdout + done.stderr
    results = {p.name: p.read_text() for p in (tmp_path / "results").iterdir()}
    assert results.keys() == {"summary.txt", "code.txt", "tests.txt", "benchmark.txt"}
    assert results["summary.txt"].count("passed") == 3
    assert "scripts/compile_kernels.py" in results["code.txt"]
    assert "tests/kernels/test_moe.py" in results["tests.txt"]
    assert "test_cpu_step" not in results["tests.txt"]
    words = results["benchmark.txt"].split()
    assert 500 < float(words[words.index("--budget") + 1]) < 540
    assert words[-4:] == ["--out", str(tmp_path / "results"), "--peers", "somewhere"]


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        ("compile_kernels", 4),
        ("no:cacheprovider", 8),
        ("benchmarks/run.py", 16),
        ("compile_kernels benchmarks/run.py", 20),
    ],
)
def test_the_status_says_what_failed(
    tmp_path: Path, pretender: str, broken: str, status: int
) -> None:
    done = gpu_check(pretender, str(tmp_path / "results"), BROKEN=broken)
    assert done.returncode == status
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert summary.count("FAILED, status 1") == len(broken.split())
    assert summary.count("passed") == 3 - len(broken.split())


def test_what_is_not_installed_is_named(tmp_path: Path, pretender: str) -> None:
    done = gpu_check(pretender, str(tmp_path / "a"), ABSENT="pytest")
    assert done.returncode == 0
    assert "tests: not run, pytest is missing" in (tmp_path / "a" / "summary.txt").read_text()
    assert gpu_check(pretender, str(tmp_path / "b"), ABSENT="hypothesis").returncode == 0
    assert "hypothesis is missing" in (tmp_path / "b" / "summary.txt").read_text()
    tests = (tmp_path / "b" / "tests.txt").read_text()
    assert "tests/kernels/test_benchmark_run.py" in tests
    assert "tests/kernels/test_moe.py" not in tests
