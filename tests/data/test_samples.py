"""Samples from files to stores: every kind of record, what is refused and where, reuse, preview."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sample_files import chat, lines, make, stored
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.samples import SampleMaker
from nemo_hybrid.data.sources import Record
from nemo_hybrid.data.store import Store, StoreWriter
from nemo_hybrid.data.tokenizer import load_tokenizer
from nemo_hybrid.errors import UserError

MakeModel = Callable[..., Path]


def test_every_kind_of_record(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    tokenizer = load_tokenizer(model)
    (prompt,), (completion,), (text,) = (
        tokenizer.encode([t]) for t in ("2 + 2 = ", "4 </s>", "hello </s> fox")
    )
    one = chat("hello", "fox")
    pair = {"prompt": one["messages"][:1], "completion": one["messages"][1:]}
    data = lines(
        tmp_path / "a.jsonl",
        one,
        pair,
        {"prompt": "2 + 2 = ", "completion": "4 </s>"},
        {"text": "hello </s> fox"},
        {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 0, 1, 0], "seq_start_id": [0, 2]},
    )
    summary = make(model, tmp_path / "out", data)
    eos = tokenizer.eos_id
    first, again, *others = stored(tmp_path / "out")
    assert first == again
    assert others == [
        ([*prompt, *completion, eos], [False] * len(prompt) + [True] * (len(completion) + 1)),
        ([*text, eos], [False] + [True] * len(text)),
        ([5, 6], [False, True]),
        ([7, 8], [False, True]),
    ]
    assert eos not in [*completion, *text]
    assert summary.records == {"messages": 1, "prompt and completion": 2, "text": 1, "pack": 1}
    assert summary.entries == {"train": 6}
    assert summary.tokens == {"train": sum(len(ids) for ids, _ in stored(tmp_path / "out"))}
    assert summary.learnt == {"train": sum(sum(t) for _, t in stored(tmp_path / "out"))}
    assert summary.longest == max(len(ids) for ids, _ in stored(tmp_path / "out"))
    assert summary.dropped == {}
    recorded = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert recorded["summary"] == asdict(summary)
    for shown in ("6 samples", "held out", "2 records: prompt and completion"):
        assert (shown in str(summary)) == (shown != "held out")


def test_only_the_completion_of_a_conversation_is_learnt(
    make_model: MakeModel, tmp_path: Path
) -> None:
    whole = [*chat("a", "b")["messages"], *chat("c", "d")["messages"]]
    pairs = [{"messages": whole}, {"prompt": whole[:3], "completion": whole[3:]}]
    make(make_model(), tmp_path / "out", lines(tmp_path / "a.jsonl", *pairs))
    (ids, both), (same, last) = stored(tmp_path / "out")
    assert ids == same
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(np.array(ids)[last].tolist()) == "d<|im_end|>\n"
    assert tokenizer.decode(np.array(ids)[both].tolist()) == "b<|im_end|>\nd<|im_end|>\n"


def test_nvidias_packs(make_model: MakeModel, tmp_path: Path) -> None:
    """The parquet columns of NVIDIA's packing tools: the mask is of labels, so it is rolled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model = make_model()
    samples = [([5, 6, 7], [0, 0, 1]), ([8, 9], [0, 1]), ([10, 11, 12, 13], [0, 1, 0, 1])]
    columns: dict[str, list[list[int]]] = {"input_ids": [], "loss_mask": [], "seq_start_id": []}
    for pack in (samples[:2], samples[2:]):
        ids = [i for s, _ in pack for i in s]
        columns["input_ids"].append(ids)
        columns["loss_mask"].append([m for _, t in pack for m in [*t[1:], 0]])
        columns["seq_start_id"].append([0, len(pack[0][0])][: len(pack)])
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    make(model, tmp_path / "out", tmp_path / "p.parquet")
    assert stored(tmp_path / "out") == [(ids, [bool(t) for t in mask]) for ids, mask in samples]
    assert stored(tmp_path / "out")[0][1] == [False, False, True]

    columns["loss_mask"] = [[m for _, t in p for m in t] for p in (samples[:2], samples[2:])]
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet row 0: loss_mask 2 is 1, .*packed_mask tokens"):
        make(model, tmp_path / "wrong", tmp_path / "p.parquet")
    make(model, tmp_path / "tokens", tmp_path / "p.parquet", packed_mask="tokens")
    assert stored(tmp_path / "tokens") == stored(tmp_path / "out")
    first = lines(
        tmp_path / "f.jsonl", {"input_ids": [5, 6], "loss_mask": [1, 1], "seq_start_id": [0]}
    )
    make(model, tmp_path / "first", first, packed_mask="tokens")
    assert stored(tmp_path / "first") == [([5, 6], [False, True])]


