#!/usr/bin/env bash
# Runs a config on this machine; without arguments the main job, DoReMi end to end on ten domains of real text.
#   bash launch/local.sh [--config=configs/X.py[:smoke]] [--workdir=DIR] [--config.KEY=VALUE ...]
# The environment is .venv in the checkout, made when needed.  The same command continues an interrupted run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The first two are the defaults, until the same flag is given: as --FLAG=VALUE or --FLAG VALUE, with one dash or two.
arguments=("--config=$repo/configs/doremi/demo.py" "--workdir=$repo/runs/doremi-demo")
while [ $# -gt 0 ]; do
  case "$1" in
    --config | -config | --workdir | -workdir)
      [ $# -gt 1 ] || { echo "error: $1 has no value; want $1=VALUE" >&2; exit 2; }
      set -- "$1=$2" "${@:3}" ;;
  esac
  case "$1" in
    --config=* | -config=*) arguments[0]="$1" ;;
    --workdir=* | -workdir=*) arguments[1]="$1" ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

. "$repo/launch/environment.sh"
make_environment "$repo/.venv" demo
exec "$repo/.venv/bin/python" -m datasel.main "${arguments[@]}"
