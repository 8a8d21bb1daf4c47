"""The command line: help, dispatch, messages and exit statuses."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.processes import HANG_S
from nemo_hybrid import __version__, cli
from nemo_hybrid.commands import evaluate, generate
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.errors import TrainingError, UserError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/run/pretrain_tiny_cpu.yaml")
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "rich", "pandas",
         "pydantic", "yaml", "matplotlib", "tensorboard", "pyarrow", "nemo_kernels")  # fmt: skip


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the functions behind the commands were called with; nothing heavy is imported."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> None:
        calls.append((*args, kwargs) if kwargs else args[0])

    for module, function, stand_in in [
        ("nemo_hybrid.recipes", "recipe_of", lambda config: config),
        ("nemo_hybrid.train.loop", "train", record),
        ("nemo_hybrid.data.documents", "prepare", record),
    ]:
        stub = ModuleType(module)
        setattr(stub, function, stand_in)
        monkeypatch.setitem(sys.modules, module, stub)
    for command in (generate, evaluate):
        in_place_of(command, record, monkeypatch)
    return calls


def in_place_of(
    module: ModuleType, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the commands of a module call another function."""
    for name, command in module.COMMANDS.items():
        monkeypatch.setitem(module.COMMANDS, name, command._replace(run=function, reads=None))


def python(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, **kwargs
    )


# What may be imported for an answer, beside Python's own modules.
OPTIONS = {"pydantic", "yaml"}


