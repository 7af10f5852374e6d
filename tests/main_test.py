"""Laws of the launcher: a run goes on only as what it began as, alone, on the data it began with."""

import errno
import fcntl
import json
import shutil
import signal

import pytest
import small_run

from datasel import build, command_line, main, processes, train, workdir
from datasel.methods.pretrain import run as pretrain

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp('made')
  small_run.make_store(folder)
  return folder


@pytest.fixture(scope='module')
def finished(made, tmp_path_factory):
  """The workdir of a finished run; tests that change it take a copy."""
  directory = tmp_path_factory.mktemp('finished')
  config = small_run.write_config(made / 'config.py', made / 'store')
  assert main.main([f'--config={config}', f'--workdir={directory}', '--config.profile_steps=2']) == 0
  return directory


@pytest.fixture
def run(made, tmp_path, capsys):
  """run(workdir, *arguments) -> (exit status, everything printed)"""

  def call(directory, *arguments):
    config = small_run.write_config(tmp_path / 'config.py', made / 'store')
    status = main.main([f'--config={config}', f'--workdir={directory}', *arguments])
    printed = capsys.readouterr()
    return status, printed.out + printed.err

  return call


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'run')


def test_a_run_leaves_what_it_promises(finished):
  for name in ('config.json', 'environment.json', 'data.json', 'metrics.jsonl', 'mixture.json', 'report.html',
               'main/stage.json'):
    assert (finished / name).stat().st_size > 0, name
  assert list((finished / 'tensorboard').iterdir())
  assert list((finished / 'profile' / 'main').rglob('*.xplane.pb'))


def test_a_run_that_is_repeated_repeats_its_metrics(finished, run, tmp_path):
  assert run(tmp_path / 'again')[0] == 0
  assert small_run.timeless(tmp_path / 'again') == small_run.timeless(finished)


def test_a_finished_run_is_not_trained_again(copy, run, monkeypatch):
  (copy / 'report.html').unlink()
  before = (copy / 'metrics.jsonl').read_bytes()
  monkeypatch.setattr(train.Program, 'put', None)  # no batch could reach the device
  assert run(copy, '--config.profile_steps=0', '--config.tracking.tensorboard=false')[0] == 0
  assert (copy / 'metrics.jsonl').read_bytes() == before
  assert (copy / 'report.html').exists()


def test_another_config_is_refused_with_what_differs(copy, run):
  status, printed = run(copy, '--config.optimizer.peak_lr=0.5', '--config.seed=3', '--config.data.prefetch=3')
  assert status == 2
  for told in ('optimizer.peak_lr: 0.001 -> 0.5', 'seed: 0 -> 3', str(copy), 'another --workdir'):
    assert told in printed
  assert 'prefetch' not in printed and 'peak_lr: ' in printed


def test_two_processes_do_not_share_a_run(copy, run):
  with open(copy / '.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    status, printed = run(copy)
  assert status == 1 and f'another process is running in {copy}' in printed


def test_a_run_refuses_another_store_than_it_began_with(copy, run, tmp_path):
  store = small_run.make_store(tmp_path / 'other', vocab_size=350)
  status, printed = run(copy, f'--config.data.store={store}')
  assert status == 2 and f'{store} (digest ' in printed and 'is not the store that this run began with' in printed


def test_a_store_that_is_gone_is_missed_and_found_in_its_new_place(copy, run, made, tmp_path):
  status, printed = run(copy, f'--config.data.store={tmp_path / "gone"}')
  assert status == 2 and f'no longer in {tmp_path / "gone"}' in printed and '--config.data.store' in printed
  moved = shutil.copytree(made / 'store', tmp_path / 'moved')
  assert run(copy, f'--config.data.store={moved}')[0] == 0
  assert workdir.read_json(copy / 'data.json')['store'] == str(moved)


def test_a_dry_run_compiles_prints_and_leaves_no_run_behind(run, tmp_path, made):
  directory = tmp_path / 'dry'
  status, printed = run(directory, '--dry_run')
  assert status == 0 and 'nothing trained' in printed
  table = [line.split() for line in printed.splitlines() if line.startswith(('stage', 'main'))]
  assert table[0][-1] == 'GiB/device' and float(table[1][-1]) >= 0
  assert not {'config.json', 'data.json', 'metrics.jsonl', 'main'} & {p.name for p in directory.iterdir()}
  other = small_run.make_store(tmp_path / 'other', vocab_size=350)
  assert run(directory, f'--config.data.store={other}')[0] == 0
  assert workdir.read_json(directory / 'data.json')['store'] == str(other)


def test_a_run_that_was_refused_may_begin_with_another_config(run, tmp_path):
  directory = tmp_path / 'run'
  status, printed = run(directory, f'--config.pretrain.mixture={tmp_path / "missing.json"}')
  assert status == 2 and 'neither one of' in printed
  assert run(directory, '--config.pretrain.mixture=uniform')[0] == 0


def test_flags_may_be_written_with_spaces(tmp_path):
  config = small_run.write_config(tmp_path / 'config.py', tmp_path)
  with_equals = [f'--config={config}', f'--workdir={tmp_path}', '--config.mesh.fsdp=-1', '--config.mesh.data=1',
                 '--config.tracking.tensorboard=false', '--dry_run']
  one, two = (command_line.parse(argv) for argv in (with_equals, ' '.join(with_equals).replace('=', ' ').split()))
  assert one.config.mesh.fsdp == -1 and not one.config.tracking.tensorboard
  assert one.flag_values_dict() == two.flag_values_dict() and two.dry_run


def test_the_resolved_config_is_printed(run, tmp_path):
  status, printed = run(tmp_path, '--print_config', '--config.train.steps=7')
  assert status == 0 and json.loads(printed)['train.steps'] == 7


def test_an_interrupted_run_exits_as_one_that_was_terminated(run, tmp_path, monkeypatch):
  def interrupted(config, directory, store):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(pretrain, 'run', interrupted)
  status, printed = run(tmp_path / 'run')
  assert status == 128 + signal.SIGTERM
  assert 'the same command continues it' in printed and 'Traceback' not in printed


@pytest.mark.parametrize(('error', 'expected'), [(ValueError('half a cluster'), 2), (RuntimeError('too late'), 1)])
def test_a_host_that_does_not_come_may_be_there_the_next_time(run, tmp_path, monkeypatch, error, expected):
  def join():
    raise error

  monkeypatch.setattr(processes, 'join', join)
  status, printed = run(tmp_path / 'run', '--distributed')
  assert status == expected and f'error: {error}' in printed


def test_a_full_disk_is_said_in_words(run, tmp_path, monkeypatch):
  def full(*args, **others):
    raise OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl')

  monkeypatch.setattr(build, 'train_stage', full)
  status, printed = run(tmp_path / 'run')
  assert status == 1
  assert 'the disk is full' in printed and 'free some space and repeat the command' in printed
  assert 'Traceback' not in printed


def test_an_unforeseen_error_keeps_its_stack_in_a_file(run, tmp_path, monkeypatch):
  monkeypatch.setattr(build, 'train_stage', None)
  status, printed = run(tmp_path / 'run')
  assert status == 1 and 'Traceback' not in printed and str(tmp_path / 'run' / 'traceback.txt') in printed
  assert 'NoneType' in (tmp_path / 'run' / 'traceback.txt').read_text()
