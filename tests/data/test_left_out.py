"""What a chat template leaves out of a conversation is refused, long conversations included."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.conversations import (
    CHATML,
    TEMPLATES,
    TOOL,
    TOOLS,
    answer,
    fault,
    learnt_texts,
    make,
    render_here,
    user,
)
from helpers.sample_files import chat, lines
from helpers.sample_files import make as make_store
from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.data import rendering

MakeModel = Callable[..., Path]


def called(name: str = "add", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {"type": "function", "function": {"name": "get_weather"}}
LONG = [
    {"role": "system", "content": "be\n kind"}, user("how much?"),
    answer("", content=None, tool_calls=[called(a=17, b=["x y", {"c": None}], d=True)]),
    {"role": "tool", "content": '{"found": "4\\n5"}'}, answer("four"), user("how much?"),
    answer("five"),
]  # fmt: skip
OURS = Path(__file__).parents[2] / "configs" / "chat_template_tools.jinja"
LOSSES = {
    "tools": ("{%- if tools %}", "{%- if false %}", "the tool add"),
    "one tool": ("for t in tools", "for t in tools[1:]", "the tool add"),
    "a system": ("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}",
                 "turn 1: what the system says"),
    "a result": ("+ m.content + '\\n</tool", "+ '\\n</tool", "turn 4: what the tool says"),
    "a question": ("'\\n' + (m.content or '')", "'\\n' + ('' if loop.first else m.content or '')",
                   "turn 1: what the user says"),
    "the same question again": (
        "'\\n' + (m.content or '')",
        "'\\n' + ('' if m.role == 'user' and loop.index0 > 3 else m.content or '')",
        "turn 6: what the user says",
    ),
    "arguments": ("call.function.arguments | tojson", "'{'", "turn 3: the argument 17 of add"),
    "a call": ("in m.tool_calls or []", "in []", "turn 3: the call of add"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_template_leaves_out_is_refused(name: str, make_model: MakeModel) -> None:
    whole, broken, why = LOSSES[name]
    assert whole in TOOLS
    messages = LONG[1:5] if name == "a question" else LONG
    record = {"messages": messages, "tools": [TOOL, WEATHER]}
    assert not make(make_model(TOOLS, "whole"), record).unusable
    model = make_model(TOOLS.replace(whole, broken), "broken")
    found = make(model, record).unusable
    assert [u.kind for u in found] == ["left out"]
    assert why in found[0].why.replace("the chat template leaves out ", "")


ELSEWHERE = {
    "an argument in the result": (
        "call.function.arguments | tojson", "'{}'", "turn 2: the argument 'Oslo' of get_weather"),
    "the second call": ("in m.tool_calls or []", "in (m.tool_calls or [])[:1]",
                        "turn 2: the call of get_weather"),
    "a call beside text": ("in m.tool_calls or []", "in ([] if m.content else m.tool_calls or [])",
                           "turn 2: the call of get_weather"),
    "text beside a call": ("(m.content or '')", "('' if m.tool_calls else m.content or '')",
                           "turn 2: what the assistant says"),
    "a system that is quoted": ("{%- for m in messages %}",
                                "{%- for m in messages %}{%- if m.role == 'system' %}{% continue %}"
                                "{%- endif %}", "turn 1: what the system says"),
    "a tool that begins another's name": ("for t in tools", "for t in tools[1:]", "the tool get"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_stands_elsewhere_too_is_left_out_all_the_same(
    name: str, make_model: MakeModel
) -> None:
    whole, broken, why = ELSEWHERE[name]
    assert whole in TOOLS
    city = called("get_weather", city="Oslo")
    messages = [
        {"role": "system", "content": "be kind"}, user("I said: be kind. Oslo?"),
        answer("I call get_weather for Oslo.", tool_calls=[city, city]),
        {"role": "tool", "content": "Oslo: 4 degrees, get_weather"}, answer("Oslo is cold."),
    ][0 if "system" in name else 1 :]  # fmt: skip
    record = {"messages": messages, "tools": [{"name": "get"}, WEATHER]}
    assert not make(make_model(TOOLS, "whole"), record).unusable
    found = fault(make_model(TOOLS.replace(whole, broken), "broken"), record)
    assert why in found.replace("the chat template leaves out ", "")


def test_reasoning_that_other_words_hold_is_left_out_all_the_same(make_model: MakeModel) -> None:
    for thought in ("Paris", "star"):  # of the answer, and of <|im_start|>
        record = {"messages": [user("q"), answer("Paris is big.", reasoning_content=thought)]}
        found = fault(make_model(CHATML, thought), record)
        assert "turn 2: the chat template leaves out the reasoning" in found


@pytest.mark.parametrize(
    "how", ["split() | join(' ')", "replace('\n', '')", r"replace('\\', '')", "upper"]
)
def test_an_answer_is_learnt_as_it_is_written(how: str, make_model: MakeModel) -> None:
    """Contexts may be shown otherwise."""
    dot = "." if "(" in how and "replace" not in how else " | "
    changed = f"(m.content{dot}{how} if m.role == 'assistant' else m.content)"
    model = make_model(CHATML.replace("m.content", changed))
    code = "def f(x):\n    return 'a\\b'"
    assert "leaves out" in fault(model, {"messages": [user("q"), answer(code)]})


@pytest.mark.parametrize(
    ("how", "content"),
    [
        ("m.content | trim", "  padded \n"),
        ("m.content | tojson", 'of "quotes",\n lines and é'),
        ("m.content | replace('/no_think', '')", "be quick /no_think"),
        ("m.content | replace('\\n', '\\n  ')", "some\nlines"),
    ],
)
def test_other_ways_to_write_a_content_are_known(
    how: str, content: str, make_model: MakeModel
) -> None:
    model = make_model(CHATML.replace("m.content", how))
    assert not make(model, {"messages": [user(content), answer("a")]}).unusable


def test_templates_for_tools(make_model: MakeModel, tmp_path: Path) -> None:
    """transformers' choice is the oracle, and their own two ways to keep several templates."""
    from transformers import AutoTokenizer

    model = make_model(None)
    both = {"default": CHATML, "tool_use": TOOLS}
    theirs = AutoTokenizer.from_pretrained(model)
    theirs.chat_template = both
    plain, tooled = chat("q", "a"), {"messages": LONG, "tools": [TOOL]}
    toolless = {"messages": LONG, "tools": []}  # which are tools too, if none
    for layout in ("files", "list"):
        directory = tmp_path / layout
        theirs.save_pretrained(directory, save_jinja_files=layout == "files")
        assert (directory / "additional_chat_templates").is_dir() == (layout == "files")
        assert (directory / "chat_template.jinja").is_file() == (layout == "files")
        out = tmp_path / f"out of {layout}"
        make_store(directory, out, lines(tmp_path / "a.jsonl", plain, tooled))
        copied = tmp_path / f"copy of {layout}"
        copied.mkdir()
        for name, content in read_companions(directory).files.items():
            (copied / name).write_bytes(content)
        for place in (directory, out, copied):
            read = AutoTokenizer.from_pretrained(place)
            assert read.chat_template == both
            for record in (plain, tooled, toolless):
                expected = read.apply_chat_template(
                    record["messages"], tools=record.get("tools"), return_dict=False
                )
                assert make(place, record).samples[-1].ids.tolist() == expected


