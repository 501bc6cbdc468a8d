#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/test.sh [--faults] [flags of pytest]

Makes .venv at the top level of the repository, installs requirements.txt into it (only when that has changed), and
runs the tests there:
  .venv/bin/python -m pytest -q -n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder   all: a file on each
core at a time, on four at most
  .venv/bin/python -m pytest -q [flags]    with flags
  .venv/bin/python -m pytest -q -m faults tests/faults [flags]    with --faults: the long part of tests/faults, which
kills real runs at some hundred moments and damages every file (as root, on Linux, for the full disks); with
AWRSR_SOAK_MINUTES=N also a run that is stopped and resumed for so long. With AWRSR_FAULTS_LOG=FILE each of these tests,
and those of hostile and fuzzed input, note what they did, see docs/reliability.py.

Paths count from the top level, whatever the current directory.

  bash launch/test.sh tests/losses_test.py -x
  bash launch/test.sh -h                    the flags of pytest

PYTHON=/path/to/python3 names the Python (3.11 or newer) that makes .venv; remove .venv to change it.
JAX_COMPILATION_CACHE_DIR is where compiled programs are kept for the next run (default: .jax_cache).
END
  exit
fi

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [[ ${1:-} == --faults ]]; then set -- -m faults tests/faults "${@:2}"; fi
if [[ $# == 0 ]]; then set -- -n logical --maxprocesses=4 --dist loadfile --no-loadscope-reorder; fi
exec .venv/bin/python -m pytest -q "$@"