def test_rollouts_are_learnt_as_the_ids_that_were_said(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """The prompt is shown, and the end learnt where there was one: not a text and its end."""
    model = make_model()
    tokenizer = load_tokenizer(model)
    rows = [rollout(tokenizer.decode([7, 8, 9]))]
    rows += [{**rows[0], "ids": [7, 8, 9, 2], "ended": "stop"}]
    rows[1]["chosen"] = [True, False, True, True]  # a budget of thinking forced one
    rows += [{**rows[0], "text": None}]  # of a model without a tokenizer
    rows += [{**rows[0], "prompt_ids": []}]
    summary = make(model, tmp_path / "out", lines(tmp_path / "a.jsonl", *rows))
    found = stored(tmp_path / "out")
    assert found[:3] == [([5, 6, *row["ids"]], [False, False, *row["chosen"]]) for row in rows[:3]]
    assert found[3] == ([7, 8, 9], [False, True, True])
    assert (summary.records, summary.unread) == ({"rollout": 4}, {})


def rollout(text: str) -> dict[str, Any]:
    return {"prompt": 0, "sample": 1, "prompt_ids": [5, 6], "ids": [7, 8, 9], "text": text,
            "chosen": [True] * 3, "logprobs": [-1.0] * 3, "ended": "length"}  # fmt: skip


def test_reasoning_in_rollouts_can_only_be_kept(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    ids = load_tokenizer(model).encode(["<think>a</think>b"])[0].tolist()
    row = {"prompt_ids": [5], "ids": ids, "chosen": [True] * len(ids)}
    data = lines(tmp_path / "a.jsonl", row)
    assert make(model, tmp_path / "kept", data).records == {"rollout": 1}
    with pytest.raises(UserError, match="reasoning in plain text can only be kept"):
        make(model, tmp_path / "masked", data, reasoning="mask")


PACK = {"input_ids": [5, 6, 7, 8], "loss_mask": [1, 0, 1, 0], "seq_start_id": [0, 2]}
BAD: dict[str, tuple[object, str]] = {
    "not JSON": ("{", "malformed: FILE line 2: not JSON"),
    "not an object": ("5", "malformed: FILE line 2: not a JSON object"),
    "an array": ("[]", "malformed: FILE line 2: a JSON array, not an object: a file of one"),
    "roles": (
        {"messages": chat("a", "b")["messages"][1:]},
        "wrong roles: FILE line 2: turn 1: a message of the assistant must not be the first",
    ),
    "empty answer": (chat("a", ""), "empty answers: FILE line 2: turn 2: the assistant's message"),
    "special": (chat("a", "<|x|>"), "special tokens: FILE line 2: unknown special token <|x|>"),
    "no kind": ({"body": "x", "id": 1}, "unknown kind: FILE line 2: of no known kind: it has body"),
    "two kinds": ({**chat("a", "b"), "text": "x"}, "of two kinds at once (messages and text)"),
    "half a kind": ({"prompt": "x"}, "of no known kind: it has prompt; the kinds are: messages;"),
    "no completion": (
        {"prompt": chat("a", "b")["messages"], "completion": []},
        "empty answers: FILE line 2: there is no message of the assistant to learn from",
    ),
    "mixed": ({"prompt": [], "completion": "x"}, "malformed: FILE line 2: prompt is not text"),
    "number": ({"text": 3}, "malformed: FILE line 2: text is not text"),
    "surrogate": ('{"text": "\\ud800"}', "FILE line 2: text holds half a surrogate pair"),
    "empty": ({"text": ""}, "malformed: FILE line 2: the text is empty"),
    "empty completion": ({"prompt": "a", "completion": ""}, "FILE line 2: the text is empty"),
    "over-long": ({"text": "Fox " * 90}, "over-long: FILE line 2: "),
    "all-masked": ({**PACK, "loss_mask": [0] * 4, "seq_start_id": [0]}, "all-masked: FILE line 2"),
    "masked part": (
        {**PACK, "loss_mask": [1, 0, 0, 0]},
        "all-masked: FILE line 2 sample 2: nothing is learnt of its 2 tokens",
    ),
    "rollout of another": (rollout("other"), "reads other text in its ids"),
    "rollout outside": ({**rollout("x"), "ids": [5, 6, 9999]}, "token id 9999 lies outside the"),
    "rollout of nothing": (
        {"prompt_ids": [5], "ids": [], "chosen": []}, "nothing is learnt of its 1 tokens"
    ),
    "rollout and more": ({**chat("a", "b"), **rollout("x")}, "messages and rollout"),
    "mask length": ({**PACK, "loss_mask": [0]}, "1 entries of loss_mask for 4 of input_ids"),
    "mask value": ({**PACK, "loss_mask": [0, 2, 0, 0]}, "loss_mask holds other numbers than 0 and"),
    "outside": ({**PACK, "input_ids": [5, 6, 7, 9999]}, "token id 9999 lies outside the"),
    "negative": ({**PACK, "input_ids": [5, 6, 7, -1]}, "token id -1 lies outside the vocabulary"),
    "fraction": ({**PACK, "input_ids": [5, 6, 7, 0.5]}, "input_ids is no list of whole numbers"),
    "words": ({**PACK, "input_ids": "5 6"}, "input_ids is no list of whole numbers"),
    "huge": ({**PACK, "input_ids": [5, 6, 7, 2**80]}, "input_ids is no list of whole numbers"),
    "nested": ({**PACK, "seq_start_id": [[0], [1, 2]]}, "seq_start_id is no list of whole numbers"),
    "late start": ({**PACK, "seq_start_id": [1, 2]}, "seq_start_id must start at 0 and ascend"),
    "no start": ({**PACK, "seq_start_id": []}, "seq_start_id must start at 0 and ascend below 4"),
    "descending": ({**PACK, "seq_start_id": [0, 3, 2]}, "seq_start_id must start at 0 and ascend"),
    "beyond": ({**PACK, "seq_start_id": [0, 4]}, "seq_start_id must start at 0 and ascend below 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_counted_and_skipped_on_request(
    name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    record, message = BAD[name]
    model = make_model()
    data = lines(tmp_path / "a.jsonl", chat("hello", "fox"), record, chat("a", "b"))
    with pytest.raises(UserError, match="1 records or samples cannot") as e:
        make(model, tmp_path / "out", data, sequence_length=100)
    assert message.replace("FILE", str(data)) in str(e.value)
    assert not (tmp_path / "out").exists()
    summary = make(model, tmp_path / "out", data, sequence_length=100, skip_bad=True)
    assert sum(summary.dropped.values()) == 1
    (reason,) = summary.dropped
    assert f"1 {reason}" in str(summary)
    assert summary.examples[reason][0].startswith(f"{data} line 2")
    kept = stored(tmp_path / "out")
    make(model, tmp_path / "good", lines(data, chat("hello", "fox"), chat("a", "b")))
    expected = stored(tmp_path / "good")
    assert [s for s in kept if s != ([5, 6], [False, True])] == expected


def test_many_bad_records(make_model: MakeModel, tmp_path: Path) -> None:
    """Each reason is counted, and its first five are named, after all of the input was read."""
    broken = ["{"] * 7 + [chat("a", "")] * 2
    data = lines(tmp_path / "a.jsonl", *broken, chat("a", "b"))
    with pytest.raises(UserError) as e:
        make(make_model(), tmp_path / "out", data)
    message = str(e.value)
    assert "9 records or samples cannot" in message
    assert re.search(r"7 malformed: .* line 1, 2, 3, 4, 5: not JSON; and 2 more", message)
    assert re.search(r"2 empty answers: .* line 8, 9: ", message)


def test_nothing_to_learn(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match="nothing to learn from"):
        make(model, tmp_path / "out", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"nothing to learn from .*\n.*1 malformed"):
        make(model, tmp_path / "out", lines(tmp_path / "a.jsonl", "{"), skip_bad=True)
    one = lines(tmp_path / "b.jsonl", chat("a", "b"))
    with pytest.raises(UserError, match=r"none of the 1 samples falls into the \w+ split"):
        make(model, tmp_path / "out", one, heldout=0.5)
    with pytest.raises(UserError, match="does not exist"):
        make(model, tmp_path / "out", tmp_path / "nowhere")
    for ending in ("bin", "idx"):
        (tmp_path / f"m.{ending}").write_bytes(b"")
    with pytest.raises(UserError, match=r"m\.bin is Megatron data, .* serves pre-training"):
        make(model, tmp_path / "out", tmp_path / "m.bin")
    assert not (tmp_path / "out").exists()


def test_over_long_samples_are_cut_on_request(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    data = lines(tmp_path / "a.jsonl", {"text": "fox " * 50}, chat("fox " * 50, "b"), {"text": "a"})
    make(model, tmp_path / "whole", data)
    whole = stored(tmp_path / "whole")
    summary = make(model, tmp_path / "out", data, sequence_length=20, truncate=True, skip_bad=True)
    assert stored(tmp_path / "out") == [(whole[0][0][:20], whole[0][1][:20]), whole[2]]
    assert summary.truncated == 2
    assert summary.dropped == {"all-masked": 1}
    assert "line 2: nothing is learnt of its 20 tokens" in summary.examples["all-masked"][0]
    # What is exactly as long as a sequence is not over-long.
    length = max(len(ids) for ids, _ in whole)
    for truncate in (False, True):
        out = tmp_path / f"exact {truncate}"
        summary = make(model, out, data, sequence_length=length, truncate=truncate)
        assert summary.entries == {"train": 3}
        assert summary.truncated == 0


def test_the_split_follows_seed_and_place(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    data = lines(tmp_path / "a.jsonl", *({"text": f"fox {i}"} for i in range(200)))
    summary = make(model, tmp_path / "out", data, heldout=0.3)
    assert abs(summary.entries["heldout"] - 60) < 25
    both = stored(tmp_path / "out") + stored(tmp_path / "out", "heldout")
    make(model, tmp_path / "all", data)
    assert sorted(both) == sorted(stored(tmp_path / "all"))
    (tmp_path / "b").mkdir()
    moved = data.rename(tmp_path / "b" / "a.jsonl")
    make(model, tmp_path / "moved", moved, heldout=0.3)
    assert stored(tmp_path / "moved", "heldout") == stored(tmp_path / "out", "heldout")
    other = lines(tmp_path / "h.jsonl", {"text": "held out"})
    summary = make(model, tmp_path / "own", moved, heldout_paths=(other,), heldout=0.3)
    assert summary.entries == {"train": 200, "heldout": 1}


def test_samples_of_a_pack_stay_in_one_split(make_model: MakeModel, tmp_path: Path) -> None:
    packs = ({**PACK, "input_ids": [i, i, i, i]} for i in range(10, 60))
    make(make_model(), tmp_path / "out", lines(tmp_path / "a.jsonl", *packs), heldout=0.4)
    seen = [{ids[0] for ids, _ in stored(tmp_path / "out", s)} for s in ("train", "heldout")]
    assert not seen[0] & seen[1]


def test_the_template_that_was_used_goes_with_the_samples(
    make_model: MakeModel, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = make_model(None)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "bad"}))
    mine = tmp_path / "mine.jinja"
    mine.write_text(
        "{{ messages[0].content }}{% if add_generation_prompt or messages[1:] %}{{ '\nAnswer: ' }}"
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{% endif %}"
    )
    data = lines(tmp_path / "a.jsonl", chat("a", "b"))
    make(model, tmp_path / "out", data, chat_template=str(mine))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == mine.read_text()
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    (ids, targets), = stored(tmp_path / "out")  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(ids) == "a\nAnswer: b"
    assert tokenizer.decode(np.array(ids)[targets].tolist()) == "b"


def test_a_tokenizer_that_disagrees_with_the_embedding(
    make_model: MakeModel, tmp_path: Path
) -> None:
    data = lines(tmp_path / "a.jsonl", chat("a", "b"))
    model = make_model()
    size = load_tokenizer(model).vocab_size
    make(model, tmp_path / "fits", data, vocab_size=size)
    with pytest.raises(UserError, match=rf"has {size} entries, .* embedding has only {size - 1}"):
        make(model, tmp_path / "out", data, vocab_size=size - 1)


def test_stores_of_the_other_kind_are_refused(
    make_model: MakeModel, make_store: Callable[..., Path], tmp_path: Path
) -> None:
    make(make_model(), tmp_path / "out", lines(tmp_path / "a.jsonl", chat("a", "b")))
    with pytest.raises(UserError, match=r"is a store of samples .* which `pretrain` takes"):
        Store.open(tmp_path / "out" / "train")
    with pytest.raises(UserError, match=r"is a token store, .* which `finetune` takes"):
        Store.open(make_store("s", [[5, 2]]), samples=True)
    with pytest.raises(UserError, match=r"no store\.json.*finetune"):
        Store.open(tmp_path, samples=True)


def test_samples_come_back_across_shards(tmp_path: Path) -> None:
    from hashlib import sha256

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1), min_size=1),
        st.integers(1, 9),
    )
    def run(samples: list[list[tuple[int, bool]]], shard_tokens: int) -> None:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "tokenizer.json").write_bytes(b"t")
        writer = StoreWriter(
            folder / "s",
            vocab_size=100,
            eos_id=2,
            tokenizer_sha256=sha256(b"t").hexdigest(),
            shard_tokens=shard_tokens,
        )
        for sample in samples:
            writer.add(np.array([i for i, _ in sample]), np.array([t for _, t in sample]))
        writer.finish({})
        store = Store.open(folder / "s", samples=True)
        assert store.lengths.tolist() == [len(s) for s in samples]
        for number, sample in enumerate(samples):
            ids, targets = store.sample(number)
            assert ids.dtype == np.int64
            assert targets.dtype == np.bool_
            assert list(zip(ids.tolist(), targets.tolist(), strict=True)) == sample
        with pytest.raises(IndexError):
            store.sample(len(samples))

    run()


