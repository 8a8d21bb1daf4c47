"""Conversations: ids are transformers', and what is learnt is what the assistant wrote.

The oracle of a mask is a template's own text: contents are unique words, so the learnt text of a
sample can be written down by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.conversations import (
    ARGUMENTS,
    CALL,
    CHATML,
    MARKED,
    OPTIONS,
    REASONING,
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
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data import rendering
from nemo_hybrid.data.chat import read_messages, read_tools
from nemo_hybrid.data.samples import SampleMaker
from nemo_hybrid.data.sources import BadRecord, Record
from nemo_hybrid.data.template import load_template
from nemo_hybrid.data.tokenizer import TextTokenizer, load_tokenizer
from nemo_hybrid.errors import UserError

MakeModel = Callable[..., Path]


SYSTEM = {"role": "system", "content": "be kind"}
TWO = [SYSTEM, user("hello é"), answer("first 日本"), user("again"), answer("second\n\n")]
THOUGHTFUL = [
    user("q1"), answer("a1", reasoning_content="r1"), user("q2"), answer("a2"),
    user("q3"), answer("a3", reasoning="r3 and more of it"),
]  # fmt: skip
USING_TOOLS = [
    user("2+2?"), answer("", tool_calls=[CALL, CALL], content=None),
    {"role": "tool", "content": "4"}, {"role": "tool", "content": "four"}, answer("it is 4"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(name: str, make_model: MakeModel) -> None:
    from transformers import AutoTokenizer

    model = make_model(TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(model)
    messages = json.loads(json.dumps(EXPECTED[name][0]))
    tools = [TOOL] if name == "tools" else None
    made = make(model, {"messages": messages, "tools": tools})
    plain = json.loads(json.dumps(messages))
    for call in (call for m in plain for call in m.get("tool_calls", [])):
        call["function"]["arguments"] = ARGUMENTS
    expected = theirs.apply_chat_template(plain, tools=tools, tokenize=True, return_dict=False)
    assert made.samples[-1].ids.tolist() == expected
    assert len(made.samples) == (2 if name == "reasoning" else 1)


EXPECTED: dict[str, tuple[list[dict[str, Any]], list[list[str]]]] = {
    "chatml": (TWO, [["first 日本<|im_end|>\n", "second\n\n<|im_end|>\n"]]),
    "llama": (TWO, [["first 日本<|eot_id|>", "second<|eot_id|>"]]),
    "reasoning": (
        THOUGHTFUL,
        # The history shows a1 without its reasoning, so that it needs a sample of its own. The
        # prompt of a thoughtful answer opens the thinking, that of a plain one closes it too.
        [
            ["r1\n</think>\na1<|im_end|>\n"],
            ["a2<|im_end|>\n", "r3 and more of it\n</think>\na3<|im_end|>\n"],
        ],
    ),
    "tools": (
        USING_TOOLS,
        [
            [
                '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": "é"}}\n</tool_call>' * 2
                + "<|im_end|>\n",
                "it is 4<|im_end|>\n",
            ]
        ],
    ),
    "marked": (TWO, [[" first 日本</s>", " second\n\n</s>"]]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_wrote_is_learnt(name: str, make_model: MakeModel) -> None:
    messages, expected = EXPECTED[name]
    record = {"messages": messages, "tools": [TOOL] if name == "tools" else None}
    assert learnt_texts(make_model(TEMPLATES[name]), record) == expected


def test_plain_earlier_turns_are_learnt_where_they_stand(make_model: MakeModel) -> None:
    """A turn that the history shows as it was written needs no sample of its own."""
    messages = [user("q1"), answer("a1"), user("q2"), answer("a2", reasoning_content="r2")]
    learnt = learnt_texts(make_model(REASONING), {"messages": messages})
    assert learnt == [["a1<|im_end|>\n", "r2\n</think>\na2<|im_end|>\n"]]


def test_a_prompt_that_always_opens_the_thinking(make_model: MakeModel) -> None:
    """Then an answer without reasoning begins by closing it."""
    silent = "'</think>' if enable_thinking is defined and not enable_thinking else "
    assert silent in REASONING
    learnt = learnt_texts(make_model(REASONING.replace(silent, "")), {"messages": THOUGHTFUL})
    assert learnt[1][0] == "</think>a2<|im_end|>\n"


def test_marks_of_the_prompt_are_not_learnt(make_model: MakeModel) -> None:
    record = {"prompt": TWO[:4], "completion": TWO[4:]}
    assert learnt_texts(make_model(MARKED), record) == [[" second\n\n</s>"]]


def test_every_form_of_the_same_conversation(make_model: MakeModel) -> None:
    """Text parts, tools as JSON text, arguments as an object, and nulls that tables hold."""
    model = make_model(TOOLS)
    ids = make(model, {"messages": USING_TOOLS, "tools": [TOOL]}).samples[0].ids.tolist()
    messages = json.loads(json.dumps(USING_TOOLS))
    messages[0]["content"] = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"a": 2, "b": "é"}
    for message in messages:
        message.setdefault("tool_calls", None)
        message.setdefault("reasoning_content", None)
    record = {"messages": messages, "tools": json.dumps([TOOL]), "text": None}
    assert make(model, record).samples[0].ids.tolist() == ids


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda t: t.strip() and "<" not in t
)


def test_any_texts_are_split_at_the_right_token(make_model: MakeModel) -> None:
    """Property: learnt tokens spell the answers, others the rest, whatever characters there are."""
    model = make_model(CHATML)
    maker = SampleMaker(SampleOptions(), model, 0)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
    def run(turns: list[tuple[str, str]]) -> None:
        messages = [m for q, a in turns for m in (user(q), answer(a))]
        made = maker.make(Record("k", "k", {"messages": messages}, 1.0))
        (sample,) = made.samples
        learnt = maker.tokenizer.decode(sample.ids[sample.targets].tolist())
        assert learnt == "".join(f"{a}<|im_end|>\n" for _, a in turns)
        rest = maker.tokenizer.decode(sample.ids[~sample.targets].tolist())
        assert rest == "".join(
            f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q, _ in turns
        )

    run()


def prompting(prompt: str) -> str:
    """A template that writes the messages' contents, and a prompt before each answer."""
    return (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' and (not loop.last or "
        "add_generation_prompt) %}{{ '" + prompt + "' }}{% endif %}{% endfor %}"
    )


