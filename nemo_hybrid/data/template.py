"""Chat templates: finding them, and rendering conversations in a process that can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from nemo_hybrid.data.chat import Conversation
from nemo_hybrid.data.reasoning import THINKING_SWITCHES, Message, Span
from nemo_hybrid.data.sources import BadRecord
from nemo_hybrid.data.template_files import DEFAULT, FURTHER, read_sources, read_template
from nemo_hybrid.data.tokenizer import CHAT_TEMPLATE, CONFIG, TextTokenizer
from nemo_hybrid.errors import UserError

TOOL_USE = "tool_use"
_CONTROL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>")
_PLAIN_TAG = re.compile(r"think|tool", re.IGNORECASE)
_LONGEST_S = 20.0  # of a processor, that a conversation may take
_LATE = 2  # conversations that may take longer
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from nemo_hybrid.data.rendering import main; main(int(sys.argv[1]))"
)
_OWN = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
        "return_assistant_tokens_mask", "conversations"}  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and the characters of it that are learnt."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja templates by name, the tokenizer whose tokens they write, and where they came from."""

    sources: Mapping[str, str]
    tokenizer: TextTokenizer
    origin: str
    _late: list[str] = field(default_factory=list, compare=False)

    @property
    def sha256(self) -> str:
        one = len(self.sources) == 1 and self.sources.get(DEFAULT)
        return hashlib.sha256((one or json.dumps(dict(self.sources))).encode()).hexdigest()

    def source(self, tools: Any = None) -> str:
        """The template that transformers takes. Raises BadRecord where there is none."""
        name = TOOL_USE if tools is not None and TOOL_USE in self.sources else DEFAULT
        if name not in self.sources:
            known = ", ".join(sorted(self.sources))
            raise BadRecord(f"{self.origin} has no default chat template, only {known}")
        return self.sources[name]

    def render(self, messages: Sequence[Message], tools: Any = None, **options: Any) -> str:
        """Text of the messages. Raises BadRecord with what the template complains of, or for a
        special token that the tokenizer has not."""
        request = {"messages": messages, "options": options}
        return self._known(self._ask(request, tools, {})["text"])

    def ask(self, conversation: Conversation) -> str:
        """Text that asks for the assistant's next turn. Raises BadRecord as `render` and `check`
        do."""
        _check_options(conversation)
        self.check([conversation.messages, conversation.tools, conversation.options])
        request = {
            "messages": conversation.messages,
            "options": {**conversation.options, "add_generation_prompt": True},
            "variables": list(conversation.options),
        }
        return self._known(self._ask(request, conversation.tools, {})["text"])

    def thinking_switch(self, tools: Any = None) -> str:
        """The variable by which the template is told whether to ask for thinking. Raises BadRecord
        where it takes none."""
        taken: list[str] = self._ask({"variables": THINKING_SWITCHES}, tools, {})["taken"]
        if not taken:
            names = " or ".join(THINKING_SWITCHES)
            raise BadRecord(f"the chat template {self.origin} takes no {names}: it has no switch")
        return taken[0]

    def split(self, conversation: Conversation) -> tuple[list[Rendering], list[str]]:
        """Renderings in which every turn that is learnt is learnt once, and which of the unread
        fields of messages the template does not read either. Raises BadRecord where the template
        cannot be split, or leaves something out."""
        _check_options(conversation)
        request = {
            "messages": conversation.messages,
            "turns": conversation.learnt,
            "variables": list(conversation.options),
            "fields": sorted(conversation.unread),
        }
        answer = self._ask(request, conversation.tools, conversation.options)
        renderings = [
            Rendering(self._known(text), [(start, stop) for start, stop in spans])
            for text, spans in answer["renderings"]
        ]
        return renderings, answer["unread"]

    def check(self, content: object) -> None:
        """Raise BadRecord if a string in it would be encoded as one of the tokens that control a
        conversation, or is no text. Tags of thinking and tool use may be written out."""
        for text in _strings(content):
            for token in self._control:
                if token in text:
                    raise BadRecord(
                        f"the text holds {token}, which would become a control token",
                        "special tokens",
                    )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadRecord("the text holds half a surrogate pair") from None

    @cached_property
    def _control(self) -> list[str]:
        named = set(self.tokenizer.named_tokens.values())
        sources = "\0".join(self.sources.values())
        return [
            token
            for token, special in self.tokenizer.added_tokens.items()
            if token in named
            or _CONTROL.fullmatch(token)
            or (special and token in sources and not _PLAIN_TAG.search(token))
        ]

    def _ask(self, request: dict[str, Any], tools: Any, options: dict[str, Any]) -> dict[str, Any]:
        template = {
            "source": self.source(tools),
            "origin": self.origin,
            "tools": tools,
            "options": {**self.tokenizer.named_tokens, **options},
        }
        try:
            line = json.dumps({"template": template, "seconds": _LONGEST_S, **request})
        except (TypeError, ValueError, RecursionError):
            raise BadRecord("the conversation holds values that JSON has not") from None
        # A fork has the pipes of its parent.
        answer = _RENDERERS.setdefault(os.getpid(), Renderer()).ask(line)
        if answer is None:
            why = (
                f"the chat template {self.origin} takes longer than {_LONGEST_S:g} s for a "
                f"conversation of {len(request.get('messages', ()))} messages"
            )
            self._late.append(why)
            if len(self._late) > _LATE:
                raise UserError(f"{why}, as for {_LATE} before")
            raise BadRecord(why, "chat template")
        if "bad" in answer:
            raise BadRecord(*answer["bad"])
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _known(self, text: str) -> str:
        for token in _CONTROL.findall(text):
            if token not in self.tokenizer.added_tokens:
                raise BadRecord(
                    f"unknown special token {token}: the tokenizer has none", "special tokens"
                )
        return text


