#!/usr/bin/env bash
# Two nodes with four GPUs each, under Slurm: `sbatch configs/slurm.sh RECIPE [key=value ...]`, from the directory that
# the recipe's output_dir is relative to. It must lie on a disk that all nodes see, and so must ftkit.
#
# srun starts one task a GPU, and each task is one process of the run: ftkit reads its rank and the first node from
# Slurm's variables, so neither --num-processes nor --launch-config is needed.
#SBATCH --job-name=ftkit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4          # as many as GPUs
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# Two minutes before the time is up, the run ends its step, saves and leaves: allow as long as a checkpoint takes to
# write. Submitted again, or queued again by Slurm after a node was lost, it goes on from its last checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# srun does not take over --cpus-per-task by itself. --kill-on-bad-exit: where a process is lost, the others would wait
# for it. --resume starts anew where there is no run of this recipe yet. On nodes without a network add --offline, after
# `hf download MODEL` on one that has it.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 ftkit train "$@" --resume
