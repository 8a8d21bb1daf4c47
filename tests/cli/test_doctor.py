"""The report on packages, machine and operations."""

import sys
import sysconfig
from pathlib import Path

import pytest

from nemo_hybrid.commands import doctor


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up packages, on the path here and in child processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_probe_says_why(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "good_lib.py").write_text("print('hello')")
    (modules / "bad_lib.py").write_text("import gone_cuda_extension")
    (modules / "crashing_lib.py").write_text("import os; os.abort()")
    (modules / "quitting_lib.py").write_text("raise SystemExit(0)")
    names = ("no-lib", "bad-lib", "good-lib", "quitting-lib", "crashing-lib", "pytest")
    none, bad, good, quitting, crashing, behind = doctor.probe(names)
    assert none == ("no-lib", "-", "not installed")
    assert "gone_cuda_extension" in bad.problem
    assert good == ("good-lib", "-", "")
    assert "SystemExit" in quitting.problem
    assert "import ended with -6" in crashing.problem
    assert behind == ("pytest", pytest.__version__, "")

    (modules / "sleeping_lib.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "IMPORT_LIMIT_S", 2)
    good, sleeping, behind = doctor.probe(["good-lib", "sleeping-lib", "pytest"])
    assert (good.problem, behind.problem) == ("", "")
    assert "took more than 2 s" in sleeping.problem


def test_status_follows_the_required_packages(
    modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch  # noqa: F401  so that the pretender is one in other processes alone

    (modules / "torch.py").write_text("")
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-lib",))
    monkeypatch.setattr(doctor, "REQUIRED", ("torch",))
    assert doctor.doctor() == 0
    shown = capsys.readouterr().out
    assert "works" in shown
    assert "not installed" in shown
    assert sys.executable in shown
    for op in ("ssd", "conv1d", "attention"):
        assert any(op in line and "reference" in line for line in shown.splitlines())
    assert "\x1b" not in shown
    (modules / "deepspeed.py").write_text("import gone")
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "deepspeed"))
    assert doctor.doctor() == 1
    assert "Broken: deepspeed" in capsys.readouterr().out


def test_machine_report_names_cores_and_memory() -> None:
    rows = {row[0]: row[1] for row in doctor.machine()}
    assert "usable cores" in rows["CPU"]
    assert "GiB" in rows["Memory"]


def test_the_compiler_of_launchers_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pretenders: the machine may have none."""
    compiler = tmp_path / "gcc"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    assert doctor.c_compiler().startswith("none; without it")
    seen = tmp_path / "seen"
    compiler.write_text(f'#!/bin/sh\necho "$@" >{seen}\nread line\necho "$line" >>{seen}\n')
    compiler.chmod(0o755)
    assert doctor.c_compiler() == f"{compiler}, builds what Triton needs"
    assert "#include <Python.h>" in seen.read_text()
    assert f"-I{sysconfig.get_path('include')}" in seen.read_text()
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    said = doctor.c_compiler()
    assert "Python.h: No such file" in said
    assert "install gcc, libc6-dev and python3-dev" in said
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert f"{tmp_path / 'gone'} does not run" in doctor.c_compiler()
