"""The token store: packed records by split and domain, with a manifest that says what they are and that they are whole.

STORE/SPLIT/DOMAIN/tokens-NNNNN-of-NNNNN.array_record, STORE/manifest.json, and the tokenizer: `tokenizer.load(STORE)`.
Record n of a domain is a stable name: counted from 0 over the domain's shards in order.
"""

import concurrent.futures
import functools
import os
import pathlib
import threading

import numpy as np
from array_record.python import array_record_module

from datasel import workdir
from datasel.data import corpus, packing, shards
from datasel.data import tokenizer as tokenizers

MANIFEST = 'manifest.json'
_OPEN_SHARDS = 512  # at most, well below the usual limit of 1024 open files
# Without read-ahead and its threads, `seek` then `read` takes 4 us a record; `read([indices])` takes 20 us and more.
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'


class Store:
  """A finished token store, read at random.

  verify: 'full' compares the sha256 of every shard, 'size' only its length in bytes.
  domains: sorted names.  length: L.  tokenizer: {name, digest, vocab_size, bos_id, eos_id}.  digest: of the manifest,
  and so of everything.  Raises ValueError naming the shard that is missing or damaged.
  """

  def __init__(self, path: str | os.PathLike, *, verify: str = 'full'):
    if verify not in ('full', 'size'):
      raise ValueError(f"verify is {verify!r}, want 'full' or 'size'")
    self.path = pathlib.Path(path)
    self.manifest = read_manifest(self.path)
    self.digest: str = self.manifest['digest']
    self.length: int = self.manifest['length']
    self.tokenizer: dict = self.manifest['tokenizer']
    self.vocab_size: int = self.tokenizer['vocab_size']
    self.domains: tuple[str, ...] = tuple(sorted(self.manifest['splits']['train']))
    self._splits = {split: _Shards(self.path / split, [counts[name]['shards'] for name in self.domains], self.domains)
                    for split, counts in self.manifest['splits'].items()}
    for split in self._splits.values():
      split.check(verify)
    self._dtype = packing.record_dtype(self.length, self.vocab_size)
    # A reader has one position, which seek moves and read follows; one thread at a time.
    self._lock = threading.Lock()
    self._reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(lambda split, shard: self._splits[split].open(shard))

  @property
  def whole(self) -> 'Store':
    """Itself: what is seen through a selection (`selection.Selected`) has another."""
    return self

  def encoder(self) -> tokenizers.Tokenizer:
    """The tokenizer of its text, which it holds."""
    return tokenizers.load(self.path)

  def sizes(self, split: str) -> np.ndarray:
    """int64 [M]: the number of records of each domain, in the order of `domains`."""
    return self._split(split).sizes_M.copy()

  def counts(self, split: str) -> dict[str, dict]:
    """{domain: {documents, tokens, targets, bytes, sequences, dropped, shards}}, and `cut` where documents were
    truncated: {documents, tokens, bytes}, what of them is not in the store."""
    self._split(split)
    return self.manifest['splits'][split]

  def read(self, split: str, domain_B: np.ndarray, record_B: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of rows (domain_B[b], record_B[b]), in order: `packing.unpack`'s arrays and the arguments,
    as domain_B int32 and example_B int64.

    domain_B: integers in [0, M).  record_B: in [0, sizes(split)[domain]).  IndexError names a row out of range.
    """
    shards_of_split = self._split(split)
    domain_B, record_B = np.asarray(domain_B, np.int64), np.asarray(record_B, np.int64)
    shard_B, local_B = shards_of_split.locate(domain_B, record_B)
    with self._lock:
      rows = [self._read_one(split, shard, local) for shard, local in zip(shard_B.tolist(), local_B.tolist())]
    batch = packing.unpack(np.frombuffer(b''.join(rows), self._dtype))
    return batch | {'domain_B': domain_B.astype(np.int32), 'example_B': record_B.copy()}

  def names(self, domain_B: np.ndarray, record_B: np.ndarray) -> list[str]:
    """['code/17', ...]: train records by domain and number, for people; these hold for the life of the store."""
    return [f'{self.domains[domain]}/{record}' for domain, record in zip(domain_B, record_B)]

  def _read_one(self, split: str, shard: int, local: int) -> bytes:
    reader = self._reader(split, shard)
    try:
      reader.seek(local)
      row = reader.read()
    except RuntimeError as e:
      raise ValueError(f'{self._splits[split].paths[shard]} is damaged at record {local} ({e}); {_REMEDY}') from e
    if len(row) != self._dtype.itemsize:
      raise ValueError(f'{self._splits[split].paths[shard]}: record {local} has {len(row)} bytes, '
                       f'want {self._dtype.itemsize}; {_REMEDY}')
    return row

  def _split(self, split: str) -> '_Shards':
    if split not in self._splits:
      raise ValueError(f'unknown split {split!r} of {self.path}; known: {sorted(self._splits)}')
    return self._splits[split]


def read_manifest(path: str | os.PathLike) -> dict:
  """The manifest of the store at `path`.  Raises ValueError when it is missing, changed, or of another format."""
  path = pathlib.Path(path)
  if not (path / MANIFEST).is_file():
    raise ValueError(f'{path} is no token store (it has no {MANIFEST}); make one with python -m datasel.prepare')
  manifest = workdir.read_json(path / MANIFEST)
  if manifest.get('format') != shards.FORMAT:
    raise ValueError(f'{path} is a store of format {manifest.get("format")}, want {shards.FORMAT}; {_REMEDY}')
  rest = {key: value for key, value in manifest.items() if key != 'digest'}
  if manifest.get('digest') != workdir.digest(rest):
    raise ValueError(f'{path / MANIFEST} was changed after it was written (its digest differs); {_REMEDY}')
  return manifest


def assemble(
    results: list[tuple[corpus.Source, dict]], folder: pathlib.Path, store: pathlib.Path, settings: dict
) -> None:
  """Moves the shards that `shards.pack_file` left in `folder` to their places in `store` and writes the manifest, last.

  results: each source with its result, in corpus order.  settings: the manifest's first keys.
  Raises ValueError for a domain without a document (or a target) in one of the splits, before anything is moved.
  """
  splits: dict[str, dict[str, dict]] = {split: {} for split in corpus.SPLITS}
  sources: dict[str, list[dict]] = {}
  for source, result in results:
    sources.setdefault(source.domain, []).append(result['source'])
    for split, counts in result['splits'].items():
      splits[split][source.domain] = _sum(splits[split].get(source.domain), counts)
  _check(splits, sources)
  for split, by_domain in splits.items():
    for domain, counts in by_domain.items():
      for i, shard in enumerate(counts['shards']):
        shard['name'] = f'tokens-{i:05}-of-{len(counts["shards"]):05}.array_record'
        target = store / split / domain / shard['name']
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / shard.pop('file'), target)
  manifest = settings | {'splits': splits, 'sources': sources}
  workdir.write_json(store / MANIFEST, manifest | {'digest': workdir.digest(manifest)})


def _sum(total: dict | None, counts: dict) -> dict:
  """The counts of a domain with one more source's."""
  shard = [dict(counts['shard'])] if counts['shard'] else []
  cut = {'cut': {key: n + (total['cut'][key] if total else 0) for key, n in counts['cut'].items()}
         } if 'cut' in counts else {}
  if total is None:
    return {key: counts[key] for key in (*COUNTED, 'dropped')} | {'shards': shard} | cut
  dropped = {reason: total['dropped'].get(reason, 0) + counts['dropped'].get(reason, 0)
             for reason in sorted({*total['dropped'], *counts['dropped']})}
  return ({key: total[key] + counts[key] for key in COUNTED}
          | {'dropped': dropped, 'shards': total['shards'] + shard} | cut)


def _check(splits: dict[str, dict[str, dict]], sources: dict[str, list[dict]]) -> None:
  for domain, listed in sources.items():
    read = sum(source['documents'] for source in listed)
    by_split = [splits[split][domain] for split in corpus.SPLITS if domain in splits[split]]
    accounted = sum(counts['documents'] + sum(counts['dropped'].values()) for counts in by_split)
    if read != accounted:
      raise RuntimeError(f'domain {domain!r}: {read} documents read but {accounted} written or dropped; our bug')
    for split in corpus.SPLITS:
      if domain not in splits[split] or not splits[split][domain]['targets']:
        dropped = splits[split].get(domain, {}).get('dropped') or 'none'
        raise ValueError(f'domain {domain!r} has no {split} document with a token to predict ({read} read, dropped: '
                         f'{dropped}); give it more text, another holdout, or files of its own in CORPUS/{split}')


COUNTED = ('documents', 'tokens', 'targets', 'bytes', 'sequences')
_REMEDY = 'restore it from a copy, or delete the store and prepare it again'


class _Shards:
  """The shards of one split, in order of domain and number, numbered through."""

  def __init__(self, folder: pathlib.Path, listed: list[list[dict]], domains: tuple[str, ...]):
    self.domains = domains
    self.entries = [shard for of_domain in listed for shard in of_domain]
    self.paths = [folder / name / shard['name'] for name, of_domain in zip(domains, listed) for shard in of_domain]
    self.sizes_M = np.array([sum(shard['records'] for shard in of_domain) for of_domain in listed], np.int64)
    self._first_M = np.cumsum(self.sizes_M) - self.sizes_M
    records = np.array([shard['records'] for shard in self.entries], np.int64)
    self._first_S = np.cumsum(records) - records

  def check(self, verify: str) -> None:
    """Raises ValueError naming the first shard that is missing, of another size or, in full, of another content."""
    for path, entry in zip(self.paths, self.entries):
      size = path.stat().st_size if path.is_file() else None
      if size != entry['bytes']:
        got = 'is missing' if size is None else f'has {size} bytes, want {entry["bytes"]}'
        raise ValueError(f'shard {path} {got}; {_REMEDY}')
    if verify == 'full':
      with concurrent.futures.ThreadPoolExecutor() as pool:
        for path, entry, got in zip(self.paths, self.entries, pool.map(workdir.digest_file, self.paths)):
          if got != entry['sha256']:
            raise ValueError(f'shard {path} is damaged: its sha256 is {got}, want {entry["sha256"]}; {_REMEDY}')

  def locate(self, domain_B: np.ndarray, record_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each row, and the record's number in it."""
    if domain_B.ndim != 1 or domain_B.shape != record_B.shape or len(domain_B) == 0:
      raise ValueError(f'domain_B and record_B have shapes {domain_B.shape}, {record_B.shape}, want [B], B >= 1')
    known_B = (domain_B >= 0) & (domain_B < len(self.domains))
    if not known_B.all():
      row = int(np.argmin(known_B))
      raise IndexError(f'row {row}: domain {domain_B[row]} is out of range; the store has {len(self.domains)} domains')
    inside_B = (record_B >= 0) & (record_B < self.sizes_M[domain_B])
    if not inside_B.all():
      row = int(np.argmin(inside_B))
      name, size = self.domains[domain_B[row]], self.sizes_M[domain_B[row]]
      raise IndexError(f'row {row}: record {record_B[row]} is out of range; domain {name!r} has {size} records')
    flat_B = self._first_M[domain_B] + record_B
    shard_B = np.searchsorted(self._first_S, flat_B, side='right') - 1
    return shard_B, flat_B - self._first_S[shard_B]

  def open(self, shard: int):
    """A reader of one shard.  A file that can't be read opens as one of 0 records, so the number is compared."""
    reader = array_record_module.ArrayRecordReader(str(self.paths[shard]), _READER_OPTIONS)
    if reader.num_records() != self.entries[shard]['records']:
      raise ValueError(f'shard {self.paths[shard]} holds {reader.num_records()} records, '
                       f'want {self.entries[shard]["records"]}; {_REMEDY}')
    return reader
