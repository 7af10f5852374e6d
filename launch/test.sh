#!/usr/bin/env bash
# Makes a clean environment, lints, and runs the tests in it.  Arguments go to pytest: bash launch/test.sh tests/step_test.py
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$repo/launch/environment.sh"
environment="$(mktemp -d "${TMPDIR:-/tmp}/datasel-test-XXXXXX")"
trap 'rm -rf "$environment"' EXIT
extras=test
if [ "$(uname -sm)" = 'Linux x86_64' ]; then
  extras=test,tpu  # no TPU: its compiler, for the tests of what fits one
fi
make_environment "$environment/venv" "$extras"

cd "$repo"
"$environment/venv/bin/ruff" check .
# A test process that crashes ends the run: pytest-xdist may wait for ever for one that it starts in its place.
"$environment/venv/bin/python" -m pytest -n 2 --dist loadfile --max-worker-restart 0 "$@"