TEXT_ARGUMENTS = {
    "joined": "' ' + call.function.arguments",
    "printed": "call.function.arguments",
    "either": "(call.function.arguments if call.function.arguments is string else none + 1)",
}


@pytest.mark.parametrize("name", TEXT_ARGUMENTS)
def test_a_template_that_wants_arguments_as_text(name: str, make_model: MakeModel) -> None:
    whole = "call.function.arguments | tojson"
    assert whole in TOOLS
    model = make_model(TOOLS.replace(whole, TEXT_ARGUMENTS[name]))
    for arguments in ({"a": "é", "b": True}, '{"a": "é", "b": true}'):
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        record = {"messages": [user("q"), answer("", tool_calls=[call])], "tools": [TOOL]}
        ((learnt,),) = learnt_texts(model, record)
        written = learnt[learnt.index('"arguments": ') + 13 : learnt.index("}\n</tool_call>")]
        assert json.loads(written) == {"a": "é", "b": True}


def trace(length: int) -> list[dict[str, Any]]:
    """A question, and so many calls of a tool until it is answered."""
    messages = [{"role": "system", "content": "s"}, user("q"), answer("p"), user("go")]
    for number in range(length):
        messages.append(answer("", content=None, tool_calls=[called(n=number)]))
        messages.append({"role": "tool", "content": f"result {number}"})
    return [*messages, answer("done"), user("q"), answer("end", reasoning_content="r")]


