"""seqio Tasks and Mixtures over our corpora and tokenizers.  The one module that imports seqio, and TensorFlow with it.

  tasks = seqio_tasks.register_corpus('demo', 'CORPUS', 'tokenizer.json')  # {'web': 'demo_web', ...} and Mixture 'demo'
  seqio.get_mixture_or_task('demo').get_dataset({'targets': 1024}, 'train')

`seqio_cache_tasks --module_import=MODULE` imports a module of yours that makes such a call.  What it writes is in turn
a corpus for `datasel.prepare`, which needs no TensorFlow.

Every task has the feature `targets`, the ids of a document's text as our tokenizers give them, and eos where the
tokenizer has one.  Cached examples keep text and id beside them (`targets_pretokenized`, `id`).
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from datasel.data import corpus as corpora
from datasel.data import domains as domain_names
from datasel.data import mixture as mixtures
from datasel.data import tokenizer as tokenizers

# Shares of the published corpora in their authors' own training sets.  The Pile, %: Gao et al. 2020, Table 1, Weight.
PILE = {
    'Pile-CC': 18.11, 'PubMed Central': 14.40, 'Books3': 12.07, 'OpenWebText2': 10.01, 'ArXiv': 8.96, 'Github': 7.59,
    'FreeLaw': 6.12, 'StackExchange': 5.13, 'USPTO Backgrounds': 3.65, 'PubMed Abstracts': 3.07,
    'Gutenberg (PG-19)': 2.17, 'OpenSubtitles': 1.55, 'Wikipedia (en)': 1.53, 'DM Mathematics': 1.24,
    'Ubuntu IRC': 0.88, 'BookCorpus2': 0.75, 'EuroParl': 0.73, 'HackerNews': 0.62, 'YoutubeSubtitles': 0.60,
    'PhilPapers': 0.38, 'NIH ExPorter': 0.30, 'Enron Emails': 0.14}
# Billions of tokens: the data card of RedPajama-Data-1T.
REDPAJAMA = {'common_crawl': 878, 'c4': 175, 'github': 59, 'arxiv': 28, 'book': 26, 'wikipedia': 24,
             'stackexchange': 20}
# Percent of bytes: the data card of SlimPajama-627B.
SLIMPAJAMA = {'RedPajamaCommonCrawl': 52.2, 'RedPajamaC4': 26.7, 'RedPajamaGithub': 5.2, 'RedPajamaArXiv': 4.6,
              'RedPajamaBook': 4.2, 'RedPajamaWikipedia': 3.8, 'RedPajamaStackExchange': 3.3}

Files = Mapping[str, Sequence[pathlib.Path]]  # by split


class Vocabulary(seqio.Vocabulary):
  """A tokenizer of ours as a seqio vocabulary: the same ids, both ways; no extra ids.

  tokenizer: as `datasel.data.tokenizer.load` takes it; it is read when first used, also by a worker that got this
  object from another process.  There is no unknown token, and no padding token: seqio pads with 0, so where 0 is a
  token (our own tokenizers' eos) its feature converters leave that token out of the loss.
  """

  def __init__(self, tokenizer: str | os.PathLike):
    super().__init__(extra_ids=0)
    path = pathlib.Path(tokenizer)
    self._name = str(path.absolute() if path.exists() else tokenizer)

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer itself."""
    return _tokenizer(self._name)

  bos_id = property(lambda self: self.tokenizer.bos_id)
  eos_id = property(lambda self: self.tokenizer.eos_id)
  unk_id = property(lambda self: None)
  _base_vocab_size = property(lambda self: self.tokenizer.vocab_size)

  def _encode(self, s: str) -> list[int]:
    return self.tokenizer.encode_batch([s])[0].tolist()

  def _decode(self, ids: Iterable[int]) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
    """int32 ids [tokens] of a text, or a ragged [texts, tokens] of several."""
    if s.shape.rank not in (0, 1):
      raise ValueError(f'texts to encode are of rank {s.shape.rank}, want one text or a vector of texts')
    ids, lengths = tf.numpy_function(self._encode_several, [tf.reshape(s, [-1])], (tf.int32, tf.int64))
    ids, lengths = tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None])
    return ids if s.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(ids, lengths)

  def _encode_several(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = self.tokenizer.encode_batch([text.decode() for text in texts])
    return np.concatenate([np.zeros(0, np.int32), *rows]), np.array([len(row) for row in rows], np.int64)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """The text of ids [tokens], or the texts of [texts, tokens]."""
    if isinstance(ids, tf.RaggedTensor):
      return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)
    text = tf.numpy_function(self._decode_several, [ids], tf.string)
    return tf.ensure_shape(text, ids.shape[:-1])

  def _decode_several(self, ids: np.ndarray) -> np.ndarray:
    return np.apply_along_axis(lambda row: self.tokenizer.decode(row).encode(), -1, ids.astype(object))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Vocabulary) and self.tokenizer.digest == other.tokenizer.digest


