#!/usr/bin/env bash
# On a machine with one GPU: checks every attention kernel against the float32 reference, then benchmarks attention and the
# train step of four model sizes.  Under 8 minutes on an H200.  bash launch/check_gpu.sh [OUT]: figures as JSON and text.
# Uses the Python that has datasel's `cuda` and `test` extras: set PYTHON to name another than python3.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$(mkdir -p "${1:-gpu-figures}" && cd "${1:-gpu-figures}" && pwd)"
python="${PYTHON:-python3}"
cd "$repo"
export JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR="$out/compiled"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
trap 'rm -rf "$out/compiled"' EXIT

if ! why="$("$python" -c 'import flax, jax, optax, pytest; print(jax.devices()[0].device_kind)' 2>&1)"; then
  echo "error: $python sees no GPU through jax, or lacks a package: ${why##*$'\n'}" >&2
  echo "install datasel with pip install -e .[cuda,test], or name another Python: PYTHON=... bash launch/check_gpu.sh" >&2
  exit 2
fi
echo "device: ${why##*$'\n'}"

# Compiling is most of it: by several processes, where pytest-xdist is there.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
failed=0
seconds_left() { echo $((470 - SECONDS > 1 ? 470 - SECONDS : 1)); }
timeout "$(seconds_left)" "$python" -m pytest -q --no-header ${workers[@]+"${workers[@]}"} tests/gpu 2>&1 | tee "$out/checks.txt" || failed=1
bench() {  # NAME of the figure, then the benchmark's arguments
  local name="$1"
  shift
  timeout "$(seconds_left)" "$python" -m datasel.bench "$@" --json="$out/$name.json" 2>&1 | tee "$out/$name.txt" || failed=1
}
bench attention attention --cases=causal,packed,window --repeats=3
bench step_160m step --preset=pds_160m --batch_size=64 --repeats=3
bench step_470m step --preset=pds_470m --batch_size=32 --repeats=3 --no-peer
bench step_1b step --preset=pds_1b --batch_size=16 --repeats=3 --no-peer
bench step_1_7b step --preset=pds_1_7b --batch_size=16 --repeats=3 --no-peer
exit "$failed"
