#!/usr/bin/env bash
# A recipe on the nodes of a Slurm job, one rank a GPU, from a checkout that every node sees:
#   bash launch/install.sh       (on the login node)
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh RECIPE.yaml [a.b=value ...]
# Five minutes before the time limit the ranks save a checkpoint and leave; sent in again, the job
# goes on. Slurm starts the ranks itself: DeepSpeed's launcher would not pass its signals on.
#SBATCH --job-name=dskd
#SBATCH --exclusive
#SBATCH --signal=TERM@300
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
if [ ! -f "${1:-}" ] || [ ! -s .venv/installed ]; then
    echo "usage: sbatch ... launch/slurm.sh RECIPE.yaml [a.b=value ...], in a checkout with .venv" >&2
    exit 2
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export PATH="$PWD/.venv/bin:$PATH"
exec srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_SIZE=${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node}
    exec python -u dskd/train.py "$@"' dskd "$@"
