"""scripts/compile_kernels.py names every kernel whose code may not be shipped, and no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def compile_kernels(cases: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Also shows that an interpreter in the environment does not keep it from compiling."""
    environment = os.environ | {
        "CASE": cases,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    script = [sys.executable, str(ROOT / "scripts/compile_kernels.py")]
    command = [*script, "--modules", "helpers.kernels_to_judge", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_good_kernels_pass_on_both_architectures() -> None:
    """One of three launches differs from another in a number alone, which is not compiled."""
    done = compile_kernels("good")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        ("matmul", "wgmma", "ok"),
        ("matmul", "tcgen05", "ok"),
        ("center", "-", "ok"),
        ("center", "-", "ok"),
    ]
    registers, stack, shared, tensor_memory = map(int, rows[1][-6:-2])
    assert 32 < registers < 256
    assert stack == 0
    assert shared >= 3 * (128 + 64) * 64 * 2  # three stages of both operands
    assert tensor_memory == 64


@pytest.fixture(scope="module")
def faulty() -> subprocess.CompletedProcess[str]:
    cases = "good missing shared spill refused aborting"
    return compile_kernels(cases, "--arch", "90")


@pytest.mark.parametrize(
    "message",
    [
        "matmul (bf16 M=16 N=16 BLOCK_K=64 warps=4 stages=3) sm_90: no wgmma in the code",
        "sm_90: 589824 bytes of shared memory, at most 232448",
        "center (fp32 N=16384 warps=1 stages=3) sm_90: spills to ",
        "refused (fp32 N=4 warps=4 stages=3) sm_90: does not compile (status 1)",
        "aborting (fp32 N=4 warps=4 stages=3) sm_90: does not compile (status -6)",
    ],
)
def test_what_may_not_be_shipped_is_named(
    faulty: subprocess.CompletedProcess[str], message: str
) -> None:
    assert faulty.returncode == 1
    assert sum(message in line for line in errors(faulty.stdout)) == 1


def test_nothing_else_is_named(faulty: subprocess.CompletedProcess[str]) -> None:
    """Two kernels are good; the one with too much shared memory spills, too."""
    verdicts = [line.split()[-1] for line in faulty.stdout.splitlines()[2:] if "error" not in line]
    assert (verdicts.count("ok"), verdicts.count("FAIL")) == (2, 5)
    assert len(errors(faulty.stdout)) == 6


def test_a_name_that_fits_no_kernel_is_refused() -> None:
    done = compile_kernels("good", "--only", "attention")
    assert done.returncode == 2
    assert "no shipped kernel fits --only and --arch" in done.stderr
