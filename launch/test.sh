#!/usr/bin/env bash
set -euo pipefail

if [[ ${1:-} == --help ]]; then
  cat <<'END'
Usage: bash launch/test.sh [flags of pytest]

Makes .venv at the top level of the repository, installs requirements.txt into it (only when that has changed), and
runs the tests there:
  .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder   all, two files at a time
  .venv/bin/python -m pytest -q [flags]    with flags

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

if [[ $# == 0 ]]; then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi
exec .venv/bin/python -m pytest -q "$@"
