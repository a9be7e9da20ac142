#!/usr/bin/env bash
# The one test command:  bash launch/test.sh [pytest arguments]
# Installs what tests need into .venv, then runs ruff, on the files that git tracks, and pytest, whatever ruff has found.
# No GPU and no network beyond the package index.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements-dev.txt
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=
status=0
files=()
while IFS= read -r -d '' file; do if [ -e "$file" ]; then files+=("$file"); fi; done < <(git ls-files -z -- '*.py' || true)
"$VENV/bin/python" -m ruff check "${files[@]:-.}" || status=$?
"$VENV/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist=worksteal --durations=10 "$@" || status=$?  # WORKERS=0: one process
exit "$status"
