"""A corpus of text to a token store.

  python -m datasel.prepare train-tokenizer --corpus CORPUS --out tokenizer.json --vocab_size 8192
  python -m datasel.prepare --corpus CORPUS --store STORE --tokenizer tokenizer.json

and with an anchor token between sentences (AnLLM's AC), by a tokenizer made of any other:

  python -m datasel.prepare anchor-tokenizer --tokenizer tokenizer.json --out FOLDER
  python -m datasel.prepare --corpus CORPUS --store STORE --tokenizer FOLDER

It may be killed at any moment: started again, it takes up the files it had not finished.  Of several processes that
make the same store, one does and the others wait for it.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator

from datasel.data import corpus as corpora
from datasel.data import locks, pools, seqio_cache, shards
from datasel.data import packing as packing_lib
from datasel.data import store as stores
from datasel.data import tokenizer as tokenizers

_log = logging.getLogger(__name__)
# Bytes of text in a byte on disk, and text bytes in a token: on the cautious side for English.
_EXPANSION = {'.tfrecord': 1.0, '.jsonl': 1.0, '.arrow': 1.0, '.parquet': 3.0, '.gz': 4.0, '.zst': 4.0}
_BYTES_A_TOKEN = 3


def prepare(
    corpus: str | os.PathLike,
    store: str | os.PathLike,
    tokenizer: str | os.PathLike,
    *,
    length: int = 1024,
    holdout: float = 0.01,
    packing: str = 'concatenate',
    workers: int = 1,
    pack_all: Callable[[list[pools.Job], pathlib.Path], Iterable[tuple[str, dict]]] | None = None,
) -> stores.Store:
  """Tokenises and packs the corpus into a token store at `store`, and opens it.

  length: L, input tokens of a record.  holdout: the fraction of documents, chosen by id, kept for validation in each
  domain that has no files in CORPUS/validation.  packing: 'concatenate', which leaves no token out, or 'truncate', one
  document a record, cut off at its end (`datasel.data.packing`).  workers: processes; the bytes of the store don't
  depend on it, nor on interruptions.  A store already there from the same text and settings is returned; another one
  is never touched.  Work in progress is in STORE.partial.  pack_all: does the work elsewhere than in processes of this
  machine, and gives back what `pools.pack_all` does (`datasel.data.beam` has one).
  Raises ValueError for a corpus, tokenizer or setting that can't work, OSError when the disk is or would be full.
  """
  if workers < 1:
    raise ValueError(f'workers is {workers}, want at least 1')
  corpus, store = corpora.Corpus(corpus), pathlib.Path(store)
  encoder = tokenizers.load(tokenizer)
  if packing not in packing_lib.NAMES:
    raise ValueError(f'packing is {packing!r}, want one of {sorted(packing_lib.NAMES)}')
  settings = shards.Settings(encoder.digest, length, holdout, packing=packing_lib.NAMES[packing])
  jobs = _jobs(corpus, settings)
  stated = _stated(encoder, settings)
  partial = store.with_name(f'{store.name}.partial')
  if not store.exists() or partial.exists():  # a store that is whole is opened also where nothing can be written
    with locks.locked(store.with_name(f'.{store.name}.lock'), f'making {store}'):
      if not store.exists():
        _check_holdout(jobs, holdout)
        if packing == 'concatenate':  # else what is cut off, or padded, is not known
          _check_space(jobs, partial, packing_lib.record_dtype(length, encoder.vocab_size).itemsize / length)
        _make(jobs, encoder, stated, store, partial, pack_all or functools.partial(pools.pack_all, workers=workers))
        return stores.Store(store, verify='size')
      shutil.rmtree(partial, ignore_errors=True)  # of a process killed when all was done
  _refuse_difference(store, stated, [source for source, _ in jobs])
  _log.info('%s is up to date', store)
  return stores.Store(store, verify='size')


def train_tokenizer(
    corpus: str | os.PathLike,
    out: str | os.PathLike,
    *,
    vocab_size: int,
    max_bytes_per_domain: int = 10_000_000,
    reuse: bool = False,
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE on the first `max_bytes_per_domain` bytes of text of each train domain, into `out`.

  reuse: an `out` already there is loaded as it is, also one that another process is making now.
  """
  corpus, out = corpora.Corpus(corpus), pathlib.Path(out)
  if reuse and out.exists():
    return tokenizers.load(out)
  with locks.locked(out.with_name(f'.{out.name}.lock'), f'training {out}'):
    if reuse and out.exists():
      return tokenizers.load(out)
    _log.info('training a tokenizer of %d tokens', vocab_size)
    encoder = tokenizers.train_bpe(_sample(corpus, max_bytes_per_domain), vocab_size, out)
  if encoder.vocab_size < vocab_size:
    _log.warning('%s has %d tokens, not %d: the text holds no more', out, encoder.vocab_size, vocab_size)
  return encoder


