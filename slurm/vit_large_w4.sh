#!/bin/bash
# ViT-L on ImageNet-1k with 4-bit weights and activations, on one node of 8 GPUs, ZeRO 3.
# Options of sbatch go before the script's name, those of dsquant/train.py after it: slurm/README.md.
#SBATCH --job-name=vit_large_w4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out

# Slurm runs a copy of this file; its record of the job says where the file lies.
root=${DSQUANT_ROOT:-$(scontrol show job -o "${SLURM_JOB_ID:-0}" | sed -n 's|.* Command=\(.*\)/slurm/vit_large_w4\.sh.*|\1|p')}
if [ ! -f "$root/slurm/body.sh" ]; then
  echo "dsquant: submit this file with sbatch, or set DSQUANT_ROOT to the checkout it belongs to (now '$root')" >&2
  exit 2
fi
# shellcheck source=slurm/body.sh
source "$root/slurm/body.sh"
run_job vit_large_w4 imagenet_vit_large_w4 zero3.json "$@"
