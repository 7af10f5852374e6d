"""The whole command, killed at its worst moments, ends as if nothing had happened."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_run

from datasel import workdir

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'doremi' / 'demo.py'

# Runs `datasel.main` and sends its own process a signal at the first event that matches: a log line, a file about to
# get its name, a checkpoint on its way to disk.  SIGKILL leaves no chance to tidy up.
DRIVER = '''
import logging, os, re, sys
from datasel import checkpoint, main

EVENTS = {
  'log': (logging.Logger, 'handle', lambda logger, record: record.getMessage()),
  'file': (os, 'replace', lambda source, target: str(target)),
  'save': (checkpoint.Checkpoints, '_finish', lambda self, step, arrays: f'{self._steps} {step}'),
}

def signal_at(kind, pattern, signum):
  owner, name, tell = EVENTS[kind]
  original = getattr(owner, name)
  def watched(*args):
    if re.search(pattern, tell(*args)):
      os.kill(os.getpid(), int(signum))
    return original(*args)
  setattr(owner, name, watched)

if __name__ == '__main__':
  if sys.argv[1]:
    signal_at(*sys.argv[1:4])
  sys.exit(main.main(sys.argv[4:]))
'''

MOMENTS = [
  ('log', 'training a tokenizer', signal.SIGKILL),
  ('file', r'offline-\w+-bpe\d+-64$', signal.SIGKILL),  # the finished token store is about to get its name
  ('save', 'reference/checkpoints/steps 8', signal.SIGKILL),  # the files of the checkpoint are half there
  ('file', r'reference/checkpoints/digests/12\.json$', signal.SIGKILL),  # the checkpoint is there, not yet proven
  ('file', r'reference_nll/partial\.json$', signal.SIGKILL),
  ('log', r'^proxy-0 +10/12', signal.SIGKILL),
  ('log', r'^main-baseline +2/12', signal.SIGTERM),
  ('log', r'^main-tuned +2/12', signal.SIGINT),
]


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  shared = tmp_path_factory.mktemp('shared')
  driver = shared / 'driver.py'
  driver.write_text(DRIVER)

  def run(directory, kind='', pattern='', signum=signal.SIGKILL):
    """(exit status, what it printed) of the smoke run; its process gets `signum` at the event, if it comes."""
    environment = os.environ | {
      'DATASEL_CACHE': str(shared / 'cache'), 'JAX_COMPILATION_CACHE_DIR': str(shared / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': '--xla_backend_optimization_level=0'}
    command = [sys.executable, str(driver), kind, pattern, str(int(signum)), f'--config={CONFIG}:smoke',
               f'--workdir={directory}', '--config.tracking.tensorboard=false']
    ended = subprocess.run(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, check=False, timeout=300)
    return ended.returncode, ended.stdout

  return run


@pytest.fixture(scope='module')
def killed(command, tmp_path_factory):
  """The run that was stopped at each of the moments.  It comes first, so it prepares its data itself."""
  directory = tmp_path_factory.mktemp('killed')
  for kind, pattern, signum in MOMENTS:
    status, printed = command(directory, kind, pattern, signum)
    if signum == signal.SIGKILL:
      assert status == -signal.SIGKILL, f'{pattern}\n{printed}'
    else:
      assert status == 128 + signal.SIGTERM, f'{pattern}\n{printed}'
      assert 'Traceback' not in printed and 'stopped after step 3 of 12' in printed
  status, printed = command(directory)
  assert status == 0, printed
  return directory


@pytest.fixture(scope='module')
def left_alone(killed, command, tmp_path_factory):
  directory = tmp_path_factory.mktemp('left_alone')
  status, printed = command(directory)
  assert status == 0, printed
  return directory


def final_params(directory):
  """{stage: {name: bytes}} of the newest checkpoints."""
  found = {}
  for stage in ('reference', 'proxy-0', 'main-baseline', 'main-tuned'):
    step = directory / stage / 'checkpoints' / 'steps' / '12'
    with ocp.StandardCheckpointer() as checkpointer:
      leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(step / 'params'))
    found[stage] = {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}
  return found


def test_a_run_killed_at_its_worst_moments_ends_as_one_left_alone(killed, left_alone):
  assert small_run.timeless(killed) == small_run.timeless(left_alone)
  for artefact in ('mixture.json', 'proxy-0/weights.json', 'summary.json'):
    assert workdir.read_json(killed / artefact) == workdir.read_json(left_alone / artefact)
  assert (killed / 'reference_nll/nll.npy').read_bytes() == (left_alone / 'reference_nll/nll.npy').read_bytes()
  got, wanted = final_params(killed), final_params(left_alone)
  assert got == wanted and wanted['main-tuned'] != wanted['main-baseline']


def test_a_finished_run_is_only_reported_again(command, left_alone):
  metrics = (left_alone / 'metrics.jsonl').read_bytes()
  report = (left_alone / 'report.html').stat().st_size
  (left_alone / 'report.html').unlink()
  status, printed = command(left_alone, 'log', r' \d+/12 ')  # killed if it trained
  assert status == 0, printed
  assert (left_alone / 'metrics.jsonl').read_bytes() == metrics
  assert (left_alone / 'report.html').stat().st_size > report / 2
