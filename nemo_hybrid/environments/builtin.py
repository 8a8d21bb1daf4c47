"""The environments that are built in. Each is its options and what it does with a text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, Literal
from urllib.request import Request, urlopen

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED, Options, PositiveFloat
from nemo_hybrid.environments import Environment, Score
from nemo_hybrid.errors import UserError

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_CHOICES = (
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}",
    r"(?i:answer)\s*(?i:is)?\s*:?\s*\**\(?([A-Z])\b",
    r"(?<![A-Za-z'])\(?([A-Z])\b(?!')",
)
"""How an answer is written; of the first that is found anywhere the last one counts."""


@dataclass(config=CHECKED)
class _Answered(Options):
    """What compares the end of a text with the row's answer."""

    fields: ClassVar[tuple[str, ...]] = ("answer",)

    after: str = "</think>"
    """What is said behind the last of these counts, if there is one."""

    def said(self, text: str) -> str:
        return text.rpartition(self.after)[2] if self.after else text


@dataclass(config=CHECKED)
class Exact(_Answered):
    """1 if the text is the row's ``answer`` (or one of them), but for white space."""

    ignore_case: bool = False
    """Whether a capital letter is another letter."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        found = self._plain(self.said(text))
        right = found in [self._plain(str(answer)) for answer in answers]
        return Score(float(right), extracted=found)

    def _plain(self, text: str) -> str:
        plain = " ".join(text.split())
        return plain.casefold() if self.ignore_case else plain


@dataclass(config=CHECKED)
class Choice(_Answered):
    """1 if the letter that the text chooses is the row's ``answer``."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        said = self.said(text)
        found = next((f[-1] for f in (re.findall(p, said) for p in _CHOICES) if f), None)
        return Score(float(found == str(row["answer"]).strip().upper()), extracted=found)


@dataclass(config=CHECKED)
class Arithmetic(_Answered):
    """1 if the last number of the text is the row's ``answer``."""

    format_reward: float = 0.0
    """What a text that is a number and nothing else gets besides."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        said = self.said(text).strip()
        numbers = _NUMBER.findall(said)
        right = bool(numbers) and _value(numbers[-1]) == _value(str(row["answer"]).strip())
        plain = _NUMBER.fullmatch(said) is not None and ended == "stop"
        return Score(
            right + self.format_reward * plain,
            {"right": float(right), "format": float(plain)},
            numbers[-1] if numbers else None,
        )


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


@dataclass(config=CHECKED)
class Regex(Options):
    """1 if a pattern is found in the text: the row's ``pattern``, or one for all rows."""

    fields: ClassVar[tuple[str, ...]] = ()

    pattern: str | None = None
    """Python's syntax; null: every row has its own."""
    whole: bool = False
    """Whether the text has to match from its beginning to its end."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        pattern = row["pattern"] if self.pattern is None else self.pattern
        found = (re.fullmatch if self.whole else re.search)(pattern, text, re.DOTALL)
        return Score(float(found is not None), extracted=found and found[0])


@dataclass(config=CHECKED)
class Format(Options):
    """1 if the text is reasoning and then an answer: it ends by itself, the reasoning is closed
    once and opened no more than once, there is an answer, and it does not repeat the reasoning."""

    fields: ClassVar[tuple[str, ...]] = ()

    opening: str = "<think>"
    """What opens the reasoning; the prompt may have done so already."""
    closing: str = "</think>"
    """What closes it."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        thought, _, answer = (part.strip() for part in text.partition(self.closing))
        opened = thought.startswith(self.opening)
        thought = thought.removeprefix(self.opening).strip()
        good = ended == "stop" and bool(answer) and answer != thought
        good &= text.count(self.closing) == 1 and text.count(self.opening) == opened
        return Score(float(good), extracted=answer)


@dataclass(config=CHECKED)
class Math(_Answered):
    r"""1 if math-verify finds the text's last expression, such as that in ``\boxed{}``, equal to
    the row's ``answer``."""

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        from math_verify import parse, verify

        answer = str(row["answer"]).strip()
        for before, behind in ((r"\(", r"\)"), ("$", "$")):
            answer = answer.removeprefix(before).removesuffix(behind)
        if r"\boxed" not in answer:
            answer = rf"\boxed{{{answer}}}"
        gold = parse(answer, parsing_timeout=None, raise_on_error=True)
        if not gold:
            raise ValueError(f"the answer {row['answer']!r} cannot be read")
        found = parse(self.said(text), parsing_timeout=None)
        right = verify(gold, found, timeout_seconds=None)
        return Score(float(right), extracted=str(found[-1]) if found else None)


@dataclass(config=CHECKED)
class Http(Options):
    """What a service says, such as NeMo Gym's ``/verify``: the row, with the answer as ``text``,
    ``ended`` and an OpenAI ``response``, is posted as JSON; it answers with a ``reward``."""

    fields: ClassVar[tuple[str, ...]] = ()

    url: str = ""
    """Where the service is."""
    method: Literal["POST", "PUT"] = "POST"
    """How it is asked."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for it; the pool's deadline counts too."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url must begin with http:// or https://, got {self.url!r}")

    def score(self, row: Mapping[str, Any], text: str, ended: str) -> Score:
        said = {"type": "output_text", "text": text, "annotations": []}
        message = {
            "id": "message", "type": "message", "role": "assistant", "status": "completed",
            "content": [said],
        }  # fmt: skip
        response = {
            "id": "response", "object": "response", "created_at": 0, "model": "policy",
            "output": [message], "parallel_tool_calls": False, "tool_choice": "auto", "tools": [],
        }  # fmt: skip
        body = json.dumps({**row, "text": text, "ended": ended, "response": response}).encode()
        request = Request(self.url, body, {"Content-Type": "application/json"}, method=self.method)
        with urlopen(request, timeout=self.timeout_s) as answer:
            said = json.load(answer)
        return Score(float(said["reward"]))


BUILT_IN: dict[str, type[Environment]] = {
    "exact": Exact,
    "choice": Choice,
    "arithmetic": Arithmetic,
    "regex": Regex,
    "format": Format,
    "math": Math,
    "http": Http,
}
