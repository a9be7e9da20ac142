# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv once and installs a requirements file into it when that has changed.
# PYTHON names the interpreter (3.11 or newer); VENV the folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="${VENV:-.venv}"

find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
    return 1
}

install() {  # install <requirements file>
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    local stamp="$VENV/.installed-$1"
    if ! cmp -s <(cat requirements*.txt) "$stamp"; then
        echo "installing $1 (once)"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
        cat requirements*.txt > "$stamp"
    fi
}