@pytest.mark.parametrize("name", ["tools", "reasoning"])
def test_long_traces_take_no_longer_for_each_turn(
    name: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that are rendered grow with the length, not with its square; and what is learnt is
    what rendering everything before each turn gives."""
    template = TEMPLATES[name]
    if name == "tools":
        template = TOOLS.replace(
            "(m.content or '')", "(m.reasoning_content or '') + (m.content or '')"
        )
    model = make_model(template)
    render_here(monkeypatch)
    rendered: list[int] = []
    run = rendering.Template._run

    def counting(self: Any, messages: Sequence[Any], **options: Any) -> Any:
        rendered.append(len(messages))
        return run(self, messages, **options)

    monkeypatch.setattr(rendering.Template, "_run", counting)
    costs = []
    for length in (20, 80):
        rendered.clear()
        found = make(model, {"messages": trace(length)}, sequence_length=10**6)
        assert not found.unusable
        costs.append(sum(rendered))
    assert costs[1] < 4 * costs[0]
    monkeypatch.setattr(rendering, "_EXACT", 10**6)
    rendered.clear()
    exact = make(model, {"messages": trace(80)}, sequence_length=10**6)
    assert sum(rendered) > 4 * costs[1]
    for ours, theirs in zip(found.samples, exact.samples, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.targets.tolist() == theirs.targets.tolist()


def test_a_trace_whose_turns_are_numbered_is_rendered_exactly(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the messages before it a turn would have another number."""
    model = make_model(
        CHATML.replace(
            "{{- '<|im_start|>' + m.role", "{{- '<|im_start|>' + m.role + loop.index | string"
        ).replace("|>assistant", "|>assistant' + (messages | length + 1) | string + '")
    )
    messages = [m for i in range(12) for m in (user(f"q{i}"), answer(f"a{i}"))]
    expected = [[f"a{i}<|im_end|>\n" for i in range(12)]]
    assert learnt_texts(model, {"messages": messages}) == expected
    place = rendering.Template._place
    render_here(monkeypatch)
    found = []

    def noting(self: Any, *args: Any) -> Any:
        found.append(place(self, *args))
        return found[-1]

    monkeypatch.setattr(rendering.Template, "_place", noting)
    assert learnt_texts(model, {"messages": messages}) == expected
    assert set(found) == {None}


def test_our_template_for_tools_writes_everything(make_model: MakeModel) -> None:
    """And what is learnt of it is what the assistant says, thinks and calls."""
    model = make_model()
    thought = answer("seven", reasoning_content="two, and five")
    record = {"messages": [*LONG, user("why?"), thought], "tools": [TOOL]}
    (text,) = learnt_texts(model, record, chat_template=str(OURS))
    call = '{"name": "add", "arguments": {"a": 17, "b": ["x y", {"c": null}], "d": true}}'
    assert text == [
        f"<tool_call>{call}</tool_call></s>\n",
        "four</s>\n",
        "five</s>\n",
        "<think>\ntwo, and five\n</think>\nseven</s>\n",
    ]
