"""From YAML files and command-line words to options, and from a RunConfig back to YAML.

jsonargparse checks types and parses overrides; this file adds what it does not do: sections kept
in files of their own, paths that resolve from the file that names them, and messages of one line
that name the file and the nearest key.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os.path
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from nemo_hybrid.config import RunConfig, TrainingConfig
from nemo_hybrid.errors import UserError

if TYPE_CHECKING:
    import jsonargparse

Options = TypeVar("Options")
Config = TypeVar("Config", bound=TrainingConfig)

PATH_KEYS = (
    "run_dir",
    "resume",
    "model.from_hf",
    "data.path",
    "data.default_corpus",
    "data.heldout_path",
    "data.chat_template",
)
"""Keys that hold a path. The keys inside data.blend are paths too."""

_GLOBS = dict[str, str]
"""Type of options that map globs to formats; a YAML file of them can be named instead."""
NOT_A_PATH = {"resume": ("auto", "never")}

# YAML 1.1 reads 1e-3 as a string, because it wants a dot. We read it as everybody means it.
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-3 as a float, dates as text, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                problem = "a key must be plain text"
            elif key in seen:
                problem = f"the key {key!r} is given twice"
            else:
                seen.add(key)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes every text the loader above would not read back as text."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # Only double quotes escape the line breaks beyond ASCII, which are folded when read.
        style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)

_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def sections(kind: type[TrainingConfig] = RunConfig) -> dict[str, type]:
    """Name and dataclass of every section of a kind of run, in order."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if is_dataclass(hints[f.name])}


def key_types(kind: type[TrainingConfig] = RunConfig) -> dict[str, Any]:
    """Type of every dotted key of a kind of run, such as ``train.lr``."""
    types: dict[str, Any] = {}
    inner = sections(kind)
    for name, hint in get_type_hints(kind).items():
        if name in inner:
            types.update({f"{name}.{k}": v for k, v in get_type_hints(inner[name]).items()})
        else:
            types[name] = hint
    return types


def load_config(
    files: Iterable[str | Path],
    overrides: Sequence[str] = (),
    kind: type[Config] = RunConfig,  # type: ignore[assignment]
) -> Config:
    """Merge YAML files in order, then apply ``--dotted.key value`` words.

    A word pair ``--SECTION FILE`` (for example ``--model model/tiny.yaml``) merges a section's file
    after all configuration files. The result has absolute paths; call ``validate()`` on it.
    Raises UserError for a missing or malformed file, an unknown key or a value of a wrong type.
    """
    return load_with(files, overrides, kind)[0]


def load_with(
    files: Iterable[str | Path], overrides: Sequence[str], kind: type[Config], **further: type
) -> tuple[Config, dict[str, Any]]:
    """The same, and the options of further sections, for which there are words alone."""
    chosen, words = take_words(overrides, repeated=[f"--{name}" for name in sections(kind)])
    parser, types = run_parser("", "", kind), dict(key_types(kind))
    for name, section in further.items():
        parser.add_class_arguments(section, name)
        types |= {f"{name}.{key}": hint for key, hint in get_type_hints(section).items()}
    merged: dict[str, Any] = {}
    for file in files:
        merged |= _checked(parser, read_config(Path(file), kind), file, kind)
    for name in sections(kind):
        for file in chosen[f"--{name}"]:
            merged |= _checked(parser, read_section(Path(file), name, kind), file, kind)
    check_words(words, {f"--{key}" for key in types})
    parser.set_defaults(merged)
    parsed = parse_words(parser, words, types)
    beside = {name: section(**parsed.pop(name)) for name, section in further.items()}
    return _absolute(_build(flatten(parsed, kind), kind)), beside


