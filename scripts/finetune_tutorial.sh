#!/usr/bin/env bash
# Fine-tune the quick start's model on a CPU until it answers with cards; then teach the tuned model
# other cards with an adapter alone, and merge that. Held-out questions are scored before and after.
# Run scripts/quickstart.sh first. A second run reuses what is there.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$ROOT/scripts/environment.sh"
cd "$ROOT"

CONFIG=configs/run/finetune_tiny_cpu.yaml
BASE=runs/quickstart
CHATS=data/chats
HOME_CHATS=data/chats_home
FULL=runs/finetune_tiny_cpu
LORA=runs/finetune_tiny_lora
MERGED=runs/finetune_tiny_merged
ADAPTED='[in_proj, q_proj, k_proj, v_proj, o_proj, up_proj, down_proj]' # PEFT refuses out_proj
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() { printf '\n== %s\n' "$*"; }

finetune() {
    python -m torch.distributed.run --standalone --nproc_per_node=2 -m nemo_hybrid finetune \
        --config "$CONFIG" "$@"
}

score() { # model, conversations, and the least share of answers that are to be right
    local answers
    answers="$(mktemp -d)/answers.jsonl"
    python -m nemo_hybrid rollout --from "$1" --data "$2/questions.jsonl" --out "$answers" \
        --temperature 0 --max_new_tokens 64
    python -m nemo_hybrid eval --rollouts "$answers" --data "$2/questions.jsonl" --json |
        python -c 'import json, sys
share = json.load(sys.stdin)["pass_at"]["1"]
print(f"exact match: {share:.1%} of the answers")
sys.exit(share < float(sys.argv[1]))' "${3:-0}"
}

[[ -f "$BASE/checkpoints/latest" ]] ||
    fail "there is no trained model in $BASE: make it with bash scripts/quickstart.sh"
make_environment
PATH="$VENV/bin:$PATH"

step 'Making conversations'
python scripts/make_chats.py --out "$CHATS"
python scripts/make_chats.py --out "$HOME_CHATS" --card home

step 'What the model answers before'
score "$BASE" "$CHATS"

SECONDS=0
step 'Fine-tuning all weights with two processes'
finetune --run_dir "$FULL"
full_s=$SECONDS

step 'What it answers now'
score "$FULL/model" "$CHATS" 0.9 || missed=1

step 'What it answers where other cards are wanted'
score "$FULL/model" "$HOME_CHATS"

SECONDS=0
step 'Training an adapter beside frozen weights'
finetune --model.from_hf "$FULL/model" --run_dir "$LORA" --data.path "$HOME_CHATS/train.jsonl" \
    --data.heldout_path "$HOME_CHATS/heldout.jsonl" --lora.rank 16 \
    --lora.target_modules "$ADAPTED" --train.max_steps 120 --train.decay_steps 50 --train.lr 5e-3
lora_s=$SECONDS

step 'Merging the adapter'
[[ -f "$MERGED/config.json" ]] || python -m nemo_hybrid merge --from "$LORA" --out "$MERGED"
score "$MERGED" "$HOME_CHATS" 0.9 || missed=1

step 'Asking'
python -m nemo_hybrid generate --from "$MERGED" --chat true \
    --prompt 'I live in Soren. My name is Dalan Tener.'

[[ -z "${missed:-}" ]] || echo 'A score is below 90 %; on another machine that can happen.'
cat <<EOF

== Done
fine-tuning ${full_s} s, adapter ${lora_s} s

  fine-tuned model   $FULL/model      transformers and serving engines load it
  adapter            $LORA/model     PEFT loads it beside $FULL/model
  merged             $MERGED
  metrics            $FULL/metrics.jsonl, $LORA/metrics.jsonl
EOF