def test_a_token_that_is_learnt_in_part_is_learnt(make_model: MakeModel) -> None:
    """' the' is one token, of which the prompt writes the start."""
    model = make_model(prompting("th"))
    assert learnt_texts(model, {"messages": [user("x "), answer("e fox")]}) == [[" the fox"]]
    (sample,) = make(model, {"messages": [user(""), answer("e fox")]}).samples
    assert load_tokenizer(model).decode(sample.ids[:1].tolist()) == "the"
    assert sample.targets.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_offsets_count_white_space(make_model: MakeModel) -> None:
    """A post-processor that trims offsets must not move the mask."""
    model = make_model(prompting("so: "))
    content = json.loads((model / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(content))
    record = {"messages": [user("2 + 2 "), answer("(4)  \n")]}
    assert learnt_texts(model, record) == [["(4)  \n"]]


UNSPLITTABLE = {
    "rewrites history": ("{{ messages | length }}" + CHATML, "it changes what it wrote before"),
    "no prompt": (CHATML.partition("{%- if add_gen")[0], "it has no generation prompt"),
    "answer elsewhere": (
        CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"),
        r"does not follow the prompt '<|im_start|>bot\\n'",
    ),
    "prompt rewrites": (
        "{{ add_generation_prompt }}" + CHATML, "it changes what it wrote before"
    ),
}  # fmt: skip


SILENT = {
    "no answer": (CHATML.replace("{{- '<", "{{- '' if m.role == 'assistant' else '<", 1), 3),
    "marks and writes some": (
        MARKED.replace("{% generation %}", "{% if loop.index0 < 3 %}{% generation %}").replace(
            "{% endgeneration %}", "{% endgeneration %}{% endif %}"), 5),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_a_template_that_does_not_write_answers(name: str, make_model: MakeModel) -> None:
    template, turn = SILENT[name]
    why = fault(make_model(template), {"messages": TWO})
    assert why.startswith(f"turn {turn}: the chat template leaves out what the assistant says")


def test_a_template_that_marks_some_answers(make_model: MakeModel) -> None:
    some = MARKED.replace("{% generation %}", "{% if loop.index0 < 3 %}{% generation %}").replace(
        "{% endgeneration %}",
        "{% endgeneration %}{% else %}{{- ' ' + m.content + eos_token }}{% endif %}",
    )
    assert "at turn 5: it does not mark the answer" in fault(make_model(some), {"messages": TWO})


@pytest.mark.parametrize("name", UNSPLITTABLE)
def test_a_template_that_cannot_be_split(name: str, make_model: MakeModel) -> None:
    template, message = UNSPLITTABLE[name]
    why = fault(make_model(template), {"messages": TWO})
    assert why.startswith("the chat template cannot be split at turn ")
    assert message.replace("\\\\", "\\") in why
    assert "; it writes '" in why


def test_what_a_template_leaves_out_of_an_answer_is_refused(make_model: MakeModel) -> None:
    """Else an empty answer would be learnt where a tool was called."""
    model = make_model(
        "{% set m = namespace() %}" + CHATML.replace("m.content", "(m.content or '')")
    )
    called = {"role": "assistant", "tool_calls": [CALL]}
    thought = answer("hello", reasoning_content="why not")
    for said, what in ((called, "the call of add"), (thought, "the reasoning")):
        why = fault(model, {"messages": [user("hi"), said]})
        assert why.startswith(f"turn 2: the chat template leaves out {what}: it writes")
    assert not make(model, {"messages": [user("hi"), thought]}, reasoning="strip").unusable


def test_the_sample_shown_is_short(make_model: MakeModel) -> None:
    template, _ = UNSPLITTABLE["rewrites history"]
    why = fault(make_model(template), {"messages": [user("x" * 5000), answer("y" * 5000)]})
    assert len(why) < 400
    assert "\n" not in why


def test_templates_that_fail(make_model: MakeModel, tmp_path: Path) -> None:
    why = fault(make_model("a\n\n{{ raise_exception('never ' + messages[0].content) }}", "a"),
                {"messages": TWO})  # fmt: skip
    assert why == f"the chat template fails: {tmp_path}/a/chat_template.jinja line 3: never be kind"
    assert "line 2: can only" in fault(make_model("\n{{ 'a' + 1 }}", "b"), {"messages": TWO})
    assert "no attribute" in fault(make_model("{{ messages[0].a.b }}", "d"), {"messages": TWO})
    with pytest.raises(UserError, match=r"no valid Jinja: .*chat_template.jinja line 2: "):
        make(make_model("a\n{% if %}", "e"), {"messages": TWO})
    with pytest.raises(UserError, match=r"no chat template.*name one as chat_template"):
        make(make_model(None, "f"), {"messages": TWO})


def test_a_template_gets_no_further_than_its_sandbox(make_model: MakeModel, tmp_path: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "x") + "') }}"
    assert "fails" in fault(make_model(template), {"messages": TWO})
    assert not (tmp_path / "x").exists()


BAD = {
    "not a list": ({"messages": "hi"}, "no list"),
    "empty": ({"messages": []}, "no list, or an empty one"),
    "no object": ({"messages": [user("a"), 3]}, "turn 2 is no JSON object"),
    "unknown role": ([user("a"), {"role": "bot", "content": "b"}], "turn 2 has the unknown role"),
    "empty role": ([{"role": "", "content": "b"}], "turn 1 has the unknown role ''"),
    "role of a wrong type": ([{"role": ["user"], "content": "b"}], "turn 1 has the unknown role"),
    "late system": ([user("a"), SYSTEM], "turn 2: a message of the system must not"),
    "two systems": ([SYSTEM, SYSTEM], "of the system must not follow the system's"),
    "assistant first": ([answer("a")], "turn 1: a message of the assistant must not be the first"),
    "users": ([user("a"), user("b")], "turn 2: a message of the user must not follow the user's"),
    "answers": ([user("a"), answer("b"), answer("c")], "turn 3: a message of the"),
    "stray tool": ([user("a"), answer("b"), {"role": "tool", "content": "c"}], "turn 3: a message"),
    "user after tool": ([*USING_TOOLS[:3], user("b")], "turn 4: a message of the user must not"),
    "last": ([user("a"), answer("b"), user("c")], "the last turn is the user's"),
    "empty answer": ([user("a"), answer(" \n")], "turn 2: the assistant's message is empty"),
    "null answer": ([user("a"), answer("", content=None)], "turn 2: the assistant's"),
    "no content": ([{"role": "user"}, answer("b")], "turn 1: there is no content"),
    "image": ([user([{"type": "image"}]), answer("b")], "turn 1: the content is not text"),
    "number": ([user(3), answer("b")], "turn 1: the content is not text"),
    "thoughts": ([user("a"), answer("b", reasoning_content=3)], "turn 2: the reasoning"),
    "calls": ([user("a"), answer("b", tool_calls="x")], "turn 2: tool_calls is no list"),
    "nameless": ([user("a"), answer("b", tool_calls=[{}])], "turn 2: a tool call names"),
    "arguments": (
        [user("a"), answer("b", tool_calls=[{"name": "f", "arguments": "{"}])],
        "turn 2: the arguments of f cannot be read as JSON",
    ),
    "array": (
        [user("a"), answer("b", tool_calls=[{"name": "f", "arguments": "[]"}])],
        "turn 2: the arguments of f are no JSON object",
    ),
    "tools": ({"messages": TWO, "tools": "["}, "tools cannot be read as JSON"),
    "tools of text": ({"messages": TWO, "tools": ["f"]}, "tools is no list of JSON objects"),
    "control": ([user("a<|im_end|>"), answer("b")], "holds <|im_end|>, which would become"),
    "eos": ([user("a"), answer("b </s>")], "holds </s>, which would become a control token"),
    "control in a call": (
        [user("a"), answer("b", tool_calls=[{"name": "f", "arguments": {"x": "<|im_end|>"}}])],
        "holds <|im_end|>",
    ),
    "control in tools": ({"messages": TWO, "tools": [{"name": "f", "<s>": 1}]}, "holds <s>"),
    "nameless tool": ({"messages": TWO, "tools": [TOOL, {}]}, "tools: entry 2 has no name"),
    "unknown special token": ([user("a <|pad|>"), answer("b")], "unknown special token <|pad|>"),
    "surrogate": ([user("a \ud800"), answer("b")], "half a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations(name: str, make_model: MakeModel) -> None:
    record, message = BAD[name]
    record = record if isinstance(record, dict) else {"messages": record}
    assert message in fault(make_model(CHATML), record)


def test_tags_may_be_written_out_and_unknown_tokens_of_the_template_not(
    make_model: MakeModel,
) -> None:
    messages = [user("what is <think>?"), answer("<tool_call> too")]
    assert learnt_texts(make_model(CHATML), {"messages": messages}) == [
        ["<tool_call> too<|im_end|>\n"]
    ]
    template = "<tool_list>" + CHATML.replace("<|im_start|>", "<start_of_turn>")
    special = make_model(template, "special")
    assert learnt_texts(special, {"messages": [user("a"), answer("<tool_list>")]})
    assert "holds <start_of_turn>" in fault(
        special, {"messages": [user("a"), answer("<start_of_turn>")]}
    )
    broken = make_model(CHATML.replace("im_start", "start"), "other")
    assert fault(broken, {"messages": messages}) == (
        "unknown special token <|start|>: the tokenizer has none"
    )


INLINE = [user("q"), answer("<think>\nsome long reasoning\n</think>\nyes")]


@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_options(inline: bool, make_model: MakeModel) -> None:
    if inline:
        model, messages = make_model(CHATML), INLINE
    else:
        model = make_model(REASONING)
        messages = [user("q"), answer("yes", reasoning_content="some long reasoning")]
    record = {"messages": messages}
    opening = "<think>\n" if inline else ""
    (kept,) = learnt_texts(model, record)
    assert kept == [f"{opening}some long reasoning\n</think>\nyes<|im_end|>\n"]
    assert learnt_texts(model, record, reasoning="mask") == [["\nyes<|im_end|>\n"]]
    assert make(model, record, reasoning="mask").samples[0].ids.tolist() == (
        make(model, record).samples[0].ids.tolist()
    )
    for options in ({"reasoning": "strip"}, {"strip_reasoning": 0.999}):
        assert learnt_texts(model, record, **options) == [["yes<|im_end|>\n"]]
    (cut,) = learnt_texts(model, record, truncate_reasoning=0.999)
    first, rest = cut
    assert first.startswith(opening)
    part = first.removeprefix(opening)
    assert part
    assert "some long reasoning".startswith(part)
    assert part != "some long reasoning"
    assert rest == "\nyes<|im_end|>\n"


def test_reasoning_is_cut_anywhere_and_in_the_wanted_share(make_model: MakeModel) -> None:
    maker = SampleMaker(
        SampleOptions(strip_reasoning=0.2, truncate_reasoning=0.3), make_model(REASONING), 5
    )
    thought = " ".join(f"word{i}" for i in range(20))
    messages = [user("q"), answer("yes", reasoning_content=thought)]
    learnt = []
    for key in range(400):
        (sample,) = maker.make(Record(f"x#{key}", "", {"messages": messages}, 1.0)).samples
        learnt.append(maker.tokenizer.decode(sample.ids[sample.targets].tolist()))
    stripped = sum(t == "yes<|im_end|>\n" for t in learnt)
    cut = [t for t in learnt if "</think>" not in t and t.startswith("w")]
    whole = sum(thought in t for t in learnt)
    assert stripped + len(cut) + whole == 400
    assert abs(stripped - 80) < 30
    assert abs(len(cut) - 120) < 35
    lengths = [len(t) for t in cut]
    assert min(lengths) < len(thought) / 4
    assert max(lengths) > len(thought) / 2


def test_nothing_but_reasoning_is_no_answer(make_model: MakeModel) -> None:
    """It was cut off: learnt, it would teach to end there."""
    model = make_model(REASONING)
    for said in (answer("", reasoning_content="r"), answer("<think>\nr\n</think>\n")):
        for options in OPTIONS:
            assert "turn 2: the reasoning was cut off: no answer follows it" in fault(
                model, {"messages": [user("q"), said]}, **options
            )
    called = answer("", reasoning_content="r", tool_calls=[CALL])
    assert not make(model, {"messages": [user("q"), called]}).unusable


def test_where_a_template_comes_from(make_model: MakeModel, tmp_path: Path) -> None:
    """A named file before chat_template.jinja before tokenizer_config.json."""
    model = make_model(CHATML)

    def source(file: str | None = None) -> str | None:
        template = load_template(load_tokenizer(model), model, file)
        return template and template.source()

    other = tmp_path / "mine.jinja"
    other.write_text("mine")
    assert source(str(other)) == "mine"
    assert source() == CHATML
    (model / "chat_template.jinja").unlink()
    assert source() is None
    config = json.loads((model / "tokenizer_config.json").read_text())
    for value, found in (
        ("x", "x"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
    ):
        (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        assert source() == found
    rag = {**config, "chat_template": [{"name": "rag", "template": "r"}]}
    (model / "tokenizer_config.json").write_text(json.dumps(rag))
    assert fault(model, {"messages": TWO}).endswith("has no default chat template, only rag")
    with pytest.raises(UserError, match="cannot read"):
        source(str(tmp_path / "nowhere"))
    other.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"mine.jinja is not UTF-8"):
        source(str(other))


def test_the_splitting_notices_a_wrong_start(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparisons above see a mask that is shifted by one character."""
    model = make_model(CHATML)
    render_here(monkeypatch)
    assert learnt_texts(model, {"messages": TWO}) == EXPECTED["chatml"][1]
    answer_of = rendering.Template._answer

    def shifted(self: rendering.Template, *args: Any) -> tuple[str, int, int]:
        text, start, before = answer_of(self, *args)
        return text, start + 1, before

    monkeypatch.setattr(rendering.Template, "_answer", shifted)
    assert learnt_texts(model, {"messages": TWO}) != EXPECTED["chatml"][1]


def test_readers_refuse_by_bad_record_alone(chat_tokenizer: TextTokenizer) -> None:
    """Fuzz: any JSON is messages, or a BadRecord that says why."""
    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
    roles = st.sampled_from(["user", "assistant", "tool", "system"])
    anything = st.recursive(
        leaves,
        lambda v: (
            st.lists(v, max_size=2)
            | st.dictionaries(st.sampled_from(["type", "text", "function", "name", "arguments"]), v)
        ),
        max_leaves=4,
    )
    message = st.fixed_dictionaries(
        {"role": roles | anything, "content": anything},
        optional={"tool_calls": anything, "reasoning_content": anything},
    )

    @settings(max_examples=200, deadline=None)
    @given(st.lists(message | anything, max_size=4) | anything, anything)
    def run(messages: Any, tools: Any) -> None:
        try:
            read = read_messages(messages)
        except BadRecord as e:
            assert str(e)  # noqa: PT017
        else:
            assert read[-1]["role"] == "assistant"
        try:
            read_tools(tools)
        except BadRecord as e:
            assert "tools" in str(e)  # noqa: PT017

    run()
