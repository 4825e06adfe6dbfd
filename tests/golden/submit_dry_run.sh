#!/bin/bash

# Parameters
#SBATCH --account=speech
#SBATCH --chdir=CODE
#SBATCH --comment='wavefleet:<run id>'
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=64
#SBATCH --error=RUN/slurm/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gres=gpu:a100:4
#SBATCH --hold
#SBATCH --job-name=tiny
#SBATCH --mail-user=me@site.org
#SBATCH --mem=480G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=RUN/slurm/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=2880

# setup
set -e
source /etc/profile.d/modules.sh
module load cuda/12.4
export HF_HOME=/shared/models
export HF_HUB_CACHE=/shared/models/hub
export HF_DATASETS_CACHE=/shared/models/datasets
export HF_HUB_OFFLINE=1
export NCCL_DEBUG=WARN
export GREETING='it'"'"'s $HOME'
export PYTHONPATH=CODE
ended=
trap ended=1 TERM
trap 'code=$?; [ $code = 0 ] || [ "$ended" ] || PYTHON -m launch.jobs.last_word RUN || true; exit $code' EXIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output RUN/slurm/%j_%t_log.out --error RUN/slurm/%j_%t_log.err --cpus-per-task=64 --kill-on-bad-exit=1 --wait=60 --export=ALL --mpi=pmix PYTHON -u -m submitit.core._submit RUN/slurm
