"""What an answer is worth: environments, which score the texts of rollouts.

An environment is an object with a method ``score`` and an attribute ``fields``, the names that rows
of its prompts must have. It lives in processes of its own (see `pool`), so that it may hang or
crash. Those that are built in are in `builtin`; a user's own class is imported, in those processes
alone, where the configuration names it as ``module:Class``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Protocol

from nemo_hybrid.errors import UserError, suggest


@dataclass(frozen=True)
class Score:
    """``reward``: what the answer is worth; ``parts``: figures to be averaged and shown;
    ``extracted``: what was taken for the answer."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    extracted: str | None = None


class Environment(Protocol):
    fields: ClassVar[tuple[str, ...]]

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score | float:
        """Of an answer. ``row``: the prompt's, as it stands in its file; ``text``: what the model
        said; ``ended``: ``stop``, or ``length`` where it was cut off. It may raise anything."""


def make(name: str, options: Mapping[str, Any]) -> Environment:
    """The environment of a name of the configuration: of the kind that its options name, else of
    that name. Raises UserError."""
    from nemo_hybrid.environments.builtin import BUILT_IN

    further = dict(options)
    kind = further.pop("kind", name)
    where = f"environments.{name}"
    if is_own(kind):
        return _own(kind, further, where)
    if kind not in BUILT_IN:
        raise UserError(
            f"{where}: there is no kind {kind!r}{suggest(str(kind), BUILT_IN, '')}; the kinds are "
            f"{', '.join(BUILT_IN)}, and a class of your own as kind: MODULE:CLASS"
        )
    try:
        return BUILT_IN[kind](**further)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def is_own(kind: object) -> bool:
    """Whether a kind names a class of the user's."""
    return isinstance(kind, str) and ":" in kind


def _own(kind: str, options: Mapping[str, Any], where: str) -> Environment:
    module, _, name = kind.partition(":")
    if os.getcwd() not in sys.path:  # as for `python -m`; last, so that it hides no other module
        sys.path.append(os.getcwd())
    try:
        found: Environment = getattr(import_module(module), name)(**options)
    except Exception as error:  # whatever the user's module does
        raise UserError(
            f"{where}: {kind} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(found, "score", None)):
        raise UserError(f"{where}: {kind} has no method score(row, text, ended)")
    return found
