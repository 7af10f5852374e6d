"""Laws of seqio tasks and of reading what seqio caches: always the ids that our own tokenizers give, of the same text.

seqio is imported by a fixture: TensorFlow takes seconds and much memory, which other tests' processes shall not spend.
"""

import collections
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import real_text
import sentencepiece
import zstandard

from datasel import prepare
from datasel.data import corpus, mixture, seqio_cache, tokenizer
from datasel.data import store as stores

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {'length': 128, 'holdout': 0.3}
DOMAINS = {'Web': real_text.topics(), 'code-py': real_text.modules('email')[:15], 'json': real_text.modules('json')}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """CORPUS of 3 domains in 5 files, one of them for validation, and tokenizer.json."""
  root = tmp_path_factory.mktemp('seqio')
  real_text.write(root / 'corpus/train/Web-0.jsonl', DOMAINS['Web'][::2])
  real_text.write(root / 'corpus/train/Web-1.jsonl', DOMAINS['Web'][1::2])
  real_text.write(root / 'corpus/train/code-py.jsonl', [*DOMAINS['code-py'], {'id': 7, 'text': ' \n'}])
  real_text.write(root / 'corpus/train/json.jsonl', DOMAINS['json'])
  real_text.write(root / 'corpus/validation/json.jsonl', [{'text': row['text'] + ' '} for row in DOMAINS['code-py']])
  prepare.train_tokenizer(root / 'corpus', root / 'tokenizer.json', vocab_size=600, max_bytes_per_domain=50_000)
  return root


@pytest.fixture(scope='module')
def model(root):
  """A sentencepiece .model, with bos and eos."""
  (root / 'lines.txt').write_text('\n'.join(row['text'] for row in DOMAINS['Web']), encoding='utf-8')
  sentencepiece.SentencePieceTrainer.train(input=str(root / 'lines.txt'), model_prefix=str(root / 'spm'),
                                           vocab_size=500, model_type='bpe', minloglevel=2)
  return root / 'spm.model'


