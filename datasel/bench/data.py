"""How fast training data is read: by datasel's sampler, by Hugging Face `datasets` from the same tokens, and at best.

Every contender gives whole batches of tokens_BxL and targets_BxL (int32, numpy) from the same packed sequences with the
same weights.  datasel also shuffles, resumes at once, and makes segments, positions and loss masks.  The peer streams
its sources in order, in its fastest format; its map-style form, which holds the whole order in memory, is shown too.
The limit is a gather from one memory-mapped array by a plan made before.  The text is the interpreter's own library, a
domain for each of its packages, so that this runs anywhere.
"""

import contextlib
import itertools
import json
import logging
import pathlib
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from datasel import prepare
from datasel.data import mixture, sampler
from datasel.data.store import Store

_log = logging.getLogger(__name__)
_LIMIT = 'numpy memmap gather (the limit)'
_PEER = 'interleave_datasets, streaming (the peer)'
_MAP_STYLE = 'interleave_datasets, map-style'
_OURS = 'datasel Sampler'
_PREFETCHED = 'datasel Sampler, prefetch thread'


def run(*, length: int = 1024, batch_size: int = 32, batches: int = 200, repeats: int = 5, domains: int = 16,
        max_bytes_per_domain: int = 600_000) -> dict[str, Any]:
  """Tokens/s of each contender over `repeats` rounds of `batches` batches, after a round to warm up.

  The contenders take turns in every round, so that a busy machine is as unkind to one as to another.
  Raises ImportError where the peer is not installed.
  """
  datasets = _import_datasets()
  with tempfile.TemporaryDirectory(prefix='datasel-bench-') as name, contextlib.ExitStack() as stack:
    folder = pathlib.Path(name)
    store = _store(folder, length, domains, max_bytes_per_domain)
    draws = sampler.Sampler(store, 'train', mixture.by_tokens(store).for_domains(store.domains), batch_size, seed=0)
    tokens = [_tokens(store, j) for j in range(len(store.domains))]
    sources = [_source(datasets, rows, folder / f'{j}.arrow') for j, rows in enumerate(tokens)]
    contenders = {
        _LIMIT: _gather(tokens, draws, folder / 'tokens.npy', batches),
        _PEER: _streamed(datasets, sources, draws),
        _MAP_STYLE: _map_style(datasets, sources, draws),
        _OURS: iter(draws),
        _PREFETCHED: stack.enter_context(contextlib.closing(sampler.batches(draws))),
    }
    rates: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
      for contender, iterator in contenders.items():
        seconds = _seconds(iterator, batches, (batch_size, length))
        if repeat > 0:  # the first round warms up
          rates[contender].append(batches * batch_size * length / seconds)
      _log.info('round %d of %d', repeat, repeats)
  medians = {contender: statistics.median(rounds) for contender, rounds in rates.items()}
  return {
      'settings': {'length': length, 'batch_size': batch_size, 'batches': batches, 'repeats': repeats,
                   'sequences': dict(zip(store.domains, store.sizes('train').tolist()))},
      'contenders': {contender: {'tokens_per_second': median, 'of_peer': median / medians[_PEER],
                                 'of_limit': median / medians[_LIMIT], 'rounds': rates[contender]}
                     for contender, median in medians.items()},
  }


def table(result: dict[str, Any]) -> str:
  """The result of `run` as text."""
  settings = result['settings']
  lines = [f'{sum(settings["sequences"].values())} sequences of {settings["length"]} tokens in '
           f'{len(settings["sequences"])} domains, batches of {settings["batch_size"]}; '
           f'{settings["repeats"]} rounds of {settings["batches"]} batches',
           f'{"Mtokens/s":42}{"median":>8}{"lowest":>9}{"highest":>9}{"x peer":>9}{"x limit":>9}']
  for contender, row in result['contenders'].items():
    millions = [rate / 1e6 for rate in (row['tokens_per_second'], min(row['rounds']), max(row['rounds']))]
    lines.append(f'{contender:42}{millions[0]:8.1f}{millions[1]:9.1f}{millions[2]:9.1f}'
                 f'{row["of_peer"]:9.2f}{row["of_limit"]:9.2f}')
  return '\n'.join(lines)


def _import_datasets() -> Any:
  try:
    import datasets
  except ImportError as e:
    raise ImportError("the peer of this benchmark is Hugging Face `datasets`, which is not installed; "
                      "pip install 'datasel[dev]'") from e
  return datasets


