"""Selections: which records of a token store's train split to train on.  Data are never copied to select them.

`gumbel_top_k` chooses records by their scores, `write` and `load` keep the choice (selection.npz), and `Selected` is
the store seen through it, for any code that takes a `datasel.data.store.Store`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from datasel import workdir
from datasel.data import domains as domain_names
from datasel.data import gumbel
from datasel.data.store import Store

FORMAT = 'selection-1'
_MANIFEST, _RECORDS = 'manifest', 'records/'  # members of selection.npz
_CHUNK = 1 << 16  # records looked at together: what is computed of them stays in the processor's cache
_HELD = 1 << 22  # keys that may be held and partitioned; more than those are first narrowed down


def gumbel_top_k(scores: Mapping[str, np.ndarray], *, ratio: float, temperature: float, seed: int,
                 quotas: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
  """The round(ratio * N) records of largest score + temperature * Gumbel noise: {domain: sorted int64 record numbers}.

  scores: floats [n] for records 0..n-1 of each domain, such as memory maps; finite.  Keys are float64.
  temperature: 0 keeps the largest scores; at t > 0 records are drawn one after another without replacement with
  probabilities proportional to exp(score / t) (PDS, Gu et al. 2024); scores all equal: at random.
  quotas: {domain: part of its records in [0, 1]}: such a domain is a selection of its own, the others share `ratio`.

  The noise of a record depends on the seed, its domain's name and its number alone; among equal keys the first by
  (domain, record) stay.  So the result is the same to the bit on every machine.  Reads the scores two or three times
  and holds a few million keys at most.  Raises ValueError for scores that are not finite, and where a share that is
  positive rounds to no record, or all of them do.
  """
  seed, quotas = operator.index(seed), dict(quotas or {})
  _check_scores(scores)
  check_options({name: len(x) for name, x in scores.items()}, ratio=ratio, temperature=temperature, quotas=quotas)
  if seed < 0:
    raise ValueError(f'seed is {seed}; want 0 or more')
  rest = [name for name in sorted(scores) if name not in quotas]
  kept = _largest({name: scores[name] for name in rest}, ratio, temperature, seed)
  for name, part in quotas.items():
    kept |= _largest({name: scores[name]}, part, temperature, seed)
  return {name: kept[name] for name in sorted(scores)}


def check_options(sizes: Mapping[str, int], *, ratio: float, temperature: float, quotas: Mapping[str, float]) -> None:
  """ValueError for what `gumbel_top_k` cannot select by, before there are scores; sizes: records of each domain."""
  if not 0 < ratio <= 1:
    raise ValueError(f'ratio is {ratio}; want the part of the records to keep, above 0 and at most 1')
  if not (math.isfinite(temperature) and temperature >= 0):
    raise ValueError(f'temperature is {temperature}; want a finite number, 0 or more')
  for name, part in quotas.items():
    if name not in sizes:
      raise ValueError(f'quotas name the domain {name!r}, which is not there; the domains are {", ".join(sizes)}')
    if not 0 <= part <= 1:
      raise ValueError(f'the quota of domain {name!r} is {part}; want the part of its records to keep, from 0 to 1')
  rest = [name for name in sizes if name not in quotas]
  kept = 0
  for names, part in ((rest, ratio), *(([name], part) for name, part in quotas.items())):
    n_records = sum(sizes[name] for name in names)
    kept += round(part * n_records)
    if part and n_records and not round(part * n_records):
      raise ValueError(f'{part} of the {n_records} records of {", ".join(names)} is less than half a record: nothing '
                       'would be kept; raise it')
  if not kept:
    raise ValueError('nothing would be kept of any domain; raise a quota, or leave one out')


def quotas_of(text: str) -> dict[str, float]:
  """{'code': 0.5, 'web': 0.0} of 'code=0.5,web=0'; ValueError for anything else."""
  pairs = [each.split('=') for each in text.split(',') if text]
  try:
    quotas = {name.strip(): float(part) for name, part in pairs}
    if len(quotas) < len(pairs):
      raise ValueError('a domain is named twice')
  except ValueError as e:
    raise ValueError(f"quotas are {text!r} ({e}); want DOMAIN=PART,..., such as 'code=0.5,web=0'") from e
  return quotas


def _check_scores(scores: Mapping[str, np.ndarray]) -> None:
  if not scores:
    raise ValueError('there are no scores to select by; want those of one domain at least')
  for name, values in scores.items():
    domain_names.check(name, 'the scores')
    if not isinstance(values, np.ndarray) or values.ndim != 1 or values.dtype.kind != 'f':
      got = f'{values.dtype} {list(values.shape)}' if isinstance(values, np.ndarray) else type(values).__name__
      raise ValueError(f'the scores of domain {name!r} are {got}; want an array of floats [n], one for each record')


def _largest(scores: Mapping[str, np.ndarray], ratio: float, temperature: float, seed: int) -> dict[str, np.ndarray]:
  """The records of largest keys of some domains, in one selection; `scores` in the order that breaks ties."""
  n_records = sum(map(len, scores.values()))
  k = round(ratio * n_records)
  none = np.zeros(0, np.int64)
  if not k:
    return dict.fromkeys(scores, none)

  def chunks() -> Iterator[tuple[str, int, np.ndarray]]:
    for name, values in scores.items():
      for first in range(0, len(values), _CHUNK):
        yield name, first, _ordered(_keys(name, values, first, temperature, seed))

  threshold, ties = _threshold(lambda: (image_N for _, _, image_N in chunks()), n_records, k)
  kept: dict[str, list[np.ndarray]] = {name: [none] for name in scores}
  for name, first, image_N in chunks():
    keep_N = image_N > threshold
    if ties:
      equal = np.flatnonzero(image_N == threshold)[:ties]
      keep_N[equal] = True
      ties -= len(equal)
    kept[name].append(first + np.flatnonzero(keep_N))
  return {name: np.concatenate(parts) for name, parts in kept.items()}


def _keys(name: str, values: np.ndarray, first: int, temperature: float, seed: int) -> np.ndarray:
  """float64: what records from `first` on, a chunk of them, are ordered by."""
  keys_N = values[first:first + _CHUNK].astype(np.float64)
  finite_N = np.isfinite(keys_N)
  if not finite_N.all():
    at = int(finite_N.argmin())
    raise ValueError(f'the score of record {name}/{first + at} is {keys_N[at]}; want finite scores: find out why the '
                     'scorer gave it')
  if temperature:
    keys_N += temperature * gumbel.noise(seed, name, first, first + len(keys_N))
  return keys_N + 0.0  # -0 becomes 0: they are equal, their bits are not


def _ordered(keys_N: np.ndarray) -> np.ndarray:
  """uint64 in the order of the float64 keys."""
  bits_N = keys_N.view(np.uint64)
  sign = np.uint64(1 << 63)
  return np.where(bits_N & sign, ~bits_N, bits_N | sign)


def _threshold(images: Callable[[], Iterable[np.ndarray]], n: int, k: int) -> tuple[int, int]:
  """(the k-th largest of n uint64 in all, how many of those equal to it are among the k largest).

  images() gives them in chunks, again at each call.  Sixteen bits a pass, from the highest, are settled by their
  histogram, until those that agree with the k-th largest in the settled bits are few enough to be held.
  """
  # Bits not settled yet; those settled; the rank of the sought one among those that agree with it; how many they are.
  bits, prefix, wanted, left = 64, 0, k, n

  def with_prefix(image_N: np.ndarray) -> np.ndarray:
    return image_N if bits == 64 else image_N[image_N >> bits == prefix]

  while left > _HELD and bits:
    counts = np.zeros(1 << 16, np.int64)
    for image_N in images():
      counts += np.bincount((with_prefix(image_N) >> (bits - 16) & 0xFFFF).astype(np.intp), minlength=1 << 16)
    at_least = np.cumsum(counts[::-1])
    i = int(np.searchsorted(at_least, wanted))
    digit = len(counts) - 1 - i
    left = int(counts[digit])
    wanted -= int(at_least[i]) - left
    bits, prefix = bits - 16, prefix << 16 | digit
  if not bits:
    return prefix, wanted
  held = np.concatenate([with_prefix(image_N) for image_N in images()])
  held.partition(len(held) - wanted)
  threshold = held[len(held) - wanted]
  return int(threshold), wanted - int((held > threshold).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
  """Records of a store's train split, and where the choice comes from.

  records: {domain: int64 record numbers, rising}, for every domain of the store, empty where nothing is kept.
  provenance: JSON; 'store' must be the digest of the store.  By custom also method, scores (their digest), ratio,
  temperature, seed, quotas, git.
  """
  records: dict[str, np.ndarray]
  provenance: dict[str, Any]

  def __post_init__(self):
    checked = {}
    for name, numbers in sorted(self.records.items()):
      domain_names.check(name, 'the selection')
      numbers = np.asarray(numbers)
      if numbers.ndim != 1 or numbers.dtype.kind not in 'iu':
        raise ValueError(f'the records of domain {name!r} are {numbers.dtype} {list(numbers.shape)}; want integers [k]')
      numbers = numbers.astype(np.int64, copy=False).view()
      if len(numbers) and (numbers[0] < 0 or (np.diff(numbers) < 1).any()):
        raise ValueError(f'the record numbers of domain {name!r} are not rising from 0 or more; sort them, each once')
      numbers.flags.writeable = False
      checked[name] = numbers
    if not isinstance(self.provenance.get('store'), str):
      raise ValueError("the selection's provenance has no 'store'; want the digest of the store that it is of")
    json.dumps(self.provenance, allow_nan=False)  # raises here rather than when a long run comes to write it
    object.__setattr__(self, 'records', checked)

  @functools.cached_property
  def digest(self) -> str:
    """sha256 of what is selected; who chose it, and when, does not matter to it."""
    return workdir.digest({name: hashlib.sha256(numbers.astype('<i8', copy=False)).hexdigest()
                           for name, numbers in self.records.items()})


def write(path: str | os.PathLike, selection: Selection) -> None:
  """Writes selection.npz, atomically; equal selections of equal provenance are equal files."""
  manifest = {'format': FORMAT, 'records': selection.digest, 'provenance': selection.provenance}
  described = json.dumps(manifest | {'digest': workdir.digest(manifest)}, allow_nan=False).encode()
  with workdir.replacing(path) as f:
    np.savez(f, **{_MANIFEST: np.frombuffer(described, np.uint8)},
             **{_RECORDS + name: numbers for name, numbers in selection.records.items()})


def load(path: str | os.PathLike) -> Selection:
  """Reads selection.npz; ValueError for a file that is missing, damaged, or something else."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f'there is no selection {path}; want a selection.npz')
  if not zipfile.is_zipfile(path):
    raise ValueError(f'{path} is no selection.npz, or was cut short; {_REMEDY}')
  try:
    with open(path, 'rb') as f, np.load(f, allow_pickle=False) as file:
      manifest = json.loads(file[_MANIFEST].tobytes())
      records = {key.removeprefix(_RECORDS): file[key] for key in file.files if key != _MANIFEST}
    rest = {key: value for key, value in manifest.items() if key != 'digest'}
    if rest.get('format') != FORMAT or manifest.get('digest') != workdir.digest(rest):
      raise ValueError(f'its format is {rest.get("format")}, want {FORMAT}, or it was changed after it was written')
    selection = Selection(records, rest['provenance'])
    if selection.digest != rest['records']:
      raise ValueError('its record numbers were changed after it was written')
  except (ValueError, TypeError, KeyError, AttributeError, EOFError, OSError, NotImplementedError, RuntimeError,
          zipfile.BadZipFile, zlib.error) as e:
    raise ValueError(f'{path} is damaged, or no selection.npz ({e}); {_REMEDY}') from e
  return selection