@pytest.fixture(scope='module')
def tf_seqio():
  """The modules seqio, tensorflow, tensorflow_datasets, and ours over them."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('CUDA_VISIBLE_DEVICES', '')
    import seqio
    import tensorflow
    import tensorflow_datasets

    from datasel.data import seqio_tasks
  return types.SimpleNamespace(seqio=seqio, tf=tensorflow, tfds=tensorflow_datasets, tasks=seqio_tasks)


@pytest.fixture
def registered(tf_seqio):
  """Our module, whose registrations are gone after the test."""
  registries = (tf_seqio.seqio.TaskRegistry, tf_seqio.seqio.MixtureRegistry)
  before = [set(registry.names()) for registry in registries]
  yield tf_seqio.tasks
  for registry, names in zip(registries, before):
    for name in set(registry.names()) - names:
      registry.remove(name)


@pytest.fixture
def examples(tf_seqio):
  """Of a task and split: {id: ids of the tokens}, without ids a list."""
  def read(task, split):
    found = tf_seqio.seqio.get_mixture_or_task(task).get_dataset(None, split, shuffle=False, num_epochs=1)
    return list(found.as_numpy_iterator())
  return read


def _ids(encoder, texts):
  """What a task shall yield: our ids, then eos."""
  return [ids.tolist() + [encoder.eos_id] for ids in encoder.encode_batch(texts)]


@pytest.mark.parametrize('kind', ['json', 'model'])
def test_the_vocabulary_gives_our_ids_both_ways(tf_seqio, root, model, kind):
  path = {'json': root / 'tokenizer.json', 'model': model}[kind]
  ours, vocabulary = tokenizer.load(path), tf_seqio.tasks.Vocabulary(path)
  texts = [row['text'] for rows in DOMAINS.values() for row in rows] + ['', 'naïve 日本 </s> <|endoftext|> \r\n\t.']
  want = [ids.tolist() for ids in ours.encode_batch(texts)]
  assert [vocabulary.encode(text) for text in texts] == want
  assert vocabulary.encode_tf(tf_seqio.tf.constant(texts)).to_list() == want
  assert [vocabulary.encode_tf(tf_seqio.tf.constant(text)).numpy().tolist() for text in texts[-9:]] == want[-9:]
  decoded = [ours.decode(ids) for ids in want]
  assert [vocabulary.decode(ids) for ids in want] == decoded
  assert [text.decode() for text in vocabulary.decode_tf(tf_seqio.tf.ragged.constant(want)).numpy()] == decoded
  stated = (vocabulary.vocab_size, vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.extra_ids)
  assert stated == (ours.vocab_size, ours.bos_id, ours.eos_id, None, 0)


def test_vocabularies_are_equal_where_their_tokenizers_are(tf_seqio, root, model, tmp_path):
  from apache_beam.internal import pickler  # what carries a task to a worker
  vocabulary = tf_seqio.tasks.Vocabulary(root / 'tokenizer.json')
  there = pickler.loads(pickler.dumps(vocabulary))
  assert there == vocabulary == tf_seqio.tasks.Vocabulary(shutil.copy(root / 'tokenizer.json', tmp_path / 'copy.json'))
  assert there.encode('def f():') == vocabulary.encode('def f():')
  assert vocabulary != tf_seqio.tasks.Vocabulary(model)


def _rewrite(form, source, folder):
  raw = source.read_bytes()
  rows = [{'id': None, **json.loads(line)} for line in raw.splitlines()]
  rows = [row | {'id': None if row['id'] is None else str(row['id'])} for row in rows]
  if form == 'folder':
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder / source.stem)
  elif form == 'parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f'{source.stem}.parquet')
  else:
    press = {'jsonl': bytes, 'jsonl.gz': gzip.compress, 'jsonl.zst': zstandard.ZstdCompressor().compress}[form]
    (folder / f'{source.stem}.{form}').write_bytes(press(raw))


@pytest.mark.parametrize('form', ['jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet', 'folder'])
def test_a_task_yields_every_document_of_its_domain_in_our_ids(registered, examples, root, tmp_path, form):
  folder = tmp_path / 'a[b]*'  # no pattern
  for split in corpus.SPLITS:
    (folder / split).mkdir(parents=True)
    for source in (root / 'corpus' / split).iterdir():
      _rewrite(form, source, folder / split)
  tasks = registered.register_corpus('forms', folder, root / 'tokenizer.json')
  assert tasks == {'Web': 'forms_web', 'code-py': 'forms_code_py', 'json': 'forms_json'}
  encoder = tokenizer.load(root / 'tokenizer.json')
  for domain, rows in {**DOMAINS, 'code-py': [*DOMAINS['code-py'], {'id': 7, 'text': ' \n'}]}.items():
    got = {example['id'].decode(): example['targets'].tolist() for example in examples(tasks[domain], 'train')}
    assert got == dict(zip([str(row['id']) for row in rows], _ids(encoder, [row['text'] for row in rows])))
  got = [example['targets'].tolist() for example in examples('forms_json', 'validation')]
  assert got == _ids(encoder, [row['text'] + ' ' for row in DOMAINS['code-py']])


def test_rates_are_the_weights_both_ways(registered, tf_seqio, root):
  weights = mixture.Mixture({'code-py': 0.1, 'Web': 0.65, 'json': 0.25})
  tasks = registered.register_corpus('rates', root / 'corpus', root / 'tokenizer.json', mixture=weights)
  made = tf_seqio.seqio.MixtureRegistry.get('rates')
  assert {task.name: made.get_rate(task) for task in made.tasks} == pytest.approx(
      {'rates_code_py': 0.1, 'rates_web': 0.65, 'rates_json': 0.25}, rel=1e-12)
  assert registered.mixture_of('rates', tasks).weights == pytest.approx(weights.weights, rel=1e-12)
  drawn = made.get_dataset({'targets': 64}, 'train', shuffle=False, seed=0, num_epochs=None)
  encoder = tokenizer.load(root / 'tokenizer.json')
  owner = {tuple(ids[:64]): domain for domain, rows in DOMAINS.items()
           for ids in _ids(encoder, [row['text'] for row in rows])}
  owner |= {tuple(ids): 'code-py' for ids in _ids(encoder, [' \n'])}
  counts = collections.Counter(owner[tuple(example['targets'].tolist())]
                               for example in drawn.take(500).as_numpy_iterator())
  for domain, weight in weights.weights.items():
    assert counts[domain] / 500 == pytest.approx(weight, abs=0.085)  # 4 standard deviations


def test_a_weight_of_0_survives_and_is_not_read(registered, tf_seqio, root):
  weights = mixture.Mixture({'code-py': 0.0, 'Web': 0.75, 'json': 0.25})
  tasks = registered.register_corpus('none', root / 'corpus', root / 'tokenizer.json', mixture=weights)
  assert {task.name for task in tf_seqio.seqio.MixtureRegistry.get('none').tasks} == {'none_web', 'none_json'}
  assert registered.mixture_of('none', tasks).weights == weights.weights


def test_by_default_domains_weigh_as_their_files(registered, root):
  tasks = registered.register_corpus('sizes', root / 'corpus', root / 'tokenizer.json')
  size = lambda domain: sum(file.stat().st_size for file in (root / 'corpus/train').glob(f'{domain}*'))
  sizes = {domain: size(domain) for domain in DOMAINS}
  assert registered.mixture_of('sizes', tasks).weights == pytest.approx(mixture.normalised(sizes), rel=1e-12)


def _zst(path, rows):
  real_text.write(path, zstandard.ZstdCompressor().compress(real_text.jsonl(rows)))


def _labelled(key, labels, files):
  """One document of each label for each file."""
  return {file: [{'text': f'{label} in {file}', 'meta': {key: label}} for label in labels] for file in files}


@pytest.mark.parametrize('name,key,label,files', [
    ('pile', 'pile_set_name', 'Gutenberg (PG-19)',
     {'train': ['train/00', 'train/01'], 'validation': ['val'], 'test': ['test']}),
    ('slimpajama', 'redpajama_set_name', 'RedPajamaArXiv',
     {split: [f'{split}/chunk1/a', f'{split}/chunk2/b'] for split in ('train', 'validation', 'test')}),
])
def test_a_labelled_corpus_is_split_into_its_domains(registered, examples, root, tmp_path, name, key, label, files):
  shares = {'pile': registered.PILE, 'slimpajama': registered.SLIMPAJAMA}[name]
  for file, rows in _labelled(key, shares, sum(files.values(), [])).items():
    _zst(tmp_path / f'{file}.jsonl.zst', rows)
  register = {'pile': registered.register_pile, 'slimpajama': registered.register_slimpajama}[name]
  tasks = register(tmp_path, root / 'tokenizer.json')
  assert len(tasks) == len(shares) and sum(shares.values()) == pytest.approx(100)
  task = {'pile': 'pile_gutenberg_pg_19', 'slimpajama': 'slimpajama_redpajamaarxiv'}[name]
  for split, of_split in files.items():
    got = [example['targets_pretokenized'].decode() for example in examples(task, split)]
    assert sorted(got) == [f'{label} in {file}' for file in of_split]
  _zst(tmp_path / f'{files["train"][-1]}.jsonl.zst', [{'text': 'x', 'meta': {key: 'Twitter'}}])
  with pytest.raises(Exception, match=f"the {key} 'Twitter', want one of "):  # TensorFlow's own kind of error
    examples(task, 'train')


def test_the_pile_s_domains_are_named_as_everywhere(registered, tf_seqio, root, tmp_path):
  for file in ('train/00', 'val', 'test'):
    _zst(tmp_path / f'{file}.jsonl.zst', [{'text': 'x', 'meta': {'pile_set_name': 'ArXiv'}}])
  tasks = registered.register_pile(tmp_path, root / 'tokenizer.json')
  assert set(tasks) == set(mixture.PILE_EPOCHS)
  assert {'pile_pubmed_abstracts', 'pile_pile_cc', 'pile_wikipedia_en'} <= set(tf_seqio.seqio.TaskRegistry.names())
  (tmp_path / 'val.jsonl.zst').unlink()
  with pytest.raises(ValueError, match='val.jsonl.zst not found'):
    registered.register_pile(tmp_path, root / 'tokenizer.json', name='again')


def test_redpajama_and_fineweb_are_read_as_published(registered, examples, root, tmp_path):
  _zst(tmp_path / 'rp/common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst', [{'text': 'crawled'}])
  real_text.write(tmp_path / 'rp/arxiv/arxiv_1.jsonl', [{'text': 'paper', 'meta': {'arxiv_id': '1'}}])
  real_text.write(tmp_path / 'rp/arxiv/arxiv_2.jsonl', [{'text': 'other paper', 'meta': {}}])
  tasks = registered.register_redpajama(tmp_path / 'rp', root / 'tokenizer.json')
  assert tasks == {'common_crawl': 'redpajama_common_crawl', 'arxiv': 'redpajama_arxiv'}
  want = {'common_crawl': 878 / 906, 'arxiv': 28 / 906}
  assert registered.mixture_of('redpajama', tasks).weights == pytest.approx(want)
  texts = lambda task: [example['targets_pretokenized'].decode() for example in examples(task, 'train')]
  assert (texts('redpajama_common_crawl'), texts('redpajama_arxiv')) == (['crawled'], ['paper', 'other paper'])
  parquet = tmp_path / 'fw/data/CC-MAIN-2024-10/000_00000.parquet'
  parquet.parent.mkdir(parents=True)
  page = {'text': 'a page', 'id': '<urn:uuid:1>', 'dump': 'CC-MAIN-2024-10'}
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([page]), parquet)
  registered.register_fineweb(tmp_path / 'fw', root / 'tokenizer.json')
  assert [example['id'] for example in examples('fineweb', 'train')] == [b'<urn:uuid:1>']
  assert texts('fineweb') == ['a page']


@pytest.mark.filterwarnings('ignore:label:DeprecationWarning')  # TensorFlow Datasets, of protobuf
def test_c4_is_read_through_tfds(registered, tf_seqio, examples, root, tmp_path):
  rows = {'text': [row['text'] for row in DOMAINS['json']], 'url': ['u'] * len(DOMAINS['json'])}
  tf_seqio.tfds.dataset_builders.store_as_tfds_dataset(
      name='tiny_c4', version='3.1.0', data_dir=tmp_path, config='en',
      features=tf_seqio.tfds.features.FeaturesDict({'text': tf_seqio.tfds.features.Text(),
                                                    'url': tf_seqio.tfds.features.Text()}),
      split_datasets={split: tf_seqio.tf.data.Dataset.from_tensor_slices(rows) for split in ('train', 'validation')})
  registered.register_c4(root / 'tokenizer.json', tfds_name='tiny_c4/en:3.1.0', data_dir=tmp_path)
  got = sorted(example['targets'].tolist() for example in examples('c4', 'validation'))
  assert got == sorted(_ids(tokenizer.load(root / 'tokenizer.json'), rows['text']))


@pytest.mark.parametrize('what,error', [
    ('twice', 'seqio has wrong, wrong_web registered already'),
    ('weights', 'the store has domains that the mixture does not name'),
    ('kinds', r"of the kinds \['.gz', '.jsonl'\], whose sizes don't compare"),
    ('names', "the domains WEB, Web would be one task, 'wrong_web'"),
    ('tokenizer', 'no such file or folder'),
])
def test_what_can_not_be_registered_is_refused_whole(registered, tf_seqio, root, tmp_path, what, error):
  real_text.write(tmp_path / 'corpus/train/Web.jsonl', DOMAINS['json'])
  if what == 'twice':
    registered.register_corpus('wrong', tmp_path / 'corpus', root / 'tokenizer.json')
  if what == 'kinds':
    real_text.write(tmp_path / 'corpus/train/code.jsonl.gz', gzip.compress(real_text.jsonl(DOMAINS['json'])))
  if what in ('names', 'weights'):
    real_text.write(tmp_path / 'corpus/train/WEB.jsonl', DOMAINS['json'])
  before = tf_seqio.seqio.TaskRegistry.names()
  with pytest.raises(ValueError, match=error):
    registered.register_corpus(
        'wrong', tmp_path / 'corpus', root / ('none.json' if what == 'tokenizer' else 'tokenizer.json'),
        mixture=mixture.Mixture({'Web': 1.0}) if what == 'weights' else None)
  assert tf_seqio.seqio.TaskRegistry.names() == before


@pytest.fixture(scope='module')
def cache(root):
  """What the command seqio_cache_tasks makes of CORPUS, with Beam's DirectRunner."""
  (root / 'modules').mkdir()
  (root / 'modules/our_tasks.py').write_text(
      'from datasel.data import seqio_tasks\n'
      f'seqio_tasks.register_corpus("ours", {str(root / "corpus")!r}, {str(root / "tokenizer.json")!r})\n')
  command = pathlib.Path(sys.executable).with_name('seqio_cache_tasks')
  done = subprocess.run(
      [command, '--module_import=our_tasks', '--tasks=ours_.*', f'--output_cache_dir={root / "cache"}',
       '--min_shards=3', '--pipeline_options=--runner=DirectRunner'], capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': f'{root / "modules"}:{ROOT}', 'TF_CPP_MIN_LOG_LEVEL': '3',
           'CUDA_VISIBLE_DEVICES': ''})
  assert done.returncode == 0, done.stderr[-2000:]
  return root / 'cache'


