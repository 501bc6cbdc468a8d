#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/slurm.sh [settings] [-- flags of awrsr_jax.main]

Submits a job to SLURM: one process per GPU, all in one run. It saves two minutes before its time is over, goes back to
the queue by itself, and resumes when its turn comes, until the run is complete, fails, or three starts in a row end at
the same checkpoint. scancel ends it for good.

  --nodes=N            default 1
  --gpus_per_node=N    default 1
  --partition=NAME, --account=NAME, --time=HH:MM:SS    as for sbatch; what is not given is the cluster's default
  --name=NAME          of the job (default awrsr_jax); its output is in runs/NAME-JOBID.log, and the newest checkpoint
                       at the end of each start in runs/NAME-JOBID.ends
  --cpu                no GPUs: one process per node
  --dry_run            prints what would be submitted

Other options of sbatch: its environment variables, as SBATCH_CPUS_PER_GPU=8 or SBATCH_CONSTRAINT. .venv, --config and
--workdir are as in launch/run_local.sh. This checkout and the run folder must be on a disk that all nodes share.

  bash launch/slurm.sh --nodes=2 --gpus_per_node=4 --time=12:00:00 -- --config=configs/ml1m.py
END
  exit
fi

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=1 partition="" account="" time="" name=awrsr_jax cpu="" flags=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus_per_node=*) gpus=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --cpu) cpu=1 ;;
    --dry_run) dry_run=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) no_setting "$1" "launch/slurm.sh --nodes=2" ;;
  esac
  shift
done
number --nodes "$nodes" 1
number --gpus_per_node "$gpus" 1
read_flags_with_defaults ${flags[@]+"${flags[@]}"}

if [[ -z $dry_run ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  if [[ -z $cpu ]] && ! compgen -G ".venv/lib/python*/site-packages/jax_plugins/xla_cuda*" >/dev/null; then
    die ".venv has JAX for the CPU only. Add the build for the GPUs of the cluster, and run this again:" \
      '  .venv/bin/python -m pip install -U "jax[cuda13]" -c requirements.txt    # or jax[cuda12]' \
      "Or train without GPUs: --cpu."
  fi
  mkdir -p runs
fi

options=("--job-name=$name" "--nodes=$nodes")
platforms=()
if [[ -n $cpu ]]; then
  options+=(--ntasks-per-node=1)
  platforms=(env JAX_PLATFORMS=cpu)
else
  # On SLURM, JAX takes GPU number I in the task with local number I. So every task has to see all GPUs of its node:
  # --gpus-per-task would hide them.
  options+=("--ntasks-per-node=$gpus" "--gpus-per-node=$gpus")
fi
if [[ -n $partition ]]; then options+=("--partition=$partition"); fi
if [[ -n $account ]]; then options+=("--account=$account"); fi
if [[ -n $time ]]; then options+=("--time=$time"); fi
# --signal without B: reaches the tasks of srun and not the shell below, which lives on to see how they end.
options+=("--output=runs/$name-%j.log" --open-mode=append --requeue --signal=TERM@120)

program=$(quoted ${platforms[@]+"${platforms[@]}"} .venv/bin/python -m awrsr_jax.main \
  ${defaults[@]+"${defaults[@]}"} ${flags[@]+"${flags[@]}"})
# A cluster may be set to kill all tasks when one ends with an error; here they end together, one of them writing.
# srun ends with the highest code: the 75 of those that wait for a task hides what ended it.
job="#!/usr/bin/env bash
source launch/common.sh
code=0
srun --kill-on-bad-exit=0 $program || code=\$?
if ((code == 75 || code > 128)) && gets_ahead \"runs/\$SLURM_JOB_NAME-\$SLURM_JOB_ID.ends\" $(quoted "$workdir"); then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code"

show "$(quoted sbatch "${options[@]}") <<'END'"
if [[ -n $dry_run ]]; then
  printf '%s\nEND\n' "$job"
else
  sbatch "${options[@]}" <<<"$job"
fi
