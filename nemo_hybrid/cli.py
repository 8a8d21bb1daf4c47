"""The command line: choose a command, read its options, report the user's mistakes.

Everything heavy is imported after the options are known to be good, so help and error messages
come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_type_hints

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint_options import CompareOptions, ImportOptions, InspectOptions
from nemo_hybrid.config import (
    EvalOptions,
    GenerateOptions,
    PlanOptions,
    PrepareOptions,
    RunConfig,
)
from nemo_hybrid.config_load import dump_config, load_config, read_config, run_parser
from nemo_hybrid.errors import Stopped, TrainingError, UserError
from nemo_hybrid.options import (
    check_words,
    new_parser,
    options_parser,
    parse_words,
    read_options,
    suggest,
    take_words,
)

if TYPE_CHECKING:
    import jsonargparse

PROG = "nemo-hybrid"
STATUSES = (
    "Exit status: 0 done, 1 internal failure (or, from doctor, a required package that does not "
    "work), 2 mistake in options, files or layout (from inspect: tensors that do not fit), 3 the "
    "training itself failed (from compare-logprobs: the difference exceeds --tolerance, or is no "
    "number), 4 stopped by a signal after writing a checkpoint, 5 the launcher died, 130 "
    "interrupted. "
    "torchrun ends with 1 whatever its processes end with."
)
DEFAULT_CORPUS_RUN = Path(__file__).parent.parent / "configs" / "run" / "pretrain_tiny_cpu.yaml"
OTHER_RANKS_WAIT_S = 3.0
TOP_OPTIONS = {"--help": "Show this help.", "--version": "Show the version."}


class Command(NamedTuple):
    """A word of the command line: what it does, in one line, its options, and its function."""

    summary: str
    options: type | None
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Internal failures raise, so Python ends with 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        _report(error)
        return 2
    except TrainingError as error:
        _report(error)
        return 3
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return 4
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _top_parser().print_help()
        if not words:
            raise UserError(f"no command given; choose one of {', '.join(COMMANDS)}")
        return 0
    name, rest = words[0], words[1:]
    if name == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} {name}{suggest(name, [*COMMANDS, *TOP_OPTIONS])}")
    if {"-h", "--help"} & set(rest):
        _command_parser(name).print_help()
        return 0
    return COMMANDS[name].run(rest)


def _top_parser() -> argparse.ArgumentParser:
    """Only for its help: jsonargparse would make `--help` slower than it has to be."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} COMMAND [OPTIONS]\n       torchrun [...] -m nemo_hybrid COMMAND [OPTIONS]",
        description="Train hybrid Mamba-2 / attention models with LatentMoE and multi-token "
        f"prediction. `{PROG} COMMAND --help` lists the options of a command.",
        epilog=STATUSES,
        add_help=False,
    )
    listing = parser.add_argument_group("commands")
    for name, command in COMMANDS.items():
        listing.add_argument(name, help=command.summary)
    other = parser.add_argument_group("options")
    for name, about in TOP_OPTIONS.items():
        other.add_argument(name, action="store_true", help=about)
    return parser


def _command_parser(name: str) -> jsonargparse.ArgumentParser:
    command = COMMANDS[name]
    prog = f"{PROG} {name}"
    if command.options in (RunConfig, PlanOptions):
        usage = f"{prog} [--config FILE]... [--SECTION FILE]... [--KEY VALUE]..."
        parser = run_parser(prog, command.summary, usage=usage, epilog=STATUSES)
        parser.add_argument("--config", metavar="FILE", help="YAML file; repeated: later keys win.")
        parser.add_argument(
            "--print_config", action="store_true", help="Print the merged options and stop."
        )
        if command.options is PlanOptions:
            parser.add_class_arguments(PlanOptions, "plan")
        return parser
    if command.options is None:
        return new_parser(prog, command.summary, epilog=STATUSES)
    return options_parser(command.options, prog, command.summary, epilog=STATUSES)


def _report(error: UserError | TrainingError) -> None:
    """Print the message once per job: from rank 0, or from a rank whose error is its own.

    torchrun ends all processes soon after the first has ended. So the other ranks wait: either
    rank 0 had the same error and they are ended while they wait, or their error is their own.
    """
    rank = int(os.environ.get("RANK", "0"))
    who = ""
    if rank > 0:
        time.sleep(OTHER_RANKS_WAIT_S)
        who = f" (rank {rank})"
    sys.stdout.flush()
    print(f"error{who}: {error}", file=sys.stderr, flush=True)


