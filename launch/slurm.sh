#!/usr/bin/env bash
# Queues a config on the GPU hosts of a Slurm cluster, one process for each GPU.
#   bash launch/slurm.sh --topology=h200:32 --nodes=4 [--SBATCH_OPTION=VALUE ...] [--dry-run]
#     -- --config=configs/X.py --workdir=/shared/DIR [--config.KEY=VALUE ...]
# What is not its own goes to sbatch (--partition, --account, --time, ...).  This checkout, the workdir and the token
# store must lie on a file system that all hosts share.  A job that is preempted, or reaches its time limit, saves, is
# queued again, and goes on where it was.  --dry-run prints what would run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
. "$repo/launch/launcher.sh"

topology= nodes= dry_run= options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --topology=*) topology="${1#*=}" ;;
    --nodes=*) nodes="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --ntasks* | --gpus*) fail "$1 follows from --topology and --nodes; leave it out" ;;
    --*) options+=("$1") ;;
    *) fail "'$1': want --SBATCH_OPTION=VALUE; the run's own flags go after --" ;;
  esac
  shift
done
count_gpus
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes: want the number of hosts"
[ $((chips % nodes)) -eq 0 ] || fail "$chips GPUs are not equally many on each of $nodes nodes; change one of them"
[ "$chips" -le 8 ] || [ $((chips % 8)) -eq 0 ] \
  || fail "--topology=$topology: $chips GPUs do not fill hosts of 8, as the gate wants; ask for up to 8, or 16, 24"
cd "$repo"
read_run_flags "${@:2}"

each=$((chips / nodes))
submit=(sbatch --nodes="$nodes" --gpus-per-node="$each" --ntasks-per-node="$each" ${options[@]+"${options[@]}"}
  "$repo/launch/slurm.sbatch" "$repo" "${run_flags[@]}")
if [ -n "$dry_run" ]; then
  quoted python -m datasel.topology "${gate_flags[@]}"
  quoted "${submit[@]}"
  echo "# the job:"
  cat "$repo/launch/slurm.sbatch"
  exit
fi
command -v sbatch > /dev/null || fail "sbatch is not installed here; run this on the cluster's login host"
pass_gate cuda
exec "${submit[@]}"
