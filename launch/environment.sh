# Sourced by local.sh and test.sh: finds a Python, and builds or reuses a virtual environment of this checkout.

find_python() {  # prints a Python >= 3.11 that can make virtual environments; $PYTHON goes first
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  echo "error: no Python 3.11 or newer with the venv module was found; install one (Debian: apt install python3-venv)," \
    "or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

make_environment() {  # make_environment FOLDER EXTRA: a virtual environment with this checkout installed, reused while current
  local folder="$1" extra="$2" python stamp wanted
  python="$(find_python)" || return 1
  stamp="$folder/.datasel-stamp"
  wanted="$("$python" -c 'import hashlib, pathlib, sys
print(sys.version.split()[0], sys.argv[2], hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest())' "$repo/setup.py" "$extra")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "building the environment in $folder (a few minutes, once)" >&2
  rm -f "$stamp"
  if ! "$folder/bin/python" -c 'import sys; sys.exit(sys.version.split()[0] != sys.argv[1])' "${wanted%% *}" 2>/dev/null; then
    rm -rf "$folder"
    "$python" -m venv "$folder"
  fi
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$repo[$extra]"
  echo "$wanted" > "$stamp"
}
