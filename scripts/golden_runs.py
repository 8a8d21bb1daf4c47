"""What `golden.py` has both revisions do: tiny runs, by the command line alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STEPS, HALF = 20, 10
# train.deterministic stays off: a CPU is deterministic without it, and it makes steps several times
# slower (torch then fills the buckets that DeepSpeed allocates, large ones for any model).
CONFIG = f"""\
model:
  {{pattern: ME*E, vocab_size: 416, hidden_size: 32, num_attention_heads: 4, head_dim: 16,
  mamba_num_heads: 16, mamba_head_dim: 4, ssm_state_size: 16, chunk_size: 16, n_routed_experts: 8,
  num_experts_per_tok: 2, moe_intermediate_size: 32, moe_latent_size: 32,
  moe_shared_expert_intermediate_size: 32, mtp_num_depths: 2}}
data: {{sequence_length: 64}}
train:
  {{max_steps: {STEPS}, global_batch_size: 8, micro_batch_size: 4, lr: 0.005, schedule: wsd,
  warmup_steps: 3, decay_steps: 6, aux_loss_weight: 0.001, eval_every: {HALF}, eval_sequences: 8}}
checkpoint: {{every: {HALF}}}
"""
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
HERE = "/proc/self/cwd"
"""The directory of one side, by a name that is the same on both: runs record absolute paths."""
PRETRAIN = f"pretrain --config {{inputs}}/run.yaml --data.path {HERE}/store --run_dir {HERE}"
FINETUNE = (
    f"finetune --model.from_hf {HERE}/import --data.path {HERE}/samples "
    f"--data.sequence_length 128 --train.max_steps {STEPS} --train.global_batch_size 4 "
    "--train.micro_batch_size 2 --train.lr 1e-3 --train.warmup_steps 3 --train.eval_sequences 8 "
    f"--run_dir {HERE}"
)
EXPORT = "export --from import --calibration store --calibration_tokens 512"


class Work(NamedTuple):
    """A command in the directory of one side, and what it leaves: a directory of its name."""

    words: str
    needs: str = ""
    processes: int = 1
    copies: str = ""
    """The run whose directory it begins with, cut back to step HALF."""


WORKS = {
    "store": Work("prepare {inputs}/corpus.jsonl --vocab_size 400 --out store"),
    "samples": Work(
        "prepare {inputs}/chats.jsonl --for finetune --tokenizer store --sequence_length 128 "
        "--chat_template {inputs}/template.jinja --out samples",
        "store",
    ),
    "pretrain": Work(f"{PRETRAIN}/pretrain", "store"),
    "ep2": Work(
        f"{PRETRAIN}/ep2 --parallel.ep 2 --parallel.zero 2 --train.micro_batch_size 2 "
        "--train.recompute Me --data.workers 1",
        "store",
        processes=2,
    ),
    "nvfp4": Work(
        f"{PRETRAIN}/nvfp4 --precision.recipe nvfp4_super --precision.health_every 5", "store"
    ),
    "resumed": Work(f"{PRETRAIN}/resumed", "pretrain", copies="pretrain"),
    # What follows starts from here: a checkpoint's manifest would tell of the run's options too.
    "import": Work(f"import pretrain/checkpoints/step_{STEPS:08d} --out import", "pretrain"),
    "lora": Work(
        f"{FINETUNE}/lora --lora.rank 4 --lora.target_modules [q_proj,in_proj] "
        "--lora.target_parameters [experts.up_proj] --train.loss two_stage "
        f"--train.second_stage_step {HALF}",
        "samples import",
    ),
    "distill": Work(
        f"{FINETUNE}/distill --distill.preset conservative --distill.weight 0.7",
        "samples import",
    ),
    "export_nvfp4": Work(f"{EXPORT} --format nvfp4 --out export_nvfp4", "import"),
    "export_mixed": Work(f"{EXPORT} --format mixed --preset super --out export_mixed", "import"),
    "generate": Work("generate --from pretrain --prompt ab --max_new_tokens 40", "pretrain"),
}


def write_inputs(out: Path) -> None:
    """A corpus of a synthetic language, conversations in it, their template, a configuration."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(200)]

    def text(most: int) -> str:
        """Three words of four follow from the one before."""
        at, said = 0, []
        for _ in range(draw.randint(1, most)):
            at = (at * 7 + 3) % 200 if draw.random() < 0.75 else draw.randrange(200)
            said.append(words[at])
        return " ".join(said)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": text(10)}

    texts = [{"text": text(120)} for _ in range(900)]
    chats = [{"messages": [turn("user"), turn("assistant")]} for _ in range(300)]
    for name, records in (("corpus", texts), ("chats", chats)):
        (out / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (out / "template.jinja").write_text(TEMPLATE)
    (out / "run.yaml").write_text(CONFIG)


def with_needs(names: Sequence[str]) -> list[str]:
    """The works of these names and those that they need, in order."""
    wanted = set(names)
    for name in reversed(WORKS):
        wanted |= set(WORKS[name].needs.split()) if name in wanted else set()
    return [name for name in WORKS if name in wanted]
