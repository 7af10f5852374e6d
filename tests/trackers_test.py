"""Laws of the trackers: what a tool's own reader finds is what metrics.jsonl says, also after kills and restarts."""

import csv
import json
import os
import random
import sqlite3
import subprocess
import sys
import types

import pyarrow.csv
import pytest

from datasel import config as config_lib
from datasel import metrics, trackers

# What the processes of an interrupted run write: (stage, restored step or None, steps).  The second goes on from
# step 4 of the first; the third is killed before it writes.
PROCESSES = [[('round-1/reference', -1, (2, 9)), ('proxy-0', -1, (0, 2, 4, 6))], [('proxy-0', 4, (6, 8))],
             [('proxy-0', 8, ())]]


def values(step):
  return {'loss': step / 3, 'nll': {'code': 0.1 * step}}


def open_writer(directory, **wanted):
  return metrics.Writer(directory, trackers.chosen(directory, {'seed': 3, 'model.d_model': 8}, **wanted))


def write(writer, process):
  for stage, restored, steps in process:
    writer.rewind(stage, restored)
    for step in steps:
      writer.write(stage, 'train', step, values(step))


def test_csv_is_metrics_jsonl_as_tables_after_every_write_rewind_and_kill(tmp_path):
  draw, step = random.Random(0), dict.fromkeys(('main', 'main-2', 'round-1/proxy-0'), 0)
  columns = ['loss', 'a,b', 'odd "name"', 'time/mfu']
  writer, restarts, written = open_writer(tmp_path, csv=True), 0, set()
  for _ in range(150):
    stage = draw.choice(list(step))
    if draw.random() < 0.15:
      step[stage] = draw.randint(-1, step[stage])
      if draw.random() < 0.7:  # in a new process, after a kill that left half a row
        restarts, writer = restarts + 1, open_writer(tmp_path, csv=True)
        for kind in ('train', 'eval'):
          if (path := tmp_path / f'metrics/{stage}-{kind}.csv').exists():
            path.write_bytes(path.read_bytes() + b'7,')
      writer.rewind(stage, step[stage])
    else:
      step[stage] += 1
      named = {name: draw.random() for name in draw.sample(columns, draw.randint(1, 4))}
      kind = draw.choice(['train', 'eval'])
      written.add((stage, kind))
      writer.write(stage, kind, step[stage], named | {'nll': {'code': draw.random(), f'd{draw.randint(0, 2)}': 1.0}})
    assert csv_tables(tmp_path) == jsonl_tables(tmp_path, written)
  assert restarts > 5 and sum(map(len, csv_tables(tmp_path).values())) > 20


def csv_tables(directory):
  folder, found = directory / 'metrics', {}
  for path in folder.rglob('*.csv'):
    stage, _, kind = str(path.relative_to(folder).with_suffix('')).rpartition('-')
    rows = pyarrow.csv.read_csv(path).to_pylist()
    found[stage, kind] = [{name: x for name, x in row.items() if x is not None} for row in rows]
  return found


def jsonl_tables(directory, pairs):
  tables = {}
  for stage, kind in pairs:
    for line in metrics.read(directory, stage, kind):
      row = {name: x for name, x in line.items() if not isinstance(x, dict)}
      row |= {f'{name}/{key}': x for name, inner in line.items() if isinstance(inner, dict) for key, x in inner.items()}
      tables.setdefault((stage, kind), []).append({k: x for k, x in row.items() if k not in ('stage', 'kind')})
  return tables


def test_a_csv_file_begins_with_the_step_and_one_header(tmp_path):
  with open_writer(tmp_path, csv=True) as writer:
    write(writer, PROCESSES[0])
  with open(tmp_path / 'metrics/round-1/reference-train.csv', newline='') as f:
    assert list(csv.reader(f)) == [['step', 'loss', 'nll/code'], ['2', str(2 / 3), '0.2'], ['9', '3.0', str(0.1 * 9)]]