def anchor_tokenizer(
    tokenizer: str | os.PathLike,
    out: str | os.PathLike,
    *,
    min_length: int = 1,
    max_length: int | None = None,
    trailing: bool = False,
) -> tokenizers.Tokenizer:
  """Writes `tokenizer`, with an anchor token between sentences, into the folder `out`: see `tokenizer.with_anchor`.

  The same one already there is left as it is.  ValueError for another, and for anything else that is there.
  """
  out = pathlib.Path(out)
  made = tokenizers.with_anchor(
    tokenizers.load(tokenizer), min_length=min_length, max_length=max_length, trailing=trailing)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    if not out.is_dir() or tokenizers.load(out).digest != made.digest:
      raise ValueError(f'{out} holds something else; give another --out')
    return made
  made.save(out)
  return made


def summary(store: stores.Store) -> str:
  """A table of the store: a line for each domain and split, with what was dropped or cut off."""
  rows = []
  for split in corpora.SPLITS:
    counts = store.counts(split)
    for domain in store.domains:
      c = counts[domain]
      dropped = ', '.join(f'{n} {reason}' for reason, n in c['dropped'].items()) or '0'
      rows.append((domain, split, *_figures(c), dropped, *_cut([c])))
    total = {key: sum(c[key] for c in counts.values()) for key in stores.COUNTED}
    dropped = str(sum(sum(c['dropped'].values()) for c in counts.values()))
    rows.append(('total', split, *_figures(total), dropped, *_cut(counts.values())))
  head = ('domain', 'split', 'documents', 'MB', 'tokens', 'targets', 'sequences', 'dropped', 'cut off')
  rows.insert(0, head[:len(rows[0])])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return '\n'.join('  '.join(cell.ljust(w) if i in (0, 1, 7, 8) else cell.rjust(w)
                             for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags that say what store is made, wherever the work is done."""
  parser.add_argument('--corpus', required=True, help='folder holding {train,validation}/DOMAIN.jsonl')
  parser.add_argument('--store', required=True, help='the token store to write')
  parser.add_argument('--tokenizer', required=True, help='tokenizer.json, .model, folder, or Hugging Face name')
  parser.add_argument('--length', type=int, default=1024, help='input tokens in a record')
  parser.add_argument('--holdout', type=float, default=0.01, help='fraction of documents kept for validation')
  parser.add_argument('--packing', choices=sorted(packing_lib.NAMES), default='concatenate',
                      help='of documents into records: one after the other, or one each, cut off where it is too long')


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  if argv[:1] == ['train-tokenizer']:
    parser = argparse.ArgumentParser('datasel.prepare train-tokenizer')
    parser.add_argument('--corpus', required=True, help='folder holding train/DOMAIN.jsonl')
    parser.add_argument('--out', required=True, help='the tokenizer.json to write')
    parser.add_argument('--vocab_size', type=int, default=8192)
    parser.add_argument('--max_bytes_per_domain', type=int, default=10_000_000)
    run = lambda args: f'{args["out"]}: {train_tokenizer(**args).vocab_size} tokens'
    argv = argv[1:]
  elif argv[:1] == ['anchor-tokenizer']:
    parser = argparse.ArgumentParser('datasel.prepare anchor-tokenizer',
                                     description='An anchor token between the sentences of all text (AnLLM\'s AC).')
    parser.add_argument('--tokenizer', required=True, help='tokenizer.json, .model, folder, or Hugging Face name')
    parser.add_argument('--out', required=True, help='the folder to write: a tokenizer like any other')
    parser.add_argument('--min_length', type=int, default=1, help='fewest tokens of a segment, its anchor among them')
    parser.add_argument('--max_length', type=int, help='most tokens of a segment; default: no limit')
    parser.add_argument('--trailing', action='store_true', help='an anchor also after the last sentence of a text')
    run = lambda args: (f'{args["out"]}: token {(made := anchor_tokenizer(**args)).anchor_id} {tokenizers.ANCHOR} of '
                        f'{made.vocab_size}')
    argv = argv[1:]
  else:
    parser = argparse.ArgumentParser('datasel.prepare',
                                     epilog='See also: train-tokenizer --help, anchor-tokenizer --help')
    add_flags(parser)
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    run = lambda args: summary(prepare(**args))
  args = vars(parser.parse_args(argv))
  try:
    print(run(args))
  except (ValueError, OSError, RuntimeError) as e:
    sys.exit(f'{parser.prog}: {e}')


def _jobs(corpus: corpora.Corpus, settings: shards.Settings) -> list[pools.Job]:
  """Every source with the settings it is packed by: a domain with validation files keeps all its train documents."""
  train, validation = (corpus.sources[split] for split in corpora.SPLITS)
  stray = sorted(set(validation) - set(train))
  if stray:
    raise ValueError(f'domains {stray} of {corpus.path}/validation have no train files; add them')
  without = sorted(set(train) - set(validation))
  if without and not settings.holdout:
    raise ValueError(f'domains {without} have no files in {corpus.path}/validation and holdout is 0; set a holdout')
  jobs = []
  for domain in corpus.domains:
    holdout = 0 if domain in validation else settings.holdout
    own = dataclasses.replace(settings, holdout=holdout)
    jobs += [(source, own) for source in (*train[domain], *validation.get(domain, ()))]
  return jobs


def _make(jobs: list[pools.Job], encoder: tokenizers.Tokenizer, stated: dict, store: pathlib.Path,
          partial: pathlib.Path, pack_all: Callable[[list[pools.Job], pathlib.Path], Iterable]) -> None:
  """Packs into `partial`, taking up what is finished there; the store appears whole.  Call it with the store locked."""
  encoder.save(partial / 'tokenizer')
  results = dict(pack_all(jobs, partial))
  _check_counts([source for source, _ in jobs], results)
  whole = partial / 'store'
  shutil.rmtree(whole, ignore_errors=True)
  encoder.save(whole)
  stores.assemble([(source, results[source.name]) for source, _ in jobs], partial, whole, stated)
  os.replace(whole, store)
  shutil.rmtree(partial)


def _check_counts(sources: list[corpora.Source], results: dict[str, dict]) -> None:
  """Raises ValueError for a task cached by seqio whose files hold another number of examples than seqio counted: a file
  cut between two records reads as a shorter one."""
  cached = [source for source in sources if seqio_cache.is_shard(source.path)]
  for (folder, split), group in itertools.groupby(cached, lambda source: (source.path.parent, source.split)):
    files = list(group)
    want = seqio_cache.n_examples(files[0].path)
    got = sum(counts['documents'] + sum(counts['dropped'].values())
              for file in files for counts in results[file.name]['splits'].values())
    if want not in (None, got):
      raise ValueError(f'{folder}: the files of split {split!r} hold {got} examples, stats.{split}.json counts {want}; '
                       'copy the cached task again')


def _stated(encoder: tokenizers.Tokenizer, settings: shards.Settings) -> dict:
  """The head of the manifest."""
  return {
      'format': settings.format,
      'packing': settings.packing,
      'length': settings.length,
      'dtype': packing_lib.record_dtype(settings.length, encoder.vocab_size)['tokens'].base.name,
      'holdout': settings.holdout,
      'tokenizer': {
          'name': encoder.name,
          'digest': encoder.digest,
          'vocab_size': encoder.vocab_size,
          'bos_id': encoder.bos_id,
          'eos_id': encoder.eos_id,
      },
  }


def _refuse_difference(store: pathlib.Path, stated: dict, sources: list[corpora.Source]) -> None:
  """Raises ValueError naming what differs between the store that exists and the one asked for."""
  manifest = stores.read_manifest(store)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    want = dict(zip([source.name for source in sources], pool.map(corpora.Source.digest, sources)))
  got = {source['name']: source['sha256'] for of_domain in manifest['sources'].values() for source in of_domain}
  differences = [f'{key} is {manifest[key]}, want {stated[key]}' for key in ('packing', 'length', 'holdout')
                 if manifest[key] != stated[key]]
  if manifest['tokenizer']['digest'] != stated['tokenizer']['digest']:
    differences.append(f'tokenizer is {manifest["tokenizer"]}, want {stated["tokenizer"]}')
  differences += [f'{name} {"is new" if name not in got else "is gone" if name not in want else "has changed"}'
                  for name in sorted({*got, *want}) if got.get(name) != want.get(name)][:5]
  if differences:
    raise ValueError(f'{store} was made otherwise: {"; ".join(differences)}; give another --store, or delete it')


def _check_holdout(jobs: list[pools.Job], holdout: float) -> None:
  """Raises ValueError for a domain none of whose documents would be held out, before hours of work show it.

  Reads ids only until the first such document: about 1 / holdout of them.
  """
  sources: dict[str, list[corpora.Source]] = {}
  for source, settings in jobs:
    if settings.holdout:
      sources.setdefault(source.domain, []).append(source)
  for domain, listed in sources.items():
    lowest, read = 1.0, 0
    for document in itertools.chain.from_iterable(map(corpora.documents, listed)):
      read += 1
      if document.text.strip():
        lowest = min(lowest, shards.holdout_rank(document.id))
        if lowest < holdout:
          break
    else:
      raise ValueError(f'domain {domain!r} has no document for validation: the first of its {read} is held out at a '
                       f'holdout above {lowest:.4f}, got {holdout}; raise it, or add files to CORPUS/validation')


def _check_space(jobs: list[pools.Job], partial: pathlib.Path, bytes_a_token: float) -> None:
  text = sum(source.size * _EXPANSION[source.files[0].suffix.partition('-')[0]] for source, _ in jobs)
  there = sum(file.stat().st_size for file in partial.rglob('*') if file.is_file())
  need = text / _BYTES_A_TOKEN * bytes_a_token - there
  folder = next(parent for parent in partial.absolute().parents if parent.exists())
  free = shutil.disk_usage(folder).free
  if need > free:
    raise OSError(f'{folder} has {free / 1e9:.1f} GB free, the store needs about {need / 1e9:.1f} GB; '
                  'free some space or give a --store on another disk')


def _sample(corpus: corpora.Corpus, max_bytes: int) -> Iterator[str]:
  for domain in corpus.domains:
    room = max_bytes
    documents = (d for source in corpus.sources['train'][domain] for d in corpora.documents(source))
    for document in documents:
      if room <= 0:
        break
      text = document.text.encode()[:room].decode(errors='ignore')
      room -= len(document.text.encode())
      yield text


def _cut(counts: Iterable[dict]) -> tuple[str, ...]:
  """What was cut off, in words, of a store of truncated documents; () of another."""
  cut = [c['cut'] for c in counts if 'cut' in c]
  if not cut:
    return ()
  documents, tokens, size = (sum(c[key] for c in cut) for key in ('documents', 'tokens', 'bytes'))
  return (f'{documents:,} documents, by {tokens:,} tokens, {size / 1e6:,.2f} MB' if documents else '0',)


def _figures(c: dict) -> tuple[str, ...]:
  return (f'{c["documents"]:,}', f'{c["bytes"] / 1e6:,.2f}',
          *(f'{c[key]:,}' for key in ('tokens', 'targets', 'sequences')))


if __name__ == '__main__':
  main(sys.argv[1:])
