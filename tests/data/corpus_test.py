"""Laws of reading a corpus: every form of the same rows is the same documents, and nothing broken passes in silence."""

import gzip
import hashlib
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import real_text
import zstandard

from datasel.data import corpus

ROWS = real_text.modules('email')


def _documents(root, split='train'):
  listed = corpus.Corpus(root).sources[split]
  return {domain: [d for source in sources for d in corpus.documents(source)] for domain, sources in listed.items()}


def _save_to_disk(folder, rows, **kwargs):
  datasets.disable_progress_bars()
  datasets.Dataset.from_list(rows).save_to_disk(folder, **kwargs)


def _write(form, folder, rows):
  folder.mkdir(parents=True, exist_ok=True)
  raw = real_text.jsonl(rows)
  if form == 'folder':
    _save_to_disk(folder / 'web', rows, num_shards=2)
  elif form == 'parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / 'web.parquet', row_group_size=5)
  elif form == 'folders in a folder':
    _save_to_disk(folder / 'web' / '0', rows[:4])
    _save_to_disk(folder / 'web' / '1', rows[4:])
  else:
    # Two members or frames, as files put together with `cat` have.
    half = len(raw) // 2
    press = {'jsonl': bytes, 'jsonl.gz': gzip.compress, 'jsonl.zst': zstandard.ZstdCompressor().compress}[form]
    (folder / f'web.{form}').write_bytes(press(raw[:half]) + press(raw[half:]))


