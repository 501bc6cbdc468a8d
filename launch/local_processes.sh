#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/local_processes.sh N [--devices=K] [--restarts=R] [--dry_run] [flags of awrsr_jax.main]

Trains in N processes on this machine, all in one run, each with K CPU devices (default 1): what a run on many machines
does, tried out on one. Process I is
  env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=K .venv/bin/python -m awrsr_jax.main [flags] \
    --coordinator_address=127.0.0.1:PORT --num_processes=N --process_id=I

Process 0 prints here, process I into WORKDIR.process_I.log (for a --workdir=gs://... beside runs/). .venv, --config and
--workdir are as in launch/run_local.sh.

Ctrl-C and SIGTERM reach every process as SIGTERM: the run saves and ends. When a process fails, the others have 60 s to
end by themselves and are then killed.

Exit code: 0 if every process ended with 0. Otherwise the first code that is neither 75 nor a signal's (1: bad
input). Otherwise 75: the run was told to stop or lost a process, and the same command goes on. With --restarts=R
(default 0) the script itself starts again after 75, up to R times, unless it was told to stop.

--dry_run prints the commands and runs none.

  bash launch/local_processes.sh 2 --devices=2 --config=configs/ml1m.py --config.mesh.data=2 --config.mesh.model=2
END
  exit
fi

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

number "The first argument, the number of processes," "${1:-}" 1
count=$1
shift
devices=1 restarts=0 flags=()
for flag in "$@"; do
  case $flag in
    --devices=*) devices=${flag#*=} ;;
    --restarts=*) restarts=${flag#*=} ;;
    --dry_run) dry_run=1 ;;
    *) flags+=("$flag") ;;
  esac
done
number --devices "$devices" 1
number --restarts "$restarts" 0

read_flags_with_defaults ${flags[@]+"${flags[@]}"}
logs=${workdir%/}
case $logs in
  gs://*) logs=runs/$(basename "$logs") ;;
esac
if [[ -z $dry_run ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  mkdir -p "$(dirname "$logs")"
fi

# Starts all processes; leaves their ids in $pids.
start() {
  local i port command
  # A new port for every start: the last one may still be held by a process that was killed.
  until
    port=$((20000 + RANDOM % 10000))
    ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null
  do :; done
  pids=()
  for ((i = 0; i < count; i++)); do
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" .venv/bin/python -m awrsr_jax.main
      ${defaults[@]+"${defaults[@]}"} ${flags[@]+"${flags[@]}"}
      "--coordinator_address=127.0.0.1:$port" "--num_processes=$count" "--process_id=$i")
    if ((i == 0)); then
      show "$(quoted "${command[@]}") &"
      [[ -z $dry_run ]] || continue
      "${command[@]}" &
    else
      show "$(quoted "${command[@]}") >$(quoted "$logs.process_$i.log") 2>&1 &"
      [[ -z $dry_run ]] || continue
      "${command[@]}" >"$logs.process_$i.log" 2>&1 &
    fi
    pids+=($!)
  done
}

# Sends a signal to the processes that have not ended.
tell() {
  local i
  for ((i = 0; i < ${#pids[@]}; i++)); do
    [[ -n ${codes[i]:-} ]] || kill "-$1" "${pids[i]}" 2>/dev/null || true
  done
}

# Waits until all processes have ended; leaves their exit codes in $codes.
# It looks twice a second, because bash 3.2 of macOS cannot wait for whichever ends first.
finish() {
  local i signal patience=120 failed=""
  codes=()
  while ((${#codes[@]} < count)); do
    for ((i = 0; i < count; i++)); do
      if [[ -z ${codes[i]:-} ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
        codes[i]=0
        wait "${pids[i]}" || codes[i]=$?
        if ((codes[i])); then
          failed=1 signal=""
          if ((codes[i] > 128)); then signal=" (signal $(kill -l "${codes[i]}"))"; fi
          echo "Process $i of $count ended with ${codes[i]}$signal." >&2
        fi
      fi
    done
    if [[ -n $failed && ${#codes[@]} -lt $count ]] && ((patience-- == 0)); then
      echo "The others did not end within 60 s: killing them." >&2
      tell KILL
    fi
    sleep 0.5 || true # Ctrl-C ends it too
  done
}

# Leaves in $code what the codes of the processes come to, and shows what failed in a way that process 0 did not.
conclude() {
  local i
  code=0
  for ((i = 0; i < count; i++)); do
    if ((codes[i] == 75 || codes[i] > 128)); then
      ((code)) || code=75
    elif ((codes[i] && (code == 0 || code == 75))); then
      code=${codes[i]}
    fi
    if ((i > 0 && codes[i] != 0 && codes[i] != 75 && codes[i] != codes[0])); then
      echo "The last lines of $logs.process_$i.log:" >&2
      tail -n 10 "$logs.process_$i.log" >&2
    fi
  done
}

pids=() codes=() stopping=""
trap 'stopping=1; tell TERM' INT TERM
while true; do
  start
  if [[ -n $dry_run ]]; then exit; fi
  if [[ -n $stopping ]]; then tell TERM; fi # the signal may have come between two starts
  finish
  conclude
  if ((code != 75)) || [[ -n $stopping ]] || ((restarts-- == 0)); then break; fi
  echo "Starting all $count again." >&2
done
exit "$code"
