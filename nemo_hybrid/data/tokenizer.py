"""Byte-level BPE: training one, and taking a Hugging Face tokenizer from a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.data.added_tokens import ADDED, CONFIG, MAP, add_declared, read_declared
from nemo_hybrid.data.store import TOKENIZER
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import json_bytes, parse_json, refuse_pointer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
"""Ids 0, 1, 2."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""All bytes and the special tokens: whatever the text, it can be encoded."""
_LONGEST_UNFINISHED = 16
CHAT_TEMPLATE = "chat_template.jinja"
_READ = (CONFIG, MAP, ADDED, CHAT_TEMPLATE)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the files that a Hugging Face directory of it needs."""

    tokenizer: Tokenizer
    vocab_size: int
    """Largest id plus one."""
    eos_id: int
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """Identity of the mapping from text to ids: the hash of tokenizer.json."""
        return hashlib.sha256(self.files[TOKENIZER]).hexdigest()

    def encode(self, texts: Sequence[str], *, opened: bool = True) -> list[NDArray[np.int64]]:
        """Token ids of each text, in which nothing becomes a special token; after the `opening`,
        unless ``opened`` is false: then it goes on with a text."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        start = self.opening if opened else self.opening[:0]
        return [np.append(start, np.array(e.ids, dtype=np.int64)) for e in encodings]

    @cached_property
    def opening(self) -> NDArray[np.int64]:
        """Ids that the tokenizer's post-processor puts before every text; mostly none, or one.

        What it puts behind a text is not ours: a prompt goes on, a document ends with eos_id.
        """
        encoding = self.tokenizer.encode("a")
        count = next((i for i, put in enumerate(encoding.special_tokens_mask) if not put), 0)
        return np.array(encoding.ids[:count], dtype=np.int64)

    def encode_prompt(self, text: str) -> NDArray[np.int64]:
        """Token ids [n] of a text that is to be continued, as transformers encodes it: special
        tokens that it spells are special tokens."""
        return np.append(self.opening, self.encode_chat(text)[0])

    def encode_chat(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids [n] of a rendered conversation, in which special tokens are special tokens, and
        the characters from and to which each reaches [n, 2]."""
        encoding = self._chat.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def _chat(self) -> Tokenizer:
        from tokenizers import Tokenizer

        # Post-processors add special tokens, which nobody asks for here, and trim white space off
        # the offsets.
        content = {**json.loads(self.files[TOKENIZER]), "post_processor": None}
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = json.loads(self.files.get(CONFIG, b"{}"))
        tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        return tokenizer

    @cached_property
    def added_tokens(self) -> dict[str, bool]:
        """Tokens that text is searched for before it is split, and whether they are special."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and others that the tokenizer's settings name."""
        declared = read_declared(self.files, Path())
        return {name: token.content for name, token in declared.named.items()}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class TextStream:
    """Text of a growing sequence of tokens, in pieces that never split a character.

    Each token costs the same, however many came before: only the latest ones are decoded again.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        # Some decoders treat the first token differently, so those shown last stay before it.
        self._shown: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; empty inside an unfinished character."""
        self._pending.append(token)
        text = self._text()
        # After this many tokens, the bytes are no character that is still to be finished.
        if text.endswith("\ufffd") and len(self._pending) < _LONGEST_UNFINISHED:
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """The text of an unfinished end: a replacement character for what is no UTF-8."""
        return self._text() if self._pending else ""

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._pending)[len(before) :]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train byte-level BPE with at most vocab_size entries (fewer if the text has fewer merges)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    return _wrap(
        tokenizer,
        eos_id=SPECIAL_TOKENS.index(eos),
        files={
            TOKENIZER: tokenizer.to_str().encode(),
            CONFIG: json.dumps(config, indent=2).encode(),
        },
    )


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small: a byte-level tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Take the tokenizer of a Hugging Face directory, or of its tokenizer.json. Its settings must
    name the eos token. Raises UserError.

    Tokens that stand in its other files alone are put into tokenizer.json.
    """
    directory = Path(path)
    if directory.name == TOKENIZER:
        directory = directory.parent
    tokenizer, files = _read(directory)
    eos = read_declared(files, directory).named.get("eos_token")
    eos_id = tokenizer.token_to_id(eos.content) if eos else None
    if eos_id is None:
        raise UserError(f"{directory / CONFIG} must name an eos_token: documents are ended with it")
    return _wrap(tokenizer, eos_id, files)


def tokenizer_sha256(directory: Path) -> str:
    """`TextTokenizer.sha256` of a directory's tokenizer, whether or not it names an eos token; of
    one that transformers cannot load the hash of its file. Raises UserError."""
    content = json_bytes(directory / TOKENIZER)
    if _has_added_tokens(content, directory):
        content = _read(directory)[1][TOKENIZER]
    return hashlib.sha256(content).hexdigest()


def _read(directory: Path) -> tuple[Tokenizer, dict[str, bytes]]:
    from tokenizers import Tokenizer

    name = directory / TOKENIZER
    try:
        there = [TOKENIZER, *(extra for extra in _READ if (directory / extra).is_file())]
        for file in there:
            refuse_pointer(directory / file)
        files = {file: (directory / file).read_bytes() for file in there}
    except OSError as e:
        raise UserError(
            f"cannot read the tokenizer {name}: {e.strerror}; name a directory with a Hugging Face "
            f"{TOKENIZER}"
        ) from e
    try:
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
    except Exception as e:  # tokenizers raises a bare Exception for whatever is wrong with it
        raise UserError(f"{name} is not a Hugging Face tokenizer: {e}") from e
    if not _has_added_tokens(files[TOKENIZER], directory):
        raise UserError(
            f"{name} has no list added_tokens, without which transformers cannot load it; save the "
            "tokenizer again with transformers' save_pretrained"
        )
    files[TOKENIZER] = add_declared(tokenizer, files, directory)
    files.pop(ADDED, None)
    return tokenizer, files


def _has_added_tokens(content: bytes, directory: Path) -> bool:
    return isinstance(parse_json(content, directory / TOKENIZER).get("added_tokens"), list)


def _wrap(tokenizer: Tokenizer, eos_id: int, files: dict[str, bytes]) -> TextTokenizer:
    # Text that happens to spell a special token is text, not the end of a document.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextTokenizer(tokenizer, vocab_size, eos_id, files)
