"""Reasoning: all of it is found, and nothing else; templates that take too long or fail."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data import chat
from nemo_hybrid.data.chat import change_reasoning, learnt_parts
from nemo_hybrid.data.samples import Made, SampleMaker
from nemo_hybrid.data.sources import Record
from nemo_hybrid.errors import UserError

MakeModel = Callable[..., Path]
TWICE = "Sure. <think>a</think>x<think>b</think>y"

# What an answer is without reasoning, with all of it in capitals, and what is learnt of it masked.
ANSWERS = {
    TWICE: ("Sure. xy", "Sure. <think>\nA\n</think>x<think>\nB\n</think>y", "Sure. xy"),
    "<think>\na\n</think>\n\ny": ("y", "<think>\nA\n</think>\n\ny", "\n\ny"),
    "x<think>a</think> y": ("x y", "x<think>\nA\n</think> y", "x y"),
    "a\nb\n</think>\ny": ("y", "A\nB\n</think>\ny", "\ny"),
    "</think>y": ("y", "y", "y"),
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


def test_a_field_of_reasoning_leaves_no_other_unopened() -> None:
    message = {"role": "assistant", "content": "a\n</think>\n<think>b</think>c"}
    assert change_reasoning(message, lambda _: "")["content"] == "c"
    for shown in ("", "R"):
        changed = change_reasoning({**message, "reasoning_content": "r"}, lambda _, s=shown: s)
        assert changed.get("reasoning_content", "") == shown
        assert changed["content"].startswith("a\n</think>\n")
        assert changed["content"].endswith("c")


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


def test_chance_leaves_a_turn_of_reasoning_alone_as_it_is(make_model: MakeModel) -> None:
    model, record = make_model(), conversation("q", "<think>a</think>", "p", "<think>b</think>y")
    maker, result = made(model, record, strip_reasoning=0.999)
    (sample,) = result.samples
    learnt = maker.tokenizer.decode(sample.ids[sample.targets].tolist())
    assert learnt == "<think>a</think><|im_end|>\ny<|im_end|>\n"
    _, result = made(model, record, reasoning="strip")
    assert [u.why for u in result.unusable] == [
        "turn 2: the assistant's message is empty without its reasoning"
    ]


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


@pytest.fixture
def own_alarm() -> Iterator[Callable[..., None]]:
    """A timer of the caller's, as test runners have them."""
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

    def handler(*_: object) -> None: ...

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 500.0, 7.0)
    yield handler
    signal.signal(signal.SIGALRM, before[0])
    signal.setitimer(signal.ITIMER_REAL, *before[1])


def test_a_template_that_takes_too_long(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, own_alarm: Callable[..., None]
) -> None:
    monkeypatch.setattr(chat, "_LONGEST_S", 0.3)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"model/chat_template\.jinja takes longer than 0\.3 s"):
        made(make_model(ENDLESS), conversation("q", "a"))
    assert time.monotonic() - started < 100
    assert signal.getsignal(signal.SIGALRM) is own_alarm
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 400 < left < 500
    assert interval == 7.0


def test_other_threads_render_too(make_model: MakeModel) -> None:
    model, results = make_model(), list[Made]()
    thread = threading.Thread(target=lambda: results.append(made(model, conversation("q", "a"))[1]))
    thread.start()
    thread.join()
    assert results[0].samples
