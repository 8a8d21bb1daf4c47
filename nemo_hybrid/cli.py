"""The command line: choose a command, read its options, report the user's mistakes.

Everything heavy is imported after the options are known to be good, so help and error messages
come at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from nemo_hybrid import __version__
from nemo_hybrid.command_options import (
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    GenerateOptions,
    ImportOptions,
    InspectOptions,
    MergeOptions,
    PlanOptions,
    PrepareOptions,
    VerifyOptions,
)
from nemo_hybrid.config.base import CHECKED, Options
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.read import dump_config, merge, read_keys, run_options, sections
from nemo_hybrid.config.run import RunConfig, TrainingConfig
from nemo_hybrid.config.words import from_pairs, help_text, options_of, read_options, split_words
from nemo_hybrid.errors import Stopped, TrainingError, UserError, suggest

PROG = "nemo-hybrid"
STATUSES = (
    "Exit status: 0 done, 1 internal failure (or, from doctor, a required package that does not "
    "work), 2 mistake in options, files or layout (from inspect: tensors that do not fit; from "
    "verify-export: a check failed), 3 the training itself failed (from compare-logprobs: the "
    "difference exceeds --tolerance, or is no number; from verify-export: a divergence exceeds "
    "--max_kl), 4 stopped by a signal after writing a checkpoint, 5 the launcher died, 130 "
    "interrupted. "
    "torchrun ends with 1 whatever its processes end with."
)
DEFAULT_CORPUS_RUN = Path(__file__).parent.parent / "configs" / "run" / "pretrain_tiny_cpu.yaml"
OTHER_RANKS_WAIT_S = 3.0
TOP_OPTIONS = {"--help": "Show this help.", "--version": "Show the version."}


@dataclass(config=CHECKED)
class RunWords(Options):
    """Of every command that reads the configuration of a run"""

    config: str | None = None
    """YAML file; repeated: later keys win."""
    print_config: bool = False
    """Print the merged options and stop."""


class Command(NamedTuple):
    """A word of the command line."""

    options: type[Any]
    """The first line of its docstring says what the command does."""
    run: Callable[..., int | None]
    """Gets the options, of `plan` a RunConfig before them; gives the exit status, or None for 0."""

    @property
    def summary(self) -> str:
        return str(self.options.__doc__).partition("\n")[0]


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
        print(_help(name), end="")
        return 0
    command = COMMANDS[name]
    if command.options in RUNS:
        return _run_with_config(command, rest)
    if rest and not options_of(command.options):
        raise UserError(f"{name} takes no options, got {' '.join(rest)}")
    options = read_options(command.options, rest)
    options.validate()
    # Who is asked to end leaves nothing unfinished behind, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command.run(options) or 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _top_parser() -> argparse.ArgumentParser:
    """Only for its help."""
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


def _help(name: str) -> str:
    command, prog = COMMANDS[name], f"{PROG} {name}"
    if command.options not in RUNS:
        return help_text(prog, command.summary, {"options": command.options}, STATUSES)
    kind = RUNS[command.options]
    parts: list[type[Options]] = [RunWords, kind, *sections(kind).values()]
    if command.options is PlanOptions:
        parts.append(PlanOptions)
    usage = f"{prog} [--config FILE]... [--SECTION FILE]... [--KEY VALUE]..."
    groups = {str(part.__doc__).partition("\n")[0].rstrip("."): part for part in parts}
    return help_text(prog, command.summary, groups, STATUSES, usage)


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


def _run_with_config(command: Command, words: list[str]) -> int:
    """`pretrain` and `finetune` get the configuration, `plan` its own options as well."""
    kind, own = RUNS[command.options], options_of(RunWords)
    if command.options is PlanOptions:
        own |= options_of(PlanOptions)
    pairs = split_words(words, own | run_options(kind))
    config = merge([text for option, text in pairs if option == "--config"], pairs, kind)
    beside = [from_pairs(PlanOptions, pairs)] if command.options is PlanOptions else []
    if from_pairs(RunWords, pairs).print_config:
        print(dump_config(config), end="")
        return 0
    return command.run(config, *beside) or 0


def _train(config: TrainingConfig) -> None:
    launcher = os.getppid()  # before the imports below, which take seconds: it may die meanwhile
    # Checked here already, because importing the training loop takes seconds.
    from nemo_hybrid.checkpoint.files import model_shape

    config.validate(model_shape(config.model))
    config.validate_world(int(os.environ.get("WORLD_SIZE", "1")))
    from nemo_hybrid.train.loop import train

    train(config, launcher)


def _prepare(options: PrepareOptions) -> None:
    if options.tokenizer and not (Path(options.tokenizer) / "tokenizer.json").is_file():
        from nemo_hybrid.checkpoint.files import list_steps, resolve

        if list_steps(Path(options.tokenizer) / "checkpoints"):  # a run's directory
            options.tokenizer = str(resolve(options.tokenizer))
    if options.preview:
        from nemo_hybrid.data.preview import preview

        preview(options)
        return
    if options.samples_wanted:
        from nemo_hybrid.data.samples import prepare_samples

        assert options.tokenizer is not None
        assert options.out is not None
        out = Path(options.out)
        print(prepare_samples(options, options.paths, options.tokenizer, out, seed=options.seed))
        return
    if options.out is None:
        options.out = default_corpus_place()
    from nemo_hybrid.data.prepare import prepare

    # The default corpus is made once: a second `prepare` finds it.
    print(prepare(options, reuse=not options.paths))


def _import(options: ImportOptions) -> None:
    from nemo_hybrid.checkpoint.convert import import_directory

    print(import_directory(Path(options.paths[0]), Path(options.out)).summary())
    print(
        f"written to {options.out}; go on with\n"
        f"  {PROG} inspect {options.out}\n"
        f"  {PROG} generate --from {options.out} --prompt TEXT\n"
        f"  {PROG} pretrain --model.from_hf {options.out} --config FILE"
    )


def _doctor(_: DoctorOptions) -> int:
    from nemo_hybrid.doctor import doctor

    return doctor()


def _in(module: str, function: str) -> Callable[..., int | None]:
    """A command's function, imported when it is called."""
    return lambda *options: getattr(import_module(f"nemo_hybrid.{module}"), function)(*options)


