#!/usr/bin/env bash
# Run a command on several nodes: sbatch scripts/slurm.sh COMMAND [OPTIONS], such as
#   sbatch --nodes=16 scripts/slurm.sh pretrain --config FILE --run_dir DIR [--KEY VALUE ...]
# Everything behind the script's name goes to `nemo-hybrid`. docs/multinode.md explains.
#
# Set these to your cluster; sbatch options of the same names win over them.
#SBATCH --job-name=nemo-hybrid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# 10 minutes before the time limit the agents get SIGUSR1: the run writes a checkpoint and ends.
#SBATCH --signal=USR1@600
# A job that is requeued, or submitted again with the same words, goes on from there.
#SBATCH --requeue
set -euo pipefail

case "${1-}" in
    '' | -*) echo "usage: sbatch $0 COMMAND [OPTIONS], such as: pretrain --config FILE" >&2; exit 2 ;;
esac

# Slurm runs a copy of this script, so the repository is where sbatch was called.
cd "$SLURM_SUBMIT_DIR"
# shellcheck source=/dev/null
[ ! -f .venv/bin/activate ] || source .venv/bin/activate

PROCESSES=${SLURM_GPUS_ON_NODE:-1}
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

# One agent per node; its options are those of torch 2.13. --kill-on-bad-exit: a node that fails ends
# the job instead of leaving the others waiting. --max-restarts: after a lost process all start again
# from the last checkpoint.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="$PROCESSES" \
    --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout=600 \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$FIRST_NODE:$PORT" \
    -m nemo_hybrid "$@"
