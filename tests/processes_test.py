"""Real processes on this machine make one run: stopped, it goes on with any number of them as if nothing had been."""

import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import processes_driver
import pytest
import small_run

from datasel import build, command_line, metrics, processes, sharding, workdir
from datasel.checkpoint import Checkpoints
from datasel.data.store import Store
from datasel.methods.pds import pmp
from datasel.methods.pretrain import run as pretrain

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = ('--config.model.n_kv_heads=2', '--config.tracking.tensorboard=false', '--config.train.eval_sequences=8')
STEPS, STOPPED = 6, 3


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('made')
  small_run.make_store(folder)
  small_run.write_config(folder / 'config.py', folder / 'store')
  return folder


@pytest.fixture(scope='module')
def launch(made, tmp_path_factory):
  compiled = tmp_path_factory.mktemp('compiled')

  def run(directory, *arguments, processes=1, devices=1, signals=None, config=made / 'config.py', of_each=None):
    """[(exit status, what it printed, the lines it recorded)] of each process.

    signals: {process: 'signal:step'}, which it sends itself.  of_each: {process: further arguments}.
    """
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      port = s.getsockname()[1]
    started = []
    for p in range(processes):
      record = directory.with_name(f'{directory.name}-{p}.jsonl')
      record.unlink(missing_ok=True)
      environment = os.environ | {
        'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(compiled),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'}
      if processes > 1:
        environment |= {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(processes),
                        'JAX_PROCESS_ID': str(p)}
      command = [sys.executable, str(ROOT / 'tests' / 'processes_driver.py'), str(record), (signals or {}).get(p, '-'),
                 f'--config={config}', f'--workdir={directory}', *SETTINGS, *arguments, *(of_each or {}).get(p, ()),
                 f'--distributed={str(processes > 1).lower()}']
      log = open(directory.with_name(f'{directory.name}-{p}.log'), 'w+', encoding='utf-8')
      started.append((subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log), log, record))
    ended = []
    for process, log, record in started:
      try:
        process.wait(timeout=240)
      finally:
        process.kill()
      log.seek(0)
      lines = record.read_text(encoding='utf-8').splitlines() if record.exists() else []
      ended.append((process.returncode, log.read(), [json.loads(line) for line in lines]))
      log.close()
    return ended

  return run


def succeeded(ended):
  assert [status for status, _, _ in ended] == [0] * len(ended), '\n'.join(printed for _, printed, _ in ended)
  return [recorded for _, _, recorded in ended]


def batches(recorded):
  """Of one process: the examples of each step, as 'domain/record'."""
  return [[f'{d}/{n}' for d, n in zip(line['domain'], line['example'])] for line in recorded if 'domain' in line]


def values(directory, kind):
  """{step: what was measured} from metrics.jsonl."""
  numbers = lambda line: np.array([line['loss'], line['grad_norm'], line['param_norm']] if kind == 'train' else
                                  [*line['nll'].values(), line['worst_nll']])
  lines = metrics.read(directory, 'main', kind)
  assert len({line['step'] for line in lines}) == len(lines)
  return {line['step']: numbers(line) for line in lines}


@pytest.fixture(scope='module')
def whole(launch, tmp_path_factory):
  """A run of one process that nothing disturbed: (its folder, its batches)."""
  directory = tmp_path_factory.mktemp('whole') / 'run'
  [recorded] = succeeded(launch(directory))
  return directory, batches(recorded)


@pytest.fixture(scope='module')
def stopped(launch, tmp_path_factory):
  """Two processes of two devices each, of which one got a SIGTERM in its third step: (folder, what each recorded)."""
  directory = tmp_path_factory.mktemp('stopped') / 'run'
  ended = launch(directory, '--config.mesh.fsdp=2', '--config.mesh.tensor=2', processes=2, devices=2,
                 signals={1: f'{int(signal.SIGTERM)}:{STOPPED}'})
  assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
  assert all(f'main: stopped after step {STOPPED} of {STEPS}' in printed for _, printed, _ in ended)
  assert 'process 1: SIGTERM' in ended[1][1] and 'SIGTERM' not in ended[0][1]
  assert ' loss ' in ended[0][1] and ' loss ' not in ended[1][1]  # one log, not one from each
  return directory, [recorded for _, _, recorded in ended]


