# Sourced by the launchers for machines elsewhere.  Each is called as  LAUNCHER ITS FLAGS -- FLAGS OF datasel.main  and
# first asks `python -m datasel.topology` whether the run fits: nothing is created or queued when it does not.

fail() {
  echo "error: $*" >&2
  exit 2
}

quoted() {  # prints a command as a shell reads it
  printf '%q ' "$@"
  echo
}

read_run_flags() {  # read_run_flags FLAGS: checks them; sets run_flags, gate_flags (those that the gate takes) and config
  local flag workdir=
  run_flags=("$@") gate_flags=() config=
  for flag in "$@"; do
    case "$flag" in
      --config=?*) config="${flag#*=}" ;;
      --workdir=?*) workdir="${flag#*=}" ;;
      --config.?*=*) gate_flags+=("$flag") ;;
      --config | --workdir | --config.*) fail "$flag has no value; want $flag=VALUE" ;;
      --*) ;;
      *) fail "'$flag' is not a flag of datasel.main; want --FLAG=VALUE, all of them after --" ;;
    esac
  done
  [ -n "$config" ] || fail "--config is missing; add it after --: -- --config=configs/X.py --workdir=/shared/DIR"
  [ -f "$config" ] || fail "--config: no file $config in $PWD, the checkout that is launched"
  case "$workdir" in
    '') fail "--workdir is missing; add it after --: a folder that every host sees" ;;
    /*) ;;
    *) fail "--workdir=$workdir is not absolute; want a folder on storage that every host sees, such as /shared/runs/X" ;;
  esac
  gate_flags=("--config=$config" "--topology=$topology" ${gate_flags[@]+"${gate_flags[@]}"})
}

count_chips() {  # sets kind and chips from $topology: v5p:4x4x8, h200:16
  [[ "$topology" =~ ^([a-z0-9]+):([0-9]+(x[0-9]+)*)$ ]] \
    || fail "--topology=$topology: want KIND:SHAPE, such as v4:2x2x2, v5e:16x16, v5p:4x4x8, v6e:8x8, h100:8 or h200:16"
  kind="${BASH_REMATCH[1]}"
  chips=$((${BASH_REMATCH[2]//x/*}))
}

pass_gate() {  # pass_gate EXTRA: builds the environment with that extra; exits unless the run fits the topology
  make_environment "$repo/.venv-$1" "$1"
  "$repo/.venv-$1/bin/python" -m datasel.topology "${gate_flags[@]}" || {
    local status=$?
    echo "error: the gate refuses (exit status $status, see above): nothing was started" >&2
    exit "$status"
  }
}
