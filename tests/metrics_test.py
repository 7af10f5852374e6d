"""Laws of metrics.jsonl: every line is whole, none is there twice, and what it says is what was written."""

import math

import pytest

from datasel import metrics, trackers

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


@pytest.mark.parametrize('line', ['[1, 2]', '3', '{"stage": "main", "kind": "train"}'])
def test_a_line_that_is_no_record_is_named(written, line):
  path = written / 'metrics.jsonl'
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(ValueError, match=rf'metrics\.jsonl, line {len(LINES) + 1} is no record'):
    metrics.read(written)


def test_a_tracker_that_fails_is_told_of_once_and_holds_up_neither_the_run_nor_the_others(tmp_path, caplog):
  (tmp_path / 'metrics').write_text('a file where CSV wants its folder')
  with metrics.Writer(tmp_path, trackers.chosen(tmp_path, {}, csv=True, tensorboard=True)) as writer:
    for stage, kind, step in LINES:
      writer.write(stage, kind, step, {'loss': 1.0})
    writer.rewind('proxy-0', 4)
  assert found(tmp_path) == LINES[:5]
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2
  [warning] = caplog.records
  assert 'tracking by Csv has ended' in warning.message and 'metrics.jsonl has all of it' in warning.message


def test_remaining_time_is_the_work_left_at_the_speed_seen():
  progress = metrics.Progress(100.0)
  assert math.isnan(progress.seconds_left)
  progress.skip(40)
  progress.add(20, seconds=4)
  assert progress.seconds_left == 8
  assert [metrics.clock(x) for x in (math.nan, 8, 61, 3723)] == ['?', '0:08', '1:01', '1:02:03']
