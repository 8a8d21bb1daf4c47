"""Reasoning: all of it is found, and nothing else; templates that take too long or fail."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.conversations import TOOLS, answer, fault, learnt_texts, user
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data import template as templates
from nemo_hybrid.data.reasoning import change_reasoning, learnt_parts, settle_reasoning
from nemo_hybrid.data.samples import Made, SampleMaker
from nemo_hybrid.data.sources import Record
from nemo_hybrid.data.template import Renderer
from nemo_hybrid.errors import UserError

MakeModel = Callable[..., Path]
TWICE = "Sure. <think>a</think>x<think>b</think>y"

# What an answer is without reasoning, with all of it in capitals, and what is learnt of it masked.
ANSWERS = {
    TWICE: ("Sure. xy", "Sure. <think>\nA\n</think>x<think>\nB\n</think>y", "Sure. xy"),
    "<think>\na\n</think>\n\ny": ("y", "<think>\nA\n</think>\n\ny", "\n\ny"),
    "x<think>a</think> y": ("x y", "x<think>\nA\n</think> y", "x y"),
    "Write </think> to end it.": ("Write </think> to end it.",) * 3,
    "<think>a</think>Write\n</think>": ("Write\n</think>", "<think>\nA\n</think>Write\n</think>",
                                        "Write\n</think>"),
    "<think> and no end": ("<think> and no end",) * 3,
    "plain": ("plain",) * 3,
}  # fmt: skip


@pytest.mark.parametrize("content", ANSWERS)
def test_all_reasoning_of_an_answer_is_found(content: str) -> None:
    without, louder, masked = ANSWERS[content]
    message = {"role": "assistant", "content": content}
    assert change_reasoning(message, lambda _: "")["content"] == without
    assert change_reasoning(message, str.upper)["content"] == louder
    text = f"user: q\nassistant: {content}"
    span = (len(text) - len(content), len(text))
    assert "".join(text[a:b] for a, b in learnt_parts(text, span, True)) == masked
    ends = "".join(text[a:b] for a, b in learnt_parts(text, span, False))
    assert ends.count("</think>") == masked.count("</think>")
    assert ends.replace("</think>", "").split() == content.replace("</think>", "").split()


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("a\nb\n</think>\n\ny", "a\nb", "y"),
        ("a\n</think>y\n</think>", "a", "y\n</think>"),
        ("</think>\n\n  y", None, "  y"),
        ("\n</think>y", None, "y"),
        ("<think>a</think>y", None, "<think>a</think>y"),
        ("a</think>y", None, "a</think>y"),
        ("y", None, "y"),
    ],
)
def test_an_answer_that_begins_inside_of_its_reasoning(
    content: str, reasoning: str | None, rest: str
) -> None:
    message = {"role": "assistant", "content": content}
    settled = settle_reasoning(message)
    assert settled.get("reasoning_content") == reasoning
    assert settled["content"] == rest
    known = {**message, "reasoning_content": "r"}
    assert settle_reasoning(known) == known


@pytest.mark.parametrize(
    ("prompt", "answer", "learnt"),
    [
        ("<think>\n", "a and b</think>y", "y"),
        ("<think>\n", "a <think> b</think>y</think>", "y</think>"),
        ("<think></think>", "x\n</think>y", "x\n</think>y"),
        ("<think></think>", "x<think>a</think>y", "xy"),
    ],
)
def test_what_the_prompt_says_of_thinking_counts(prompt: str, answer: str, learnt: str) -> None:
    text = prompt + answer
    parts = learnt_parts(text, (len(prompt), len(text)), True)
    assert "".join(text[a:b] for a, b in parts) == learnt


def test_whatever_the_blocks() -> None:
    """Reasoning in capitals between answers in small letters: what is masked is the capitals."""
    blocks = st.lists(st.tuples(st.text("ab \n", max_size=4), st.text("AB \n", max_size=4)))

    @settings(max_examples=200, deadline=None)
    @given(blocks, st.text("ab \n", max_size=4))
    def run(parts: list[tuple[str, str]], end: str) -> None:
        text = "".join(f"{said}<think>{thought}</think>" for said, thought in parts) + end
        learnt = "".join(text[a:b] for a, b in learnt_parts(text, (0, len(text)), True))
        assert learnt == "".join(said for said, _ in parts) + end
        stripped = change_reasoning({"content": text}, lambda _: "")["content"]
        assert stripped.split() == stripped.lower().split()
        assert "".join(stripped.split()) == "".join(learnt.split())

    run()


def made(model: Path, record: dict[str, Any], **options: Any) -> tuple[SampleMaker, Made]:
    maker = SampleMaker(SampleOptions(**options), model, seed=0)
    return maker, maker.make(Record("k#1", "k line 1", record, 1.0))


def conversation(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    ("options", "text", "learnt"),
    [
        ({"reasoning": "strip"}, "Sure. xy", "Sure. xy"),
        ({"strip_reasoning": 0.999}, "Sure. xy", "Sure. xy"),
        ({"reasoning": "mask"}, TWICE, "Sure. xy"),
        ({}, TWICE, TWICE),
        (
            {"truncate_reasoning": 0.999},
            "Sure. <think>\na\n</think>x<think>\nb\n</think>y",
            "Sure. <think>\nax<think>\nby",
        ),
    ],
)
def test_samples_of_an_answer_that_thinks_twice(
    options: dict[str, Any], text: str, learnt: str, make_model: MakeModel
) -> None:
    maker, result = made(make_model(), conversation("q", TWICE), **options)
    (sample,) = result.samples
    start, end = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    assert maker.tokenizer.decode(sample.ids.tolist()) == start + text + end
    assert maker.tokenizer.decode(sample.ids[sample.targets].tolist()) == learnt + end


def test_reasoning_is_not_looked_for_in_tool_calls(make_model: MakeModel) -> None:
    """What a call writes into a file is learnt as it is, or the record is refused."""
    model = make_model(TOOLS)
    call = {"name": "write", "arguments": {"text": "a <think>b</think> c"}}
    messages = [user("q"), answer("<think>r</think>x", tool_calls=[{"function": call}])]
    record = {"messages": messages, "tools": [{"name": "write"}]}
    ((learnt,),) = learnt_texts(model, record)
    assert "<think>r</think>x" in learnt
    assert call["arguments"]["text"] in learnt
    for options in ({"reasoning": "mask"}, {"truncate_reasoning": 0.999}):
        assert "turn 2: a tool call holds a tag" in fault(model, record, **options)
    assert "a <think>b</think> c" in learnt_texts(model, record, reasoning="strip")[0][0]


def test_a_process_that_cannot_start_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Renderer().ask("{}")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("template", "why"),
    [("\n{{ cycler() }}", " line 2: "), ("{{ 'a' * 10**14 }}", " line 1: MemoryError")],
)
def test_templates_fail_as_records(template: str, why: str, make_model: MakeModel) -> None:
    model = make_model(template)
    _, result = made(model, conversation("q", "a"))
    (bad,) = result.unusable
    assert bad.why.startswith(f"the chat template fails: {model}/chat_template.jinja{why}")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
def test_a_template_that_takes_too_long(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed, and another template is rendered after it. A third conversation is too many."""
    maker = SampleMaker(SampleOptions(), make_model(ENDLESS, "endless"), 0)
    record = Record("k#1", "k line 1", conversation("q", "a"), 1.0)
    message = r"/chat_template\.jinja takes longer than 0\.3 s for a conversation of 2 messages"
    with monkeypatch.context() as patched:
        patched.setattr(templates, "_LONGEST_S", 0.3)
        for _ in range(2):
            (bad,) = maker.make(record).unusable
            assert re.search(message, bad.why)
        with pytest.raises(UserError, match=message + ", as for 2 before"):
            maker.make(record)
    assert made(make_model(), conversation("q", "a"))[1].samples


