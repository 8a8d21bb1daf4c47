"""jsonargparse behind a few functions: help from docstrings, errors of one line, suggestions."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from nemo_hybrid.errors import UserError

if TYPE_CHECKING:
    import jsonargparse

Options = TypeVar("Options")


def flag(field_name: str) -> str:
    """The option of a field; a trailing underscore (``from_``) is not part of it."""
    return "--" + field_name.rstrip("_")


def suggest(key: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known key nearest to key, else an empty string."""
    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not nearest:
        # A right name in a wrong place: lr for train.lr.
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        name = key.rsplit(".", 1)[-1].lstrip("-")
        leaf = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
        nearest = [leaves[found] for found in leaf]
    return f"; did you mean {nearest[0]}?" if nearest else "; see `--help`"


def check_words(words: Sequence[str], options: set[str]) -> None:
    """Raise UserError for the first word that starts like an option and is not one of options."""
    for word in words:
        name = word.split("=", 1)[0]
        if word.startswith("--") and name not in options:
            raise UserError(f"unknown option {name}{suggest(name, options)}")


def take_words(
    words: Sequence[str], *, repeated: Sequence[str] = (), switches: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Take some options out of the words, and give back the rest as well.

    A repeated option has a value and may come more than once: its result is a list of texts. A
    switch has no value: its result is a bool. Raises UserError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in repeated:
        parser.add_argument(option, dest=option, action="append", default=[])
    for option in switches:
        parser.add_argument(option, dest=option, action="store_true")
    try:
        taken, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as e:
        raise UserError(one_line(e, {})) from None
    return vars(taken), rest


def new_parser(prog: str, description: str, **kwargs: Any) -> jsonargparse.ArgumentParser:
    """A jsonargparse parser that takes help texts from field docstrings and raises its errors."""
    import jsonargparse  # here, so that reading this file stays cheap

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
        **kwargs,
    )


def options_parser(
    options_class: type, prog: str, description: str, **kwargs: Any
) -> jsonargparse.ArgumentParser:
    """The parser of a flat dataclass: ``paths`` by place, the other fields as ``--name value``.

    A field without a default must be given.
    """
    from docstring_parser import parse_from_object

    parser = new_parser(prog, description, **kwargs)
    helps = {p.arg_name: p.description for p in parse_from_object(options_class).params}
    hints = get_type_hints(options_class)
    for f in fields(options_class):
        about: dict[str, Any] = {"type": hints[f.name], "help": helps[f.name]}
        if f.name == "paths":
            # Without default, or the help would call it required.
            parser.add_argument(
                f.name, nargs="*", metavar="PATH", default=[], **(about | {"type": str})
            )
            continue
        if f.default is MISSING:
            about["required"] = True
        else:
            about["default"] = f.default
        option = flag(f.name)
        metavar = option[2:].upper() if get_origin(hints[f.name]) is not Literal else None
        parser.add_argument(option, dest=f.name, metavar=metavar, **about)
    return parser


def read_options(
    options_class: type[Options], parser: jsonargparse.ArgumentParser, words: Sequence[str]
) -> Options:
    """The options in the words of a command line. Raises UserError."""
    hints = get_type_hints(options_class)
    check_words(words, {flag(name) for name in hints})
    return options_class(**parse_words(parser, words, hints))


def parse_words(
    parser: jsonargparse.ArgumentParser, words: Sequence[str], types: dict[str, Any]
) -> dict[str, Any]:
    """Parse command-line words; what argparse and jsonargparse refuse becomes a UserError."""
    try:
        parsed: dict[str, Any] = parser.parse_args(_complete(words, types)).as_dict()
    except argparse.ArgumentError as e:
        raise UserError(one_line(e, types)) from None
    return parsed


def _complete(words: Sequence[str], types: dict[str, Any]) -> list[str]:
    """The words with ``true`` after every bare yes-or-no option: ``--skip_bad`` means true."""
    switches = {flag(name) for name, hint in types.items() if hint is bool}
    completed = []
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        completed.append(word)
        if word in switches and following.lower() not in ("true", "false", "yes", "no"):
            completed.append("true")
    return completed


def one_line(error: BaseException, types: dict[str, Any]) -> str:
    """What went wrong, in one line of plain words, from an argparse or jsonargparse error.

    types maps option names to their types, so that the message can say what was expected.
    """
    text = " ".join(str(error).split())
    wrong_type = re.match(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)$', text)
    if wrong_type:
        key, value = wrong_type.groups()
        expected = type_in_words(types.get(key))
        if expected:
            return f"{key}: expected {expected}, got {value or 'nothing'}"
    missing = re.match(r"the following arguments are required: (.*)", text)
    if missing:
        return f"missing: {', '.join(flag(name) for name in missing.group(1).split(', '))}"
    no_value = re.match(r"argument (--\S+): expected one argument", text)
    if no_value:
        option = no_value.group(1)
        return f"{option} needs a value; write {option}=VALUE when the value starts with a dash"
    return text.replace("unrecognized arguments", "unexpected words on the command line")


def type_in_words(hint: Any) -> str:
    """A type in words: ``an integer``, ``one of wsd, cosine``; empty for other types."""
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "text (quote it)"}
    if hint in simple:
        return simple[hint]
    args = get_args(hint)
    if type(None) in args:
        return " or ".join([*(type_in_words(a) for a in args if a is not type(None)), "null"])
    if get_origin(hint) is dict:
        return "a mapping of paths to numbers"
    return f"one of {', '.join(str(a) for a in args)}" if args else ""