RUNS: dict[type, type[TrainingConfig]] = {
    RunConfig: RunConfig,
    FinetuneConfig: FinetuneConfig,
    PlanOptions: RunConfig,
}
"""Options of commands that read run configurations, and the kind of run that they are about."""

COMMANDS = {
    "prepare": Command(PrepareOptions, _prepare),
    "pretrain": Command(RunConfig, _train),
    "finetune": Command(FinetuneConfig, _train),
    "plan": Command(PlanOptions, _in("plan", "plan_command")),
    "eval": Command(EvalOptions, _in("train.evaluate", "eval_command")),
    "generate": Command(GenerateOptions, _in("generate", "generate_command")),
    "import": Command(ImportOptions, _import),
    "merge": Command(MergeOptions, _in("checkpoint.adapter", "merge_command")),
    "export": Command(ExportOptions, _in("export.command", "export_command")),
    "verify-export": Command(VerifyOptions, _in("export.verify", "verify_command")),
    "inspect": Command(InspectOptions, _in("inspection", "inspect_command")),
    "compare-logprobs": Command(CompareOptions, _in("logprobs", "compare_command")),
    "doctor": Command(DoctorOptions, _doctor),
}


def default_corpus_place() -> str:
    """Where the default corpus belongs, as the run configuration that uses it says."""
    if not DEFAULT_CORPUS_RUN.is_file():
        raise UserError("--out is missing: name the directory of the token store")
    return str(read_keys(DEFAULT_CORPUS_RUN)["data.default_corpus"])