def test_a_template_may_not_fill_the_memory(make_model: MakeModel) -> None:
    """5 GiB, of an address space of 4."""
    _, result = made(make_model("{{ 'a' * (5 * 2**30) }}"), conversation("q", "a"))
    assert "MemoryError" in result.unusable[0].why


@pytest.mark.slow
def test_the_process_that_renders(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named where it does not start, started anew where it was killed, and not shared with
    forks."""
    renderer = Renderer()
    monkeypatch.setattr(templates, "_RENDERERS", {os.getpid(): renderer})
    with monkeypatch.context() as patched:
        patched.setattr(templates, "_START", "import os; os._exit(7)")
        with pytest.raises(UserError, match=r"renders chat templates ended with status 7"):
            made(make_model(), conversation("q", "a"))
    maker, first = made(make_model(name="again"), conversation("q", "a"))
    process = renderer._process
    assert process is not None
    child = os.fork()
    if not child:
        status = 1
        with suppress(BaseException):
            again = maker.make(Record("k", "k", conversation("q", "a"), 1.0))
            status = 0 if len(again.samples[0].ids) == len(first.samples[0].ids) else 2
            templates.stop_rendering()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert renderer._process is process
    process.kill()
    process.wait()
    assert maker.make(Record("k", "k", conversation("q", "a"), 1.0)).samples
    renderer.stop()
    assert renderer._process is None


def test_other_threads_render_too(make_model: MakeModel) -> None:
    model, results = make_model(), list[Made]()
    thread = threading.Thread(target=lambda: results.append(made(model, conversation("q", "a"))[1]))
    thread.start()
    thread.join()
    assert results[0].samples
