#!/bin/bash
# A run on 4 hosts of 8 GPUs under Slurm, a process a host:
#   sbatch docs/launch/slurm.sh --config=qwen3_8b --workdir=/shared/run
# All arguments go to `dcore train`. The work directory is on a disk that all hosts share.
#SBATCH --job-name=dcore
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --output=dcore-%j.log
#SBATCH --open-mode=append
set -euo pipefail

# A host that is lost ends all of them within a minute; started again, they go on from the newest
# checkpoint. Three times, since a config that fails would fail for ever.
for attempt in 1 2 3; do
  echo "attempt ${attempt} of 3, on ${SLURM_JOB_NODELIST}"
  status=0
  srun --kill-on-bad-exit=0 --label dcore train --hosts=auto "$@" || status=$?
  case "${status}" in
    # Done; or a mistake in the command or its config, which is printed above.
    0 | 1) exit "${status}" ;;
    # The time is nearly up (--signal): all hosts have written a checkpoint. The job gets in line
    # again, under the same number.
    143)
      scontrol requeue "${SLURM_JOB_ID}"
      exit 0
      ;;
  esac
done
exit "${status}"