def assert_continues(directory, whole):
  wanted_directory, _ = whole
  for kind in ('train', 'eval'):
    got, wanted = values(directory, kind), values(wanted_directory, kind)
    assert got.keys() == wanted.keys()
    for step in wanted:  # float32 sums in another order, through six steps of AdamW
      np.testing.assert_allclose(got[step], wanted[step], rtol=1e-5)
  assert workdir.read_json(directory / 'main' / 'stage.json')['finished']
  assert (directory / 'report.html').exists()


def test_two_processes_read_what_one_reads_each_its_part(stopped, whole):
  _, recorded = stopped
  first, second = map(batches, recorded)
  assert [a + b for a, b in zip(first, second, strict=True)] == whole[1][:STOPPED]


@pytest.mark.parametrize(('count', 'devices', 'mesh'), [(1, 1, (1, 1, 1)), (1, 4, (2, 2, 1)), (4, 1, (1, 2, 2))])
def test_a_stopped_run_goes_on_with_other_processes(launch, stopped, whole, tmp_path, count, devices, mesh):
  directory = shutil.copytree(stopped[0], tmp_path / 'run')
  shape = [f'--config.mesh.{axis}={n}' for axis, n in zip(('data', 'fsdp', 'tensor'), mesh)]
  recorded = [batches(lines) for lines in succeeded(launch(directory, *shape, processes=count, devices=devices))]
  if count == 4:  # two and two share a batch shard: both of them must have been fed its rows
    assert recorded[0] == recorded[1] and recorded[2] == recorded[3]
    recorded = [[a + b for a, b in zip(recorded[0], recorded[2], strict=True)]]
  assert recorded == [whole[1][STOPPED:]]
  assert_continues(directory, whole)


def test_a_checkpoint_is_restored_to_the_bit_on_any_mesh(made, stopped):
  directory, recorded = stopped
  saved = [shard for lines in recorded for line in lines if line.get('step') == STOPPED for shard in line['shards']]
  options = command_line.parse([f'--config={made / "config.py"}', f'--workdir={directory}', *SETTINGS])
  [stage] = pretrain.stages(options.config, Store(made / 'store'))
  for shape in ((1, 1, 1), (2, 1, 2), (1, 4, 1)):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:math.prod(shape)])
    program = build.stage_program(stage, options.config, mesh)
    with Checkpoints(directory / 'main' / 'checkpoints', keep=2) as checkpoints:
      step, state, _ = checkpoints.restore(program.abstract_state)
    assert step == STOPPED
    restored = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert restored.keys() == {name for name, _, _ in saved} and any('mu' in name for name in restored)
    for name, index, digest in saved:
      part = np.ascontiguousarray(restored[name][tuple(slice(*ends) for ends in index)])
      assert hashlib.sha256(part.tobytes()).hexdigest() == digest, (name, index)


def test_an_error_of_one_process_is_told_by_all_before_anything_is_computed(launch, tmp_path):
  ended = launch(tmp_path / 'run', processes=2, of_each={1: [f'--workdir={tmp_path / "elsewhere"}']})
  assert [status for status, _, _ in ended] == [2, 2]
  assert 'error: process 1 failed, looking for the workdir: ValueError: --workdir ' in ended[0][1]
  assert 'error: --workdir ' in ended[1][1] and 'is not the same folder on every host' in ended[1][1]
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_process_that_dies_takes_the_others_with_it(launch, tmp_path):
  ended = launch(tmp_path / 'run', '--config.mesh.fsdp=2', '--config.mesh.tensor=2', processes=2, devices=2,
                 signals={1: f'{int(signal.SIGKILL)}:2'})
  assert ended[1][0] == -signal.SIGKILL and ended[0][0] not in (0, 128 + signal.SIGTERM)


@pytest.fixture
def beside(monkeypatch):
  """beside(texts): this is process 0 of several, and the texts are what the others say."""

  def others(*texts):
    monkeypatch.setattr(processes, '_gather', lambda text: [text, *texts])
    monkeypatch.setattr(jax, 'process_count', lambda: 1 + len(texts))

  return others


