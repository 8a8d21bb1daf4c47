"""A small synthetic corpus, the same on every machine, and a model small enough to learn it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from nemo_hybrid.data.store import HELDOUT, TRAIN, Store, StoreWriter
from nemo_hybrid.files import hash_file

VOCABULARY = 96
EOS = 2
FIRST_WORD = 3
TINY_MODEL: dict[str, Any] = {
    "pattern": "ME*E-M",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 48,
    "mtp_pattern": "*E",
    "mtp_num_depths": 2,
    # Larger than usual: with tiny weights a broken router or scan would hardly change the loss.
    "initializer_range": 0.15,
}
ALL_EXPERTS = {"num_experts_per_tok": TINY_MODEL["n_routed_experts"]}
"""Where two layouts or implementations are compared: rounding must not choose between experts."""


def write_corpus(out: Path, seed: int = 0, documents: int = 600, heldout: int = 80) -> Path:
    """Write a token store with a tokenizer below ``out``; return ``out``.

    Documents have 4 to 60 words. Every word has a favourite successor, taken three times out of
    four, so that the next words are learnable at all depths, but not completely. Drawn with
    ``random.Random.random`` alone, whose stream Python promises never to change.
    """
    draw = random.Random(seed).random
    out.mkdir(parents=True)
    words = VOCABULARY - FIRST_WORD
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"w{i}": FIRST_WORD + i for i in range(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    successor = sorted(range(words), key=lambda _: draw())
    for split, count in ((TRAIN, documents), (HELDOUT, heldout)):
        writer = StoreWriter(
            out / split,
            vocab_size=VOCABULARY,
            eos_id=EOS,
            tokenizer_sha256=hash_file(out / "tokenizer.json"),
        )
        for _ in range(count):
            word, document = int(draw() * words), []
            for _ in range(4 + int(draw() * 57)):
                document.append(FIRST_WORD + word)
                word = successor[word] if draw() < 0.75 else int(draw() * words)
            writer.add(np.array([*document, EOS]))
        writer.finish({"paths": ["synthetic"]})
        Store.open(out / split)
    return out


def flip_byte(path: Path, place: int) -> None:
    """Damage one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))
