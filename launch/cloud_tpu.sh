#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/cloud_tpu.sh COMMAND [settings] [-- flags of awrsr_jax.main]

Trains on a Cloud TPU slice, with gcloud: one process on each of its workers, all in one run.

  create    asks for the slice, as a queued resource; spot machines unless told --on_demand
  status    prints its state: WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED (preempted), FAILED, absent ...
  wait      waits until it is ACTIVE
  setup     copies HEAD of this checkout to ~/awrsr_jax on every worker and makes .venv there, with jax[tpu] and gcsfs
  start     starts awrsr_jax.main with the flags on every worker, and leaves it running; it is started again there when
            it ends with 75 or by a signal, unless three starts in a row end at the same checkpoint
  follow    shows the log of a worker as it grows
  stop      has the run save and end, and waits for that
  resume    after a preemption: deletes what is left of the slice, creates, waits, sets up, and starts with the flags of
            the last start, which are kept in runs/cloud_tpu/NAME.flags; a slice that is not lost is not created again
  delete    gives the slice back

Settings, and the environment variables that stand in for them:
  --project=PROJECT          CLOUD_TPU_PROJECT
  --zone=ZONE                CLOUD_TPU_ZONE
  --name=NAME                CLOUD_TPU_NAME, of the queued resource and of the slice
  --accelerator=TYPE         CLOUD_TPU_ACCELERATOR, as v5litepod-64
  --runtime=VERSION          CLOUD_TPU_RUNTIME, the image of the workers (default v2-alpha-tpuv5-lite, for v5e)
  --on_demand                CLOUD_TPU_ON_DEMAND=1, machines that are not preempted
  --worker=N                 whose log to follow (default 0)
  --disposable_workdir       start with a --workdir that is no bucket: only for a slice of one worker, and lost with it
  --dry_run                  prints the commands and runs none; takes the slice to be SUSPENDED for resume, else ACTIVE

  export CLOUD_TPU_PROJECT=my-project CLOUD_TPU_ZONE=us-west4-a CLOUD_TPU_NAME=awrsr CLOUD_TPU_ACCELERATOR=v5litepod-64
  for command in create wait setup; do bash launch/cloud_tpu.sh $command || break; done
  bash launch/cloud_tpu.sh start -- --config=configs/ml1m.py --workdir=gs://my-bucket/ml1m

With more than one worker, gcloud needs its key in the agent first: ssh-add ~/.ssh/google_compute_engine
On a worker, ~/awrsr_jax/runs/job has the log and, when the job has ended, its exit_code. install_here, start_here and
stop_here are what the commands above call there.
END
  exit
fi

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

command=${1:-}
needed=(project zone name)
case $command in
  create | resume) needed+=(accelerator) ;;
  status | wait | setup | start | follow | stop | delete) ;;
  install_here | start_here | stop_here) needed=() ;;
  *)
    die "The first argument must be a command, not '$command':" \
      "create, status, wait, setup, start, follow, stop, resume or delete; --help says what they do."
    ;;
esac
shift

project=${CLOUD_TPU_PROJECT:-} zone=${CLOUD_TPU_ZONE:-} name=${CLOUD_TPU_NAME:-}
accelerator=${CLOUD_TPU_ACCELERATOR:-} on_demand=${CLOUD_TPU_ON_DEMAND:-}
# The image for v5e. Others: v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), tpu-ubuntu2204-base (v4 and older).
runtime=${CLOUD_TPU_RUNTIME:-v2-alpha-tpuv5-lite}
worker=0 disposable="" flags=()
while (($#)); do
  case $1 in
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --on_demand) on_demand=1 ;;
    --worker=*) worker=${1#*=} ;;
    --disposable_workdir) disposable=1 ;;
    --dry_run) dry_run=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) no_setting "$1" "launch/cloud_tpu.sh start" ;;
  esac
  shift
