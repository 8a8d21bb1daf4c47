"""What commands have in common: how their words are read, and their help."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED, CommandOptions, Options, refuse
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.config.words import from_pairs, help_text, options_of, read_options, split_words
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import ended_when_asked


@dataclass(config=CHECKED)
class RunWords(Options):
    """Configuration of the run."""

    config: str | None = None
    """YAML file; repeated: later keys win."""
    print_config: bool = False
    """Print the merged options and stop."""


class Command(NamedTuple):
    """What is done with a word of the command line."""

    run: Callable[..., int | None]
    """Gets the configuration and the options, where there are such; gives the exit status, or None
    for 0."""
    options: type[CommandOptions] | None = None
    kind: type[TrainingConfig] | None = None
    """The kind of run whose configuration the command reads."""
    kinds: Sequence[type[TrainingConfig]] = ()
    """Further kinds, of which the one is taken that knows the keys."""
    reads: str | None = None
    """The option that names models: they have to be there before anything heavy is imported."""

    def known(self) -> dict[str, Any]:
        """Type by option."""
        own = options_of(self.options) if self.options else {}
        if self.kind is None:
            return own
        from nemo_hybrid.config.read import run_options

        known = options_of(RunWords) | own
        for kind in (*self.kinds, self.kind):
            known |= run_options(kind)
        return known

    def start(self, name: str, words: Sequence[str]) -> int:
        """Read the words that follow the command's name, and run it. Raises UserError."""
        if self.kind is not None:
            return self._with_config(self.kind, words)
        given = []
        if self.options is not None:
            given = [read_options(self.options, words)]
            given[0].validate()
            self._look_for_models(given[0])
        elif words:
            raise UserError(f"{name} takes no options, got {' '.join(words)}")
        # Who is asked to end leaves nothing unfinished behind, as after Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with ended_when_asked():
                return self.run(*given) or 0
        finally:
            signal.signal(signal.SIGTERM, before)

    def _with_config(self, kind: type[TrainingConfig], words: Sequence[str]) -> int:
        from nemo_hybrid.config.read import check_home, dump_config, kind_of, merge, run_options

        own = options_of(RunWords) | (options_of(self.options) if self.options else {})
        pairs = split_words(words, self.known())
        files = [text for option, text in pairs if option == "--config"]
        if self.kinds:
            given = {option for option, _ in pairs if option not in own}
            kind = kind_of(files, given, (kind, *self.kinds))
            split_words(words, run_options(kind) | own)  # again: no option of another kind
        config = merge(files, pairs, kind)
        beside = [from_pairs(self.options, pairs)] if self.options else []
        if from_pairs(RunWords, pairs).print_config:
            print(dump_config(config), end="")
            return 0
        if all(option != "--run_dir" for option, _ in pairs):
            check_home(files, config.run_dir)
        with ended_when_asked():
            return self.run(config, *beside) or 0

    def _look_for_models(self, options: CommandOptions) -> None:
        if self.reads:
            from nemo_hybrid.checkpoint.steps import require

            named = getattr(options, self.reads)
            for path in [named] if isinstance(named, str) else named or ():
                require(path)

    def help(self, prog: str, summary: str, statuses: str) -> str:
        """All options and their meaning."""
        parts: list[type[Options]] = [self.options] if self.options else []
        usage = None
        if self.kind is not None:
            from nemo_hybrid.config.read import sections

            parts = [RunWords, self.kind, *sections(self.kind).values(), *parts]
            usage = f"{prog} [--config FILE]... [--SECTION FILE]... [--KEY VALUE]..."
        groups = {str(part.__doc__).partition("\n")[0].rstrip("."): part for part in parts}
        return help_text(prog, summary, groups, statuses, usage)


def check_place(out: str) -> None:
    """Raise UserError for an --out that has no name, or is in no directory."""
    path = Path(out)
    refuse(
        (not path.name, f"--out: {out!r} names no file"),
        (not path.parent.is_dir(), f"{path.parent} is no directory, so {out} cannot be written"),
    )


def check_paths(command: str, paths: list[str], fewest: int, most: int) -> None:
    """Raise UserError for too few or too many words without an option."""
    wanted = str(most) if fewest == most else f"{fewest} or {most}"
    given = " ".join(paths) or "none"
    refuse(
        (
            not fewest <= len(paths) <= most,
            f"{command} takes {wanted} path{'s' * (most > 1)}, got {given}",
        )
    )


def check_text(prompt: str) -> None:
    """Raise UserError for a command-line word that held bytes which are not UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not text: it holds bytes that are not UTF-8")