_REMEDY = 'restore it from a copy, or select again'


class Selected:
  """A store seen through a selection: takes the place of a `Store` wherever one is read.

  Its train split holds the kept records alone, renumbered from 0 in their order; a domain of which nothing is kept is
  there, with 0 records.  Every other split is the store's.  digest: of the store's and the selection's.
  whole: the `Store` itself, also where `store` is given as another `Selected` to choose from.

  In `read` and in batches (example_B) a record's number is the one *here*, so that what is looked up by it stays right;
  `names` gives what to tell people: the name in the store itself, which holds for good.
  Raises ValueError for a selection of another store, or one that does not fit it.
  """

  def __init__(self, store: 'Store | Selected', selection: Selection):
    if selection.provenance['store'] != store.digest:
      raise ValueError(f'the selection is of another token store (digest {selection.provenance["store"][:12]}) than '
                       f'{store.path} (digest {store.digest[:12]}); select from this store, or name that one')
    unknown = sorted(set(selection.records) - set(store.domains))
    missing = sorted(set(store.domains) - set(selection.records))
    if unknown or missing:
      raise ValueError(f'the selection does not fit {store.path}: domains that this does not have: {unknown}; domains '
                       f'that the selection does not name: {missing}')
    for name, size in zip(store.domains, store.sizes('train').tolist()):
      numbers = selection.records[name]
      if len(numbers) and numbers[-1] >= size:
        raise ValueError(f'the selection keeps record {name}/{numbers[-1]}, but {store.path} has {size} of that domain')
    self.selection = selection
    self.digest = workdir.digest({'store': store.digest, 'selection': selection.digest})
    self.whole: Store = store.whole
    self.path, self.domains, self.length = store.path, store.domains, store.length
    self.tokenizer, self.vocab_size, self.encoder = store.tokenizer, store.vocab_size, store.encoder
    kept = [selection.records[name] for name in store.domains]
    if isinstance(store, Selected):
      kept = [before[numbers] for before, numbers in zip(store._records, kept)]
    self._records = kept
    self._sizes_M = np.array([len(numbers) for numbers in kept], np.int64)

  def sizes(self, split: str) -> np.ndarray:
    """int64 [M], as `Store.sizes`."""
    return self._sizes_M.copy() if split == 'train' else self.whole.sizes(split)

  def counts(self, split: str) -> dict[str, dict]:
    """As `Store.counts`; of the train split only what is known of a part: {domain: {sequences, tokens}}.

    tokens: inputs that are not padding, exactly.  All records of one file sum to its tokens in the manifest, less its
    last one where that is a target only.  How many documents, targets and bytes the kept records hold is not recorded
    anywhere, so they are absent.
    """
    if split != 'train':
      return self.whole.counts(split)
    return {name: {'sequences': int(size), 'tokens': tokens}
            for name, size, tokens in zip(self.domains, self._sizes_M, self._tokens)}

  def read(self, split: str, domain_B: np.ndarray, record_B: np.ndarray) -> dict[str, np.ndarray]:
    """As `Store.read`; example_B is record_B."""
    if split != 'train':
      return self.whole.read(split, domain_B, record_B)
    batch = self.whole.read(split, domain_B, self._in_store(domain_B, record_B))
    return batch | {'example_B': np.array(record_B, np.int64)}

  def names(self, domain_B: np.ndarray, record_B: np.ndarray) -> list[str]:
    """As `Store.names`: by the record numbers of the store itself."""
    return self.whole.names(domain_B, self._in_store(domain_B, record_B))

  def _in_store(self, domain_B: np.ndarray, record_B: np.ndarray) -> np.ndarray:
    """The store's own numbers of train records.  IndexError names a row out of range."""
    domain_B, record_B = np.asarray(domain_B, np.int64), np.asarray(record_B, np.int64)
    numbers_B = record_B.copy()
    for domain in np.unique(domain_B[(domain_B >= 0) & (domain_B < len(self.domains))]):  # the store refuses others
      mine_B = domain_B == domain
      wanted, size = record_B[mine_B], int(self._sizes_M[domain])
      outside = wanted[(wanted < 0) | (wanted >= size)]
      if len(outside):
        raise IndexError(f'record {outside[0]} is out of range; the selection keeps {size} of domain '
                         f'{self.domains[domain]!r}')
      numbers_B[mine_B] = self._records[domain][wanted]
    return numbers_B

  def records_of_whole(self, records: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{domain: train records by their numbers here} -> by those in the `whole` store."""
    return {name: kept[records[name]] for name, kept in zip(self.domains, self._records)}

  @functools.cached_property
  def _tokens(self) -> list[int]:
    """For each domain: its kept records are full but for those that end a shard, and those are read."""
    counted = []
    for domain, (name, numbers) in enumerate(zip(self.domains, self._records)):
      shards = self.whole.counts('train')[name]['shards']
      ends = np.intersect1d(np.cumsum([shard['records'] for shard in shards]) - 1, numbers, assume_unique=True)
      real = [int((self.whole.read('train', np.array([domain]), ends[i:i + 1])['segment_BxL'] > 0).sum())
              for i in range(len(ends))]
      counted.append((len(numbers) - len(ends)) * self.length + sum(real))
    return counted
