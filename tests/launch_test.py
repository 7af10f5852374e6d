"""Laws of launch/: what is given wins in every form, and an environment is built when it must be, not otherwise."""

import hashlib
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BASH = shutil.which('bash')
SCRIPTS = [*sorted((ROOT / 'launch').glob('*.sh')), ROOT / 'launch/slurm.sbatch', ROOT / '.ci/run']
# Stands in for the environment's Python: notes its arguments, one a line and a blank line after each call.
NOTES_CALLS = """#!/bin/sh
printf '%s\\n' "$@" '' >> "$0.calls"
case "$*" in *'pip install'*) test ! -e "$0.broken" ;; esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A checkout of launch/ and setup.py, its environment current; a space in its path, as people have."""
  checkout = tmp_path / 'check out'
  shutil.copytree(ROOT / 'launch', checkout / 'launch')
  shutil.copy(ROOT / 'setup.py', checkout)
  _script(checkout / '.venv/bin/python', NOTES_CALLS)
  (checkout / '.venv/.datasel-stamp').write_text(_stamp(checkout))
  return checkout


def _script(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def _stamp(checkout):
  return f'{platform.python_version()} demo {hashlib.sha256((checkout / "setup.py").read_bytes()).hexdigest()}\n'


def _local(checkout, *arguments):
  """Runs local.sh; its outcome, and the arguments of each call of the environment's Python since the last time."""
  calls = checkout / '.venv/bin/python.calls'
  calls.unlink(missing_ok=True)
  done = subprocess.run([BASH, checkout / 'launch/local.sh', *arguments], env={'PATH': '/usr/bin:/bin',
                        'PYTHON': sys.executable}, capture_output=True, text=True, check=False)
  return done, [call.splitlines() for call in calls.read_text().split('\n\n')[:-1]] if calls.exists() else []


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_well_formed(script):
  subprocess.run([BASH, '-n', script], check=True)


CONFIG, WORKDIR = '--config=CHECKOUT/configs/doremi/demo.py', '--workdir=CHECKOUT/runs/doremi-demo'


@pytest.mark.parametrize('given,want', [
  ([], [CONFIG, WORKDIR]),
  (['--config=a b.py:smoke'], ['--config=a b.py:smoke', WORKDIR]),
  (['--config', 'a b.py:smoke'], ['--config=a b.py:smoke', WORKDIR]),
  (['-config=a.py'], ['-config=a.py', WORKDIR]),
  (['-config', 'a.py'], ['-config=a.py', WORKDIR]),
  (['--workdir=d'], [CONFIG, '--workdir=d']),
  (['--workdir', 'd e'], [CONFIG, '--workdir=d e']),
  (['-workdir', 'd', '-config', 'a.py'], ['-config=a.py', '-workdir=d']),
  (['--config.seed=1', '--config.data.store=s', '--dry_run'],
   [CONFIG, WORKDIR, '--config.seed=1', '--config.data.store=s', '--dry_run']),
  (['--dry_run', '--config=a.py', '--config.seed=1', '--config', 'b.py'],
   ['--config=b.py', WORKDIR, '--dry_run', '--config.seed=1']),
])
def test_a_default_stands_only_where_nothing_is_given(checkout, given, want):
  done, calls = _local(checkout, *given)
  assert done.returncode == 0, done.stderr
  assert calls == [['-m', 'datasel.main', *(argument.replace('CHECKOUT', str(checkout)) for argument in want)]]


@pytest.mark.parametrize('flag', ['--config', '-config', '--workdir', '-workdir'])
def test_a_flag_without_its_value_is_refused_before_anything_is_built(checkout, flag):
  shutil.rmtree(checkout / '.venv')
  done, _ = _local(checkout, '--dry_run', flag)
  assert done.returncode == 2
  assert done.stderr == f'error: {flag} has no value; want {flag}=VALUE\n'
  assert not (checkout / '.venv').exists()


def test_an_environment_is_installed_into_again_when_setup_py_changed_and_then_reused(checkout):
  with open(checkout / 'setup.py', 'a') as f:
    f.write('# another requirement\n')
  (checkout / '.venv/bin/python.broken').touch()
  done, calls = _local(checkout)  # a failed installation is not taken for a whole one, and nothing is run in it
  assert done.returncode != 0 and 'datasel.main' not in str(calls)
  (checkout / '.venv/bin/python.broken').unlink()
  done, calls = _local(checkout)
  assert done.returncode == 0 and 'building the environment' in done.stderr
  assert [call[:3] for call in calls[1:]] == [['-m', 'pip', 'install'], ['-m', 'datasel.main', calls[2][2]]]
  assert calls[1][-1] == f'{checkout}[demo]'
  assert (checkout / '.venv/.datasel-stamp').read_text() == _stamp(checkout)
  done, calls = _local(checkout)
  assert done.stderr == '' and len(calls) == 1


def _posing(change):
  """A Python that takes itself for another one."""
  return f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; {change}\n$2"\n'


OLD = _posing('sys.version_info = (3, 10, 14)')
NO_VENV = _posing("sys.modules['ensurepip'] = None")
GOOD = _posing("sys.executable = 'the good one'")


def _find_python(folder, pythons, **environment):
  for name, text in pythons.items():
    _script(folder / name, text)
  return subprocess.run([BASH, '-c', f'. "{ROOT}/launch/environment.sh"; find_python', 'launch/local.sh'],
                        env={'PATH': str(folder), **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize('unfit', [OLD, NO_VENV, '#!/bin/sh\nexit 127\n'], ids=['old', 'no venv', 'broken'])
def test_a_python_that_would_not_do_is_passed_over(tmp_path, unfit):
  found = _find_python(tmp_path, {'named': unfit, 'python3.12': unfit, 'python3': GOOD, 'python': OLD},
                       PYTHON=str(tmp_path / 'named'))
  assert (found.returncode, found.stdout) == (0, 'the good one\n')


def test_the_python_that_is_named_goes_first(tmp_path):
  found = _find_python(tmp_path, {'python3.12': OLD}, PYTHON=sys.executable)
  assert (found.returncode, found.stdout) == (0, f'{sys.executable}\n')


def test_without_any_python_that_would_do_it_says_what_to_do(tmp_path):
  found = _find_python(tmp_path, {'python3.12': OLD, 'python3': NO_VENV}, PYTHON='/nowhere/python')
  assert (found.returncode, found.stdout) == (1, '')
  assert 'no Python 3.11 or newer' in found.stderr and 'PYTHON=/path/to/python bash launch/local.sh' in found.stderr