def dump_config(config: TrainingConfig) -> str:
    """YAML text from which load_config gives an equal configuration (paths made absolute)."""
    return yaml.dump(asdict(_absolute(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_config(file: Path, kind: type[TrainingConfig] = RunConfig) -> dict[str, Any]:
    """The dotted keys of one configuration file: sections read in, keys checked, paths absolute."""
    flat: dict[str, Any] = {}
    inner = sections(kind)
    for key, value in read_yaml(file).items():
        if key not in inner:
            flat |= _known({str(key): value}, file, kind)
        elif isinstance(value, str):
            flat |= read_section(_resolve(value, file.parent), key, kind)
        else:
            flat |= _known(_in_section({} if value is None else value, key, file), file, kind)
    return flat


def read_section(
    file: Path, section: str, kind: type[TrainingConfig] = RunConfig
) -> dict[str, Any]:
    """The same of a file that holds the keys of one section, such as a model's shape."""
    return _known(_in_section(read_yaml(file), section, file), file, kind)


def _in_section(content: Any, section: str, file: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: {section} must be a mapping of keys or the path of a YAML file, "
            f"got {content!r}"
        )
    return {f"{section}.{key}": value for key, value in content.items()}


def _known(flat: dict[str, Any], file: Path, kind: type[TrainingConfig]) -> dict[str, Any]:
    """The same keys, if there are such, with paths seen from the file, and mappings of globs that
    are kept in files of their own."""
    known = key_types(kind)
    for key, value in flat.items():
        if key not in known:
            near = suggest(key, [*sections(kind), *known])
            raise UserError(f"{file}: unknown key {key}{near}")
        if known[key] == _GLOBS and isinstance(value, str):
            flat = {**flat, key: read_yaml(_resolve(value, file.parent))}
    return _resolve_paths(flat, file.parent)


def run_parser(
    prog: str, description: str, kind: type[TrainingConfig], **kwargs: Any
) -> jsonargparse.ArgumentParser:
    """The parser of every option of a kind of run."""
    parser = new_parser(prog, description, **kwargs)
    parser.add_class_arguments(kind)
    return parser


def read_yaml(file: Path) -> dict[str, Any]:
    """Content of a YAML file that holds a mapping; an empty file is an empty mapping."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file") from None
    except OSError as e:
        raise UserError(f"cannot read configuration file {file}: {e.strerror}") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        place = f" line {mark.line + 1}" if mark else ""
        # A pattern such as *E without quotes is an alias to YAML.
        alias = "alias" in f"{e.problem} {e.context}"
        hint = ' (put text that starts with * in quotes: "*E")' if alias else ""
        raise UserError(f"{file}{place}: not valid YAML: {e.problem}{hint}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(e).split())}") from None
    except (ValueError, LookupError, AttributeError, RecursionError) as e:
        # The library's own, on endless numbers and nesting, and values that belie their tags.
        raise UserError(f"{file}: not valid YAML: {type(e).__name__}: {e}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected `key: value` lines, found {type(content).__name__}")
    return content


def _checked(
    parser: jsonargparse.ArgumentParser,
    flat: dict[str, Any],
    file: str | Path,
    kind: type[TrainingConfig],
) -> dict[str, Any]:
    """Check the types of one file's content, so that the message can name the file."""
    types = key_types(kind)
    for key, value in flat.items():
        # jsonargparse takes null for "not given" whatever the type.
        if value is None and type(None) not in get_args(types[key]):
            raise UserError(f"{file}: {key}: expected {type_in_words(types[key])}, got null")
    try:
        parser.parse_object(flat)
    except argparse.ArgumentError as e:
        raise UserError(f"{file}: {one_line(e, types)}") from None
    return flat


def flatten(content: dict[str, Any], kind: type[TrainingConfig] = RunConfig) -> dict[str, Any]:
    """Dotted keys of a configuration by sections; data.blend stays one value."""
    flat: dict[str, Any] = {}
    inner = sections(kind)
    for key, value in content.items():
        if key in inner and isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat


def _resolve(path: str, base: Path) -> Path:
    """Without ``..``; links are kept, so that they may be moved later."""
    return Path(os.path.normpath(base.absolute() / Path(path).expanduser()))


def _resolve_paths(flat: dict[str, Any], base: Path) -> dict[str, Any]:
    """The same with every relative path made absolute, seen from base."""
    out = dict(flat)
    for key in PATH_KEYS:
        value = flat.get(key)
        if isinstance(value, str) and value not in NOT_A_PATH.get(key, ()):
            out[key] = str(_resolve(value, base))
    if isinstance(flat.get("data.blend"), dict):
        blend = flat["data.blend"].items()
        out["data.blend"] = {str(_resolve(str(k), base)): weight for k, weight in blend}
    return out


def _build(flat: dict[str, Any], kind: type[Config]) -> Config:
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, got {value}")
    values = dict(flat)
    for name, section in sections(kind).items():
        values[name] = section(**{f.name: values.pop(f"{name}.{f.name}") for f in fields(section)})
    return kind(**values)


def _absolute(config: Config) -> Config:
    """A copy whose relative paths are seen from the current directory."""
    kind = type(config)
    return _build(_resolve_paths(flatten(asdict(config), kind), Path.cwd()), kind)


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
    helps = {
        p.arg_name: p.description
        for base in reversed(options_class.__mro__[:-1])
        for p in parse_from_object(base).params
    }
    hints = get_type_hints(options_class)
    for f in fields(options_class):
        about: dict[str, Any] = {"type": hints[f.name], "help": helps[f.name]}
        if f.name == "paths":
            # Without default, or the help would call it required.
            parser.add_argument(
                f.name, nargs="*", metavar="PATH", default=[], **(about | {"type": str})
            )
            continue
        if f.default_factory is not MISSING:
            about["default"] = f.default_factory()
        elif f.default is MISSING:
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
        words = _with_files(_complete(words, types), types)
        parsed: dict[str, Any] = parser.parse_args(words).as_dict()
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


def _with_files(words: Sequence[str], types: dict[str, Any]) -> list[str]:
    """The words with what a YAML file holds for its name, where globs and formats are expected."""
    options = {flag(name) for name, hint in types.items() if hint == _GLOBS}
    read: list[str] = []
    before = ""
    for word in words:
        name, equals, value = word.partition("=")
        if before in options:
            word = _from_file(word)
        elif equals and name in options:
            word = f"{name}={_from_file(value)}"
        before = "" if before in options else word
        read.append(word)
    return read


def _from_file(value: str) -> str:
    """The content, as JSON, of a file that holds a mapping; the value itself if it is one."""
    if "{" in value or ": " in value:
        return value
    return json.dumps(read_yaml(Path(value).expanduser()))


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
    if get_origin(hint) is list:
        return 'a list such as "[q_proj, o_proj]"'
    if get_origin(hint) is dict:
        if args[1] is float:
            return "a mapping of paths to numbers"
        return "a mapping of globs to formats such as \"{'*.o_proj': bf16}\" or a YAML file of one"
    return f"one of {', '.join(str(a) for a in args)}" if args else ""