class Documents(seqio.FileDataSource):
  """The documents of text files as examples {targets: text, id}.

  keep: tells which documents of a file are of this source; without, all.
  """

  def __init__(self, files: Files, keep: Callable[[corpora.Document], bool] = lambda document: True):
    super().__init__(functools.partial(_examples, keep=keep),
                     {split: [str(file) for file in listed] for split, listed in files.items()})

  def list_shards(self, split: str) -> list[str]:
    """The files themselves: seqio would take a '*' or '[' in a name for a pattern."""
    return list(self._split_to_filepattern[split])


def register_corpus(name: str, corpus: str | os.PathLike, tokenizer: str | os.PathLike, *,
                    mixture: mixtures.Mixture | None = None) -> dict[str, str]:
  """A Task NAME_DOMAIN for each domain of a corpus folder, of any form that `prepare` reads, and the Mixture NAME.

  Splits are those for which a domain has files.  mixture: weights of exactly the domains; by default each domain by
  the bytes of its train files, which have to be of one kind then.  Returns {domain: task}.
  Raises ValueError for a corpus or mixture that can't work, and for a name already registered.
  """
  corpus = corpora.Corpus(corpus)
  sources = {domain: {split: corpus.sources[split][domain] for split in corpora.SPLITS
                      if domain in corpus.sources[split]} for domain in corpus.domains}
  if mixture is None:
    train = [source for of_domain in sources.values() for source in of_domain['train']]
    kinds = sorted({source.path.suffix.partition('-')[0] for source in train})
    if len(kinds) > 1:
      raise ValueError(f'the files of {corpus.path}/train are of the kinds {kinds}, whose sizes don\'t compare; give '
                       'the weights of the domains as a mixture')
    amounts = {domain: sum(source.size for source in of_domain['train']) for domain, of_domain in sources.items()}
    mixture = mixtures.Mixture(mixtures.normalised(amounts), {'method': 'by bytes of files'})
  files = {domain: {split: [file.absolute() for source in listed for file in source.files]
                    for split, listed in of_domain.items()} for domain, of_domain in sources.items()}
  return _register(name, {domain: Documents(of_domain) for domain, of_domain in files.items()}, tokenizer, mixture)


def register_pile(folder: str | os.PathLike, tokenizer: str | os.PathLike, *, name: str = 'pile',
                  mixture: mixtures.Mixture | None = None) -> dict[str, str]:
  """The 22 domains of the Pile from its published files: FOLDER/{train/NN,val,test}.jsonl.zst, by meta.pile_set_name.

  Each task reads all files and keeps its domain's documents.  mixture: by default the weights of the Pile's paper.
  Otherwise as `register_corpus`.
  """
  folder = pathlib.Path(folder)
  files = {'train': _found(folder / 'train'), 'validation': [folder / 'val.jsonl.zst'],
           'test': [folder / 'test.jsonl.zst']}
  return _register_labelled(name, files, 'pile_set_name', PILE, tokenizer, mixture)


def register_slimpajama(folder: str | os.PathLike, tokenizer: str | os.PathLike, *, name: str = 'slimpajama',
                        mixture: mixtures.Mixture | None = None) -> dict[str, str]:
  """The 7 domains of SlimPajama, which is RedPajama without its duplicates, from its published files:
  FOLDER/{train,validation,test}/chunkN/*.jsonl.zst, by meta.redpajama_set_name.  Otherwise as `register_pile`."""
  files = {split: _found(pathlib.Path(folder) / split) for split in ('train', 'validation', 'test')}
  return _register_labelled(name, files, 'redpajama_set_name', SLIMPAJAMA, tokenizer, mixture)


def register_redpajama(folder: str | os.PathLike, tokenizer: str | os.PathLike, *, name: str = 'redpajama',
                       mixture: mixtures.Mixture | None = None) -> dict[str, str]:
  """The domains of RedPajama-Data-1T from its published files: FOLDER/DOMAIN/**/*.jsonl[.zst].

  Of the 7 domains those whose folder is there (`book` is no longer published).  mixture: of these; by default in
  proportion to the published tokens.  Otherwise as `register_corpus`; there is no split but train.
  """
  there = [domain for domain in REDPAJAMA if (pathlib.Path(folder) / domain).is_dir()]
  if not there:
    raise ValueError(f'{folder} has none of the folders {", ".join(REDPAJAMA)}; want RedPajama-Data-1T as published')
  sources = {domain: Documents({'train': _found(pathlib.Path(folder) / domain)}) for domain in there}
  published = {domain: REDPAJAMA[domain] for domain in there}
  return _register(name, sources, tokenizer, mixture or _published(published))


def register_fineweb(folder: str | os.PathLike, tokenizer: str | os.PathLike, *, name: str = 'fineweb') -> None:
  """The Task NAME over all Parquet files in FOLDER, of FineWeb or FineWeb-Edu: any of their samples, dumps, or all."""
  _add_task(name, Documents({'train': _found(pathlib.Path(folder))}), tokenizer)


