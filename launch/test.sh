#!/usr/bin/env bash
# The one test command:  bash launch/test.sh [pytest arguments]
# Installs what tests need into .venv, then runs ruff and pytest. No GPU and no network beyond the package index.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements-dev.txt
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m pytest -q -n "${WORKERS:-2}" --dist=worksteal --durations=10 "$@"  # WORKERS=0: one process
