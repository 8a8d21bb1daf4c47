#!/usr/bin/env bash
# Reinforcement learning on two CPU cores, for three seeds (--quick: one, and fewer steps): a model
# learns to sort and reverse digits from answers of which many are wrong, then from rewards (and, to
# compare, from noise), then from two teachers of one task each; and its MTP block is healed.
# Leaves runs/rl_tutorial/summary.json and plots.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$ROOT/scripts/environment.sh"
cd "$ROOT"
make_environment
PATH="$VENV/bin:$PATH"
export HF_HUB_OFFLINE=1
rm -rf runs/rl_tutorial
python scripts/rl_tutorial.py "$@"
