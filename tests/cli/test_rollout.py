"""rollout and generate --prompts: what is read, what is written, and going on after a stop."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.commands import Commands, commands_in_one_process
from helpers.once import once
from helpers.processes import run_python
from helpers.sample_files import make, stored
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.data.tokenizer import TextTokenizer, train_tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}<s>{{ m.role ~ ':' ~ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<s>{{ mood or 'A' }}:{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": "b </s> é", "answer": 3},
    {"prompt": [{"role": "user", "content": "a b?"}]},
    {"input_ids": [5, 6, 7]},
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                     {"role": "user", "content": "a"}],
        "tools": [{"name": "t"}], "system": "be", "chat_template_kwargs": {"mood": "B"},
    },
]  # fmt: skip
RENDERED = ["b </s> é", "<s>user:a b?<s>A:", None,
            "[t]<s>system:be<s>user:a<s>assistant:b<s>user:a<s>B:"]  # fmt: skip
CONFIG = tiny_config(
    "ME*", vocab_size=260, max_position_embeddings=60, mtp_num_depths=1, mtp_pattern="*E"
)
SAMPLES, NEW = 3, 5
UNEVEN = Path(__file__).with_name("uneven_rollout.py")
NUMBERS = [(prompt, sample) for prompt in range(len(ROWS)) for sample in range(SAMPLES)]


def tokenizer() -> TextTokenizer:
    return train_tokenizer(["a b"], 259)


def write_model(directory: Path) -> None:
    loud_model(CONFIG).save_hf(str(directory / "model"))
    for name, data in tokenizer().files.items():
        (directory / "model" / name).write_bytes(data)
    (directory / "model/chat_template.jinja").write_text(TEMPLATE)
    loud_model(tiny_config("ME*", vocab_size=260)).save_hf(str(directory / "bare"))
    write_rows(directory / "prompts.jsonl", ROWS)


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_alike(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same samples, whose log-probabilities differ by rounding alone."""
    for a, b in zip(ours, theirs, strict=True):
        assert a | {"logprobs": []} == b | {"logprobs": []}
        logprobs = torch.tensor([a["logprobs"], b["logprobs"]])
        assert torch.allclose(logprobs[0], logprobs[1], atol=1e-4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "rollouts", write_model)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as commands:
        yield commands