@pytest.mark.parametrize(
    ("words", "status", "needed"),
    [
        (["--help"], 0, set()),
        (["pretran"], 2, set()),
        (["pretrain", "--help"], 0, OPTIONS),
        (["pretrain", "--data.path", "d", "--train.lr", "x"], 2, OPTIONS),
        (["pretrain", "--config", "gone.yaml"], 2, OPTIONS),
        (["export", "--from", "a"], 2, OPTIONS),
        (["generate", "--from", "a", "--prompt", "b", "--top_p", "2"], 2, OPTIONS),
        (["generate", "--from", "gone", "--prompt", "b"], 2, OPTIONS),
    ],
)
def test_help_and_mistakes_are_quick(words: list[str], status: int, needed: set[str]) -> None:
    """They import little and so take little time: CPU time, for the machine may be busy."""
    code = (
        "import sys, time; from nemo_hybrid import cli; status = cli.main(sys.argv[1:]); "
        "print('MODULES', *sys.modules); print(time.process_time()); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        done = python("-c", code, *words)
        seconds.append(float(done.stdout.split()[-1]))
    assert done.returncode == status, done.stderr
    assert min(seconds) < 1.2, seconds  # a third of it on an idle core
    modules = {m.split(".")[0] for m in done.stdout.split("MODULES")[1].split()}
    assert not modules & set(HEAVY) - needed


@pytest.mark.parametrize(
    "words",
    [
        "generate --from gone --prompt a",
        "eval --from gone --data d",
        "export --from gone --format bf16 --out o",
        "merge --from gone --out o",
        "import gone --out o",
        "average gone --out o",
        "inspect gone",
        "verify-export gone",
        "compare-logprobs . gone --prompt a",
    ],
)
def test_a_model_that_is_not_there_is_named_before_all_else(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = words.split()[0]
    module = import_module(f"nemo_hybrid.commands.{cli.COMMANDS[name].module}")
    begun = module.COMMANDS[name]._replace(run=lambda options: pytest.fail("it has begun"))
    monkeypatch.setitem(module.COMMANDS, name, begun)
    assert cli.main(words.split()) == 2
    assert "error: gone does not exist: give a local directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"nemo-hybrid {command}" in shown
    assert "Exit status: 0 done, 1" in shown


def test_field_docstrings_are_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig()  # after which pydantic may have forgotten them
    cli.main(["pretrain", "-h"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.hidden_size HIDDEN_SIZE Width of the residual stream." in shown
    assert "--train.schedule {wsd,cosine,constant}" in shown
    assert "--print_config" in shown
    cli.main(["generate", "-h"])
    assert "--from FROM Run directory" in " ".join(capsys.readouterr().out.split())


def test_top_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in cli.COMMANDS)
    assert "130 interrupted" in shown
    assert cli.main(["--version"]) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(rf"nemo-hybrid {re.escape(__version__)}( \([0-9a-f]+(-dirty)?\))?\n", said)
    if ".git" in os.listdir(ROOT):
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        )
        assert head.stdout.startswith(said.split("(")[1].rstrip(")\n").removesuffix("-dirty"))


def test_pretrain_gets_the_merged_configuration(called: list[Any]) -> None:
    words = ["pretrain", "--config", TINY, "--train.max_steps", "100", "--model.pattern=ME*"]
    assert cli.main(words) == 0
    (config,) = called
    assert isinstance(config, RunConfig)
    assert config.train.max_steps == 100
    assert config.model.pattern == "ME*"
    assert config.data.path == str(ROOT / "data/python-stdlib")


def test_print_config_reloads(
    called: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["pretrain", "--config", TINY, "--train.lr", "3e-4"]
    assert cli.main([*words, "--print_config"]) == 0
    assert called == []
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    cli.main(words)
    cli.main(["pretrain", "--config", str(tmp_path / "printed.yaml")])
    assert called[0] == called[1]


def test_prepare(called: list[Any], tmp_path: Path) -> None:
    assert cli.main(["prepare", "a.txt", "b", "--out", "o", "--skip_bad", "--heldout", "0"]) == 0
    assert cli.main(["prepare"]) == 0
    (out, paths, how), (default, none, how_default) = called
    assert (str(out), paths) == ("o", ["a.txt", "b"])
    assert how == {
        "skip_bad": True, "heldout": 0.0, "reuse": False, "seed": 0, "text_field": "text",
        "tokenizer": None, "tokenizer_sample_mb": None, "vocab_size": None,
    }  # fmt: skip
    assert (str(default), none) == (str(ROOT / "data/python-stdlib"), [])
    assert how_default == how | {"skip_bad": False, "heldout": 0.03, "reuse": True}


def test_generate_and_eval(called: list[Any]) -> None:
    assert cli.main(["generate", "--from", "runs/a", "--prompt", "def ", "--top_p", "0.9"]) == 0
    assert cli.main(["eval", "--from=runs/a", "--data", "d", "--sequences", "7"]) == 0
    generated, evaluated = called
    assert generated == generate.GenerateOptions("runs/a", "def ", top_p=0.9)
    assert evaluated == evaluate.EvalOptions("d", "runs/a", sequences=7)


@pytest.mark.parametrize("prompt", ["null", "1e-3", "[1, 2]", "a: b", "# c", " x\n", "", "true"])
def test_prompt_is_taken_as_it_is(called: list[Any], prompt: str) -> None:
    assert cli.main(["generate", "--from", "a", "--prompt", prompt]) == 0
    assert called[0].prompt == prompt


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "no command given"),
        ("pretran", "unknown command pretran; did you mean pretrain?"),
        ("--verson", "unknown option --verson; did you mean --version?"),
        ("pretrain", "data.path is missing"),
        ("pretrain --config gone.yaml", "gone.yaml: No such file"),
        ("pretrain --config", "--config needs a value"),
        ("pretrain --data.path d --train.lr x", "train.lr: expected a number, got x"),
        ("pretrain --data.path d --parallel.ep 3", "not divisible by parallel.ep (3)"),
        ("pretrain --data.path d --parallel.ep 2", "does not divide the number of processes (1)"),
        ("pretrain --data.path d --model.pattern MXE", "unknown layer letter 'X'"),
        ("pretrain --data.path d --data.sequence_length 0", "data.sequence_length must be posit"),
        ("prepare a.txt", "--out is missing"),
        ("prepare a.txt --out o --heldout 1", "heldout must lie in [0, 1), got 1"),
        ("prepare a.txt --out o --tokenizer t --vocab_size 300", "not both"),
        ("prepare a.txt --out o --truncate", "--truncate is about samples: give --for finetune"),
        ("prepare --vocab_size many", "vocab_size: expected an integer or null, got many"),
        ("generate", "missing: --from"),
        ("generate --from a --prompt b --prompts c", "give --prompt or --prompts, not both"),
        ("generate --from a --prompts c --chat", "--chat is for --prompt"),
        ("generate --from a --prompt b --speculate 8", "speculate must lie in [0, 7], got 8"),
        ("generate --from a --prompt b --ssm_rounding nearest", "is for --ssm_cache float16"),
        ("rollout --from a --data b --out c --ssm_rounding nearest", "is for --ssm_cache float16"),
        ("rollout --from a --data b --out c --samples 0", "samples must be positive, got 0"),
        ("generate --from a --prompt b --chat maybe", "--chat is true or false, or stands alone"),
        ("generate --from a --prompt b --top_p 2", "top_p must lie in (0, 1]"),
        ("generate --from a --prompt b --temperature -1", "temperature must be 0 or more"),
        ("generate --from a --prompt b --seed -1", "seed must lie in [0, 2**63), got -1"),
        ("generate --from a --prompt \udcff", "the prompt is not text"),
        ("eval --from a", "missing: --data"),
        ("eval --data d", "missing: --from, or --rollouts"),
        ("eval --data d --from a --rollouts b", "give --from or --rollouts, not both"),
        ("eval --from a --data d --sequence 3", "did you mean --sequences?"),
        ("doctor now", "doctor takes no options"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: str, expected: str, called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert expected in said
    assert said.count("\n") == 1
    assert called == []


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    def fail(options: object) -> None:
        raise error

    in_place_of(generate, fail, monkeypatch)
    return ["generate", "--from", "a", "--prompt", "b"]


def test_statuses_of_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(raising(monkeypatch, UserError("no disk"))) == 2
    assert capsys.readouterr().err == "error: no disk\n"
    assert cli.main(raising(monkeypatch, TrainingError("loss is nan"))) == 3
    assert capsys.readouterr().err == "error: loss is nan\n"
    assert cli.main(raising(monkeypatch, KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    for rank, said in (("0", "interrupted\n"), ("1", "")):  # of several processes one says it
        monkeypatch.setenv("RANK", rank)
        raising(monkeypatch, KeyboardInterrupt())
        in_place_of(evaluate, generate.COMMANDS["generate"].run, monkeypatch)
        assert cli.main(["eval", "--from", "a", "--data", "b"]) == 130
        assert capsys.readouterr().err == said
    with pytest.raises(ZeroDivisionError):  # Python then prints the traceback and ends with 1
        cli.main(raising(monkeypatch, ZeroDivisionError()))


def test_a_command_that_is_asked_to_end_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    in_place_of(generate, run, monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["generate", "--from", "a", "--prompt", "b"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_ranks_speak_only_when_they_are_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 prints at once; another rank waits to be ended, and prints when nobody ends it."""
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["pretrain"]) == 2
    assert capsys.readouterr().err.startswith("error: data.path")
    assert waits == []
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pretrain"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 1): data.path")
    assert waits == [cli.OTHER_RANKS_WAIT_S]


def test_module_and_console_script_agree() -> None:
    done = python("-m", "nemo_hybrid", "pretran")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command pretran; did you mean pretrain?\n"
    script = Path(sys.executable).parent / "nemo-hybrid"
    if not script.exists():
        pytest.skip("the console script is not installed")
    assert python(str(script), "pretran").stderr == done.stderr


def test_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_hybrid", "--version"],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_quiet(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom nemo_hybrid import cli\nfrom nemo_hybrid.commands import generate\n"
        "def wait(options):\n    import time\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "command = generate.COMMANDS['generate']\n"
        "generate.COMMANDS['generate'] = command._replace(run=wait)\n"
        "sys.exit(cli.main(['generate', '--from', '.', '--prompt', 'b']))"
    )
    # A shell's background job ignores Ctrl-C, and so would its children.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + program
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANG_S)
    assert (process.returncode, said) == (130, "interrupted\n")
