"""Laws of the swarm's tables: what is written is read, rows are joined by id, a flaw is refused by its place."""

import csv
import pathlib

import numpy as np
import pytest

from datasel.methods.regmix import tables

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'regmix'


def written(tmp_path, text, name='t.csv'):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_the_published_files_are_read_as_they_are():
  mixtures = tables.read_mixtures(GOLDEN / 'train_mixture_1m.csv')
  losses = tables.read(GOLDEN / 'train_pile_loss_1m.csv')
  assert mixtures.values_NxC.shape == (512, 17) and losses.values_NxC.shape == (512, 13)
  assert mixtures.columns[0] == 'train_the_pile_arxiv' and losses.columns[-1].startswith('metric/')
  with open(GOLDEN / 'train_mixture_1m.csv', newline='') as f:
    for n, row in enumerate(csv.DictReader(f)):
      assert row.pop('index') == mixtures.index_N[n]
      assert list(map(float, row.values())) == mixtures.values_NxC[n].tolist()


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
  values = np.random.default_rng(0).normal(size=(5, 3)) * 10.0 ** np.arange(-8, -3)[:, None]
  table = tables.Table(('web', 'a, "b"', 'é'), ('x', '2', '3', '4', '05'), values)
  tables.write(tmp_path / 't.csv', table)
  again = tables.read(tmp_path / 't.csv')
  assert (again.columns, again.index_N) == (table.columns, table.index_N)
  assert again.values_NxC.tobytes() == values.tobytes()


def test_spreadsheets_are_read(tmp_path):
  """A byte order mark, Windows line ends, spaces, blank lines, `index` not first."""
  path = written(tmp_path, b'\xef\xbb\xbfa, index,b\r\n 0.25,p1, 7.5e-1\r\n\r\n1,p2,0\r\n\r\n')
  table = tables.read_mixtures(path)
  assert table.columns == ('a', 'b') and table.index_N == ('p1', 'p2')
  assert table.values_NxC.tolist() == [[0.25, 0.75], [1, 0]]


def test_rows_are_joined_by_id():
  mixtures = tables.Table(('a', 'b'), ('1', '2', '3'), [[1, 0], [0.5, 0.5], [0, 1]])
  losses = tables.Table(('x',), ('3', '1', '2'), [[30], [10], [20]])
  weights, values = tables.join(mixtures, losses)
  assert weights.tolist() == [[1, 0], [0.5, 0.5], [0, 1]] and values.tolist() == [[10], [20], [30]]


@pytest.mark.parametrize('mine, theirs, wanted', [
  (('1', '2', '3'), ('1', '2'), r"1 ids have a mixture but not losses: 3"),
  (('1',), ('1', '2', '02'), r"2 ids have losses but not a mixture: 2, 02")])
def test_an_id_of_one_side_only_is_refused(mine, theirs, wanted):
  table = lambda ids: tables.Table(('a',), ids, np.ones((len(ids), 1)))
  with pytest.raises(ValueError, match=wanted):
    tables.join(table(mine), table(theirs))


def test_columns_are_matched_by_name():
  table = tables.Table(('a', 'b'), ('1',), [[0.25, 0.75]])
  assert table.select(('b', 'a')).values_NxC.tolist() == [[0.75, 0.25]] and table.column('b').tolist() == [0.75]
  with pytest.raises(ValueError, match="no column 'web1'.*the columns are a, b"):
    table.select(('a', 'b', 'web1'))
  with pytest.raises(ValueError, match="unknown column 'b'; want only a"):
    table.select(('a',))
  with pytest.raises(ValueError, match=r"no column 'train_web' \(close: train_web2\)"):
    tables.Table(('train_web2',), ('1',), [[1]]).column('train_web')


@pytest.mark.parametrize('text, wanted', [
  ('', r't\.csv is empty'),
  ('a,b\n1,2\n', r"t\.csv, line 1: no column 'index'.*the columns are a, b"),
  ('index,a\n', r't\.csv has 0 rows of 1 columns'),
  ('index\n1\n', r't\.csv has 1 rows of 0 columns'),
  ('index,a,b,a\n1,2,3,4\n', r"line 1: column 'a' is there more than once"),
  ('index,a,\n1,2,3\n', r'line 1: column 3 has no name'),
  ('index,a\n1,2\n7,2\n1,3\n', r"line 4, column 'index': '1' is the id of line 2 too"),
  ('index,a\n,2\n', r"line 2, column 'index': got nothing"),
  ('index,a,b\n1,2,3\n2,2\n', r'line 3: 2 values, want 3'),
  ('index,a,b\n1,2,3,4\n', r'line 2: 4 values, want 3'),
  ('index,a,b\n1,2,\n', r"line 2, column 'b': got '', want a finite number"),
  ('index,a\n1,2\n2,nan\n', r"line 3, column 'a': got 'nan'"),
  ('index,a\n1,-inf\n', r"line 2, column 'a': got '-inf'"),
  ('index,a\n1,1e999\n', r"line 2, column 'a': got '1e999'"),
  ('index,a\n1,1_0\n', r"line 2, column 'a': got '1_0'"),
  ('index,a\n1,"0,5"\n', r"line 2, column 'a': got '0,5'"),
  ('index,a\n1,"x\n', r't\.csv is not a CSV file'),
  (b'index,a\n1,\xff\n', r't\.csv is not a CSV file')])
def test_a_flaw_is_refused_by_its_place(tmp_path, text, wanted):
  with pytest.raises(ValueError, match=wanted):
    tables.read(written(tmp_path, text))


@pytest.mark.parametrize('row, wanted', [
  ('0.5,0.6', r"t\.csv, index 'p2': the weights sum to 1\.1, want 1 within 0\.01.*1 of 3 rows"),
  ('0.5,0.48', r"index 'p2': the weights sum to 0\.98"),
  ('1.005,-0.005', r"index 'p2', column 'b': the weight -0\.005"),
  ('0,0', r"index 'p2': the weights sum to 0, want 1")])
def test_a_mixture_that_is_none_is_refused(tmp_path, row, wanted):
  path = written(tmp_path, f'index,a,b\np1,0.5,0.5\np2,{row}\np3,0.5,0.509\n')
  with pytest.raises(ValueError, match=wanted):
    tables.read_mixtures(path)


@pytest.mark.parametrize('columns, index, values, wanted', [
  (('a', 'a'), ('1',), [[1, 2]], "column 'a' is there more than once"),
  (('a',), ('1', '1'), [[1], [2]], "index '1' is there more than once"),
  (('a',), ('1', '2'), [[1], [np.nan]], "index '2', column 'a': got nan"),
  (('a', 'b'), ('1',), [[1]], r'shape \(1, 1\) for 1 rows of 2 columns')])
def test_a_table_that_is_none_is_refused(columns, index, values, wanted):
  with pytest.raises(ValueError, match=wanted):
    tables.Table(columns, index, values)
