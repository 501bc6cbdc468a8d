#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/run_local.sh [flags of awrsr_jax.main]

Makes .venv at the top level of the repository, installs requirements.txt into it (only when that has changed), and
trains there:
  .venv/bin/python -m awrsr_jax.main --config=configs/synthetic.py --workdir=runs/synthetic [flags]

Your flags win. With --config=configs/NAME.py and no --workdir, the run folder is runs/NAME. Paths count from the top
level, whatever the current directory. The same command again continues the run, or says that it is complete.

  bash launch/run_local.sh --config=configs/ml1m.py --config.train.epochs=2 --workdir=runs/short
  bash launch/run_local.sh --helpshort      the flags of awrsr_jax.main

PYTHON=/path/to/python3 names the Python (3.11 or newer) that makes .venv; remove .venv to change it.
END
  exit
fi

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

read_flags_with_defaults "$@"
exec .venv/bin/python -m awrsr_jax.main ${defaults[@]+"${defaults[@]}"} "$@"