FORMS = ['jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'folder', 'folders in a folder']


@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_the_same_rows_is_the_same_documents(tmp_path, form):
  _write(form, tmp_path / 'train', ROWS)
  want = [corpus.Document(row['id'], row['text'], {'lines': row['lines']}) for row in ROWS]
  assert _documents(tmp_path) == {'web': want}


def test_a_number_at_the_end_of_a_name_is_a_shard_in_numeric_order(tmp_path):
  for name in ('web-10', 'web-2', 'web', 'web2', 'a-b', 'x.y-001'):
    real_text.write(tmp_path / f'train/{name}.jsonl', [{'text': name}])
  got = {domain: [d.text for d in documents] for domain, documents in _documents(tmp_path).items()}
  assert got == {'web': ['web', 'web-2', 'web-10'], 'web2': ['web2'], 'a-b': ['a-b'], 'x.y': ['x.y-001']}


def test_a_document_without_an_id_is_named_by_its_text(tmp_path):
  real_text.write(tmp_path / 'train/web.jsonl', [
      {'text': 'é'}, {'text': 'b', 'id': None}, {'text': 'é'}, {'text': 'b', 'id': 7}])
  ids = [d.id for d in _documents(tmp_path)['web']]
  e, b = (hashlib.sha256(text.encode()).hexdigest() for text in 'éb')
  assert ids == [e, b, e, '7']


def test_hidden_files_and_files_beside_the_splits_are_no_domains(tmp_path):
  real_text.write(tmp_path / 'train/web.jsonl', ROWS)
  real_text.write(tmp_path / 'train/.DS_Store', b'x')
  real_text.write(tmp_path / 'sources.json', b'{}')
  assert corpus.Corpus(tmp_path).domains == ('web',)


@pytest.mark.parametrize('line,error', [
    (b'{"text": "a"', 'not valid JSON'),
    (b'{"text": "caf\xe9"}', 'not valid JSON in UTF-8'),
    (b'["a"]', 'got a JSON list'),
    (b'{"txt": "a"}', r'no "text" among the fields \[\'txt\'\]'),
    (b'{"text": 3}', '"text" is of type int'),
    (b'{"text": null}', '"text" is of type NoneType'),
    (b'{"input_ids": [1]}', 'holds tokens, not text'),
    (b'{"text": "a", "id": 1.5}', '"id" is of type float'),
    (b'{"text": "\\ud800"}', 'surrogate'),
    (b'[' * 100_000, 'not valid JSON'),
])
def test_a_bad_line_is_named(tmp_path, line, error):
  real_text.write(tmp_path / 'train/web.jsonl', b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
  with pytest.raises(ValueError, match=f'web.jsonl:3: .*{error}'):
    _documents(tmp_path)


@pytest.mark.parametrize('form', ['jsonl.gz', 'jsonl.zst', 'parquet', 'folder'])
@pytest.mark.parametrize('left', [0.999, 0.5])
def test_a_file_cut_short_is_named(tmp_path, form, left):
  _write(form, tmp_path / 'train', ROWS)
  path = next(tmp_path.rglob('data-00001*.arrow' if form == 'folder' else 'web.*'))
  path.write_bytes(path.read_bytes()[:int(path.stat().st_size * left)])
  with pytest.raises(ValueError, match=f'{path.name}.* can\'t be read after row'):
    _documents(tmp_path)


def test_an_arrow_stream_cut_between_batches_is_named(tmp_path):
  table = pyarrow.Table.from_pylist(ROWS)
  _write('folder', tmp_path / 'train', ROWS)
  path = next(tmp_path.rglob('data-00000*.arrow'))
  with pyarrow.ipc.new_stream(path, table.schema) as writer:
    writer.write_table(table, max_chunksize=3)
  path.write_bytes(path.read_bytes()[:-8])
  assert pyarrow.ipc.open_stream(path.read_bytes()).read_all().num_rows == len(ROWS)  # pyarrow alone doesn't see it
  with pytest.raises(ValueError, match='no end marker'):
    _documents(tmp_path)


def test_a_table_of_tokens_only_is_refused(tmp_path):
  _save_to_disk(tmp_path / 'train/web', [{'input_ids': [1, 2]}])
  with pytest.raises(ValueError, match='holds tokens, not text'):
    _documents(tmp_path)


def _dataset_dict(root):
  datasets.disable_progress_bars()
  datasets.DatasetDict({'train': datasets.Dataset.from_list(ROWS)}).save_to_disk(root)


LAYOUTS = {
    'no train folder': lambda root: real_text.write(root / 'web.jsonl', ROWS),
    'holds no domain': lambda root: (root / 'train').mkdir(),
    'rename it to validation': lambda root: real_text.write(root / 'valid/web.jsonl', ROWS),
    'of no known kind': lambda root: real_text.write(root / 'train/web.txt', b'text'),
    "domain name '_web'": lambda root: real_text.write(root / 'train/_web.jsonl', ROWS),
    "domain name 'a..b'": lambda root: real_text.write(root / 'train/a..b-1.jsonl', ROWS),
    'is empty .0 bytes': lambda root: real_text.write(root / 'train/web.jsonl', b''),
    'folder .* is empty': lambda root: (root / 'train/web').mkdir(parents=True),
    'no state.json': lambda root: real_text.write(root / 'train/web/a/x.arrow', b''),
    'lacks data files': lambda root: real_text.write(
        root / 'train/web/state.json', b'{"_data_files": [{"filename": "a"}]}'),
    'files outside the folder': lambda root: real_text.write(
        root / 'train/web/state.json', b'{"_data_files": [{"filename": "../x.arrow"}]}'),
    'selects rows through an index': lambda root: real_text.write(
        root / 'train/web/state.json', b'{"_indices_data_files": [{"filename": "a"}]}'),
    'both as files and as folders': lambda root: (real_text.write(root / 'train/web.jsonl', ROWS),
                                                  _save_to_disk(root / 'train/web', ROWS)),
    'in more than one format': lambda root: [
        real_text.write(root / f'train/web.{kind}', ROWS) for kind in ('jsonl', 'jsonl.gz')],
    'is a DatasetDict': _dataset_dict,
    'web is a DatasetDict': lambda root: _dataset_dict(root / 'train/web'),
    'is one data set': lambda root: _save_to_disk(root / 'train', ROWS),
}


@pytest.mark.parametrize('error', LAYOUTS)
def test_a_layout_that_could_lose_documents_is_refused(tmp_path, error):
  LAYOUTS[error](tmp_path)
  with pytest.raises(ValueError, match=error):
    corpus.Corpus(tmp_path)


def test_a_missing_corpus_is_refused(tmp_path):
  with pytest.raises(ValueError, match='is not a folder'):
    corpus.Corpus(tmp_path / 'nothing')


def test_the_digest_of_a_source_follows_its_bytes(tmp_path):
  path = real_text.write(tmp_path / 'train/web.jsonl', ROWS)
  digest = lambda: corpus.Corpus(tmp_path).sources['train']['web'][0].digest()
  before = digest()
  assert before == hashlib.sha256(path.read_bytes()).hexdigest()
  path.write_bytes(path.read_bytes().replace(b'email', b'Email', 1))
  assert digest() != before


def test_the_digest_of_a_folder_follows_its_data(tmp_path):
  _save_to_disk(tmp_path / 'train/web', ROWS)
  digest = lambda: corpus.Corpus(tmp_path).sources['train']['web'][0].digest()
  before = digest()
  state = tmp_path / 'train/web/state.json'
  state.write_text(json.dumps(json.loads(state.read_text()) | {'_fingerprint': 'another'}))
  assert digest() == before
  data = next(tmp_path.rglob('*.arrow'))
  data.write_bytes(data.read_bytes().replace(b'email', b'Email', 1))
  assert digest() != before
