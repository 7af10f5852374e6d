# Sourced by the launchers, after environment.sh.  Each is called as  LAUNCHER ITS FLAGS -- FLAGS OF datasel.main  and
# first asks `python -m datasel.topology` whether the run fits: nothing is created or queued when it does not.

fail() {
  echo "error: $*" >&2
  exit 2
}

quoted() {  # prints a command as a shell reads it
  printf '%q ' "$@"
  echo
}

read_run_flags() {  # read_run_flags FLAGS: checks them; sets run_flags, gate_flags (for the gate), config and workdir
  local flag
  run_flags=("$@") gate_flags=() config= workdir=
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
  # X.py:smoke is the file X.py, called with smoke.
  [ -f "${config%:*}" ] || fail "--config: no file ${config%:*} in $PWD, the checkout that is launched"
  case "$workdir" in
    '') fail "--workdir is missing; add it after --: a folder that every host sees" ;;
    /*) ;;
    *) fail "--workdir=$workdir is not absolute; want a folder on storage that every host sees, such as /shared/runs/X" ;;
  esac
  gate_flags=("--config=$config" "--topology=$topology" ${gate_flags[@]+"${gate_flags[@]}"})
}

have_python() {  # sets PYTHON for environment.sh; fetched where the host's own is too old or has no venv module
  if ! PYTHON="$(find_python 2>/dev/null)"; then
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON="$(python3 -m uv python find 3.12)"
  fi
}

count_chips() {  # sets kind and chips from $topology: v5p:4x4x8, h200:16; plain h200 is one GPU
  case "$topology" in
    h100 | h200) kind="$topology" chips=1; return ;;
  esac
  [[ "$topology" =~ ^([a-z0-9]+):([0-9]+(x[0-9]+)*)$ ]] \
    || fail "--topology=$topology: want KIND:SHAPE, such as v4:2x2x2, v5e:16x16, v5p:4x4x8, v6e:8x8, h100 or h200:16"
  kind="${BASH_REMATCH[1]}"
  chips=$((${BASH_REMATCH[2]//x/*}))
}

count_gpus() {  # count_chips, for a topology that must be of GPUs
  count_chips
  case "$kind" in h100 | h200) ;; *) fail "--topology=$topology is no GPU; known: h100, h200, h100:N, h200:N" ;; esac
}

pass_gate() {  # pass_gate EXTRA: builds the environment with that extra; exits unless the run fits the topology
  make_environment "$repo/.venv-$1" "$1"
  must_pass "$repo/.venv-$1/bin/python" -m datasel.topology "${gate_flags[@]}"
}

must_pass() {  # must_pass COMMAND: exits with its status unless it succeeds
  "$@" || {
    local status=$?
    echo "error: the gate refuses (exit status $status, see above): nothing was started" >&2
    exit "$status"
  }
}
