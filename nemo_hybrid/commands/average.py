"""`average`: one model out of several checkpoints."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import (
    CHECKED,
    NOT_NEGATIVE,
    POSITIVE,
    CommandOptions,
    refuse,
)
from nemo_hybrid.terminal import print_table


@dataclass(config=CHECKED)
class AverageOptions(CommandOptions):
    """Average the weights of several checkpoints."""

    out: str
    """Hugging Face directory to write; it must be absent or empty."""
    paths: list[str] = field(default_factory=list)
    """A run, or two or more checkpoints of one model, the oldest first."""
    weights: str = "minus_sqrt"
    """minus_sqrt: as if the learning rate had decayed by 1 - sqrt(fraction), the oldest counts
    most; linear: the plain mean; or numbers such as 1,2,1."""
    from_: Annotated[int | None, NOT_NEGATIVE] = None
    """Of a run: the first step whose checkpoint may be taken; null: the oldest there is."""
    to: Annotated[int | None, NOT_NEGATIVE] = None
    """Of a run: the last one; null: the newest there is."""
    every: Annotated[int | None, POSITIVE] = None
    """Of a run: fewest steps between two checkpoints that are taken; null: all of them."""

    def validate(self) -> None:
        selects = {"from_", "to", "every"} & {*self.changed()}
        refuse(
            (not self.paths, "average takes a run, or two or more checkpoints, got none"),
            (
                selects and len(self.paths) > 1,
                "--from, --to and --every choose among the checkpoints of one run: name it alone",
            ),
        )


def average_command(options: AverageOptions) -> None:
    """Write the mean, and say what it is of."""
    from nemo_hybrid.checkpoint.average import average, checkpoints_of
    from nemo_hybrid.checkpoint.directory import STEP
    from nemo_hybrid.checkpoint.steps import resolve

    if len(options.paths) == 1:
        run = Path(options.paths[0]).expanduser()
        directories = checkpoints_of(run, options.from_, options.to, options.every)
    else:
        directories = [resolve(path) for path in options.paths]
        names = [directory.name for directory in directories if STEP.fullmatch(directory.name)]
        if names != sorted(names):
            print("warning: the first is taken for the oldest, but the steps do not rise")
    parts = average(directories, options.weights, Path(options.out))
    rows = [(str(directory), f"{coefficient:.4f}") for directory, coefficient in parts]
    print_table(("checkpoint", "coefficient"), rows)
    print(f"written to {options.out}; compare it with the last one: nemo-hybrid eval --help")


COMMANDS = {"average": Command(average_command, AverageOptions, reads="paths")}