done
if [[ ${#flags[@]} -gt 0 && $command != start && $command != start_here ]]; then
  die "Only start takes flags of awrsr_jax.main; resume takes those of the last start."
fi
missing=()
for setting in ${needed[@]+"${needed[@]}"}; do
  if [[ -z ${!setting} ]]; then
    missing+=("  --$setting=... or CLOUD_TPU_$(printf '%s' "$setting" | tr '[:lower:]' '[:upper:]')")
  fi
done
if [[ $command == *_here && -n $dry_run ]]; then
  die "$command has no dry run: it is what the others run on a worker."
fi
if ((${#missing[@]})); then die "$command needs settings that are not given:" "${missing[@]}"; fi

place=("--project=$project" "--zone=$zone")
kept=runs/cloud_tpu/$name.flags
here="bash awrsr_jax/launch/cloud_tpu.sh"
busy="a job is running already. To end it: bash launch/cloud_tpu.sh stop"

on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

create() {
  local tier=(--spot)
  if [[ -n $on_demand ]]; then tier=(); fi
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" "--node-id=$name" \
    "--accelerator-type=$accelerator" "--runtime-version=$runtime" ${tier[@]+"${tier[@]}"}
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# Leaves the state in $state, once it is none of those named; a dry run takes it to be the first argument.
# It lists, because describe fails in the same way for a resource that is absent and for a lost network.
look_until_not() {
  local last="" query
  query=(gcloud compute tpus queued-resources list "${place[@]}" "--filter=name~/$name\$" "--format=value(state.state)")
  show "$(quoted "${query[@]}")"
  state=$1
  shift
  while [[ -z $dry_run ]]; do
    state=$("${query[@]}") || die "The state of $name could not be read: see the message above."
    state=${state:-absent}
    [[ " $* " == *" $state "* ]] || break
    if [[ $state != "$last" ]]; then echo "$name is $state" >&2; fi
    last=$state
    sleep 30
  done
}

wait_until_active() {
  look_until_not ACTIVE CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING
  [[ $state == ACTIVE ]] ||
    die "$name is $state. Lost: bash launch/cloud_tpu.sh resume. Never made: bash launch/cloud_tpu.sh create."
}

setup() {
  local changes="" archive=runs/cloud_tpu/$name.tar.gz
  local is_free="mkdir -p awrsr_jax/runs/job && flock -n awrsr_jax/runs/job/lock true"
  if [[ -z $dry_run ]]; then changes=$(git status --short); fi
  if [[ -n $changes ]]; then printf 'Not committed, and so not copied:\n%s\n' "$changes" >&2; fi
  run mkdir -p runs/cloud_tpu
  run git archive --format=tar.gz "--output=$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:awrsr_jax.tar.gz" "${place[@]}" --worker=all
  # The next start of a running job would import what is unpacked. All workers are asked before one is changed.
  on_workers all "$is_free || { echo \"\$(hostname): $busy\" >&2; exit 1; }"
  on_workers all "tar -xzf awrsr_jax.tar.gz -C awrsr_jax && $here install_here"
}

start() {
  on_workers all "$here start_here -- $(quoted "${flags[@]}")"
}

# Runs the job until it is complete, fails for a reason of its own, or is told to stop.
keep_running() {
  local pid="" code stopping=""
  read_flags "$@"
  trap '' HUP
  trap 'stopping=1; kill -TERM "$pid" 2>/dev/null || true' TERM
  while true; do
    .venv/bin/python -m awrsr_jax.main "$@" &
    pid=$!
    echo "$pid" >runs/job/python_pid
    if [[ -n $stopping ]]; then kill -TERM "$pid" || true; fi # told before there was a job to tell
    # A wait would be cut short by the signal, and so miss how the job ended.
    while kill -0 "$pid" 2>/dev/null; do sleep 1; done
    code=0
    wait "$pid" || code=$?
    echo "$(date '+%F %T') The job ended with $code."
    # Time for a stop to reach this worker too, when it was first on another and has ended the run.
    if ((code)) && [[ -z $stopping ]]; then sleep 10; fi
    if ((code != 75 && code <= 128)) || ! gets_ahead runs/job/ends "$workdir" || [[ -n $stopping ]]; then break; fi
  done
  echo "$code" >runs/job/exit_code
}

# The lock is held as long as the loop or its Python lives, also when the loop was killed.
refuse_while_running() {
  mkdir -p runs/job
  exec 8>>runs/job/lock
  flock -n 8 || die "$(hostname): $busy"
}

# Leaves in $pid the loop, or its Python where the loop was killed. It holds the lock; a process that has got the number
# of one that ended does not.
find_job() {
  local file
  for file in runs/job/pid runs/job/python_pid; do
    pid=$(cat "$file" 2>/dev/null) || continue
    if [[ /proc/$pid/fd/8 -ef runs/job/lock ]]; then return; fi
  done
  die "$(hostname): no job is running, but $PWD/runs/job/lock is held: by a setup, or by what a killed job has left." \
    "On this worker, fuser -v $PWD/runs/job/lock names the process. Wait for it, or kill it."
}

case $command in
  create) create ;;
  delete) delete ;;
  setup) setup ;;
  wait) wait_until_active ;;
  status)
    look_until_not ACTIVE
    if [[ -z $dry_run ]]; then echo "$state"; fi
    ;;
  start)
    read_flags ${flags[@]+"${flags[@]}"}
    if [[ -z $config || -z $workdir ]]; then
      die "start needs --config and --workdir after --:" \
        "  bash launch/cloud_tpu.sh start -- --config=configs/ml1m.py --workdir=gs://my-bucket/ml1m"
    fi
    if [[ $workdir != gs://* && -z $disposable ]]; then
      die "--workdir=$workdir is on a worker's own disk: the others cannot read it, and it is lost with the slice." \
        "Name a bucket, --workdir=gs://my-bucket/ml1m, or for a slice of one worker add --disposable_workdir before --."
    fi
    start
    if [[ -z $dry_run ]]; then
      mkdir -p runs/cloud_tpu
      printf '%s\n' "${flags[@]}" >"$kept"
    fi
    ;;
  follow) on_workers "$worker" "tail -n 50 -F awrsr_jax/runs/job/log" ;;
  stop) on_workers all "$here stop_here" ;;
  resume)
    [[ -e $kept ]] || die "$kept is not here: nothing was started on $name from this checkout." \
      "Use create, wait, setup and start."
    while IFS= read -r flag; do flags+=("$flag"); done <"$kept"
    look_until_not SUSPENDED SUSPENDING DELETING
    case $state in
      SUSPENDED | FAILED)
        delete
        create
        ;;
      absent) create ;;
    esac
    wait_until_active
    setup
    start
    ;;
  install_here)
    refuse_while_running
    # The images are of Ubuntu 22.04, with Python 3.10. uv brings a newer one, and needs no root and no package manager,
    # which may be locked by the updates of a fresh machine.
    if ! python3 -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python3 -m pip install --quiet --user uv
      python3 -m uv python install --quiet 3.12
      PYTHON=$(python3 -m uv python find --managed-python 3.12)
    fi
    # shellcheck source=launch/setup.sh
    source launch/setup.sh
    .venv/bin/python -m pip install --quiet -U "jax[tpu]" gcsfs -c requirements.txt
    ;;
  start_here)
    refuse_while_running
    rm -f runs/job/exit_code runs/job/ends
    keep_running ${flags[@]+"${flags[@]}"} </dev/null >>runs/job/log 2>&1 &
    echo "$!" >runs/job/pid
    echo "$(hostname): started"
    ;;
  stop_here)
    mkdir -p runs/job
    if flock -n runs/job/lock true; then
      echo "$(hostname): no job is running"
    else
      find_job
      kill -TERM "$pid"
      flock runs/job/lock true
      echo "$(hostname): ended with $(cat runs/job/exit_code 2>/dev/null || echo "a code that runs/job/log may tell")"
    fi
    ;;
esac
