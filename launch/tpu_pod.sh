#!/usr/bin/env bash
# Runs a config on a TPU slice of Google Cloud; queues another slice and goes on after each preemption, until it is done.
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --topology=v5p:4x4x8 [--project=ID] [--spot] [--setup=FILE] [--keep]
#     [--poll=SECONDS] [--dry-run] -- --config=configs/X.py --workdir=/shared/DIR [--config.KEY=VALUE ...]
# Every host gets this checkout as it stands, builds its environment, and runs the same command.  The workdir and the
# token store must lie on storage that all of them share: --setup is a script that each host runs first, to mount it
# (NFS, or a bucket with gcsfuse).  NAME belongs to this launcher, which deletes it at the end, also after an error;
# --keep leaves it.  The loop lives in this shell (tmux); started again it goes on where it was.  gcloud wants the key:
# ssh-add ~/.ssh/google_compute_engine.  --dry-run prints what would run.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
. "$repo/launch/launcher.sh"

name= zone= topology= setup= keep= dry_run= poll=30 place=() tier=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --project=*) place+=("$1") ;;
    --spot) tier=(--spot) ;;
    --setup=*) setup="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --keep) keep=yes ;;
    --dry-run) dry_run=yes ;;
    *) fail "unknown flag '$1'; the run's own flags go after --" ;;
  esac
  shift
done
[[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name=$name: want letters, digits and dashes, a letter first"
[ -n "$zone" ] || fail "--zone is missing; \`gcloud compute tpus locations list\` shows them"
count_chips
case "$kind" in  # accelerator types of v4 and v5p count cores, two a chip
  v4) accelerator="v4-$((2 * chips))" runtime=tpu-ubuntu2204-base ;;
  v5e) accelerator="v5litepod-$chips" runtime=v2-alpha-tpuv5-lite ;;
  v5p) accelerator="v5p-$((2 * chips))" runtime=v2-alpha-tpuv5 ;;
  v6e) accelerator="v6e-$chips" runtime=v2-alpha-tpuv6e ;;
  *) fail "--topology=$topology is no TPU of Cloud TPU; known: v4, v5e, v5p, v6e" ;;
esac
case "$setup" in '' | /*) ;; *) setup="$PWD/$setup" ;; esac
[ -z "$setup" ] || [ -f "$setup" ] || fail "--setup: no file $setup"
cd "$repo"
read_run_flags "${@:2}"
case "$config" in /*) fail "--config=$config: want a path in the checkout, which is what the hosts get" ;; esac

place+=("--zone=$zone")
tpus=(gcloud compute tpus)
create=("${tpus[@]}" queued-resources create "$name" --node-id="$name" --accelerator-type="$accelerator"
  --runtime-version="$runtime" ${tier[@]+"${tier[@]}"} "${place[@]}")
delete=("${tpus[@]}" queued-resources delete "$name" --force --quiet "${place[@]}")

host_script() {  # what each host runs
  cat <<END
set -euo pipefail
cd "\$HOME"
# Where only the connection was lost, the process is still there: it saves and ends, and this one goes on from there.
old="\$(cat datasel.pid 2>/dev/null || true)"
while [ -n "\$old" ] && grep -q datasel.main "/proc/\$old/cmdline" 2>/dev/null; do kill -TERM "\$old" || true; sleep 2; done
${setup:+bash datasel-setup.sh}
mkdir -p datasel
find datasel -mindepth 1 -maxdepth 1 ! -name .venv-tpu -exec rm -rf {} +
tar -xzf datasel.tgz -C datasel
cd datasel
repo="\$PWD"
. launch/environment.sh
. launch/launcher.sh
have_python
make_environment "\$repo/.venv-tpu" tpu
echo \$\$ > "\$HOME/datasel.pid"
exec .venv-tpu/bin/python -m datasel.main $(quoted "${run_flags[@]}" --distributed)
END
}

folder="$(mktemp -d "${TMPDIR:-/tmp}/datasel-pod-XXXXXX")"
trap 'rm -rf "$folder"' EXIT
host_script > "$folder/datasel-run.sh"
cargo=("$folder/datasel.tgz" "$folder/datasel-run.sh")
if [ -n "$setup" ]; then
  cp "$setup" "$folder/datasel-setup.sh"
  cargo+=("$folder/datasel-setup.sh")
fi
copy=("${tpus[@]}" tpu-vm scp "${cargo[@]}" "$name:" --worker=all "${place[@]}")
start=("${tpus[@]}" tpu-vm ssh "$name" --worker=all "--command=bash datasel-run.sh" "${place[@]}")

if [ -n "$dry_run" ]; then
  quoted python -m datasel.topology "${gate_flags[@]}"
  quoted "${create[@]}"
  quoted "${copy[@]}"
  quoted "${start[@]}"
  [ -n "$keep" ] || quoted "${delete[@]}"
  echo "# each host:"
  cat "$folder/datasel-run.sh"
  exit
fi

command -v gcloud > /dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
pass_gate tpu
git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$folder/datasel.tgz"
trap 'echo "stopped; $name may still be running, and costs money. Go on: the same command. End it: $(quoted "${delete[@]}")" >&2
  exit 143' INT TERM

queue_state() {  # of the request: empty where there is none
  "${tpus[@]}" queued-resources list "${place[@]}" --format='value(name.basename(),state.state)' \
    | awk -v name="$name" '$1 == name { print $2 }'
}

node_state() {  # of the slice itself, which knows of a preemption before the request does
  "${tpus[@]}" tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null || true
}

finish() {  # finish STATUS
  if [ -n "$keep" ]; then
    echo "$name is kept, and costs money until: $(quoted "${delete[@]}")" >&2
  else
    "${delete[@]}"
  fi
  exit "$1"
}

queue="$(queue_state)" fruitless=0
while :; do
  case "$queue/$(node_state)" in
    /*) "${create[@]}" ;;
    ACTIVE/READY)
      began=$SECONDS status=0
      if "${copy[@]}"; then "${start[@]}" || status=$?; else status=255; fi  # a new host is slow to take connections
      [ "$status" -ne 0 ] || finish 0
      sleep "$poll"
      if [ "$(queue_state)/$(node_state)" = ACTIVE/READY ]; then  # it was not a preemption
        fruitless=$((fruitless + 1))
        case "$status" in
          2) echo "error: the run refuses its input (see above)" >&2; finish 2 ;;
          134 | 143 | 255)  # jax aborts (134) when another host is late or dies
            echo "a host stopped, or its connection was lost (exit status $status); going on" >&2
            [ $((SECONDS - began)) -le 300 ] || fruitless=0 ;;
          # However long it took: an error that comes back after hours of work must not be paid for without end.
          *) echo "the run failed (exit status $status, see above); going on from its last checkpoint" >&2 ;;
        esac
        [ "$fruitless" -lt 5 ] || { echo "error: five attempts failed, or ended at once" >&2; finish "$status"; }
      fi ;;
    SUSPENDED/* | */PREEMPTED | */TERMINATED)
      echo "$name was preempted; queueing another slice, the run goes on from its last checkpoint" >&2
      "${delete[@]}" ;;
    FAILED/*)
      echo "error: Google Cloud could not serve the request (quota, zone, type?):" >&2
      "${tpus[@]}" queued-resources describe "$name" "${place[@]}" >&2 || true
      finish 1 ;;
    *)
      echo "$(date +%T)  $name: ${queue:-none}" >&2
      sleep "$poll" ;;
  esac
  queue="$(queue_state)" || queue=UNKNOWN  # a call may fail now and then; the first one must not
done
