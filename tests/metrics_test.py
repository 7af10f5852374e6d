"""Laws of metrics.jsonl: every line is whole, none is there twice, and what it says is what was written."""

import math
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from datasel import metrics

LINES = [('reference', 'train', 2), ('reference', 'eval', 4), ('proxy-0', 'train', 2), ('proxy-0', 'train', 4),
         ('proxy-0', 'eval', 4), ('proxy-0', 'train', 6)]


@pytest.fixture
def written(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    for stage, kind, step in LINES:
      writer.write(stage, kind, step, {'loss': step / 3, 'nll': {'code': 0.1 * step}})
  return tmp_path


def found(directory):
  return [(line['stage'], line['kind'], line['step']) for line in metrics.read(directory)]


def test_what_is_read_is_what_was_written(written):
  assert found(written) == LINES
  assert metrics.read(written, 'proxy-0', 'eval') == [
    {'stage': 'proxy-0', 'kind': 'eval', 'step': 4, 'loss': 4 / 3, 'nll': {'code': 0.1 * 4}}]
  assert metrics.read(written / 'nowhere') == []


@pytest.mark.parametrize('step,kept', [(-1, 2), (0, 2), (2, 3), (4, 5), (5, 5), (6, 6)])
def test_rewinding_drops_what_came_after_in_that_stage_alone(written, step, kept):
  metrics.Writer(written).rewind('proxy-0', step)
  assert found(written) == LINES[:kept]


def test_a_half_written_line_is_neither_read_nor_kept(written):
  path = written / 'metrics.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole + whole.splitlines()[-1][:20])
  assert found(written) == LINES
  writer = metrics.Writer(written)
  writer.rewind('main', 0)
  assert path.read_bytes() == whole
  writer.write('main', 'train', 1, {'loss': 1.0})
  assert found(written) == [*LINES, ('main', 'train', 1)]


def test_a_damaged_line_is_named(written):
  path = written / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([*lines[:2], lines[2][:-10] + '\n', *lines[3:]]))
  with pytest.raises(ValueError, match=r'metrics\.jsonl, line 3 is not valid JSON'):
    metrics.read(written)


def test_a_value_that_json_has_no_word_for_is_refused_and_leaves_no_line(written):
  with pytest.raises(ValueError, match='JSON'):
    metrics.Writer(written).write('main', 'train', 1, {'loss': math.nan})
  assert found(written) == LINES


def test_tensorboard_files_hold_the_values_and_need_no_tensorflow(tmp_path):
  had = 'tensorflow' in sys.modules
  with metrics.Writer(tmp_path, tensorboard=True) as writer:
    writer.write('main', 'eval', 3, {'uniform_nll': 2.5, 'nll': {'code': 1.5}})
  assert had or 'tensorflow' not in sys.modules
  assert shown(tmp_path / 'tensorboard/main') == [(3, 'eval/uniform_nll', 2.5), (3, 'eval/nll/code', 1.5)]


def test_tensorboard_shows_each_step_of_a_resumed_stage_once_and_all_of_the_others(tmp_path):
  for restored, steps in ((-1, (0, 2, 4, 6)), (4, (6, 8)), (8, ())):  # three processes; the last is killed at once
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
      if restored == -1:
        for step in (2, 9):
          writer.write('reference', 'train', step, {'loss': 1.0})
      writer.rewind('proxy-0', restored)
      for step in steps:
        writer.write('proxy-0', 'train', step, {'loss': restored})
  assert shown(tmp_path / 'tensorboard/proxy-0') == [
    (0, 'train/loss', -1), (2, 'train/loss', -1), (4, 'train/loss', -1), (6, 'train/loss', 4), (8, 'train/loss', 4)]
  assert [step for step, *_ in shown(tmp_path / 'tensorboard/reference')] == [2, 9]


def test_a_stage_begun_again_from_nothing_shows_nothing_of_before_in_tensorboard(tmp_path):
  for value in (1.0, 2.0):
    with metrics.Writer(tmp_path, tensorboard=True) as writer:
      writer.rewind('main', -1)
      writer.write('main', 'eval', 0, {'loss': value})
  assert shown(tmp_path / 'tensorboard/main') == [(0, 'eval/loss', 2.0)]


def shown(folder):
  """(step, tag, value) that TensorBoard shows: files in order of their names; a start hides steps from its own on.

  Not the first start of a folder: that is no restart.
  """
  seen, started = [], False
  for path in sorted(folder.iterdir()):
    for event in events(path.read_bytes()):
      if event.session_log.status == event_pb2.SessionLog.START:
        seen = [value for value in seen if not started or value[0] < event.step]
        started = True
      seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return seen


def events(content):
  """The events of a file: records of length (8 bytes), its checksum (4), message, checksum (4)."""
  while content:
    [size] = struct.unpack('<Q', content[:8])
    yield event_pb2.Event.FromString(content[12:12 + size])
    content = content[16 + size:]


def test_weights_and_biases_asked_for_but_absent_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match="pip install 'datasel"):
    metrics.Writer(tmp_path, wandb_project='p')
  assert not list(tmp_path.iterdir())


@pytest.fixture
def wandb(monkeypatch):
  """Stands in for the service, which needs an account: keeps the calls made of it, in order."""
  calls = []
  run = types.SimpleNamespace(
    log=lambda values: calls.append(('log', values)), finish=lambda: calls.append(('finish',)),
    define_metric=lambda name, step_metric: calls.append(('define', name, step_metric)))

  def init(*, project, config, dir, id, resume):
    calls.append(('init', project, id, resume))
    return run

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  return calls


def test_a_restart_continues_the_same_weights_and_biases_run_and_another_workdir_is_another_run(tmp_path, wandb):
  for workdir in ('a', 'a', 'b'):
    metrics.Writer(tmp_path / workdir, wandb_project='p', config={'seed': 0}).__exit__()
  (_, project, first, resume), _, (*_, again, _), _, (*_, other, _), _ = wandb
  assert (project, resume) == ('p', 'allow')
  assert first == again == (tmp_path / 'a/wandb_id.txt').read_text()
  assert other != first and first.isalnum()


def test_each_stage_has_its_own_axis_of_steps_stated_once_before_its_values(tmp_path, wandb):
  with metrics.Writer(tmp_path, wandb_project='p') as writer:
    for stage, kind, step in LINES:
      writer.write(stage, kind, step, {'nll': {'code': 0.5}})
  sent = [('log', {f'{stage}/{kind}/nll/code': 0.5, f'{stage}/step': step}) for stage, kind, step in LINES]
  assert wandb[1:] == [('define', 'reference/*', 'reference/step'), *sent[:2],
                       ('define', 'proxy-0/*', 'proxy-0/step'), *sent[2:], ('finish',)]


def test_remaining_time_is_the_work_left_at_the_speed_seen():
  progress = metrics.Progress(100.0)
  assert math.isnan(progress.seconds_left)
  progress.skip(40)
  progress.add(20, seconds=4)
  assert progress.seconds_left == 8
  assert [metrics.clock(x) for x in (math.nan, 8, 61, 3723)] == ['?', '0:08', '1:01', '1:02:03']