def _shards(store):
  return {path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob('*.array_record'))}


def test_a_cache_is_a_corpus_of_the_same_documents(root, cache):
  cached, original = corpus.Corpus(cache), corpus.Corpus(root / 'corpus')
  names = {'Web': 'ours_web', 'code-py': 'ours_code_py', 'json': 'ours_json'}
  assert cached.domains == tuple(sorted(names.values()))
  for split in corpus.SPLITS:
    assert {names[domain] for domain in original.sources[split]} == set(cached.sources[split])
    for domain, sources in original.sources[split].items():
      read = lambda sources: sorted((d.id, d.text) for source in sources for d in corpus.documents(source))
      assert read(cached.sources[split][names[domain]]) == read(sources)


def test_a_store_from_a_cache_is_that_of_its_text_and_needs_no_tensorflow(tf_seqio, root, cache, tmp_path):
  """The texts in the order of the cache, as TensorFlow reads it: Beam has shuffled them."""
  tf = tf_seqio.tf
  features = {'targets_pretokenized': tf.io.FixedLenFeature([], tf.string), 'id': tf.io.FixedLenFeature([], tf.string)}
  for shard in sorted(cache.glob('*/*.tfrecord-*')):
    rows = [tf.io.parse_single_example(record, features) for record in tf.data.TFRecordDataset(str(shard))]
    split, number = shard.name.split('.')[0], shard.name.split('-')[1]
    real_text.write(tmp_path / f'corpus/{split}/{shard.parent.name}-{number}.jsonl',
                    [{'id': row['id'].numpy().decode(), 'text': row['targets_pretokenized'].numpy().decode()}
                     for row in rows])
  prepare.prepare(tmp_path / 'corpus', tmp_path / 'want', root / 'tokenizer.json', **SETTINGS)
  code = ('import sys\nsys.modules |= dict.fromkeys(("tensorflow", "seqio", "apache_beam", "jax"))\n'
          f'from datasel import prepare\nprepare.prepare({str(cache)!r}, {str(tmp_path / "got")!r}, '
          f'{str(root / "tokenizer.json")!r}, **{SETTINGS})')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert _shards(tmp_path / 'got') == _shards(tmp_path / 'want') != {}
  original = prepare.prepare(root / 'corpus', tmp_path / 'original', root / 'tokenizer.json', **SETTINGS)
  for split in corpus.SPLITS:
    got = stores.Store(tmp_path / 'got').counts(split)
    for domain, task in (('Web', 'ours_web'), ('code-py', 'ours_code_py'), ('json', 'ours_json')):
      for key in ('documents', 'tokens', 'targets', 'bytes', 'dropped'):
        assert got[task][key] == original.counts(split)[domain][key]


