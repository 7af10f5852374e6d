#!/usr/bin/env bash
# Runs a config on all GPUs of this host, in one process.
#   bash launch/gpu_host.sh --topology=h200[:8] [--dry-run] -- --config=configs/X.py --workdir=/DIR [--config.KEY=VALUE ...]
# The same command goes on where it was.  For a host that may be preempted and comes back: the line in `crontab -e` after
# @reboot, and --workdir on a disk that stays.  --dry-run prints what would run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
. "$repo/launch/launcher.sh"

topology= dry_run=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --topology=*) topology="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    *) fail "unknown flag '$1'; the run's own flags go after --" ;;
  esac
  shift
done
count_gpus
[ "$chips" -le 8 ] || fail "--topology=$topology: one host has at most 8 GPUs; launch/slurm.sh is for several hosts"
cd "$repo"
read_run_flags "${@:2}"

run=("$repo/.venv-cuda/bin/python" -m datasel.main "${run_flags[@]}")
if [ -n "$dry_run" ]; then
  quoted python -m datasel.topology "${gate_flags[@]}"
  quoted "${run[@]}"
  exit
fi
pass_gate cuda
exec "${run[@]}"
