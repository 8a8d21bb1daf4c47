"""scripts/gpu_check.sh without a GPU: it says so; and with a Python that only pretends to work:
what it runs, where the output goes and what its status says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

CONTACT = ["compiler", "ops", "training", "packed", "deterministic", "profile"]
PARTS = [CONTACT[0], "code", *CONTACT[1:], "train_step", "tests", "benchmark", "nvfp4"]
PRETENDER = """#!/bin/bash
case "$*" in
    -) cat >/dev/null; echo '9.0 NVIDIA H000' ;;
    '-c import '*) [[ " $ABSENT " != *" ${2#import } "* ]] ;;
    *) echo "ran $*"; for part in $BROKEN; do [[ "$*" != *"$part"* ]] || exit 1; done
       trap 'echo "1 failed"; exit 2' INT
       [[ -z "$SLOW" || "$*" != *"$SLOW"* ]] || sleep 60 ;;
esac
"""
HURRY = f"""#!/bin/bash
set -- "${{@/#[0-9][0-9]*/3}}"
exec {shutil.which("timeout")} "$@"
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


@pytest.mark.slow
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
    assert results.keys() == {"summary.txt", "log.txt"}
    assert results["summary.txt"].count("passed") == len(PARTS)
    assert re.findall(r"^==== (\w+) ====$", results["log.txt"], re.MULTILINE) == PARTS
    parts = dict(
        zip(
            PARTS,
            re.split(r"^==== \w+ ====\n", results["log.txt"], flags=re.MULTILINE)[1:],
            strict=True,
        )
    )
    assert "kernels/benchmarks/nvfp4.py" in parts["nvfp4"]
    assert "scripts/compile_kernels.py --arch 90" in parts["code"]
    for name in CONTACT:
        assert f"first_contact.py {name} --out" in parts[name]
    tests = re.findall(r"tests/\S+\.py", parts["tests"])
    assert all((ROOT / path).is_file() for path in tests)
    assert "test_moe_kernel" in tests[0]
    assert set(tests) == {"tests/kernels/test_moe.py", *run_on_the_gpu()}
    words = parts["benchmark"].split()
    assert 450 < float(words[words.index("--budget") + 1]) < 540
    assert words[-4:] == ["--out", str(tmp_path / "results"), "--peers", "somewhere"]


def run_on_the_gpu() -> set[str]:
    """The test files that take their device from the helper."""
    taken = re.compile(r"^from helpers\.triton_env import .*\bDEVICE\b", re.MULTILINE)
    files = (ROOT / "tests").rglob("test_*.py")
    return {p.relative_to(ROOT).as_posix() for p in files if taken.search(p.read_text())}


@pytest.mark.parametrize(
    ("broken", "parts"),
    [
        ("compile_kernels", 1),
        ("no:cacheprovider", 1),
        ("first_contact.py", len(CONTACT)),
        ("benchmarks/run.py benchmarks/nvfp4.py benchmarks/train_step.py", 3),
    ],
)
def test_what_fails_stops_nothing(tmp_path: Path, pretender: str, broken: str, parts: int) -> None:
    done = gpu_check(pretender, OUT=str(tmp_path / "results"), BROKEN=broken)
    assert done.returncode == 1
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert summary.count("FAILED, status 1") == parts
    assert summary.count("passed") == len(PARTS) - parts


def test_a_dry_run_needs_no_gpu(tmp_path: Path, pretender: str) -> None:
    done = gpu_check(pretender, "--dry", str(tmp_path))
    assert done.returncode == 0
    ran = re.findall(r"^ran (.*)", (tmp_path / "log.txt").read_text(), re.MULTILINE)
    assert len(ran) == len(PARTS) - 2
    assert all(line.endswith("--device cpu --tiny") for line in ran)
    done = gpu_check(pretender, "--dry", str(tmp_path / "none"), ABSENT="torch")
    assert done.returncode == 2
    assert done.stderr == f"error: {pretender} cannot import torch: set PYTHON\n"
    assert not (tmp_path / "none").exists()


def test_without_pytest_it_does_not_pass(tmp_path: Path, pretender: str) -> None:
    done = gpu_check(pretender, str(tmp_path), ABSENT="pytest")
    assert done.returncode == 1
    assert "tests: NOT RUN, pytest is missing" in (tmp_path / "summary.txt").read_text()


def test_without_hypothesis_the_same_files_are_tested(tmp_path: Path, pretender: str) -> None:
    for name in ("pytest-xdist", "hypothesis"):
        assert gpu_check(pretender, str(tmp_path / name), ABSENT=name).returncode == 0
    with_it, without = (
        re.findall(r"ran -m pytest.*", (tmp_path / name / "log.txt").read_text())
        for name in ("pytest-xdist", "hypothesis")
    )
    assert with_it == without
    assert "hypothesis is missing" in (tmp_path / "hypothesis" / "summary.txt").read_text()


def test_what_takes_too_long_is_interrupted_and_reports(tmp_path: Path, pretender: str) -> None:
    (tmp_path / "timeout").write_text(HURRY)
    (tmp_path / "timeout").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_check(pretender, str(tmp_path / "out"), PATH=path, SLOW="no:cacheprovider")
    assert done.returncode == 1
    assert "tests: FAILED, took more than" in (tmp_path / "out" / "summary.txt").read_text()
    assert "1 failed" in (tmp_path / "out" / "log.txt").read_text()


MODULE = """
import pytest
from helpers.drawn import drawn, st

seen = []

@pytest.mark.parametrize("other", [1, 2])
@drawn(30, number=st.integers(0, 2**31))
def test_drawn(number, other):
    seen.append(number)

def test_plain():
    assert len(seen) == {count}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "gpu", "count", "summary"),
    [
        (False, False, 60, "3 passed"),
        (False, True, 10, "3 passed"),
        (True, False, 0, "1 passed, 2 skipped"),
    ],
)
def test_only_drawn_tests_need_hypothesis(
    tmp_path: Path, missing: bool, gpu: bool, count: int, summary: str
) -> None:
    """With it all examples are drawn, on a GPU a few."""
    (tmp_path / "test_it.py").write_text(MODULE.replace("{count}", str(count)))
    lines = ["import sys, torch, pytest"]
    lines += ["sys.modules['hypothesis'] = None"] if missing else []
    lines += [f"torch.cuda.is_available = lambda: {gpu}"]
    lines += ["sys.exit(pytest.main(sys.argv[1:]))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), "-q", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary in done.stdout