def _write(tf, path, *examples):
  """A TFRecord file as TensorFlow writes it."""
  def feature(value):
    if isinstance(value, str):
      return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=value))
  with tf.io.TFRecordWriter(str(path)) as writer:
    for example in examples:
      features = tf.train.Features(feature={name: feature(value) for name, value in example.items()})
      writer.write(tf.train.Example(features=features).SerializeToString())


def test_examples_of_other_tasks_are_read_by_their_text(tf_seqio, tmp_path):
  _write(tf_seqio.tf, tmp_path / 'x', {'text': 'a', 'id': [2**40], 'targets': [1, 300, 2**31], 'url': 'u'},
         {'targets_pretokenized': 'é' * 300, 'inputs_pretokenized': '', 'targets': []})
  assert list(seqio_cache.rows(tmp_path / 'x')) == [
      {'text': 'a', 'id': 2**40, 'url': 'u'}, {'text': 'é' * 300, 'inputs_pretokenized': ''}]
  _write(tf_seqio.tf, tmp_path / 'y', {'targets_pretokenized': 'yes', 'inputs_pretokenized': 'is it?'})
  with pytest.raises(ValueError, match='a text for inputs and one for targets'):
    list(seqio_cache.rows(tmp_path / 'y'))
  _write(tf_seqio.tf, tmp_path / 'z', {'targets': [1, 2]})
  with pytest.raises(ValueError, match=r"no text among the features \['targets'\]"):
    list(seqio_cache.rows(tmp_path / 'z'))