def test_who_fails_raises_its_error_and_the_others_say_whose_it_was(beside):
  beside('', '')
  assert processes.together('working', lambda: 5) == processes.from_lead('working', lambda: 5) == 5
  beside('', 'OSError: no disk')
  with pytest.raises(processes.PeerFailed, match='process 2 failed, working: OSError: no disk'):
    processes.together('working', lambda: 5)
  beside('', 'ValueError: no such key')
  with pytest.raises(processes.PeerRefused, match='process 2 failed, working: ValueError: no such key'):
    processes.together('working', lambda: 5)
  with pytest.raises(ZeroDivisionError):
    processes.together('working', lambda: 1 // 0)


def test_processes_that_were_started_differently_are_refused(beside):
  beside('{"a": 1}')
  processes.agree('config', {'a': 1})
  beside('{"a": 1, "b": 0}', '{"a": 2, "b": 0}')
  with pytest.raises(ValueError, match='process 2 has another config: a 2 .process 0: 1.; start every process with'):
    processes.agree('config', {'a': 1, 'b': 0})


DOREMI = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('doremi')
  config.data.store = {store!r}
  config.data.length, config.data.block = {length}, 4096
  config.doremi = config_lib.doremi()
  config.doremi.baseline, config.doremi.train_main = 'tokens', False
  config.doremi.steps, config.doremi.batch_size = 3, 8
  config.model = config_lib.model('smoke')
  config.doremi.model = config_lib.model('smoke')
  for model in (config.model, config.doremi.model):
    model.vocab_size, model.n_layers, model.d_model, model.d_ff = {vocab}, 1, 16, 32
  config.train.log_every, config.train.checkpoint_every, config.train.eval_sequences = 1, 2, 4
  return config_lib.finish(config, arg)
'''


def test_doremi_on_two_processes_is_doremi_on_one(launch, made, tmp_path):
  config = tmp_path / 'doremi.py'
  config.write_text(DOREMI.format(store=str(made / 'store'), length=small_run.LENGTH, vocab=small_run.VOCAB))
  for name, count in (('one', 1), ('two', 2)):
    succeeded(launch(tmp_path / name, '--config.doremi.model.n_kv_heads=2', processes=count, config=config))
  nll = [np.load(tmp_path / name / 'reference_nll' / 'nll.npy') for name in ('one', 'two')]
  assert nll[0].any()
  np.testing.assert_allclose(*nll, rtol=1e-5, atol=1e-6)
  one, two = (workdir.read_json(tmp_path / name / 'proxy-0' / 'weights.json') for name in ('one', 'two'))
  for key in ('average', 'last'):
    assert max(abs(weight - 0.5) for weight in one[key].values()) > 1e-3
    np.testing.assert_allclose([*two[key].values()], [*one[key].values()], rtol=1e-5)
  assert (tmp_path / 'two' / 'report.html').exists() and workdir.read_json(tmp_path / 'two' / 'mixture.json')


def test_pmp_scores_of_two_processes_are_those_of_one_which_goes_on_with_their_work(launch, tmp_path):
  recorded = succeeded(launch(tmp_path / 'pmp', '--pmp', processes=2, devices=2))
  args, options = processes_driver.control_problem(jax.devices()[:1])
  want = pmp.solve(*args, **options)
  for [scores] in recorded:
    np.testing.assert_allclose(scores, want, rtol=0, atol=2e-5 * np.abs(want).max())
  args, options = processes_driver.control_problem(jax.devices())
  traces = []
  got = pmp.solve(*args, **options, directory=tmp_path / 'pmp', report=traces.append)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
  assert len(traces) == 1 + 2  # of theta_T, and of the two segments out of three that were left


@pytest.mark.parametrize(('variables', 'message'), [
  ({'JAX_PROCESS_ID': '0'}, 'JAX_PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES'),
  ({'JAX_COORDINATOR_ADDRESS': 'h', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}, "'h' has no port; want"),
  ({'JAX_COORDINATOR_ADDRESS': 'h:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, 'one of 0 ... number - 1'),
])
def test_half_a_cluster_is_refused(monkeypatch, variables, message):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    processes.join()