@pytest.fixture
def shown(monkeypatch):
  """shown(folder, tag) -> [(step, value)] that TensorBoard itself shows."""
  had = 'tensorflow' in sys.modules
  monkeypatch.setitem(sys.modules, 'tensorboard.compat.notf', types.ModuleType('notf'))  # its switch: no TensorFlow
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  def read(folder, tag):
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]

  yield read
  assert had or 'tensorflow' not in sys.modules


def test_tensorboard_shows_each_step_of_a_resumed_stage_once_and_all_of_the_others(tmp_path, shown):
  for process in PROCESSES:
    with open_writer(tmp_path, tensorboard=True) as writer:
      write(writer, process)
  for tag, of in (('train/loss', 1 / 3), ('train/nll/code', 0.1)):
    for stage, steps in (('proxy-0', (0, 2, 4, 6, 8)), ('round-1/reference', (2, 9))):
      want = [(step, pytest.approx(of * step)) for step in steps]
      assert shown(tmp_path / 'tensorboard' / stage, tag) == want, stage


def test_tensorboard_hides_what_was_written_before_any_restart(tmp_path, shown):
  for restored, value in ((None, 1.0), (2, 2.0)):
    with open_writer(tmp_path, tensorboard=True) as writer:
      if restored is not None:
        writer.rewind('main', restored)
      for step in (2, 4) if restored is None else (4,):
        writer.write('main', 'eval', step, {'loss': value})
  assert shown(tmp_path / 'tensorboard/main', 'eval/loss') == [(2, 1.0), (4, 2.0)]


def test_a_stage_begun_again_from_nothing_shows_nothing_of_before_in_tensorboard(tmp_path, shown):
  for value in (1.0, 2.0):
    with open_writer(tmp_path, tensorboard=True) as writer:
      writer.rewind('main', -1)
      writer.write('main', 'eval', 0, {'loss': value})
  assert shown(tmp_path / 'tensorboard/main', 'eval/loss') == [(0, 2.0)]


@pytest.fixture
def wandb(monkeypatch, tmp_path):
  """Weights & Biases without an account or a network: it keeps what it would send."""
  import wandb as package
  for name in [name for name in os.environ if name.startswith('WANDB_')]:
    monkeypatch.delenv(name)
  for name in ('WANDB_MODE', 'HOME', 'WANDB_CONFIG_DIR', 'WANDB_CACHE_DIR', 'WANDB_DATA_DIR'):
    monkeypatch.setenv(name, 'offline' if name == 'WANDB_MODE' else str(tmp_path / 'home'))
  monkeypatch.setenv('WANDB_SILENT', 'true')
  yield
  package.teardown()  # it keeps its settings for the life of a process


def sent(directory):
  """The records of all processes of a run, as Weights & Biases would upload them: its files are LevelDB logs."""
  from wandb.proto import wandb_internal_pb2
  records = []
  for path in sorted(directory.glob('wandb/offline-run-*/*.wandb'), key=lambda path: path.stat().st_mtime_ns):
    content, at, parts = path.read_bytes(), 7, b''  # after the file's header
    while at + 7 <= len(content):
      if 2 ** 15 - at % 2 ** 15 < 7:  # no header is split over two blocks
        at += 2 ** 15 - at % 2 ** 15
        continue
      length, kind = int.from_bytes(content[at + 4:at + 6], 'little'), content[at + 6]
      parts += content[at + 7:at + 7 + length]
      at += 7 + length
      if kind in (1, 4):  # whole, or the last part
        records.append(wandb_internal_pb2.Record.FromString(parts))
        parts = b''
  return records