@pytest.mark.parametrize('damage', ['cut', 'length', 'data', 'no example'])
def test_a_damaged_shard_is_named(tf_seqio, cache, tmp_path, damage):
  copy = shutil.copytree(cache, tmp_path / 'cache')
  source = corpus.Corpus(copy).sources['train']['ours_web'][0]
  raw = bytearray(source.path.read_bytes())
  if damage == 'cut':
    del raw[-1:]
  elif damage == 'no example':
    with tf_seqio.tf.io.TFRecordWriter(str(tmp_path / 'other')) as writer:
      writer.write(b'{"text": "no example"}')
    raw = (tmp_path / 'other').read_bytes()
  else:
    raw[{'length': 3, 'data': 100}[damage]] ^= 1
  source.path.write_bytes(raw)
  errors = {'cut': 'ends in the middle of a record', 'no example': 'is no tf.train.Example'}
  error = errors.get(damage, 'its checksum is another')
  with pytest.raises(ValueError, match=f"{source.path.name} can't be read after row .*{error}"):
    list(corpus.documents(source))


def _without(name):
  return lambda task: (task / name).unlink()


def _info(change):
  def edit(task):
    info = json.loads((task / 'info.train.json').read_text())
    (task / 'info.train.json').write_text(json.dumps(change(info)))
  return edit


@pytest.mark.parametrize('damage,error', [
    (_without('COMPLETED'), 'ours_web has no file COMPLETED'),
    (_without('info.train.json'), "the cached task has no split 'train'"),
    (_without('train.tfrecord-00001-of-00003'), r'lacks 1 of 3 files of split .train. \(train.tfrecord-00001-of-00003'),
    (_info(lambda info: info | {'features': {'targets': {}}}), r"the task keeps no text, only \['targets'\]"),
    (_info(lambda info: {}), 'a split without examples'),
])
def test_a_cache_that_can_not_give_all_its_text_is_refused(cache, tmp_path, damage, error):
  copy = shutil.copytree(cache, tmp_path / 'cache')
  damage(copy / 'ours_web')
  with pytest.raises(ValueError, match=error):
    corpus.Corpus(copy)
