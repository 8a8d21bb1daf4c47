"""The fine-tuning tutorial: its conversations, its template, and how answers are scored."""

import json
import re
import subprocess
from pathlib import Path

import finetune_figures
import make_chats
import pytest

from helpers.processes import run_python
from nemo_hybrid import HybridConfig, HybridLM, cli
from nemo_hybrid.config.finetune import FinetuneConfig, SampleOptions
from nemo_hybrid.config.read import load_config
from nemo_hybrid.data.samples import SampleMaker
from nemo_hybrid.data.sources import BadRecord, find_sources
from nemo_hybrid.data.template import load_template, need_template
from nemo_hybrid.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "configs" / "chat_template.jinja"
EOS = 2
_NAME = re.compile(r"\b[A-Z][a-z]{3,}\b")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chats")
    assert make_chats.main(["--out", str(out), "--conversations", "300"]) == 0
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model that is never asked, and a tokenizer without a chat template."""
    out = tmp_path_factory.mktemp("base") / "model"
    shape = HybridConfig(
        pattern="-", vocab_size=300, hidden_size=8, intermediate_size=8, mtp_num_depths=0
    )
    HybridLM(shape).save_hf(str(out))
    for name, content in train_tokenizer(["first: last: city: user assistant"], 280).files.items():
        (out / name).write_bytes(content)
    return out


def read(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def names(messages: list[dict[str, str]], role: str) -> set[str]:
    found = {n for m in messages if m["role"] == role for n in _NAME.findall(m["content"])}
    return found - {"Write"}


def test_the_same_arguments_make_the_same_conversations() -> None:
    assert make_chats.make_chats(40, 1) == make_chats.make_chats(40, 1)
    assert make_chats.make_chats(40, 1) != make_chats.make_chats(40, 2)
    assert make_chats.main(["--out", "unused", "--conversations", "19"]) == 2


def test_cards_of_both_kinds_answer_the_same_questions() -> None:
    kinds = [make_chats.make_chats(20, 0, card)["train.jsonl"] for card in make_chats.CARDS]
    for person, home in zip(*map(str.splitlines, kinds), strict=True):
        for one, other in zip(*(json.loads(c)["messages"] for c in (person, home)), strict=True):
            assert (one == other) == (one["role"] != "assistant")
            if one != other:
                a, b = (
                    dict(line.split(": ") for line in m["content"].splitlines())
                    for m in (one, other)
                )
                assert (a["last"], a["first"], a["city"]) == (b["family"], b["name"], b["home"])


def test_held_out_names_are_new_and_answers_follow_from_the_questions(chats: Path) -> None:
    train, heldout = read(chats / "train.jsonl"), read(chats / "heldout.jsonl")
    assert (len(train), len(heldout)) == (300, 15)
    seen = [set[str]().union(*(names(m, "user") for m in part)) for part in (train, heldout)]
    assert min(map(len, seen)) > 40
    assert not seen[0] & seen[1]
    for messages in train + heldout:
        cards = [m["content"] for m in messages if m["role"] == "assistant"]
        assert all(re.fullmatch(r"last: \w+\nfirst: \w+\ncity: \w+", card) for card in cards)
        assert names(messages, "assistant") == names(messages, "user")
    lengths = {len(messages) for messages in train}
    assert lengths == {2, 3, 4, 5}  # with and without a system message and a second turn
    for change in make_chats.CHANGES.values():
        start = change.split("{")[0]
        assert any(m["content"].startswith(start) for chat in train for m in chat)


def test_every_answer_is_learnt_and_nothing_else(chats: Path, model: Path) -> None:
    maker = SampleMaker(SampleOptions(chat_template=str(TEMPLATE)), model, seed=0)
    conversations = read(chats / "heldout.jsonl")
    made = list(maker.read(find_sources([chats / "heldout.jsonl"]).sources))
    assert len(made) == len(conversations)
    for one, messages in zip(made, conversations, strict=True):
        assert not one.unusable
        (sample,) = one.samples
        assert maker.tokenizer.decode(sample.ids.tolist()) == "".join(
            f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages
        )
        answers = [f"{m['content']}</s>\n" for m in messages if m["role"] == "assistant"]
        assert maker.tokenizer.decode(sample.ids[sample.targets].tolist()) == "".join(answers)
        assert (sample.ids[sample.targets] == EOS).sum() == len(answers)


def test_the_template_refuses_roles_that_it_has_no_form_for(model: Path) -> None:
    tokenizer = SampleMaker(SampleOptions(), model, seed=0).tokenizer
    template = need_template(load_template(tokenizer, model, str(TEMPLATE)), model)
    with pytest.raises(BadRecord, match="knows no role tool"):
        template.render([{"role": "tool", "content": "x"}])


def test_questions_are_the_held_out_answers_as_the_template_asks_for_them(
    chats: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = SampleMaker(SampleOptions(), model, seed=0).tokenizer
    template = need_template(load_template(tokenizer, model, str(TEMPLATE)), model)
    wanted = [
        {
            "prompt": template.render(messages[:turn], add_generation_prompt=True),
            "answer": message["content"],
        }
        for messages in read(chats / "heldout.jsonl")
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    questions = chats / "questions.jsonl"
    assert [json.loads(line) for line in questions.read_text().splitlines()] == wanted

    samples = [
        {"prompt": number, "sample": 0, "text": row["answer"] if number else "another"}
        for number, row in enumerate(wanted)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    words = ["eval", "--rollouts", str(answers), "--data", str(questions), "--json"]
    assert cli.main(words) == 0
    share = json.loads(capsys.readouterr().out)["pass_at"]["1"]
    assert share == pytest.approx(1 - 1 / len(wanted))


def test_the_tutorial_runs_what_is_there() -> None:
    script = ROOT / "scripts" / "finetune_tutorial.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    for path in re.findall(r"(?:configs|scripts)/[\w./]+\w", text):
        assert (ROOT / path).is_file(), path
    words = ["--lora.rank", re.findall(r"--lora.rank (\d+)", text)[0]]
    for given in ([], words):
        config = load_config([ROOT / "configs/run/finetune_tiny_cpu.yaml"], given, FinetuneConfig)
        assert Path(str(config.data.path)) == ROOT / "data" / "chats" / "train.jsonl"


def test_packing_figures() -> None:
    found = finetune_figures.packing()
    sizes = finetune_figures.lengths(found["samples"], found["capacity"]).tolist()
    assert min(sizes) >= finetune_figures.SHORTEST
    assert found["tokens"] == sum(sizes)
    best, in_order, padded, single = found["slots"].values()
    assert single == len(sizes) * found["capacity"]
    batch = finetune_figures.BATCH
    assert padded == sum(max(sizes[i : i + batch]) * batch for i in range(0, len(sizes), batch))
    rows, room = 0, 0
    for size in sizes:
        rows, room = (rows, room - size) if size <= room else (rows + 1, found["capacity"] - size)
    assert in_order == rows * found["capacity"]
    assert sum(sizes) <= best < in_order
    assert found["efficiency"]["best fit"] == sum(sizes) / best > 0.95


@pytest.mark.sweep
def test_training_figures(tmp_path: Path) -> None:
    model, out = tmp_path / "model.yaml", tmp_path / "figures.json"
    model.write_text(
        "{pattern: '-', vocab_size: 64, hidden_size: 16, intermediate_size: 8, mtp_num_depths: 0}"
    )
    script = ROOT / "scripts" / "finetune_figures.py"
    words = ["--models", model, "--steps", "1", "--rank", "2", "--threads", "1", "--out", out]
    run_python([script, *words])
    full, adapter = json.loads(out.read_text())["training"]
    weights = 2 * 64 * 16 + 2 * 16 + 2 * 16 * 8
    assert (full["parameters"], full["trained"]) == (weights, weights)
    assert adapter["trained"] == adapter["parameters"] - weights == 2 * 2 * (16 + 8)
    for row in (full, adapter):
        assert row["tokens_per_s"] == pytest.approx(4 * 512 / row["seconds"][0])
        assert 0 < row["peak_mib_over_imports"] < row["peak_mib"]