def words(home: Path, out: Path | str, *more: str | Path) -> list[str]:
    return ["rollout", "--from", str(home / "model"), "--data", str(home / "prompts.jsonl"),
            "--samples", str(SAMPLES), "--max_new_tokens", str(NEW), "--seed", "7",
            f"--out={out}", *map(str, more)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(home: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing interrupted writes."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    said = commands(*words(home, out))
    assert (said.status, said.err.splitlines()[0]) == (0, "generating 12 samples ...")
    assert said.out.startswith(f"{out}: 12 samples of 4 prompts; 12 generated now, ")
    assert {p.name for p in out.parent.iterdir()} == {"out.jsonl", "out.jsonl.run.json"}
    return out


def test_what_stands_in_the_file(whole: Path, home: Path) -> None:
    from transformers import AutoTokenizer

    rows, theirs = read_rows(whole), AutoTokenizer.from_pretrained(home / "model")
    assert [(row["prompt"], row["sample"]) for row in rows] == NUMBERS
    model = loud_model(CONFIG)
    for row in rows:
        assert list(row) == [
            "prompt", "sample", "prompt_ids", "ids", "chosen", "logprobs", "text", "ended"
        ]  # fmt: skip
        text = RENDERED[row["prompt"]]
        asked = [5, 6, 7] if text is None else theirs(text)["input_ids"]
        assert row["prompt_ids"] == asked
        assert row["ended"] == ("stop" if row["ids"][-1] == 2 else "length")
        assert len(row["ids"]) == NEW or row["ended"] == "stop"
        said = row["ids"][:-1] if row["ended"] == "stop" else row["ids"]
        assert row["text"] == theirs.decode(said)
        with torch.no_grad():
            logits_SV = model(torch.tensor([asked + row["ids"]])).logits[0]
        own_nV = logits_SV[len(asked) - 1 : -1].log_softmax(-1)
        own_n = own_nV.gather(-1, torch.tensor(row["ids"])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(row["logprobs"]), own_n, atol=1e-4)
    assert len({tuple(row["ids"]) for row in rows}) > len(rows) // 2


def test_rollouts_are_samples_to_learn_from(whole: Path, home: Path, tmp_path: Path) -> None:
    make(home / "model", tmp_path / "out", whole)
    asked_and_said = [(row["prompt_ids"], row["ids"]) for row in read_rows(whole)]
    assert stored(tmp_path / "out") == [
        (asked + said, [False] * len(asked) + [True] * len(said)) for asked, said in asked_and_said
    ]


def test_samples_are_compared_with_answers_of_their_own_prompts_alone(
    whole: Path, home: Path, commands: Commands, tmp_path: Path
) -> None:
    def said(rows: list[dict[str, Any]]) -> str:
        write_rows(tmp_path / "data.jsonl", rows)
        return commands("eval", "--rollouts", whole, "--data", tmp_path / "data.jsonl").err

    answered = [{**row, "answer": "other", "note": 1} for row in ROWS]
    assert said(answered) == ""
    for other in (answered[::-1], [{**answered[0], "prompt": "c"}, *answered[1:]],
                  [*answered[:3], {**answered[3], "system": "be so"}]):  # fmt: skip
        assert f"{whole} holds samples of other prompts than those of" in said(other)
    about = Path(f"{whole}.run.json")
    assert "asked" in json.loads(about.read_text())
    write_rows(tmp_path / "alone.jsonl", read_rows(whole))  # nothing tells what that is of
    assert commands("eval", "--rollouts", tmp_path / "alone.jsonl",
                    "--data", tmp_path / "data.jsonl").status == 0  # fmt: skip


def test_fields_that_are_not_read_are_counted_once(
    home: Path, commands: Commands, tmp_path: Path
) -> None:
    misspelt = [{**row, "thinking_budgt": 3} for row in ROWS[:2]]
    write_rows(tmp_path / "misspelt.jsonl", [*misspelt, {"prompt": "a", "url": "b", "c": None}])
    said = commands("generate", "--from", home / "model", "--max_new_tokens", "1",
                    "--prompts", tmp_path / "misspelt.jsonl")  # fmt: skip
    assert said.status == 0
    assert said.err.splitlines()[0] == (
        "fields of prompts that are not read, and rows with them: thinking_budgt (2), url (1)"
    )


def test_what_is_missing_is_named_with_its_line(
    home: Path, commands: Commands, tmp_path: Path
) -> None:
    def said(model: str, line: str) -> str:
        (tmp_path / "data.jsonl").write_text('{"input_ids": [5]}\n' + line)
        given = ["generate", "--from", home / model, "--prompts", tmp_path / "data.jsonl",
                 "--max_new_tokens", "1"]  # fmt: skip
        return commands(*given).err.replace(str(home), "HOME").replace(str(tmp_path), "HERE")

    assert said("bare", '{"prompt": "a"}') == (
        "error: HERE/data.jsonl line 2: HOME/bare has no tokenizer.json: give rows of input_ids\n"
    )
    assert said("model", '{"prompt": a}') == (
        "error: HERE/data.jsonl line 2: not JSON: Expecting value at column 12\n"
    )
    assert said("model", '{"prompt": "a"\n').endswith(
        "not JSON: Expecting ',' delimiter at column 15\n"
    )
    assert said("model/config.json", "") == (
        "error: HOME/model/config.json is a file: name its directory, HOME/model\n"
    )


def test_parquet_other_slots_and_other_orders_give_the_same(
    whole: Path, home: Path, commands: Commands, tmp_path: Path
) -> None:
    """Rows with ids keep their samples wherever they stand."""
    table = [{"id": number, **row} for number, row in enumerate(ROWS)]
    texts = [
        {"prompt": None, "input_ids": None, **row}
        for row in table
        if isinstance(row.get("prompt"), str) or "input_ids" in row
    ]
    pq.write_table(pa.Table.from_pylist(texts[::-1]), tmp_path / "prompts.parquet")
    out, given = tmp_path / "out.jsonl", words(home, tmp_path / "out.jsonl", "--slots", "2")
    given[given.index("--data") + 1] = str(tmp_path / "prompts.parquet")
    assert commands(*given).status == 0
    rows = {(row["prompt"], row["sample"]): row["ids"] for row in read_rows(whole)}
    found = read_rows(out)
    assert [row["prompt"] for row in found] == [2, 2, 2, 0, 0, 0]
    assert all(row["ids"] == rows[row["prompt"], row["sample"]] for row in found)


def test_it_goes_on_where_it_was_killed(
    whole: Path, home: Path, commands: Commands, tmp_path: Path
) -> None:
    """With what several processes had written, the last line of one of them torn."""
    lines = whole.read_text().splitlines(keepends=True)
    out = tmp_path / "out.jsonl"
    Path(f"{out}.run.json").write_text(Path(f"{whole}.run.json").read_text())
    Path(f"{out}.part-0").write_text(lines[7] + lines[2] + lines[1][:30])
    Path(f"{out}.part-1").write_text(lines[4])
    said = commands(*words(home, out))
    assert "12 samples of 4 prompts; 9 generated now" in said.out
    assert_alike(read_rows(out), read_rows(whole))
    assert [out.read_text().splitlines(keepends=True)[i] for i in (2, 4, 7)] == [
        lines[i] for i in (2, 4, 7)
    ]
    assert not list(tmp_path.glob("*part*"))
    Path(f"{out}.part-1").write_text(lines[4])  # it was killed before it had removed all parts
    said = commands(*words(home, out))
    assert (said.status, said.out) == (0, f"{out} is complete: 12 samples\n")
    assert not list(tmp_path.glob("*part*"))


def test_processes_divide_prompts_and_experts(whole: Path, home: Path, tmp_path: Path) -> None:
    """Four processes, of which two each share experts, give what one gives."""
    out = tmp_path / "out.jsonl"
    run_python(["-m", "nemo_hybrid", *words(home, out, "--ep", "2")], size=4)
    assert_alike(read_rows(out), read_rows(whole))


def test_a_full_disk_of_one_process_ends_all_that_share_experts_with_its_reason(
    whole: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [UNEVEN, "full", *words(home, out, "--ep", "2", "--slots", "1")]
    for process in run_python(command, size=2, succeed=False):
        (line,) = (line for line in process.stderr.splitlines() if line.startswith("error"))
        assert f"cannot write {out}.part-1: File too large" in line
        assert "Traceback" not in process.stderr
        assert process.status == 2
    assert not out.exists()
    said = run_python(["-m", "nemo_hybrid", *words(home, out)])[0].stdout
    made = int(re.search(r"(\d+) generated now", said)[1])
    assert 0 < made < len(NUMBERS)  # some lines were whole
    assert_alike(read_rows(out), read_rows(whole))


def test_no_process_tires_of_waiting_for_samples(whole: Path, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_python([UNEVEN, "late", *words(home, out)], size=2)
    assert_alike(read_rows(out), read_rows(whole))


def test_several_prompts_are_continued_one_after_the_other(home: Path, commands: Commands) -> None:
    given = ["generate", "--from", str(home / "model"), "--max_new_tokens", "4"]
    said = commands(*given, "--prompts", str(home / "prompts.jsonl"), "--slots", "2")
    assert said.status == 0
    alone = []
    for number, text in enumerate(RENDERED):
        if text is not None:
            (answer,) = [commands(*given, "--prompt", text).out]
            alone.append(f"--- {number}\n{answer.removeprefix(text)}")
    assert len(alone) == 3
    assert [part for part in alone if part not in said.out] == []
    assert [line for line in said.out.splitlines() if line.startswith("--- ")] == [
        f"--- {number}" for number in range(4)
    ]


def test_drafts_change_no_text_at_temperature_0(home: Path, commands: Commands) -> None:
    given = ["generate", "--max_new_tokens", "12", "--prompt", "a b"]
    plain = commands(*given, "--from", home / "model")
    drafted = commands(*given, "--from", home / "model", "--speculate", "3")
    assert (plain.status, drafted.status, drafted.out) == (0, 0, plain.out)
    assert re.search(r"^\[\d+ tokens in [\d.]+ s, [1-4]\.\d\d per pass\]$", drafted.err)
    assert "per pass" not in plain.err
    refused = commands(*given, "--from", home / "bare", "--speculate", "3")
    assert refused.err == (f"error: {home / 'bare'} has no MTP block that could draft tokens\n")


def test_without_a_tokenizer_ids_are_answered_in_ids(
    home: Path, commands: Commands, tmp_path: Path
) -> None:
    write_rows(tmp_path / "ids.jsonl", [{"input_ids": [9, 8]}])
    given = ["--from", str(home / "bare"), "--max_new_tokens", "3"]
    out = tmp_path / "out.jsonl"
    assert commands("rollout", *given, "--data", tmp_path / "ids.jsonl", "--out", out,
                    "--temperature", "0").status == 0  # fmt: skip
    (row,) = read_rows(out)
    assert row["text"] is None
    said = commands("generate", *given, "--prompts", tmp_path / "ids.jsonl")
    stopped = row["ended"] == "stop"
    shown = row["ids"][: len(row["ids"]) - stopped]
    assert said.out == f"--- 0\n{''.join(f'{token} ' for token in shown)}\n"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"input_ids": []}, "the prompt is empty"),
        ({"prompt": []}, "the messages are no list, or an empty one"),
        ({"input_ids": [1, 260]}, "token 260, beyond the model's vocab_size 260"),
        ({"input_ids": [-1]}, "token -1, below 0"),
        ({"input_ids": [1.5]}, "input_ids is no list of whole numbers"),
        ({"input_ids": [3] * 56}, r"has 56 tokens; with 5 new ones .* exceeds the 60"),
        ({"prompt": 3}, "prompt is not text"),
        ({"prompt": "\ud800"}, "prompt holds half a surrogate pair"),
        ({"text": "a"}, "one of the fields prompt, messages, input_ids, this has text"),
        ({"prompt": "a", "input_ids": [1]}, "this has prompt and input_ids"),
        ({"prompt": "a", "tools": [{"name": "t"}]}, "tools: conversations alone have it"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "assistant must not be the first"),
        ({"messages": [{"role": "system", "content": "a"}]}, "nothing is to be answered"),
        ({"messages": [{"role": "user", "content": "<s>"}]}, "the text holds <s>"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"moood": 1}},
            "chat_template_kwargs: the chat template takes no moood",
        ),
        ({"prompt": "a", "id": 1.5}, "the id 1.5 is neither"),
        ({"prompt": "a", "id": 0}, "two prompts have the id 0"),
        ([1], "a JSON array, not an object"),
    ],
)
def test_a_prompt_that_is_none_is_named(
    row: object, why: str, home: Path, commands: Commands, tmp_path: Path
) -> None:
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "good"}, row])
    given = words(home, tmp_path / "out.jsonl")
    given[given.index("--data") + 1] = str(tmp_path / "bad.jsonl")
    said = commands(*given)
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'bad.jsonl'} line 2: ")
    assert re.search(why, line), line
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_files_of_others_are_left_alone(
    whole: Path, home: Path, commands: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"

    def refused(why: str, *more: str, at: Path = out) -> None:
        before = {p.name: p.read_bytes() for p in at.parent.glob("*")}
        said = commands(*words(home, at, *more))
        assert (said.status, why in said.err) == (2, True), said.err
        assert len(said.err.splitlines()) == 1
        assert {p.name: p.read_bytes() for p in at.parent.glob("*")} == before

    refused("seed is 7 there, 8 here; name another --out", "--seed", "8", at=whole)
    refused("samples is 3 there, 2 here", "--samples", "2", at=whole)
    refused("ssm_cache is float32 there, stochastic here", "--ssm_cache", "float16", at=whole)
    refused("--ep 2 does not divide the number of processes, 1", "--ep", "2")
    out.write_text("mine")
    refused(f"{out} exists already, of another run")
    refused(
        f"{out} exists already, of another run", "--from", str(home)
    )  # no model is looked for yet
    out.unlink()
    part = Path(f"{out}.part-0")
    part.write_text("{}\n")
    refused(f"{part} exists already, of another run")
    Path(f"{out}.run.json").write_text(Path(f"{whole}.run.json").read_text())
    refused(f"{part} is damaged at byte 0: remove it")
    assert commands(*words(home, Path("."))).err == "error: --out: '.' names no file\n"
    assert commands(*words(home, "")).err == "error: --out: '' names no file\n"
    assert commands(*words(home, tmp_path)).err == (
        f"error: --out: {tmp_path} is a directory: name a file\n"
    )
    refused("is no directory, so", at=tmp_path / "gone" / "out.jsonl")
    other = tmp_path / "other.jsonl"
    about = Path(f"{other}.run.json")
    about.write_text(Path(f"{whole}.run.json").read_text())
    with about.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused(f"another process is writing {other}: wait for it", at=other)
