#!/usr/bin/env bash
# From a fresh clone to a trained tiny model on a CPU: install, prepare the default corpus,
# pre-train with two processes, evaluate, generate. A second run reuses what is there.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$ROOT/scripts/environment.sh"
cd "$ROOT"

CONFIG=configs/run/pretrain_tiny_cpu.yaml
RUN_DIR=runs/quickstart
DATA=data/python-stdlib
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() { printf '\n== %s\n' "$*"; }

SECONDS=0
step 'Setting up'
make_environment
set_up_s=$SECONDS
PATH="$VENV/bin:$PATH"

SECONDS=0
step 'Preparing the corpus'
python -m nemo_hybrid prepare --out "$DATA"
prepare_s=$SECONDS

SECONDS=0
step 'Pre-training with two processes'
python -m torch.distributed.run --standalone --nproc_per_node=2 -m nemo_hybrid pretrain \
    --config "$CONFIG" --parallel.ep 2 --run_dir "$RUN_DIR"
train_s=$SECONDS

SECONDS=0
step 'Evaluating on held-out data'
python -m nemo_hybrid eval --from "$RUN_DIR" --data "$DATA"

step 'What it learned'
python scripts/learning_report.py "$RUN_DIR" || echo 'A bar was missed; on a slower or other machine that can happen.'

step 'Generating'
python -m nemo_hybrid generate --from "$RUN_DIR" --prompt 'def ' --temperature 0.8
use_s=$SECONDS

cat <<EOF

== Done
set up ${set_up_s} s, corpus ${prepare_s} s, training ${train_s} s, evaluation and sample ${use_s} s

  checkpoints   $RUN_DIR/checkpoints
  metrics       $RUN_DIR/metrics.jsonl   (one JSON object per step)
  TensorBoard   $RUN_DIR/tensorboard     (.venv/bin/tensorboard --logdir $RUN_DIR/tensorboard)
  plots         $RUN_DIR/plots

What next:
  source .venv/bin/activate
  nemo-hybrid generate --from $RUN_DIR --prompt 'class ' --temperature 0.8 --top_p 0.95
  nemo-hybrid doctor                          # what is installed, which path each operation takes
  nemo-hybrid prepare YOUR_TEXTS --out data/yours
  python -m torch.distributed.run --standalone --nproc_per_node=2 -m nemo_hybrid pretrain \\
    --config $CONFIG --data.path data/yours --run_dir runs/yours --parallel.ep 2
EOF
