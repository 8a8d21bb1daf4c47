"""What all options share: bounds, the check of types when they are made, and messages of one line.

Options are pydantic dataclasses. Docstrings of fields are the help texts of the command line.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, model_validator

from nemo_hybrid.errors import UserError, suggest

CHECKED = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    defer_build=True,  # most commands need few of the classes
)
"""Of every class of options."""
POSITIVE = Field(gt=0)
NOT_NEGATIVE = Field(ge=0)
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NotNegativeInt = Annotated[int, NOT_NEGATIVE]
NotNegativeFloat = Annotated[float, NOT_NEGATIVE]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Some generators refuse others."""
GLOBS = dict[str, str]
"""Globs over module names and their formats; a YAML file of them can be named instead."""
PHASES = dict[float, dict[str, float]]
"""Blends of stores and their weights, by the number of tokens from which on they are drawn."""
SIZES = dict[PositiveFloat, PositiveInt]
"""Sequences of a batch, by the number of tokens up to which."""

NAMED = Mapping[str, str]
"""Texts, such as places, by names that the user gives them; another type than GLOBS."""
SHARES = Mapping[str, NotNegativeFloat]
"""Shares of a whole, by names that the user gives them; they need not sum to 1."""
OPTIONS_BY_NAME = dict[str, dict[str, Any]]
"""Things that have options of their own, by names that the user gives them."""


_MAPPINGS = {
    GLOBS: "a mapping of globs to formats such as \"{'*.o_proj': bf16}\" or a YAML file of one",
    PHASES: 'a mapping of tokens to blends such as "{2e12: {data/a: 0.3, data/b: 0.7}}"',
    dict[float, int]: 'a mapping of tokens to sequences such as "{2e9: 768, 8e9: 1536}"',
    NAMED: 'a mapping of names to texts such as "{math: runs/math/model}"',
    Mapping[str, float]: 'a mapping of names to numbers such as "{math: 0.6, choice: 0.4}"',
    OPTIONS_BY_NAME: 'a mapping of names to options such as "{arithmetic: {format_reward: 0.1}}"',
}
"""Types, without bounds, in words."""


class OptionError(UserError):
    """An option whose value cannot be had."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(why)
        self.key = key
        """Which, such as ``train.lr``."""


class Options:
    """Base of all options: a wrong value is refused when they are made, with an OptionError."""

    section: ClassVar[str] = ""
    """What stands before the names of fields in files and messages: ``train.``"""

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, values: Any, make: Callable[[Any], Any]) -> Any:
        try:
            return make(values)
        except ValidationError as error:
            raise _in_words(error, cls) from None

    def changed(self) -> list[str]:
        """Names of the fields that do not have their default."""
        return [f.name for f in fields(self) if getattr(self, f.name) != default_of(f)]  # type: ignore[arg-type]


class CommandOptions(Options):
    """Options of a command. The first line of a class's docstring is the command's summary."""

    def validate(self) -> None:
        """Raise UserError for options that contradict each other or have no effect."""


def default_of(field: Any) -> Any:
    """The default of a dataclass's field; MISSING: it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


_TYPES: dict[type, dict[str, Any]] = {}  # found once: evaluating annotations takes its time


def field_types(options: type[Options]) -> dict[str, Any]:
    """Type of every field, without bounds."""
    if options not in _TYPES:
        hints = get_type_hints(options)
        _TYPES[options] = {f.name: hints[f.name] for f in fields(options)}  # type: ignore[arg-type]
    return _TYPES[options]


def refuse(*rules: tuple[object, str]) -> None:
    """Raise UserError with the first text whose condition holds."""
    for holds, why in rules:
        if holds:
            raise UserError(why)


def descriptions(options: type) -> dict[str, str]:
    """The docstring of every field, from the source: pydantic forgets them when it builds a class
    late."""
    found: dict[str, str] = {}
    for part in options.__mro__[::-1]:
        if not issubclass(part, Options):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def flag(options: type[Options], field_name: str) -> str:
    """The option of a field; a trailing underscore (``from_``) is not part of it."""
    return f"--{options.section}{field_name.rstrip('_')}"


def _in_words(error: ValidationError, options: type[Options]) -> OptionError:
    """What went wrong with the first option that is wrong, in one line of plain words."""
    found = error.errors(include_url=False)
    missing = [flag(options, str(e["loc"][0])) for e in found if e["type"] == "missing"]
    if missing:
        return OptionError("", f"missing: {', '.join(missing)}")
    first = found[0]
    name, *inside = map(str, first["loc"])
    key, hints = options.section + name, field_types(options)
    if name not in hints:
        return OptionError(key, f"unknown option {key}{suggest(name, hints)}")
    got = (
        "null" if first["input"] is None else first["input"] if first["input"] != "" else "nothing"
    )
    if inside and inside[-1] != "[key]":
        got = f"{inside[0]}: {got}"
    if "finite" in first["type"]:
        if inside:
            what = inside[0] if inside[-1] == "[key]" else f"the weight of {inside[0]}"
            got = f"{what} must be positive and finite, got {first['input']}"
            return OptionError(key, f"{key}: {got}")
        return OptionError(key, f"{key} must be a finite number, got {got}")
    if "ctx" in first and {"gt", "ge", "lt", "le"} & first["ctx"].keys():
        return OptionError(key, f"{key} must {_bounds_in_words(options, name)}, got {got}")
    given = first["input"]
    if isinstance(given, str) and given.strip("+-").replace(".", "", 1).isdigit():
        got = f"the text {given!r}"  # of a file; without quotes it would be what is expected
    return OptionError(key, f"{key}: expected {type_in_words(hints[name])}, got {got}")


def _bounds_in_words(options: type, name: str) -> str:
    """What a number must do: ``be positive``, ``lie in [0, 1)``."""
    limits: dict[str, Any] = {}
    for limit in vars(options)["__pydantic_fields__"][name].metadata:
        limits |= {k: getattr(limit, k) for k in ("gt", "ge", "lt", "le") if hasattr(limit, k)}
    low, high = (limits.get(a, limits.get(b)) for a, b in (("gt", "ge"), ("lt", "le")))
    if high is not None:
        opens, closes = "(" if "gt" in limits else "[", "]" if "le" in limits else ")"
        return f"lie in {opens}{low}, {'2**63' if high == 2**63 else high}{closes}"
    return "be positive" if limits in ({}, {"gt": 0}) else f"be {low} or more"


def type_in_words(hint: Any) -> str:
    """A type in words: ``an integer``, ``one of wsd, cosine``."""
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "text (quote it)"}
    if hint in simple:
        return simple[hint]
    args = get_args(hint)
    if type(None) in args:
        return " or ".join([*(type_in_words(a) for a in args if a is not type(None)), "null"])
    if get_origin(hint) is list:
        return 'a list such as "[q_proj, o_proj]"'
    if get_origin(hint) is Literal:
        return f"one of {', '.join(args)}"
    return _MAPPINGS.get(hint, "a mapping of paths to numbers")
