"""Stores made directly from token lists, and directories with a tokenizer for conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from helpers.preparing import write_folder
from nemo_hybrid.data.store import Store, StoreWriter
from nemo_hybrid.data.tokenizer import TextTokenizer, train_tokenizer

MakeStore = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """in/ with one file of each kind, some of them nested; 40 documents in all."""
    return write_folder(tmp_path / "in")


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(name, documents, **options): writes OUT/name, returns its path. Documents are
    lists of ids that end with eos (2)."""

    def make(
        name: str,
        documents: list[list[int]],
        vocab_size: int = 100,
        shard_tokens: int = 7,
        tokenizer: bytes = b"tokenizer",
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "tokenizer.json").write_bytes(tokenizer)
        writer = StoreWriter(
            path,
            vocab_size=vocab_size,
            eos_id=2,
            tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
            shard_tokens=shard_tokens,
        )
        for document in documents:
            writer.add(np.array(document))
        writer.finish({"paths": ["test"]})
        Store.open(path)
        return path

    return make


CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
"""The plainest template, and the default of make_model."""
CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<tool_list>")  # fmt: skip
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@pytest.fixture(scope="session")
def chat_tokenizer() -> TextTokenizer:
    """300 entries and the tokens of chat templates, of which tags are not special."""
    made = train_tokenizer(["the quick brown fox says hello to the lazy dogs. \n\n2 + 2 = 4"], 300)
    made.tokenizer.add_special_tokens(list(CONTROL))
    made.tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return replace(made, files={**made.files, "tokenizer.json": made.tokenizer.to_str().encode()})


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path, chat_tokenizer: TextTokenizer) -> MakeModel:
    """make_model(template): a directory with a tokenizer and a chat template (None: without)."""

    def make(template: str | None = CHATML, name: str = "model") -> Path:
        path = tmp_path / name
        path.mkdir()
        for file, content in chat_tokenizer.files.items():
            (path / file).write_bytes(content)
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return path

    return make
