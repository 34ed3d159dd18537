#!/bin/bash
# Train on the nodes of a Slurm cluster. Submit it from the repository's folder, with flags of
# train.py:
#
#     sbatch --nodes 2 scripts/slurm.sh --name mine --model Qwen2.5-7B --data math.json --replicas 2
#
# sbatch's own options, before the script, replace those below. All nodes must see this folder and
# the environment, .venv or that of the variable PYTHON.
#
# Slurm signals the run ten minutes before the time limit, and when the job is preempted with a
# grace time. The run then finishes its iteration and saves, the job is queued again and resumes.
#
#SBATCH --job-name orz
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --mem 0
#SBATCH --signal TERM@600
#SBATCH --requeue
#SBATCH --open-mode append

set -euo pipefail
export PYTHON=${PYTHON:-.venv/bin/python}
export MASTER_ADDR=$SLURMD_NODENAME # this script runs on the first node
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# One torchrun on each node; nine of the ten minutes are for its ranks to save. 143 means stopped
# by SIGTERM.
# shellcheck disable=SC2016  # the variables are those of each node
node='trap "exit 143" TERM
"$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --shutdown-timeout 540 \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" train.py --resume auto "$@"'
status=0
srun --cpus-per-task "$SLURM_CPUS_ON_NODE" bash -c "$node" node "$@" || status=$?

# A job that someone canceled is not running any more.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [ "$status" = 143 ] && [ "$state" = RUNNING ]; then
    echo "stopped by SIGTERM: job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
