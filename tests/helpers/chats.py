"""Small conversations, and checkpoints to fine-tune on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from helpers.corpus import TINY_MODEL
from helpers.tiny_models import loud
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.tokenizer import train_tokenizer
from nemo_hybrid.hub import HybridLM

WORDS = ("ab", "cde", "fg", "hijk", "lm", "nop", "q", "rst", "uvw", "xyz")
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{{ m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '</s>\n' }}{% endif %}{% endfor %}"
)
"""The same, with transformers' marks around what assistants say."""


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """One or two turns of a few words; answers repeat some of the question's."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 2)):
            words = [draw.choice(WORDS) for _ in range(draw.randint(1, 9))]
            messages.append({"role": "user", "content": " ".join(words)})
            answer = words[:: draw.choice((1, 2))]
            messages.append({"role": "assistant", "content": ", ".join(answer)})
        made.append(messages)
    return made


def write_chats(path: Path, count: int, seed: int = 0) -> Path:
    lines = (json.dumps({"messages": messages}) for messages in conversations(count, seed))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_base(out: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Hugging Face directory with weights, tokenizer and chat template."""
    texts = [m["content"] for messages in conversations(50) for m in messages]
    tokenizer = train_tokenizer(texts, 280)
    shape = TINY_MODEL | {"vocab_size": 288, "chunk_size": 8} | changes
    loud(HybridLM(HybridConfig(**shape)), seed=3).to(dtype).save_hf(str(out))
    for name, content in tokenizer.files.items():
        (out / name).write_bytes(content)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def tune(base: Path, chats: Path, **sections: dict[str, Any]) -> FinetuneConfig:
    """A run over packs of 128 tokens; sections' options by name."""
    config = FinetuneConfig()
    given: dict[str, dict[str, Any]] = {
        "model": {"from_hf": str(base)},
        "data": {"path": str(chats), "sequence_length": 128, "heldout": 0.0},
        "train": {
            "max_steps": 3,
            "global_batch_size": 4,
            "lr": 1e-3,
            "eps": 1e-4,
            "warmup_steps": 0,
            "clip_grad_norm": 0.0,
            "eval_sequences": 0,
        },
        "precision": {"recipe": "fp32"},
    }
    for section in given.keys() | sections.keys():
        for name, value in (given.get(section, {}) | sections.get(section, {})).items():
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
    return config
