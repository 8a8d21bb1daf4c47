"""From command-line words to options, and the help that lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from nemo_hybrid.config.base import (
    GLOBS,
    Options,
    default_of,
    descriptions,
    field_types,
    flag,
    type_in_words,
)
from nemo_hybrid.errors import UserError, suggest

Some = TypeVar("Some", bound=Options)
Pairs = Sequence[tuple[str, str]]
"""Options and their texts, in order."""


def split_words(
    words: Sequence[str], known: Mapping[str, Any], alone: list[str] | None = None
) -> Pairs:
    """The words as pairs of option and text; a yes-or-no option may stand without value.

    ``known``: type by option, such as ``--train.lr``; ``alone`` gets the words that belong to none.
    Raises UserError for an option that is not known or lacks its value, and for words alone where
    there should be none.
    """
    pairs: list[tuple[str, str]] = []
    unexpected: list[str] = []
    following = zip_longest(words, words[1:])
    for word, after in following:
        name, equals, text = word.partition("=")
        if not word.startswith("--"):
            (unexpected if alone is None or _like_an_option(word) else alone).append(word)
        elif name not in known:
            raise UserError(f"unknown option {name}{suggest(name, known)}")
        elif equals:
            pairs.append((name, text))
        elif known[name] is bool and (after or "").lower() not in ("true", "false", "yes", "no"):
            if alone is None and after is not None and not _like_an_option(after):
                raise UserError(f"{name} is true or false, or stands alone; got {after}")
            pairs.append((name, "true"))
        elif after is None or _like_an_option(after):
            raise UserError(
                f"{name} needs a value; write {name}=VALUE when the value starts with a dash"
            )
        else:
            pairs.append((name, after))
            next(following)
    if unexpected:
        raise UserError(f"unexpected words on the command line: {' '.join(unexpected)}")
    return pairs


def _like_an_option(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-" and " " not in word
    return False


def value_of(text: str, hint: Any) -> Any:
    """What a text means for an option of a type. Raises UserError for a file that it names."""
    if hint is str or get_origin(hint) is Literal:
        return text
    if str in get_args(hint) and type(None) in get_args(hint):
        return None if text in ("null", "~") else text
    from nemo_hybrid.config.yaml_text import parse_yaml, read_yaml  # which most mistakes do without

    if hint == GLOBS and "{" not in text and ": " not in text:
        return read_yaml(Path(text).expanduser())
    return parse_yaml(text)


def options_of(options: type[Options]) -> dict[str, Any]:
    """Type by option, ``paths`` left out."""
    types = field_types(options).items()
    return {flag(options, name): hint for name, hint in types if name != "paths"}


def read_options(options: type[Some], words: Sequence[str]) -> Some:
    """The options of a command: ``paths`` by place, the others as ``--name value``. Raises
    UserError."""
    paths: list[str] | None = [] if "paths" in field_types(options) else None
    pairs = split_words(words, options_of(options), paths)
    return from_pairs(options, pairs, **({"paths": paths} if paths else {}))


def from_pairs(options: type[Some], pairs: Pairs, **values: Any) -> Some:
    """Options from pairs of option and text; those of others are left alone. Raises UserError."""
    types = field_types(options)
    names = {flag(options, name): name for name in types}
    known = [(names[option], text) for option, text in pairs if option in names]
    return options(**values, **{name: value_of(text, types[name]) for name, text in known})


def help_text(
    prog: str,
    summary: str,
    groups: Mapping[str, type[Options]],
    epilog: str,
    usage: str | None = None,
) -> str:
    """The help of a command whose options are those of some classes, by title."""
    import argparse  # which help alone needs

    parser = argparse.ArgumentParser(prog, usage, summary, epilog, add_help=False)
    for title, options in groups.items():
        group, described = parser.add_argument_group(title), descriptions(options)
        shared_last = sorted(fields(options), key=lambda f: bool(f.kw_only))  # type: ignore[arg-type]
        for f in shared_last:
            hint = field_types(options)[f.name]
            if is_dataclass(hint):
                continue
            shown = _help(options, f, described[f.name])
            if f.name == "paths":
                group.add_argument("paths", nargs="*", metavar="PATH", help=shown)
                continue
            option = flag(options, f.name)
            metavar = option.rpartition(".")[2].lstrip("-").upper()
            if get_origin(hint) is Literal:
                metavar = "{" + ",".join(get_args(hint)) + "}"
            group.add_argument(option, metavar=metavar, help=shown)
    return parser.format_help()


def _help(options: type[Options], field: Any, description: str) -> str:
    hint, default = field_types(options)[field.name], default_of(field)
    kind = "one of these" if get_origin(hint) is Literal else type_in_words(hint)
    told = "" if field.name == "paths" else f" ({kind.partition(' (')[0]}, {_shown(default)})"
    return f"{description}{told}".replace("%", "%%")


def _shown(default: Any) -> str:
    if default is MISSING:
        return "must be given"
    return "default: " + ("null" if default is None else str(default))
