# shellcheck shell=bash
# Sourced by the other scripts here: goes to the top level of the repository and leaves a ready .venv there.
# It asks nothing and needs only Python and, the first time, the package registry.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Prints the first interpreter that can make the environment, or says what each one lacked.
find_python() {
  local candidate version seen="" without_venv=""
  local -a candidates=(python3 python3.13 python3.12 python3.11 python)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    # An interpreter may be there and not run (a version manager's stub), so that only running it tells.
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      seen+="${seen:+, }$candidate is $version"
    elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      without_venv=${without_venv:-$candidate $version}
    else
      printf '%s\n' "$candidate"
      return
    fi
  done
  if [[ -n $without_venv ]]; then
    die "${without_venv% *} (Python ${without_venv##* }) lacks the module venv or ensurepip, which make .venv." \
      "On Debian and Ubuntu: apt-get install python${without_venv##* }-venv" \
      "Or name another Python, 3.11 or newer: PYTHON=/path/to/python3 bash $0"
  fi
  die "Python 3.11 or newer is needed (${seen:-none of these runs: ${candidates[*]}})." \
    "Install one, and if it is not on PATH name it: PYTHON=/path/to/python3 bash $0"
}

# Fails while .venv is missing, half made, or made for other requirements.
is_ready() {
  [[ -x .venv/bin/python && ! -e .venv/unfinished ]] && cmp -s requirements.txt .venv/installed.txt
}

prepare() {
  local python
  if [[ ! -x .venv/bin/python || -e .venv/unfinished ]]; then
    python=$(find_python)
    echo "Making .venv with $python" >&2
    mkdir -p .venv
    # An install that was cut off can leave packages that pip takes for whole. The mark outlives the emptying below, so
    # that a cut at any point starts over.
    touch .venv/unfinished
    find .venv/ -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +
    "$python" -m venv .venv
  fi
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die ".venv holds a Python older than 3.11: remove .venv, and run this again."
  echo "Installing requirements.txt into .venv (minutes the first time)" >&2
  touch .venv/unfinished
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed.txt
  rm .venv/unfinished
}

if ! is_ready; then
  # Two launches at once would empty each other's environment. macOS has no flock; there, start one first.
  exec 9<launch/setup.sh
  if command -v flock >/dev/null; then flock 9; fi
  is_ready || prepare
  exec 9<&-
fi
