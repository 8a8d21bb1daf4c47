"""`verify-export`: is a directory what its configuration says, and the model it was made of?"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_paths
from nemo_hybrid.config.base import CHECKED, NOT_NEGATIVE, CommandOptions, PositiveInt
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table


@dataclass(config=CHECKED)
class VerifyOptions(CommandOptions):
    """Check an exported directory: names, shapes, dtypes, checksums, values."""

    paths: list[str] = field(default_factory=list)
    """Exported directory."""
    base: str | None = None
    """The checkpoint it was made of, to compare probabilities with."""
    data: str | None = None
    """UTF-8 text file or token store (its held-out part) to compare on; null: random token ids."""
    tokens: PositiveInt = 8192
    """Tokens to compare on."""
    max_kl: Annotated[float | None, NOT_NEGATIVE] = None
    """End with status 3 when the mean KL divergence, with or without rounded inputs, exceeds this,
    in nats."""

    def validate(self) -> None:
        check_paths("verify-export", self.paths, 1, 1)


def verify_command(options: VerifyOptions) -> int:
    """Print the checks; 2 where one failed, 3 where the divergence exceeds ``max_kl``. Raises
    UserError for options and data that cannot be used."""
    if options.max_kl is not None and options.base is None:
        raise UserError("--max_kl needs --base: name the checkpoint to compare with")
    from nemo_hybrid.export.verify import verify_directory

    directory = Path(options.paths[0]).expanduser()
    result = verify_directory(
        directory, base=options.base, data=options.data, tokens=options.tokens, show=True
    )
    words = {True: "passed", False: "FAILED", None: "not made"}
    rows = [
        (check.name, words[check.passed], "see below" if check.passed is False else check.note)
        for check in result.checks
    ]
    print_table(("check", "", "what was found"), rows, title=str(directory))
    for check in result.checks:
        for line in check.note.splitlines() if check.passed is False else ():
            print(f"{check.name}: {line}")
    if not result.passed:
        return 2
    if options.max_kl is None:
        return 0
    assert result.measured is not None  # where every check passed, the model ran
    kls = [run.kl for run in result.measured.runs if run.kl is not None]
    if all(kl <= options.max_kl for kl in kls):  # not a number compares as false
        return 0
    print(f"the KL divergence exceeds --max_kl {options.max_kl:g}")
    return 3


COMMANDS = {"verify-export": Command(verify_command, VerifyOptions, reads="paths")}
