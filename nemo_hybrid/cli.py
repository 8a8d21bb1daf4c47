"""The command line: from a word to a command, and from an error to a status.

Nothing heavy is imported before a command's options are known to be good, so help and error
messages come at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from nemo_hybrid import __version__
from nemo_hybrid.errors import Stopped, TrainingError, UserError, suggest
from nemo_hybrid.process import TOGETHER
from nemo_hybrid.terminal import ReaderGone, open_streams

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
OTHER_RANKS_WAIT_S = 3.0
BRIEF = ("plan", "inspect", "doctor")
"""Commands that end before it would help to look for unreachable objects: among all those that
libraries make when they are imported that takes up to a second."""
TOP_OPTIONS = {
    "--help": "Show this help.",
    "--version": "Show the version, and the commit.",
    "--completion": "Show a script that lets bash and zsh complete commands and options.",
}


class Word(NamedTuple):
    """A word of the command line."""

    module: str
    """Of nemo_hybrid.commands."""
    summary: str


COMMANDS = {
    "prepare": Word(
        "prepare", "Turn text into a token store, or conversations into samples for fine-tuning."
    ),
    "pretrain": Word("train", "Train a model from its first step, or resume."),
    "finetune": Word("train", "Fine-tune a checkpoint on conversations, or resume."),
    "rl": Word("train", "Train a checkpoint on rewards for its own answers, or resume."),
    "plan": Word("plan", "Say whether a run fits, and how long a step takes."),
    "launch": Word("launch", "Start a command in several processes of this machine."),
    "eval": Word("evaluate", "Measure a trained model's losses on held-out data."),
    "harness": Word("harness", "Score a model on tasks of lm-eval."),
    "generate": Word("generate", "Continue prompts with a trained model."),
    "rollout": Word("rollout", "Write samples of what a model says to prompts, to a file."),
    "eval-mtp": Word(
        "eval_mtp", "Measure how many drafts of the MTP block stay, and what they gain."
    ),
    "import": Word("import_merge", "Copy a Hugging Face checkpoint into our layout."),
    "merge": Word("import_merge", "Add adapters to the weights that they were trained beside."),
    "average": Word("average", "Average the weights of several checkpoints of a run."),
    "export": Word("export", "Write a checkpoint in the number formats that serving engines load."),
    "push": Word("push", "Send a model to the Hugging Face hub."),
    "verify-export": Word(
        "verify", "Check an exported directory: names, shapes, dtypes, checksums, values."
    ),
    "inspect": Word("inspect", "Show shape, size and tensors of a model, without loading weights."),
    "compare-logprobs": Word(
        "compare", "Compare two checkpoints' probabilities of a text, token by token."
    ),
    "doctor": Word("doctor", "Show what is installed and which path each operation takes."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status. Internal failures raise, so Python ends with 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        if words and words[0] in BRIEF:
            gc.disable()
        asks = {"-h", "--help", "--print_config"} & set(words)
        runs = ("pretrain", "finetune", "rl")
        open_streams(needed=bool(asks) or not words or words[0] not in runs)
    rank = os.environ.get("RANK", "") if words and words[0] in TOGETHER else ""
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        _report(error, rank)
        return 2
    except TrainingError as error:
        _report(error, rank)
        return 3
    except Stopped as error:
        if rank in ("", "0"):
            print(error, file=sys.stderr, flush=True)
        return 4
    except KeyboardInterrupt:
        if rank in ("", "0"):
            print("interrupted", file=sys.stderr, flush=True)
        if argv is None:  # Python would wait for threads at its end
            os._exit(130)
        return 130
    except ReaderGone:
        return 0
    return status


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        _top_parser().print_help()
        if not words:
            raise UserError(f"no command given; choose one of {', '.join(COMMANDS)}")
        return 0
    name, rest = words[0], words[1:]
    if name == "--version":
        print(f"{PROG} {__version__}{_commit()}")
        return 0
    if name == "--completion":
        from nemo_hybrid.commands.completion import script

        known = {name: _command(name).known() for name in COMMANDS}
        print(script(PROG, [*COMMANDS, *TOP_OPTIONS], known), end="")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UserError(f"unknown {kind} {name}{suggest(name, [*COMMANDS, *TOP_OPTIONS])}")
    command, summary = _command(name), COMMANDS[name].summary
    if {"-h", "--help"} & set(rest):
        print(command.help(f"{PROG} {name}", summary, STATUSES), end="")
        return 0
    return int(command.start(name, rest))


def _command(name: str) -> Any:
    return import_module(f"nemo_hybrid.commands.{COMMANDS[name].module}").COMMANDS[name]


def _commit() -> str:
    """The commit that a clone stands at, and whether it was changed, in brackets; else nothing."""
    clone = Path(__file__).parents[1]
    if not (clone / ".git").exists():
        return ""
    words = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({done.stdout.strip()})"


def _top_parser() -> argparse.ArgumentParser:
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


def _report(error: UserError | TrainingError, rank: str) -> None:
    """Print the message once per job: from rank 0, or from a rank whose error is its own.

    torchrun ends all processes soon after the first has ended. So the other ranks wait: either
    rank 0 had the same error and they are ended while they wait, or their error is their own.
    """
    who = ""
    if rank not in ("", "0"):
        time.sleep(OTHER_RANKS_WAIT_S)
        who = f" (rank {rank})"
    sys.stdout.flush()
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
