#!/usr/bin/env bash
# Compiles training steps and the attention kernels for GPUs that are not here.  Needs no GPU, but 4 GB of disk for CUDA's libraries; 5 minutes.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
make_environment "$repo/.venv-cuda" cuda
cd "$repo"

gate() {  # gate STATUS FLAGS: fails unless the gate ends with that status
  local wanted="$1" status=0
  shift
  "$repo/.venv-cuda/bin/python" -m datasel.topology "$@" || status=$?
  if [ "$status" != "$wanted" ]; then
    echo "error: exit status $status, want $wanted: python -m datasel.topology $*" >&2
    exit 1
  fi
}

gate 0 --config=configs/pretrain/pds_160m.py:smoke --topology=h100
gate 0 --config=configs/pretrain/pds_160m.py:smoke --topology=h200:16 --config.train.batch_size=16
gate 0 --config=configs/pretrain/pds_160m.py --topology=h200:8 --config.train.microbatches=2
gate 1 --config=configs/pretrain/pds_160m.py:smoke --topology=h100 --config.model.vocab_size=100000000
"$repo/.venv-cuda/bin/python" tests/gpu/compile_for_h200.py
echo "the CUDA gate works"
