# shellcheck shell=bash
# Sourced by the other scripts here: goes to the top level of the repository, and holds what they share.
set -euo pipefail

# An exported CDPATH would send a relative "launch/.." somewhere else.
CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# Refuses a setting that is not a number of at least $3.
number() {
  if [[ ! $2 =~ ^[0-9]+$ || $2 == 0?* ]] || (($2 < $3)); then
    die "$1 must be a number, $3 or more, not '$2': see --help."
  fi
}

# Refuses what is no setting of a script; $2 is how the script is called.
no_setting() {
  die "$1 is no setting of this script (--help lists them, written --name=VALUE)." \
    "Flags of awrsr_jax.main go after --: bash $2 -- --config=configs/ml1m.py ..."
}

# Prints a command as it would be typed.
quoted() {
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

dry_run=""

# Shows a command line: the output of a dry run, a message of any other.
show() {
  if [[ -n $dry_run ]]; then printf '+ %s\n' "$1"; else printf '+ %s\n' "$1" >&2; fi
}

# Shows a command and, unless this is a dry run, runs it.
run() {
  show "$(quoted "$@")"
  [[ -n $dry_run ]] || "$@"
}

# Whether a run is worth another start: notes in the file $1 the newest checkpoint of the run folder $2, which may be
# gs://..., and fails when the two starts before this one ended there too.
gets_ahead() {
  local newest
  newest=$(.venv/bin/python -c 'import sys; from etils import epath
names = [path.name for path in epath.Path(sys.argv[1]).glob("checkpoints/*")]
print(max((int(name) for name in names if name.isdigit()), default=0))' "$2") || newest=unknown
  echo "$newest" >>"$1" || return 1
  if (($(tail -n 3 "$1" | grep -cx "$newest") == 3)); then
    echo "Three starts in a row ended with checkpoint $newest as the newest: it is not started again." >&2
    return 1
  fi
}

# Reads flags of awrsr_jax.main: leaves $config and $workdir, empty when they are not given.
read_flags() {
  local flag before=""
  config="" workdir=""
  for flag in "$@"; do
    case $before in
      --config | -config) config=$flag ;;
      --workdir | -workdir) workdir=$flag ;;
    esac
    case $flag in
      --config=* | -config=*) config=${flag#*=} ;;
      --workdir=* | -workdir=*) workdir=${flag#*=} ;;
    esac
    before=$flag
  done
}

# Leaves in the array $defaults what the flags lack, and $config and $workdir filled in. Defaults go before the flags:
# main takes --config.x only after --config, and the run folder of another config would be refused.
read_flags_with_defaults() {
  read_flags "$@"
  defaults=()
  if [[ -z $config ]]; then
    config=configs/synthetic.py
    defaults+=("--config=$config")
  fi
  if [[ -z $workdir ]]; then
    workdir=${config%%:*}
    workdir=runs/$(basename "$workdir" .py)
    defaults+=("--workdir=$workdir")
  fi
}
