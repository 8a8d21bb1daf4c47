"""What bash and zsh complete, asked of them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from helpers.processes import HANG_S
from nemo_hybrid import cli
from nemo_hybrid.config.read import run_options
from nemo_hybrid.config.run import RunConfig, TrainOptions

Complete = Callable[[str], set[str]]


@pytest.fixture
def complete(capsys: pytest.CaptureFixture[str]) -> Complete:
    """What the last of some words may become."""
    assert cli.main(["--completion"]) == 0
    script = capsys.readouterr().out

    def ask(line: str) -> set[str]:
        words = line.split(" ")
        ready = f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}"
        asked = f"{script}\n{ready}\n_nemo_hybrid\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "-uc", asked], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return ask


def test_every_command_and_option_is_completed(complete: Complete) -> None:
    assert complete("nemo-hybrid ") == {*cli.COMMANDS, *cli.TOP_OPTIONS}
    assert complete("nemo-hybrid comp") == {"compare-logprobs"}
    everything = complete("nemo-hybrid pretrain --config a.yaml -")
    assert everything == {*run_options(RunConfig), "--config", "--print_config", "--help"}
    assert "--train.epochs" in complete("nemo-hybrid plan --train.e")  # of fine-tuning
    assert complete("nemo-hybrid launch --") == {"--nproc", "--help"}
    assert "rollout" in complete("nemo-hybrid launch --nproc 2 ")
    assert complete("nemo-hybrid launch --nproc 2 pretrain --data.bl") == {"--data.blend"}
    assert complete("nemo-hybrid nothing --") == {"--help", "--version", "--completion"}


def test_values_are_choices_or_files(complete: Complete) -> None:
    hint = get_type_hints(TrainOptions)["schedule"]
    assert complete("nemo-hybrid pretrain --train.schedule ") == set(get_args(hint))
    assert complete("nemo-hybrid pretrain --train.schedule co") == {"cosine", "constant"}
    assert complete("nemo-hybrid inspect --deep t") == {"true"}
    assert complete("nemo-hybrid pretrain --config ") == set()  # bash then takes files
    assert complete("nemo-hybrid pretrain --config x --run") == {"--run_dir"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_as_bash_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its own prompt, in a terminal that it makes itself: an option behind `launch`, a choice
    and a file."""
    assert cli.main(["--completion"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    typed = (
        "nemo-hybrid launch --nproc 2 pretrain --data.bl\t1 --train.schedule cos\t--model comp\t"
    )
    script = f"""
        zmodload zsh/zpty
        zpty z zsh -f -i
        zpty -w z $'source completion; PS1=REA\\'\\'DY'
        zpty -r z out '*READY*'
        zpty -w -n z $'{typed}'
        for wanted in '*--data.blend*' '*cosine*' '*completion*'; zpty -r z out $wanted
        zpty -d z
    """
    subprocess.run(["zsh", "-fc", script], cwd=tmp_path, timeout=HANG_S, check=True)