def register_c4(tokenizer: str | os.PathLike, *, name: str = 'c4', tfds_name: str = 'c4/en:3.1.0',
                data_dir: str | os.PathLike | None = None) -> None:
  """The Task NAME over C4 of TensorFlow Datasets, where `tfds build` has put it; documents have no id."""
  source = seqio.TfdsDataSource(tfds_name, tfds_data_dir=data_dir and str(data_dir), splits=('train', 'validation'))
  rekey = functools.partial(seqio.preprocessors.rekey, key_map={'targets': 'text'})
  _add_task(name, source, tokenizer, (rekey,))


def register_mixture(name: str, tasks: Mapping[str, str], mixture: mixtures.Mixture) -> None:
  """The seqio Mixture NAME of registered tasks {domain: task}, at the rates of a mixture of exactly these domains.

  A domain of weight 0 is left out: seqio would read it to no end.
  """
  rates = dict(zip(tasks.values(), mixture.for_domains(tasks).tolist()))
  seqio.MixtureRegistry.add(name, [(task, rate) for task, rate in rates.items() if rate])


def mixture_of(name: str, tasks: Mapping[str, str]) -> mixtures.Mixture:
  """The reverse: the rates of a registered seqio Mixture as weights of the domains of `tasks`, 0 for those not in it.

  Raises ValueError for a task of the Mixture that is of no domain.
  """
  mixture = seqio.MixtureRegistry.get(name)
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  stray = sorted(set(rates) - set(tasks.values()))
  if stray:
    raise ValueError(f'the seqio Mixture {name!r} has tasks of no domain: {", ".join(stray)}; name their domains')
  weights = mixtures.normalised({domain: rates.get(task, 0.0) for domain, task in tasks.items()})
  return mixtures.Mixture(weights, {'method': 'seqio', 'mixture': name})


def _register_labelled(name: str, files: Files, key: str, shares: Mapping[str, float],
                       tokenizer: str | os.PathLike, mixture: mixtures.Mixture | None) -> dict[str, str]:
  """A task for each label that `meta` has under `key` in files of all domains together."""
  missing = [str(file) for listed in files.values() for file in listed if not file.is_file()]
  if missing:
    raise ValueError(f'{", ".join(missing)} not found; want the corpus as published')
  labels = domain_names.from_labels(shares)

  def keep(label: str, document: corpora.Document) -> bool:
    found = (document.fields.get('meta') or {}).get(key)
    if found not in shares:
      raise ValueError(f'document {document.id} has the {key} {found!r}, want one of {", ".join(shares)}')
    return found == label

  sources = {domain: Documents(files, functools.partial(keep, label)) for label, domain in labels.items()}
  published = _published({labels[label]: share for label, share in shares.items()})
  return _register(name, sources, tokenizer, mixture or published)


def _register(name: str, sources: Mapping[str, seqio.DataSource], tokenizer: str | os.PathLike,
              mixture: mixtures.Mixture) -> dict[str, str]:
  """A task for each domain, and their mixture."""
  mixture.for_domains(sources)  # refuses before anything is registered
  tasks = {domain: f'{name}_{re.sub(r"[^a-z0-9]+", "_", domain.lower()).strip("_")}' for domain in sources}
  twice = sorted(domain for domain, task in tasks.items() if list(tasks.values()).count(task) > 1)
  if twice:
    raise ValueError(f'the domains {", ".join(twice)} would be one task, {tasks[twice[0]]!r}; rename one')
  taken = {name, *tasks.values()} & {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if taken:
    raise ValueError(f'seqio has {", ".join(sorted(taken))} registered already; give another name')
  for domain, source in sources.items():
    _add_task(tasks[domain], source, tokenizer)
  register_mixture(name, tasks, mixture)
  return tasks


def _add_task(name: str, source: seqio.DataSource, tokenizer: str | os.PathLike,
              first: Sequence[Callable] = ()) -> None:
  vocabulary = Vocabulary(tokenizer)
  seqio.TaskRegistry.add(
      name, source=source,
      preprocessors=[*first, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
                     seqio.preprocessors.append_eos],
      output_features={'targets': seqio.Feature(vocabulary, add_eos=vocabulary.eos_id is not None)})


def _published(shares: Mapping[str, float]) -> mixtures.Mixture:
  return mixtures.Mixture(mixtures.normalised(shares), {'method': 'published'})


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
  """All text files in a folder and those inside it, in order of their names."""
  files = sorted(file.absolute() for file in folder.rglob('*') if file.is_file() and corpora.suffix(file))
  if not files:
    raise ValueError(f'{folder} holds no text files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet); want the corpus as '
                     'published')
  return files


@tf.autograph.experimental.do_not_convert
def _examples(file: tf.Tensor, keep: Callable[[corpora.Document], bool]) -> tf.data.Dataset:
  """The documents of one file that `keep` keeps, read as the data set is iterated over."""
  def read(path: bytes) -> Iterator[dict[str, str]]:
    for document in corpora.documents_of(pathlib.Path(path.decode())):
      if keep(document):
        yield {'targets': document.text, 'id': document.id}

  text = tf.TensorSpec([], tf.string)
  return tf.data.Dataset.from_generator(read, args=(file,), output_signature={'targets': text, 'id': text})


_tokenizer = functools.lru_cache(maxsize=8)(tokenizers.load)
