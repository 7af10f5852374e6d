#!/usr/bin/env bash
# Runs a config on this machine; without arguments the main job, DoReMi end to end on ten domains of real text.
#   bash launch/local.sh [--config=configs/X.py[:smoke]] [--workdir=DIR] [--config.KEY=VALUE ...]
# The environment is .venv in the checkout, made when needed.  The same command continues an interrupted run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
make_environment "$repo/.venv" demo

arguments=("$@")
has() { local a; for a in "${arguments[@]:-}"; do [[ "$a" == "$1="* ]] && return 0; done; return 1; }
has --config || arguments+=("--config=$repo/configs/doremi/demo.py")
has --workdir || arguments+=("--workdir=$repo/runs/doremi-demo")
exec "$repo/.venv/bin/python" -m datasel.main "${arguments[@]}"
