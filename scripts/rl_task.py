#!/usr/bin/env python3
"""Make a task that a model of 0.3 million parameters can learn, for configs/run/rl_tiny_cpu.yaml.

    python scripts/rl_task.py DIR

DIR/base is a model with new weights; answers.jsonl has answers to learn from first, of which a
share is wrong; train.jsonl and heldout.jsonl are prompts with what judges their answers: digits
that are to be sorted, or reversed. No held-out prompt is among the others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

WRONG = 0.6
"""Share of the answers in which two digits are exchanged."""
SHAPE = dict(
    pattern="M*EM*E", vocab_size=259, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, moe_latent_size=32,
    moe_shared_expert_intermediate_size=64, max_position_embeddings=256, mtp_pattern="*E",
    mtp_num_depths=1,
)  # fmt: skip


def answer(task: str, digits: str) -> str:
    return "".join(sorted(digits)) if task == "sort" else digits[::-1]


def draw(rng: random.Random, tasks: Sequence[str]) -> tuple[str, str]:
    return rng.choice(tasks), "".join(rng.choices("0123456789", k=rng.randint(4, 6)))


def disturbed(rng: random.Random, text: str) -> str:
    letters, (i, j) = list(text), rng.sample(range(len(text)), 2)
    letters[i], letters[j] = letters[j], letters[i]
    return "".join(letters)


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(
    out: Path, tasks: Sequence[str], answers: int, prompts: int, heldout: int, seed: int,
    wrong: float,
) -> None:  # fmt: skip
    from nemo_hybrid.config.hf import HybridConfig
    from nemo_hybrid.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
    from nemo_hybrid.hub import HybridLM

    tokenizer = train_tokenizer(["0123456789"], SMALLEST_VOCABULARY)
    base = out / "base"
    HybridLM(HybridConfig(**SHAPE), seed=seed).save_hf(str(base))
    for name, content in tokenizer.files.items():
        (base / name).write_bytes(content)
    rng = random.Random(seed)
    held = sorted({draw(rng, tasks) for _ in range(heldout)})
    rows = []
    for _ in range(answers):
        task, digits = draw(rng, tasks)
        said = answer(task, digits)
        if rng.random() < wrong:
            said = disturbed(rng, said)
        if (task, digits) not in held:
            rows.append({"prompt": f"{task} {digits}=", "completion": said})
    write(out / "answers.jsonl", rows)
    asked = sorted({draw(rng, tasks) for _ in range(prompts)} - set(held))
    for name, some in (("train", asked), ("heldout", held)):
        write(
            out / f"{name}.jsonl",
            [{"prompt": f"{t} {d}=", "environment": t, "answer": answer(t, d)} for t, d in some],
        )


def main() -> None:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default="sort,reverse")
    parser.add_argument("--answers", type=int, default=16000)
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrong", type=float, default=WRONG)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    make(
        options.out, options.tasks.split(","), options.answers, options.prompts, options.heldout,
        options.seed, options.wrong,
    )  # fmt: skip


if __name__ == "__main__":
    main()