def _pretrain(words: list[str]) -> int:
    own, overrides = take_words(words, repeated=["--config"], switches=["--print_config"])
    config = load_config(own["--config"], overrides)
    if own["--print_config"]:
        print(dump_config(config), end="")
        return 0
    launcher = os.getppid()  # before the imports below, which take seconds: it may die meanwhile
    # Checked here already, because importing the training loop takes seconds.
    from nemo_hybrid.checkpoint.shape import model_shape

    config.validate(model_shape(config.model))
    config.validate_world(int(os.environ.get("WORLD_SIZE", "1")))
    from nemo_hybrid.train.loop import pretrain

    pretrain(config, launcher)
    return 0


def _plan(words: list[str]) -> int:
    hints = {f"plan.{name}": hint for name, hint in get_type_hints(PlanOptions).items()}
    check_words([w for w in words if w.startswith("--plan.")], {f"--{key}" for key in hints})
    own, overrides = take_words(
        words,
        repeated=["--config", *(f"--{key}" for key in hints)],
        switches=["--print_config"],
    )
    config = load_config(own["--config"], overrides)
    if own["--print_config"]:
        print(dump_config(config), end="")
        return 0
    parser = new_parser("", "")
    parser.add_class_arguments(PlanOptions, "plan")
    given = [word for key in hints for value in own[f"--{key}"] for word in (f"--{key}", value)]
    options = PlanOptions(**parse_words(parser, given, hints)["plan"])
    from nemo_hybrid.plan import plan_command

    return plan_command(config, options)


def _prepare(words: list[str]) -> int:
    options = read_options(PrepareOptions, _command_parser("prepare"), words)
    if options.out is None:
        if options.paths:
            raise UserError("--out is missing: name the directory of the token store")
        options.out = default_corpus_place()
    from nemo_hybrid.data.prepare import prepare

    # The default corpus is made once: a second `prepare` finds it.
    print(prepare(**vars(options), reuse=not options.paths))
    return 0


def _generate(words: list[str]) -> int:
    options = read_options(GenerateOptions, _command_parser("generate"), words)
    options.validate()
    from nemo_hybrid.generate import generate_command

    generate_command(options)
    return 0


def _eval(words: list[str]) -> int:
    options = read_options(EvalOptions, _command_parser("eval"), words)
    options.validate()
    from nemo_hybrid.train.evaluate import eval_command

    eval_command(options)
    return 0


def _import(words: list[str]) -> int:
    options = read_options(ImportOptions, _command_parser("import"), words)
    options.validate()
    from nemo_hybrid.checkpoint.convert import import_directory

    print(import_directory(Path(options.paths[0]), Path(options.out)).summary())
    print(
        f"written to {options.out}; go on with\n"
        f"  {PROG} inspect {options.out}\n"
        f"  {PROG} generate --from {options.out} --prompt TEXT\n"
        f"  {PROG} pretrain --model.from_hf {options.out} --config FILE"
    )
    return 0


def _inspect(words: list[str]) -> int:
    options = read_options(InspectOptions, _command_parser("inspect"), words)
    options.validate()
    from nemo_hybrid.inspection import inspect_command

    return inspect_command(options)


def _compare_logprobs(words: list[str]) -> int:
    options = read_options(CompareOptions, _command_parser("compare-logprobs"), words)
    options.validate()
    from nemo_hybrid.logprobs import compare_command

    return compare_command(options)


def _doctor(words: list[str]) -> int:
    if words:
        raise UserError(f"doctor takes no options, got {' '.join(words)}")
    from nemo_hybrid.doctor import doctor

    return doctor()


COMMANDS = {
    "prepare": Command("Turn text into a token store.", PrepareOptions, _prepare),
    "pretrain": Command("Train a model from its first step, or resume.", RunConfig, _pretrain),
    "plan": Command("Say whether a run fits, and how long a step takes.", PlanOptions, _plan),
    "eval": Command("Measure a trained model's losses on held-out data.", EvalOptions, _eval),
    "generate": Command("Continue a prompt with a trained model.", GenerateOptions, _generate),
    "import": Command("Copy a Hugging Face checkpoint into our layout.", ImportOptions, _import),
    "inspect": Command("Show shape, size and tensors of a model.", InspectOptions, _inspect),
    "compare-logprobs": Command(
        "Compare two checkpoints' probabilities of a text.", CompareOptions, _compare_logprobs
    ),
    "doctor": Command("Show what is installed and which path each op takes.", None, _doctor),
}


def default_corpus_place() -> str:
    """Where the default corpus belongs, as the run configuration that uses it says."""
    if not DEFAULT_CORPUS_RUN.is_file():
        raise UserError("--out is missing: name the directory of the token store")
    return str(read_config(DEFAULT_CORPUS_RUN)["data"]["default_corpus"])