class Renderer:
    """The process that renders (see `rendering`). Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: IO[str] | None = None

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer to a request; None where it took too long. Raises UserError for a process
        that ended otherwise, and again when it had been started anew."""
        with self._lock:
            for _ in range(2):
                answer, status = self._try(line)
                if answer:
                    return dict(json.loads(answer))
                if status == -signal.SIGPROF:
                    return None
        raise UserError(f"the process that renders chat templates ended with status {status}")

    def stop(self) -> None:
        """End the process. Another is started where it is needed."""
        with self._lock:
            self._end(lambda process: None)

    def _try(self, line: str) -> tuple[str, int]:
        """The answer, or nothing and the status of the process, which has ended then."""
        if self._process is None or self._answers is None:
            self._process, self._answers = _start()
        assert self._process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            answer = self._answers.readline()
        except BaseException:
            # An answer may be under way that the next request must not get.
            self._end(subprocess.Popen.kill)
            raise
        return answer, 0 if answer else self._end(lambda process: None)

    def _end(self, how: Callable[[subprocess.Popen[str]], None]) -> int:
        process, answers = self._process, self._answers
        self._process = self._answers = None
        if process is None or answers is None:
            return 0
        how(process)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        answers.close()
        return process.wait()


_RENDERERS: dict[int, Renderer] = {}
"""By process."""


def stop_rendering() -> None:
    """End the process that this one has for rendering, if there is one."""
    if os.getpid() in _RENDERERS:
        _RENDERERS[os.getpid()].stop()


def _start() -> tuple[subprocess.Popen[str], IO[str]]:
    """The process, and where it answers: its standard output is anybody's."""
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            # What this process would import, whatever lies in the working directory.
            [sys.executable, "-c", _START, str(write), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(write,),
            encoding="utf-8",
            # Threads of numerical libraries would take of the memory that a template may use.
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # an interrupt is for whoever waits
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    return process, open(read, encoding="utf-8")


def load_template(
    tokenizer: TextTokenizer, directory: str | Path, file: str | None = None
) -> ChatTemplate | None:
    """The template of a file, else those of the tokenizer's directory; None without any.

    Raises UserError for files that hold none.
    """
    if file is not None:
        return ChatTemplate({DEFAULT: read_template(Path(file))}, tokenizer, file)
    directory = Path(directory)
    sources = read_sources(directory, tokenizer.files)
    further = DEFAULT not in sources or not (directory / CHAT_TEMPLATE).is_file()
    name = FURTHER if (directory / FURTHER).is_dir() else CONFIG
    origin = directory / (name if further else CHAT_TEMPLATE)
    return ChatTemplate(sources, tokenizer, str(origin)) if sources else None


def need_template(
    template: ChatTemplate | None, directory: str | Path, or_else: str = ""
) -> ChatTemplate:
    """Raise UserError if there is none; ``or_else``: what else can be done."""
    if template is None:
        raise UserError(
            f"{directory} has no chat template, which conversations need: put one beside the "
            f"tokenizer as {CHAT_TEMPLATE}{or_else}"
        )
    return template


def _check_options(conversation: Conversation) -> None:
    if own := _OWN & conversation.options.keys():
        why = f"chat_template_kwargs: {min(own)} is none that a record may set"
        raise BadRecord(why, "refused fields")


def _strings(content: object) -> Iterator[str]:
    """All strings in nested lists and objects."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
