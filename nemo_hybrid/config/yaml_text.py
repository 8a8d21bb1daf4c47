"""YAML as people write it: 1e-3 is a number, dates are text, and no key is given twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import refuse_pointer

# YAML 1.1 reads 1e-3 as a string, because it wants a dot. We read it as everybody means it.
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


_BROKEN = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""The library's own, on endless numbers and nesting, and values that belie their tags, as well."""


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


def read_yaml(file: Path) -> dict[str, Any]:
    """Content of a YAML file that holds a mapping; an empty file is an empty mapping."""
    try:
        refuse_pointer(file)
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
    except _BROKEN as e:
        raise UserError(f"{file}: not valid YAML: {type(e).__name__}: {e}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected `key: value` lines, found {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """The value of a text; the text itself if it is no YAML, or empty."""
    try:
        return yaml.load(text, Loader=_Loader) if text else text
    except _BROKEN:
        return text


def dump_yaml(content: dict[str, Any]) -> str:
    """The text from which `read_yaml` gives the same content."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
