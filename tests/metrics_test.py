"""Laws of metrics.jsonl: every line is whole, none is there twice, and what it says is what was written."""

import math
import struct
import sys

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
  [path] = (tmp_path / 'tensorboard').iterdir()
  assert list(events(path.read_bytes())) == [(3, 'main/eval/uniform_nll', 2.5), (3, 'main/eval/nll/code', 1.5)]


def events(content):
  """(step, tag, value) of an event file: records of length (8 bytes), its checksum (4), message, checksum (4)."""
  while content:
    [size] = struct.unpack('<Q', content[:8])
    event = event_pb2.Event.FromString(content[12:12 + size])
    content = content[16 + size:]
    yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)


def test_weights_and_biases_asked_for_but_absent_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match="pip install 'datasel"):
    metrics.Writer(tmp_path, wandb_project='p')


def test_remaining_time_is_the_work_left_at_the_speed_seen():
  progress = metrics.Progress(100.0)
  assert math.isnan(progress.seconds_left)
  progress.skip(40)
  progress.add(20, seconds=4)
  assert progress.seconds_left == 8
  assert [metrics.clock(x) for x in (math.nan, 8, 61, 3723)] == ['?', '0:08', '1:01', '1:02:03']