def _store(folder: pathlib.Path, length: int, domains: int, max_bytes: int) -> Store:
  """A token store of the interpreter's library: its largest packages are the domains."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  packages = {path.name: sorted(path.rglob('*.py')) for path in root.iterdir() if (path / '__init__.py').is_file()}
  sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in packages.items()}
  for name in sorted(sizes, key=lambda name: (-sizes[name], name))[:domains]:
    text = ''.join(path.read_text(encoding='utf-8', errors='replace') for path in packages[name])[:max_bytes]
    documents = [text[i:i + 8192] for i in range(0, len(text), 8192)]
    for split, part in (('validation', documents[:1]), ('train', documents[1:])):
      path = folder / 'corpus' / split / f'{name}.jsonl'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(''.join(json.dumps({'text': document}) + '\n' for document in part), encoding='utf-8')
  tokenizer = folder / 'tokenizer.json'
  prepare.train_tokenizer(folder / 'corpus', tokenizer, vocab_size=4096, max_bytes_per_domain=50_000)
  return prepare.prepare(folder / 'corpus', folder / 'store', tokenizer, length=length)


def _tokens(store: Store, j: int) -> np.ndarray:
  """The sequences of domain j, [size, L+1], as small as the store keeps them."""
  size = int(store.sizes('train')[j])
  batch = store.read('train', np.full(size, j), np.arange(size))
  tokens = np.concatenate([batch['tokens_BxL'], batch['targets_BxL'][:, -1:]], axis=1)
  return tokens.astype(np.uint16 if store.vocab_size <= 1 << 16 else np.uint32)


def _gather(tokens: list[np.ndarray], draws: sampler.Sampler, path: pathlib.Path,
            batches: int) -> Iterator[dict[str, np.ndarray]]:
  np.save(path, np.concatenate(tokens))
  memory = np.load(path, mmap_mode='r')
  first_M = np.cumsum(draws.sizes_M) - draws.sizes_M
  domain_N, record_N = draws.plan(0, batches * draws.batch_size)
  for row_B in itertools.cycle((first_M[domain_N] + record_N).reshape(batches, -1)):
    rows = memory[row_B]
    yield {'tokens_BxL': rows[:, :-1].astype(np.int32), 'targets_BxL': rows[:, 1:].astype(np.int32)}


def _source(datasets: Any, tokens: np.ndarray, path: pathlib.Path) -> Any:
  """One domain as a memory-mapped Hugging Face dataset."""
  import pyarrow as pa
  table = pa.table({'tokens': list(tokens.astype(np.int32))})
  with pa.OSFile(str(path), 'wb') as f, pa.ipc.new_stream(f, table.schema) as writer:
    writer.write_table(table)
  return datasets.Dataset.from_file(str(path))


# Measured with datasets 5.2: the 'arrow' format beats 'numpy' and Python lists, and streaming parquet is no faster.
def _streamed(datasets: Any, sources: list[Any], draws: sampler.Sampler) -> Iterator[dict[str, np.ndarray]]:
  streams = [source.to_iterable_dataset() for source in sources]
  mixed = datasets.interleave_datasets(streams, _probabilities(draws), seed=0, stopping_strategy='all_exhausted')
  while True:
    for batch in mixed.with_format('arrow').iter(draws.batch_size, drop_last_batch=True):
      yield _batch(batch)


def _map_style(datasets: Any, sources: list[Any], draws: sampler.Sampler) -> Iterator[dict[str, np.ndarray]]:
  mixed = datasets.interleave_datasets(sources, _probabilities(draws), seed=0, stopping_strategy='all_exhausted')
  mixed = mixed.with_format('arrow')
  for first in itertools.cycle(range(0, len(mixed) - draws.batch_size + 1, draws.batch_size)):
    yield _batch(mixed[first:first + draws.batch_size])


def _probabilities(draws: sampler.Sampler) -> list[float]:
  return (draws.counts_M / draws.block).tolist()


def _batch(table: Any) -> dict[str, np.ndarray]:
  rows = table['tokens'].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
  return {'tokens_BxL': rows[:, :-1], 'targets_BxL': rows[:, 1:]}


def _seconds(iterator: Iterator[dict[str, np.ndarray]], batches: int, shape: tuple[int, int]) -> float:
  began = time.perf_counter()
  for _ in range(batches):
    batch = next(iterator)
    for key in ('tokens_BxL', 'targets_BxL'):
      if batch[key].shape != shape or batch[key].dtype != np.int32:
        raise RuntimeError(f'{key} is {batch[key].dtype} {batch[key].shape}, want int32 {shape}; a bug of datasel')
  return time.perf_counter() - began
