"""generate: the prompt is read as transformers reads it, and the text comes out whole."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from nemo_hybrid import HybridConfig, HybridLM
from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.commands.generate import GenerateOptions, generate_command
from nemo_hybrid.data.tokenizer import train_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.batched import Generator, Request, Rollout


def answers(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> list[list[int]]:
    """Have every model say these tokens, one after the other; the list is of what it is asked."""
    asked: list[list[int]] = []

    def fixed(
        self: Generator, requests: Iterable[Request], watch: Callable[[Rollout], None]
    ) -> Iterator[Rollout]:
        for request in requests:
            asked.append(list(request.ids))
            rollout = Rollout(request, 0)
            for token in ids:
                rollout.ids.append(token)
                watch(rollout)
            yield rollout

    monkeypatch.setattr(Generator, "run", fixed)
    return asked


def test_text_in_and_text_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(["a b"], 259)
    HybridLM(
        HybridConfig(pattern="-", vocab_size=300, hidden_size=8, intermediate_size=8,
                     mtp_num_depths=0)
    ).save_hf(str(tmp_path / "model"))  # fmt: skip
    for name, data in tokenizer.files.items():
        (tmp_path / "model" / name).write_bytes(data)
    (answer,) = tokenizer.encode([" é </s>\U0001f600"])
    prompts = answers(monkeypatch, answer[:-1].tolist())
    generate_command(GenerateOptions(str(tmp_path / "model"), "a </s> b"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert prompts[0] == theirs("a </s> b")["input_ids"]
    assert tokenizer.eos_id in prompts[0]
    shown = capsys.readouterr().out
    assert shown.rstrip("\ufffd\n") == "a </s> b é </s>"
    assert shown.endswith("\ufffd\n")


def test_what_ends_a_text(tmp_path: Path) -> None:
    """generation_config.json before config.json before the default."""
    assert read_companions(tmp_path).stops(2) == [2]
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_companions(tmp_path).stops(2) == [5, 6]
    (tmp_path / "generation_config.json").write_text('{"temperature": 1.0}')
    assert read_companions(tmp_path).stops(2) == [5, 6]
    for value, ids in (("7", [7]), ("[7, 8]", [7, 8])):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
        assert read_companions(tmp_path).stops(2) == ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError, match="eos_token_id"):
        read_companions(tmp_path).stops(2)


def test_chat_asks_with_the_template_and_prints_the_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(["a b"], 259)
    HybridLM(
        HybridConfig(pattern="-", vocab_size=300, hidden_size=8, intermediate_size=8,
                     mtp_num_depths=0)
    ).save_hf(str(tmp_path / "model"))  # fmt: skip
    for name, data in tokenizer.files.items():
        (tmp_path / "model" / name).write_bytes(data)
    (answer,) = tokenizer.encode(["yes"])
    prompts = answers(monkeypatch, answer.tolist())
    options = GenerateOptions(str(tmp_path / "model"), "a b?", chat=True)
    with pytest.raises(UserError, match="has no chat template"):
        generate_command(options)
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token ~ 'A:' }}{% endif %}"
    )
    generate_command(options)
    expected = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(
        [{"role": "user", "content": "a b?"}], add_generation_prompt=True, return_dict=False
    )
    assert prompts[0] == expected
    assert expected[0] == 1
    assert expected.count(2) == 1
    assert capsys.readouterr().out == "yes\n"
    with pytest.raises(UserError, match=r"--prompt: the text holds </s>"):
        generate_command(GenerateOptions(str(tmp_path / "model"), "a </s>", chat=True))


def test_a_token_that_the_model_has_no_row_for_is_named(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b"], 259)
    HybridLM(
        HybridConfig(pattern="-", vocab_size=259, hidden_size=8, intermediate_size=8,
                     mtp_num_depths=0)
    ).save_hf(str(tmp_path))  # fmt: skip
    for name, data in tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 259}')
    with pytest.raises(UserError, match=r"token 259 \('<tool>'\), beyond the model"):
        generate_command(GenerateOptions(str(tmp_path), "a <tool>"))
