"""Tokens declared outside tokenizer.json: ids are those that transformers gives."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.loader import require_tokenizer
from nemo_hybrid.data.packing import open_stores
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.data.store import Store
from nemo_hybrid.data.tokenizer import load_tokenizer, tokenizer_sha256, train_tokenizer
from nemo_hybrid.errors import UserError

Files = dict[str, Any]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = {"eos_token": "</s>", "bos_token": "<s>"}
TEXTS = (
    "a<|im_start|>user\nhi  <|im_end|> <tool>x</tool>",
    "A </S> <TOOL> b<tool >ab<tool>ab <tool> <|img|><|aud|>",
    "word<word>wording keyword word <unk><mask> [PAD]",
    " <|im_end|>  <|im_end|>",
    "",
)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **plain, "special": True, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, **flags)}


CHATML = {"300": token("<|im_end|>"), "7": token("<|im_start|>")}
STRIPS = {
    "400": token("<|im_end|>", lstrip=True),
    "401": token("<tool>", rstrip=True, normalized=True, special=False),
    "402": token("word", single_word=True, special=False),
    "403": token("</s>", rstrip=True),
}
LAYOUTS: dict[str, Files] = {
    "nothing": {},
    "decoder": {CONFIG: {"added_tokens_decoder": CHATML}},
    "flags": {CONFIG: {"added_tokens_decoder": STRIPS}},
    "not special, but named": {
        CONFIG: {
            "added_tokens_decoder": {"9": token("<mask>", special=False, normalized=True)},
            "mask_token": "<mask>",
        }
    },
    "additional": {CONFIG: {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    "of a model": {CONFIG: {"model_specific_special_tokens": {"image_token": "<|img|>"}}},
    "extra list": {CONFIG: {"extra_special_tokens": ["<|im_end|>", typed("<tool>", lstrip=True)]}},
    "extra dict": {CONFIG: {"extra_special_tokens": {"image_token": "<|img|>", "a": "<|aud|>"}}},
    "extra before additional": {
        CONFIG: {"additional_special_tokens": ["<tool>"], "extra_special_tokens": ["</tool>"]}
    },
    "named": {CONFIG: {"pad_token": "[PAD]", "unk_token": "<unk>", "cls_token": None}},
    "typed": {CONFIG: {"pad_token": typed("[PAD]", lstrip=True), "eos_token": typed("<|im_end|>")}},
    "own names": {
        CONFIG: {
            "aud_token": typed("<|aud|>"),
            "image_token": "<|img|>",
            "extra_special_tokens": {"tool_token": "<tool>"},
        },
        MAP: {"end_token": "</tool>"},
    },
    "map": {MAP: {"eos_token": token("<|im_end|>", lstrip=True), "pad_token": "[PAD]"}},
    "map's list": {MAP: {"additional_special_tokens": ["<tool>", "</tool>"]}},
    "map's list goes behind the config's": {
        CONFIG: {"additional_special_tokens": ["<|im_end|>"]},
        MAP: {"extra_special_tokens": ["<tool>", "<|im_end|>"]},
    },
    "map's older list beside the config's": {
        CONFIG: {"extra_special_tokens": ["<|im_end|>"]},
        MAP: {"additional_special_tokens": ["<tool>"]},
    },
    "map does not count": {
        CONFIG: {"added_tokens_decoder": CHATML},
        MAP: {"pad_token": "[PAD]", "eos_token": "<tool>"},
    },
    "added": {ADDED: {"<tool>": 311, "</tool>": 310, "<|im_end|>": 999}},
    "added, some special": {
        CONFIG: {"pad_token": "<tool>", "extra_special_tokens": ["<|im_end|>"]},
        ADDED: {"<tool>": 310, "</tool>": 311, "<|im_end|>": 312},
    },
    "added, ids taken": {ADDED: {"</s>": 2, "<tool>": 1, "<s>": 310}},
    "known, but not special": {
        CONFIG: {"extra_special_tokens": ["</tool>"], "tool_token": "</tool>"}
    },
    "twice": {
        CONFIG: {"extra_special_tokens": ["<|im_end|>", "<|im_end|>"], "pad_token": "<|im_end|>"},
        ADDED: {"<|im_end|>": 310},
    },
    "in the vocabulary": {CONFIG: {"extra_special_tokens": ["word", "a"]}},
    "split": {CONFIG: {"added_tokens_decoder": CHATML, "split_special_tokens": True}},
}


@cache
def tokenizer_json(kind: str) -> str:
    words = ["some words of a keyword, wording the word"]
    tokenizer = Tokenizer.from_str(train_tokenizer(words, 290).files["tokenizer.json"].decode())
    if kind == "lower":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    if kind in ("bos", "both"):
        single = "<s> $A" + (" </s>" if kind == "both" else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if kind == "longer":
        tokenizer.add_tokens([AddedToken("</tool>", special=False, normalized=False)])
    return tokenizer.to_str()


def write(out: Path, kind: str, files: Files) -> Path:
    out.mkdir()
    (out / "tokenizer.json").write_text(tokenizer_json(kind))
    for name, content in {CONFIG: {}, **files}.items():
        (out / name).write_text(json.dumps((NAMES if name == CONFIG else {}) | content))
    return out


def check(directory: Path, kind: str) -> PreTrainedTokenizerBase:
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.named_tokens == theirs.special_tokens_map
    for text in TEXTS:
        assert ours.encode_chat(text)[0].tolist() == theirs.encode(text, add_special_tokens=False)
        expected = theirs(text)["input_ids"]
        if kind == "both":  # put behind what goes on
            assert expected.pop() == 2
        assert ours.encode_prompt(text).tolist() == expected
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode([text], opened=False)[0].tolist() == plain
    return theirs


@pytest.mark.parametrize("kind", ["plain", "lower", "bos", "both", "longer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str, kind: str) -> None:
    check(write(tmp_path / "given", kind, LAYOUTS[layout]), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_stay_where_the_files_are_written_again(tmp_path: Path, layout: str) -> None:
    """For both readers; and what declares nothing keeps its bytes, and so its stores."""
    directory, saved = write(tmp_path / "given", "plain", LAYOUTS[layout]), tmp_path / "saved"
    ours, given = load_tokenizer(directory), (directory / "tokenizer.json").read_bytes()
    assert (ours.files["tokenizer.json"] == given) == (layout in ("nothing", "added, ids taken"))
    saved.mkdir()
    for name, content in ours.files.items():
        (saved / name).write_bytes(content)
    assert load_tokenizer(saved).files == ours.files
    assert ours.tokenizer.get_vocab() == check(saved, "plain").get_vocab()
    assert tokenizer_sha256(directory) == tokenizer_sha256(saved) == ours.sha256


def test_tokens_that_transformers_cannot_read_are_tokens(tmp_path: Path) -> None:
    """A list of objects in the older files, as transformers 4 wrote it."""
    older = {MAP: {"additional_special_tokens": [token("<tool>"), "</tool>"]}}
    ours = load_tokenizer(write(tmp_path / "given", "plain", older))
    assert ours.encode_chat("<tool></tool>")[0].tolist() == [280, 281]


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"added_tokens_decoder": {"x": token("<tool>")}}},
        {CONFIG: {"added_tokens_decoder": {"300": 5}}},
        {CONFIG: {"extra_special_tokens": ["a", 5]}},
        {CONFIG: {"extra_special_tokens": "abc"}},
        {CONFIG: {"pad_token": 5}},
        {CONFIG: {"extra_special_tokens": {"image_token": ["a"]}}},
        {CONFIG: {"eos_token": {"text": "</s>"}}},
        {ADDED: {"a": "b"}},
        {MAP: {"eos_token": token("<x>") | {"lstrip": "yes"}}},
    ],
)
def test_what_is_no_token_is_refused(tmp_path: Path, files: Files) -> None:
    with pytest.raises(UserError, match="given declares what is no token in"):
        load_tokenizer(write(tmp_path / "given", "plain", files))


def test_a_store_made_without_a_token_is_not_taken_for_one_with_it(tmp_path: Path) -> None:
    """Two tokenizers whose tokenizer.json is the same one."""
    (tmp_path / "text.txt").write_text("a <tool> b")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "a <tool>", "completion": "b"}))
    lists = {"plain": {}, "other": {CONFIG: {"additional_special_tokens": ["<tool>"]}}}
    stores = {}
    for name, files in lists.items():
        directory = write(tmp_path / name, "plain", files)
        texts, samples = tmp_path / f"{name}-texts", tmp_path / f"{name}-samples"
        prepare(texts, [str(tmp_path / "text.txt")], tokenizer=str(directory), heldout=0.0)
        prepare_samples(SampleOptions(heldout=0.0), [chats], directory, samples, seed=0)
        stores[name] = [Store.open(texts / "train"), open_stores(samples)[0]]
    for name, made in stores.items():
        other = next(key for key in lists if key != name)
        for store in made:
            rows: Any = SimpleNamespace(
                tokenizer_sha256=store.info.tokenizer_sha256, tokenizer_dir=store.tokenizer_dir
            )
            require_tokenizer(rows, tmp_path / name)
            require_tokenizer(rows, store.tokenizer_dir)
            with pytest.raises(UserError, match="made with another tokenizer"):
                require_tokenizer(rows, tmp_path / other)
            assert AutoTokenizer.from_pretrained(store.tokenizer_dir).get_vocab() == (
                AutoTokenizer.from_pretrained(tmp_path / name).get_vocab()
            )


def test_texts_begin_as_the_tokenizer_begins_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A document, a text to learn and a prompt; not what goes on with one. It is said once."""
    directory = write(tmp_path / "bos", "both", {})
    (tmp_path / "text.txt").write_text("words")
    records = [
        {"text": "words"},
        {"prompt": "so", "completion": "me"},
        {"prompt": "", "completion": "x"},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    prepare(tmp_path / "a", [str(tmp_path / "text.txt")], tokenizer=str(directory), heldout=0.0)
    assert capsys.readouterr().err.count("every text begins with <s>") == 1
    options = SampleOptions(heldout=0.0)
    prepare_samples(options, [tmp_path / "r.jsonl"], directory, tmp_path / "b", seed=0)
    assert capsys.readouterr().err.count("every text begins with <s>") == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    words = tokenizer("words")["input_ids"]
    assert (words[0], words[-1]) == (1, 2)
    documents = Store.open(tmp_path / "a" / "train")
    assert documents.read(0, len(documents)).tolist() == words
    samples = open_stores(tmp_path / "b")[0]
    assert [samples.sample(i)[0].tolist() for i in range(3)] == [
        words,
        [*tokenizer("so")["input_ids"][:-1], *tokenizer("me")["input_ids"][1:]],
        tokenizer("x")["input_ids"],
    ]