@pytest.mark.parametrize("name", ["targets-00000.bin", "tokens-00000.bin", "documents.npy"])
def test_damage_is_noticed(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    make(make_model(), tmp_path / "out", lines(tmp_path / "a.jsonl", chat("a", "b")))
    file = tmp_path / "out" / "train" / name
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match="damaged"):
        Store.open(tmp_path / "out" / "train", samples=True)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="bytes"):
        Store.open(tmp_path / "out" / "train", samples=True, verify="size")
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        Store.open(tmp_path / "out" / "train", samples=True)


def test_fewer_targets_than_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    make(make_model(), tmp_path / "out", lines(tmp_path / "a.jsonl", chat("a", "b")))
    targets = tmp_path / "out" / "train" / "targets-00000.bin"
    targets.write_bytes(targets.read_bytes()[:-1])
    info = targets.with_name("store.json")
    content = json.loads(info.read_text())
    content["files"][targets.name]["size"] -= 1
    info.write_text(json.dumps(content))
    with pytest.raises(UserError, match="contradicts itself"):
        Store.open(tmp_path / "out" / "train", samples=True, verify="size")


def test_no_record_escapes_as_another_error(make_model: MakeModel) -> None:
    """Fuzz: any JSON object is samples or a named fault."""
    maker = SampleMaker(SampleOptions(), make_model(), 0)
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=2),
        max_leaves=6,
    )
    keys = st.sampled_from([key for kind in maker._kinds.values() for key in kind])

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(keys, value))
    def run(content: dict[str, Any]) -> None:
        made = maker.make(Record("k", "place", content, 1.0))
        assert made.samples or made.unusable
        assert all(item.where.startswith("place") for item in made.unusable)
        for sample in made.samples:
            assert len(sample.ids) == len(sample.targets) > 1
            assert sample.learnt == sample.targets.sum()

    run()