def test_weights_and_biases_has_every_record_in_one_run_with_an_axis_for_each_stage(tmp_path, wandb):
  directory = tmp_path / 'a'
  for process in PROCESSES:
    with open_writer(directory, wandb_project='p') as writer:
      write(writer, process)
  records = sent(directory)
  runs = [record.run for record in records if record.HasField('run')]
  assert {(run.project, run.display_name, run.run_id) for run in runs} == {
    ('p', 'a', (directory / 'wandb_id.txt').read_text())}
  assert {item.key or '.'.join(item.nested_key): item.value_json for item in runs[0].config.update}['seed'] == '3'
  axes = {(r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField('metric') and r.metric.glob_name}
  assert axes == {(f'{stage}/*', f'{stage}/step') for stage in ('round-1/reference', 'proxy-0')}
  logged = []
  for record in records:
    row = {item.key or '/'.join(item.nested_key): item.value_json for item in record.history.item}
    logged += [{name: float(x) for name, x in row.items() if not name.startswith('_')}] if row else []
  assert logged == [
    {f'{stage}/step': step, f'{stage}/train/loss': step / 3, f'{stage}/train/nll/code': 0.1 * step}
    for process in PROCESSES for stage, _, steps in process for step in steps]


def test_an_account_that_does_not_work_stops_a_new_run_and_not_one_that_goes_on(tmp_path, wandb, monkeypatch, caplog):
  monkeypatch.setenv('WANDB_MODE', 'online')
  new, old = tmp_path / 'new', tmp_path / 'old'
  with pytest.raises(Exception, match='No API key'):
    open_writer(new, wandb_project='p')
  assert not (new / 'wandb_id.txt').exists()
  old.mkdir()
  (old / 'wandb_id.txt').write_text('abc')
  with open_writer(old, wandb_project='p') as writer:
    write(writer, PROCESSES[0])
  assert len(metrics.read(old)) == 6 and caplog.text.count('tracking by WeightsAndBiases has ended') == 1


_PROCESS = """
import os, pathlib, sys, time
sys.path.insert(0, 'tests')
import trackers_test as test
directory, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])
writer = test.open_writer(directory, trackio_project='p')
test.write(writer, test.PROCESSES[number])
if number == 0:
  time.sleep(1)  # Trackio writes a moment later
  os._exit(9)  # killed
writer.__exit__()
"""


def test_trackio_has_every_record_in_one_run_that_a_killed_process_began(tmp_path):
  # In processes of their own: Trackio reads its variables when it is imported.
  environment = os.environ | {'TRACKIO_DIR': str(tmp_path / 'trackio'), 'HF_HUB_OFFLINE': '1'}
  for name in ('TRACKIO_SPACE_ID', 'TRACKIO_SERVER_URL'):
    environment.pop(name, None)
  for number in range(3):
    done = subprocess.run([sys.executable, '-c', _PROCESS, tmp_path / 'a', str(number)], env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == (9 if number == 0 else 0), done.stderr
  with sqlite3.connect(tmp_path / 'trackio/p.db') as db:
    rows = db.execute('SELECT run_id, run_name, step, metrics FROM metrics').fetchall()
  name = (tmp_path / 'a/trackio_run.txt').read_text()
  [(_, known)] = {row[:2] for row in rows}
  assert known == f'a-{name[:8]}'
  want = {(stage, step) for process in PROCESSES for stage, _, steps in process for step in steps}
  found = {}
  for *_, step, row in rows:
    for key, x in json.loads(row).items():
      found.setdefault((key, step), set()).add(x)
  assert found == {(f'{stage}/train/{name}', step): {x} for stage, step in want
                   for name, x in (('loss', step / 3), ('nll/code', 0.1 * step))}


@pytest.mark.parametrize('package', ['wandb', 'trackio'])
def test_a_tracker_asked_for_but_not_installed_is_bad_input_that_says_how_to_get_it(tmp_path, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  config = config_lib.base('pretrain')
  config.data.store = 'somewhere'
  config.pretrain = config_lib.pretrain()
  config_lib.check(config)
  config.tracking[f'{package}_project'] = 'p'
  with pytest.raises(ValueError, match=rf"tracking\.{package}_project is set.*pip install 'datasel\[track\]'"):
    config_lib.check(config)
  with pytest.raises(ImportError, match='not installed'):
    trackers.chosen(tmp_path, {}, **config.tracking)
  assert not list(tmp_path.iterdir())
