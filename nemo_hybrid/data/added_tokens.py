"""Tokens that a tokenizer's settings declare beside tokenizer.json, put into it.

transformers adds them when it loads a directory, so the model knows them by ids of their own. What
is added, and in which order, is what transformers 5 does: that is the oracle of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_hybrid.data.store import TOKENIZER
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import parse_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_OF_A_MODEL = "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Declared:
    """Tokens that a file lists by id, those with a name such as eos_token, and others."""

    listed: dict[int, AddedToken]
    older: bool
    """Whether the list is that of added_tokens.json, which tokenizer.json completes."""
    named: dict[str, AddedToken]
    extra: list[AddedToken]


def read_declared(files: Mapping[str, bytes], directory: Path) -> Declared:
    """What the files of a tokenizer's directory declare. Raises UserError for what is no token.

    Where tokenizer_config.json has an ``added_tokens_decoder``, the two older files do not count;
    elsewhere special_tokens_map.json has the last word about a name.
    """
    names = (CONFIG, MAP, ADDED)
    given = [parse_json(files.get(name, b"{}"), directory / name) for name in names]
    try:
        return _declared(*given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"the tokenizer of {directory} declares what is no token in {CONFIG}, {MAP} or "
            f"{ADDED}: {error!r}"
        ) from None


def _declared(given: dict[str, Any], before: dict[str, Any], ids: dict[str, int]) -> Declared:
    decoder = given.get("added_tokens_decoder")
    if not given.get(_EXTRA) and _EXTRA_BEFORE in given:
        given[_EXTRA] = given.pop(_EXTRA_BEFORE)
    # Names that only this tokenizer has come last, in this order.
    own = {key: given.pop(key) for key in [*given] if isinstance(given[key], str) and _own(key)}
    if isinstance(given.get(_EXTRA), dict):
        own |= given.pop(_EXTRA)
    own |= given.pop(_OF_A_MODEL, None) or {}
    if decoder is None:
        for key, value in before.items():
            if isinstance(value, dict) and key != _EXTRA:
                value = value | {"special": True}
            elif isinstance(value, list) and key == _EXTRA:
                value = [*(given.get(_EXTRA) or []), *value]
            given[key] = value
        if isinstance(given.get(_EXTRA), dict):
            own |= given.pop(_EXTRA)
    named = {key: given.get(key) for key in _NAMED}
    named |= {k: v for k, v in given.items() if isinstance(v, str | dict) and _own(k)} | own
    tokens = {key: _token(value) for key, value in named.items() if value is not None}
    others = given.get(_EXTRA, given.get(_EXTRA_BEFORE)) or []
    if not isinstance(others, list):
        raise TypeError(f"{_EXTRA} is {others!r}")
    extra = [_token({"special": True, **v} if isinstance(v, dict) else v) for v in others]
    if decoder is not None:
        listed = {int(key): _token(value) for key, value in decoder.items()}
        return Declared(listed, False, tokens, extra)
    special = {token.content for token in [*tokens.values(), *extra]}
    listed = {
        int(number): _token({"content": content, "special": content in special})
        for content, number in ids.items()
    }
    return Declared(listed, True, tokens, extra)


def _own(key: str) -> bool:
    return key.endswith("_token") and key not in _NAMED


def _token(value: str | dict[str, Any]) -> AddedToken:
    """A token as the files write it: its text alone, or with what it does."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], **{name: value[name] for name in _FLAGS if name in value})


def add_declared(tokenizer: Tokenizer, files: Mapping[str, bytes], directory: Path) -> bytes:
    """Add what the files declare to a tokenizer that was made of tokenizer.json alone.

    Returns tokenizer.json with these tokens; its own bytes where it lacks none. Raises UserError.
    """
    declared, there = read_declared(files, directory), tokenizer.get_added_tokens_decoder()
    listed = declared.listed | (tokenizer.get_added_tokens_decoder() if declared.older else {})
    tokens = [token for _, token in sorted(listed.items(), key=lambda item: item[0])]
    known = {token.content for token in [*there.values(), *tokens]}
    for token in [*declared.named.values(), *declared.extra]:
        if token.content not in known and token not in tokens:
            tokens.append(token)
    names = {token.content for token in declared.named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)
    added = tokenizer.get_added_tokens_decoder()
    if repr(added) == repr(there):
        return files[TOKENIZER]
    entries = [
        {"id": number, "content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
        for number, token in sorted(added.items())
    ]
    return json.dumps({**json.loads(files[TOKENIZER]), "added_tokens": entries}).encode()
