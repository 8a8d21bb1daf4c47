"""Tokenizers outside prepare: text that grows token by token, and files that transformers needs."""

import json
from pathlib import Path

import pytest

from nemo_hybrid.data.tokenizer import TextStream, TextTokenizer, load_tokenizer, train_tokenizer
from nemo_hybrid.errors import UserError

TEXT = "naïve 日本語 \U0001f600\U0001f680 a </s> b <s> ﬁn\n  x"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["plain words only, so that other characters are single bytes"], 270)


def test_pieces_make_the_text_and_split_no_character(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    (ids,) = tokenizer.encode([TEXT])
    pieces = [stream.add(int(i)) for i in ids]
    assert "".join(pieces) == TEXT == tokenizer.decode(ids)
    assert stream.finish() == ""
    assert len([p for p in pieces if p]) >= len(TEXT) - 12  # nothing waits longer than it must
    assert "\ufffd" not in "".join(pieces)


def test_an_unfinished_end_is_shown(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    (ids,) = tokenizer.encode(["ab\U0001f600"])
    shown = "".join(stream.add(int(i)) for i in ids[:-1])
    assert shown == "ab"
    assert set(stream.finish()) == {"\ufffd"}


def test_work_per_token_does_not_grow(tokenizer: TextTokenizer) -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int]) -> str:
            Counting.longest = max(Counting.longest, len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Counting())  # type: ignore[arg-type]
    half = int(tokenizer.encode(["\U0001f600"])[0][0])
    for token in [*tokenizer.encode(["word " * 50])[0], *[half] * 200]:
        stream.add(int(token))
    assert Counting.longest <= 40


def test_a_tokenizer_without_added_tokens_is_refused(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    for name, data in tokenizer.files.items():
        (tmp_path / name).write_bytes(data)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    del content["added_tokens"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="added_tokens"):
        load_tokenizer(tmp_path)
