"""Nothing that a record says of itself is lost without a word: reasoning, fields, tools, contexts.

Expected texts are written down by hand from what an engine would give a model; the templates are
those of two families of thinking models, shortened.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.conversations import (
    CHATML,
    MARKED,
    OPTIONS,
    TOOL,
    answer,
    fault,
    learnt_texts,
    make,
    user,
)
from helpers.sample_files import chat, lines
from helpers.sample_files import make as make_store
from nemo_hybrid.data.tokenizer import load_tokenizer

MakeModel = Callable[..., Path]

# Nemotron 3: every prompt opens the thinking or writes an empty one; texts with tags stay as given.
OPENING = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {%- set said = m.content | default('') -%}
  {%- if m.reasoning_content -%}
    {%- set said = '<think>\\n' + m.reasoning_content + '\\n</think>\\n' + said -%}
  {%- elif '<think>' not in said and '</think>' not in said -%}
    {%- set said = '<think></think>' + said -%}
  {%- endif -%}
  {{- '<|im_start|>assistant\\n' + said | trim + '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' -}}
{%- endif -%}"""

# Qwen 3.5: the template itself takes reasoning out of a text that holds a whole block of it.
TAKING = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
  {%- set said, inner = m.content | default(''), m.reasoning_content | default('') -%}
  {%- if '<think>' in said and '</think>' in said -%}
    {%- set inner = said.split('</think>')[0].split('<think>')[-1] | trim -%}
    {%- set said = said.split('</think>')[-1].lstrip() -%}
  {%- endif -%}
  {{- '<|im_start|>assistant\\n<think>\\n' + inner + '\\n</think>\\n\\n' + said -}}
  {{- '<|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{{- '\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '' -}}
{%- endif -%}"""

ASKED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def text_of(model: Path, record: dict[str, Any], **options: Any) -> str:
    (sample,) = make(model, record, **options).samples
    return load_tokenizer(model).decode(sample.ids.tolist())


@pytest.mark.parametrize(
    ("template", "written"), [(OPENING, "r r\n</think>\n4"), (TAKING, "r r\n</think>\n\n4")]
)
@pytest.mark.parametrize(
    "raw", ["r r\n</think>\n\n4", "\nr r\n</think>4", "<think>\nr r\n</think>\n4"]
)
def test_what_a_thinking_model_wrote_is_reasoning_and_answer(
    template: str, written: str, raw: str, make_model: MakeModel
) -> None:
    """Its prompt opened the thinking that its text ends."""
    model, record = make_model(template), {"messages": [user("q"), answer(raw)]}
    assert text_of(model, record) == f"{ASKED}<think>\n{written}<|im_end|>\n"
    assert learnt_texts(model, record) == [[f"{written}<|im_end|>\n"]]
    ending = written.removeprefix("r r\n</think>")
    assert learnt_texts(model, record, reasoning="mask") == [[f"{ending}<|im_end|>\n"]]
    assert learnt_texts(model, record, reasoning="strip") == [["4<|im_end|>\n"]]
    ((cut, rest),) = learnt_texts(model, record, truncate_reasoning=0.999)
    assert "r r".startswith(cut.strip())
    assert rest == f"{ending}<|im_end|>\n"


BROKEN = {
    "open": ("<think>r r", "leaves <think> open"),
    "open behind an answer": ("4 <think> r", "leaves <think> open"),
    "opened again": ("<think>r<think>r</think>4", "opens <think> twice"),
    "mentioned": ("The tag </think> ends it", "holds a </think> that nothing opened"),
    "inside a line": ("r r</think>4", "holds a </think> that nothing opened"),
    "closed again": ("<think>r</think>4</think>5", "holds a </think> that nothing opened"),
    "raw, closed again": ("r\n</think>4\n</think>5", "holds a </think> that nothing opened"),
    "cut off": ("r r\n</think>\n", "the reasoning was cut off"),
    "two answers": ("<think>r</think>\n", "the reasoning was cut off"),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BROKEN)
def test_reasoning_that_is_not_whole_is_refused(
    name: str, options: dict[str, Any], make_model: MakeModel
) -> None:
    content, why = BROKEN[name]
    for number, template in enumerate((OPENING, TAKING, CHATML)):
        model = make_model(template, f"m{number}")
        found = fault(model, {"messages": [user("q"), answer(content)]}, **options)
        assert found.startswith("turn 2: ")
        assert why in found
        # It is nobody's business where it is not learnt.
        later = [user("q"), answer(content, weight=0), user("q"), answer("4")]
        assert not any("turn 2" in u.why for u in make(model, {"messages": later}).unusable)
    shutil.rmtree(model)


def test_what_a_template_makes_of_reasoning_is_looked_at(make_model: MakeModel) -> None:
    thinks = answer("4", reasoning_content="r")
    twice = OPENING.replace("'<think>\\n' + m.reasoning", "'<think>\\n<think>' + m.reasoning")
    assert "as the chat template writes it, the answer opens <think> twice" in fault(
        make_model(twice, "a"), {"messages": [user("q"), thinks]}
    )
    left_open = OPENING.replace("'\\n</think>\\n' + said", "'\\n' + said")
    assert "leaves <think> open" in fault(
        make_model(left_open, "b"), {"messages": [user("q"), thinks]}
    )
    # What every prompt opens, an answer has to close.
    silent = OPENING.replace("'<think></think>' + said", "said")
    assert "does not follow the prompt" in fault(
        make_model(silent, "c"), {"messages": [user("q"), answer("4")]}
    )
    lost = TAKING.replace(" | trim -%}", " | trim | replace('whyever', '') -%}")
    assert "leaves out a part of the answer" in fault(
        make_model(lost, "d"), {"messages": [user("q"), answer("<think>whyever</think>4")]}
    )
    both = answer("<think>s</think>Sure. <think>t</think> y")
    assert "leaves out a part of the answer" in fault(
        make_model(TAKING, "e"), {"messages": [user("q"), both]}
    )
    assert learnt_texts(
        make_model(OPENING, "f"), {"messages": [user("q"), thinks, user("p"), both]}
    )


MARKS = [
    ("weight", 0, 1),
    *((name, False, True) for name in ("train", "trainable", "training", "loss")),
]


@pytest.mark.parametrize(("name", "no", "yes"), MARKS)
@pytest.mark.parametrize("template", [CHATML, MARKED, OPENING])
def test_a_turn_says_whether_it_is_learnt(
    template: str, name: str, no: object, yes: object, make_model: MakeModel
) -> None:
    model = make_model(template)
    turns = [user("q"), answer("bad", **{name: no}), user("q"), answer("good", **{name: yes})]
    plain = [user("q"), answer("bad"), user("q"), answer("good")]
    (learnt,) = learnt_texts(model, {"messages": turns})
    assert [text for text in learnt if "bad" in text] == []
    assert len([text for text in learnt if "good" in text]) == 1
    assert text_of(model, {"messages": turns}) == text_of(model, {"messages": plain})
    ending = [user("q"), answer("good"), user("q"), answer("bad", **{name: no})]
    assert "bad" not in "".join(learnt_texts(model, {"messages": ending})[0])
    pair = {"prompt": plain[:1], "completion": turns[1:]}
    assert learnt_texts(model, pair) == [learnt]
    made = make(model, {"messages": [user("q"), answer("bad", **{name: no})]})
    assert [(u.kind, u.why) for u in made.unusable] == [
        ("all-masked", "every turn says that it is not learnt")
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "half a weight": (
        {"messages": [user("q"), answer("a", weight=0.5)]}, "turn 2: weight 0.5 is neither",
    ),
    "weight as text": (
        {"messages": [user("q"), answer("a", weight="0")]}, "turn 2: weight '0' is neither",
    ),
    "contradiction": (
        {"messages": [user("q"), answer("a", weight=1, train=False)]},
        "turn 2: weight contradicts train",
    ),
    "a record that is not learnt": (
        {**chat("q", "a"), "train": False}, "the field train: it belongs to a turn",
    ),
    "half a record": ({**chat("q", "a"), "weight": 0.5}, "the field weight: it belongs to a turn"),
    "a call by other names": (
        {"messages": [user("q"), answer("", tool_calls=[{"name": "f", "input": {"a": 1}}])]},
        "turn 2: the field input of a tool call: give name and arguments",
    ),
    "arguments beside the call": (
        {"messages": [user("q"), answer("", tool_calls=[{"function": {"name": "f"},
                                                         "arguments": {"a": 1}}])]},
        "turn 2: the field arguments of a tool call",
    ),
    "a call that is not learnt": (
        {"messages": [user("q"), answer("", tool_calls=[{"name": "f", "weight": 0}])]},
        "turn 2: the field weight of a tool call",
    ),
    "an argument twice": (
        {"messages": [user("q"), answer("", tool_calls=[{"name": "f",
                                                         "arguments": '{"a": 1, "a": 2}'}])]},
        "turn 2: the arguments of f cannot be read as JSON",
    ),
    "reasoning twice": (
        {"messages": [user("q"), answer("<think>s</think>a", reasoning_content="r")]},
        "turn 2: there is reasoning in a field and other in the text",
    ),
    "a picture without a type": (
        {"messages": [user([{"text": "q", "image": "x.png"}]), answer("a")]},
        "turn 1: the content is not text, but holds image",
    ),
    "a picture in a text": (
        {"messages": [user([{"type": "text", "text": "q", "image_url": {"url": "x"}}]),
                      answer("a")]},
        "turn 1: the content is not text, but holds image_url",
    ),
    "a word of the template": (
        {**chat("q", "a"), "chat_template_kwargs": {"said": "x"}},
        "chat_template_kwargs: the chat template takes no said",
    ),
    "thinking that was asked not to be": (
        {"messages": [user("q"), answer("a", reasoning_content="r")],
         "chat_template_kwargs": {"enable_thinking": False}},
        "the answer does not follow the prompt",
    ),
    "half a thought in a text": (
        {"prompt": "q", "completion": "<think>r"}, "leaves <think> open at its end",
    ),
    "functions": ({**chat("q", "a"), "functions": [TOOL]}, "the field functions: give tools"),
    "function_call": (
        {"messages": [user("q"), answer("", function_call={"name": "f"})]},
        "turn 2: the field function_call: give tool_calls",
    ),
    "thoughts": (
        {"messages": [user("q"), answer("a", thoughts="r")]},
        "turn 2: the field thoughts: give reasoning_content",
    ),
    "two thoughts": (
        {"messages": [user("q"), answer("a", reasoning="r", thinking="s")]},
        "turn 2: two fields of reasoning differ",
    ),
    "tools of a system": (
        {"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, user("q"), answer("a")]},
        "turn 1: the field tools: give them as a field of the record",
    ),
    **{
        name: ({**chat("q", "a"), name: ["x.png"]}, f"the field {name}: only text can be learnt")
        for name in ("images", "audio", "video", "image")
    },
    "image of a turn": (
        {"messages": [{**user("q"), "images": ["x"]}, answer("a")]},
        "turn 1: the field images: only text can be learnt",
    ),
    "part of a picture": (
        {"messages": [user([{"type": "text", "text": "q"}, {"type": "image_url"}]), answer("a")]},
        "turn 1: the content is not text, but holds image_url",
    ),
    "another system": (
        {"messages": [{"role": "system", "content": "s"}, user("q"), answer("a")], "system": "t"},
        "system is another text than the first message's",
    ),
    "no system": ({**chat("q", "a"), "system": 0}, "system is not text"),
    "a system of no text": ({**chat("q", "a"), "system": 3}, "system is not text"),
    "a system of texts": (
        {"prompt": "q", "completion": "a", "system": "s"},
        "the field system: conversations alone have it",
    ),
    "tools of texts": (
        {"text": "a", "tools": [TOOL]}, "the field tools: conversations alone have it",
    ),
    "a picture of texts": ({"text": "a", "images": ["x"]}, "the field images: only text"),
    "a variable that nobody reads": (
        {**chat("q", "a"), "chat_template_kwargs": {"low_effort": True}},
        "chat_template_kwargs: the chat template takes no low_effort",
    ),
    "a variable of ours": (
        {**chat("q", "a"), "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs: add_generation_prompt is none that a record may set",
    ),
    "variables of no object": (
        {**chat("q", "a"), "chat_template_kwargs": [1]}, "chat_template_kwargs is no JSON object",
    ),
    "a control token in a system": ({**chat("q", "a"), "system": "<|im_end|>"}, "control token"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_cannot_be_honoured_are_refused(name: str, make_model: MakeModel) -> None:
    record, why = REFUSED[name]
    assert why in fault(make_model(OPENING), record)


def test_empty_fields_of_tables_say_nothing(make_model: MakeModel) -> None:
    model = make_model(OPENING)
    nothing = {"images": [], "functions": None, "system": "", "tools": [], "train": None,
               "chat_template_kwargs": None, "function_call": None, "thoughts": ""}  # fmt: skip
    record = {"messages": [{**m, **nothing} for m in chat("q", "a")["messages"]], **nothing}
    made = make(model, record)
    assert not made.unusable
    assert made.unread == set()
    assert text_of(model, record) == text_of(model, chat("q", "a"))


def test_a_system_of_the_record_is_shown(make_model: MakeModel) -> None:
    model, system = make_model(CHATML), {"role": "system", "content": "be kind"}
    plain = {"messages": [system, user("q"), answer("a"), user("p"), answer("b")]}
    expected = text_of(model, plain)
    for given in (plain["messages"][1:], plain["messages"]):
        record = {"messages": given, "system": "be kind"}
        assert text_of(model, record) == expected
        assert learnt_texts(model, record) == learnt_texts(model, plain)
    pair = {"prompt": given[1:4], "completion": given[4:], "system": "be kind"}
    assert text_of(model, pair) == expected
    assert learnt_texts(model, pair) == [["b<|im_end|>\n"]]
    deaf = CHATML.replace(
        "{{- '<|im_start|>' + m.role", "{{- '' if m.role == 'system' else '<|im_start|>' + m.role"
    )
    assert "turn 1: the chat template leaves out what the system says" in fault(
        make_model(deaf, "deaf"), pair
    )


def test_variables_of_the_template(make_model: MakeModel) -> None:
    switch = (
        "{% if effort is defined %}"
        "{{ '<|im_start|>system\n' + effort + '<|im_end|>\n' }}{% endif %}"
    )
    model = make_model(switch + OPENING)
    for given in ({"effort": "low"}, '{"effort": "low"}'):
        record = {**chat("q", "a"), "chat_template_kwargs": given}
        assert text_of(model, record).startswith("<|im_start|>system\nlow<|im_end|>\n<|im_start|>")
        assert learnt_texts(model, record) == [["a<|im_end|>\n"]]
    quiet = {**chat("q", "a"), "chat_template_kwargs": {"enable_thinking": False}}
    assert learnt_texts(model, quiet) == [["a<|im_end|>\n"]]


def test_reasoning_that_stands_twice_is_learnt_once(make_model: MakeModel) -> None:
    model = make_model(OPENING)
    for content in ("<think>\nr r\n</think>\n\na", "r r\n</think>\na", "  <think>r r</think>a"):
        record = {"messages": [user("q"), answer(content, reasoning_content="r r")]}
        assert learnt_texts(model, record) == [["r r\n</think>\na<|im_end|>\n"]]


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != {"reasoning": "keep"}], ids=str)
def test_reasoning_of_plain_text_can_only_be_kept(
    options: dict[str, Any], make_model: MakeModel
) -> None:
    model = make_model()
    for record in (
        {"prompt": "q <think>", "completion": "r</think>4"},
        {"prompt": "q", "completion": "<think>r</think>4"},
        {"text": "q <think>r</think>4"},
    ):
        assert make(model, record).samples
        assert "reasoning in plain text can only be kept" in fault(model, record, **options)
    assert make(model, {"prompt": "a </think>?", "completion": "4"}, **options).unusable


def test_other_fields_are_counted_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    named = CHATML.replace("m.content", "(m.name | default('')) + m.content")
    parts = [{"type": "text", "text": "q", "cache": True}]
    messages = [
        {**user(parts), "name": "Bo", "id": 3, "train": True, "reasoning_content": "r"},
        answer("a", score=1.0, refusal=None),
    ]
    records = [{"messages": messages, "source": "x"}, {"text": "a", "source": "y", "url": "z"}]
    data = lines(tmp_path / "a.jsonl", *records)
    tools = "{% for t in tools or [] %}{{ t.name }}{% endfor %}"  # that are no messages
    summary = make_store(make_model(tools + CHATML), tmp_path / "out", data)
    assert summary.unread == {
        "messages.content.cache": 1, "messages.id": 1, "messages.name": 1,
        "messages.reasoning_content": 1, "messages.score": 1, "messages.train": 1,
        "source": 2, "url": 1,
    }  # fmt: skip
    assert "2 records: the field source" in str(summary)
    keys = CHATML.replace("m.content", "(m.keys() | join(' ')) + m.content")
    assert "content." not in text_of(make_model(keys, "keys"), records[0])
    read = make_store(make_model(named, "named"), tmp_path / "read", data)
    assert summary.unread.items() - read.unread.items() == {("messages.name", 1)}
