#!/usr/bin/env bash
# Runs a config on a Colab runtime, whose disk vanishes with it: everything that the run needs again is kept on Drive.
#   bash launch/colab.sh [--topology=v5e:1x1] [--drive=/content/drive/MyDrive/datasel] [--dry-run]
#     -- --config=configs/X.py --workdir=/content/drive/MyDrive/datasel/DIR [--config.KEY=VALUE ...]
# First, in a cell:  from google.colab import drive; drive.mount('/content/drive').  --drive is a folder there, made if
# absent, for the workdir and the demo corpora.  With a --topology that has one chip (v5e:1x1, v6e:1x1, h100) the gate
# goes first; without (T4, L4, A100, CPU) the run's own --dry_run, which compiles on the device itself.  After a
# disconnect mount Drive and repeat the command: it goes on where it was.  --dry-run prints what would run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
. "$repo/launch/launcher.sh"

topology= drive=/content/drive/MyDrive/datasel dry_run=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --topology=*) topology="${1#*=}" ;;
    --drive=*) drive="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    *) fail "unknown flag '$1'; the run's own flags go after --" ;;
  esac
  shift
done
if [ -n "$topology" ]; then
  count_chips
  [ "$chips" -eq 1 ] || fail "--topology=$topology: a Colab runtime has one chip, such as v5e:1x1, v6e:1x1 or h100"
fi
cd "$repo"
read_run_flags "${@:2}"
case "$workdir" in
  *..*) fail "--workdir=$workdir: want a path without '..'" ;;
  "${drive%/}"/?*) ;;
  *) fail "--workdir=$workdir is lost with the runtime; want a folder in --drive=$drive" ;;
esac

case "$topology" in
  v*) platform=tpu ;;
  h*) platform=cuda ;;
  *)
    [ -z "$(compgen -G '/dev/accel[0-9]*' || compgen -G '/dev/vfio/[0-9]*')" ] \
      || fail "this runtime has a TPU; say which: --topology=v5e:1x1 or --topology=v6e:1x1"
    if nvidia-smi > /dev/null 2>&1; then platform=cuda; else platform=cpu; fi ;;
esac
extra=demo platforms=cpu
# With the platform named, an accelerator that jax cannot use is an error, and not a run on the CPU.
[ "$platform" = cpu ] || extra="$platform,demo" platforms="$platform,cpu"
run=(env "DATASEL_CACHE=${drive%/}/cache" "JAX_PLATFORMS=$platforms" "$repo/.venv-colab/bin/python" -m datasel.main
  "${run_flags[@]}")
if [ -n "$topology" ]; then
  first=("$repo/.venv-colab/bin/python" -m datasel.topology "${gate_flags[@]}")
else
  first=("${run[@]}" --dry_run)
fi
if [ -n "$dry_run" ]; then
  if [ -n "$topology" ]; then quoted python -m datasel.topology "${gate_flags[@]}"; else quoted "${first[@]}"; fi
  quoted "${run[@]}"
  exit
fi
mounted="$(dirname "$drive")"
[ -d "$mounted" ] || fail "--drive=$drive: there is no folder $mounted; mount your Drive first, in a cell:" \
  "from google.colab import drive; drive.mount('/content/drive')"
have_python
make_environment "$repo/.venv-colab" "$extra"
must_pass "${first[@]}"
exec "${run[@]}"
