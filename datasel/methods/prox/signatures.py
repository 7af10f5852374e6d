"""What tells copies of a document: a digest of its words, and the MinHash signature of its n-grams of words.

MinHash is datasketch's (pip install 'datasel[prox]').  Broder 1997, 'On the resemblance and containment of documents'.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from datasel import workdir
from datasel.data import corpus
from datasel.methods.prox import executor, pieces

_AT_ONCE = 1 << 14  # n-grams hashed at once: each is hashed num_perm times
# In scripts without spaces a letter is a word: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = ('\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff'
             '\U00020000-\U0003ffff')
_WORD = re.compile(rf'[{_UNSPACED}]|[^\W{_UNSPACED}]+')


@dataclasses.dataclass(frozen=True)
class Signing:
  """threshold: the estimated Jaccard similarity of two sets of n-grams from which on they count as copies.  num_perm:
  hashes of a signature; the estimate's standard error is sqrt(s (1 - s) / num_perm).  ngram: words."""
  threshold: float = 0.8
  num_perm: int = 128
  ngram: int = 5

  def __post_init__(self):
    if not 0 < self.threshold <= 1 or self.num_perm < 16 or self.ngram < 1:
      raise ValueError(f'threshold {self.threshold}, num_perm {self.num_perm}, ngram {self.ngram}; want a threshold in '
                       '(0, 1], at least 16 hashes, and n-grams of at least 1 word')


@dataclasses.dataclass(frozen=True)
class Signed:
  """Of n documents.  digests: bytes.  hashes_NxP: uint32.  shingled: whether each has an n-gram of n words at all."""
  ids: list[str]
  digests: list[bytes]
  hashes_NxP: np.ndarray
  shingled: np.ndarray


def words(text: str) -> list[str]:
  """Lower-cased runs of letters and digits."""
  return _WORD.findall(text.casefold())


def shingles(found: Sequence[str], ngram: int) -> set[str]:
  """The n-grams of a document's words; of fewer words, all of them as one."""
  return {' '.join(found[i:i + ngram]) for i in range(max(len(found) - ngram + 1, 1))}


def signed(documents: Sequence[corpus.Document], signing: Signing) -> Signed:
  """The digests and signatures of documents."""
  blank = minhash(signing)
  digests, rows, long_enough = [], [], []
  for document in documents:
    found = words(document.text)
    # Without any word the text itself is compared, not the lack of words.
    same = ' '.join(found) or document.text.strip()
    digests.append(hashlib.blake2b(same.encode(), digest_size=16).digest())
    one = blank.copy()
    grams = sorted(shingles(found, signing.ngram))
    for start in range(0, len(grams), _AT_ONCE):
      one.update_batch([gram.encode() for gram in grams[start:start + _AT_ONCE]])
    rows.append(one.hashvalues)
    long_enough.append(len(found) >= signing.ngram)
  hashes_NxP = np.stack(rows) if rows else np.zeros((0, signing.num_perm), np.uint32)
  return Signed([document.id for document in documents], digests, hashes_NxP, np.array(long_enough, bool))


def minhash(signing: Signing, hashes_P: np.ndarray | None = None) -> Any:
  """datasketch's MinHash, empty or of given hashes."""
  held = _empty(signing.num_perm).copy()
  if hashes_P is not None:
    held.hashvalues = hashes_P
  return held


@functools.lru_cache(maxsize=1)
def _empty(num_perm: int) -> Any:
  return library().MinHash(num_perm, seed=1, hashfunc=zlib.crc32, scheme='affine32')


def library() -> Any:
  try:
    import datasketch
  except ImportError as e:
    raise ImportError(f'finding near copies needs datasketch ({e}); pip install \'datasel[prox]\'') from e
  return datasketch


def do(signing: Signing, job: Any, some: Sequence[pieces.Piece], progress: Callable[[dict[str, Any]], None],
       stopping: Callable[[], bool]) -> bool:
  """Signs every document of pieces, a file for each; a `refining_job.Do` once it has its first argument."""
  reader = pieces.Reader(pieces.sources_of(corpus.Corpus(job.corpus)))
  for piece in some:
    rows = itertools.islice(reader.documents(piece.source, piece.start), piece.stop - piece.start)
    parts: list[Signed] = []
    while batch := list(itertools.islice(rows, job.settings.batch)):
      if stopping():
        return False
      parts.append(signed(batch, signing))
      progress({'documents': {'kept': len(batch)},
                'before': {'words': sum(executor.words(document.text) for document in batch)}})
    _write(path(job.folder, piece), parts, signing)
  return True


def path(folder: pathlib.Path, piece: pieces.Piece) -> pathlib.Path:
  """Of the file that `do` leaves."""
  return folder / f'signatures/{piece.name}.npz'


def read(file: pathlib.Path) -> Signed:
  """What `do` has left; ValueError names a damaged file."""
  try:
    with open(file, 'rb') as f, np.load(f) as arrays:
      return Signed(json.loads(arrays['ids'].tobytes()), [row.tobytes() for row in arrays['digests']],
                    arrays['hashes'], arrays['shingled'])
  except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as e:
    raise ValueError(f'{file} is damaged ({e}); delete it and start again') from e


def _write(file: pathlib.Path, parts: list[Signed], signing: Signing) -> None:
  ids = json.dumps([identity for part in parts for identity in part.ids]).encode()
  digests = b''.join(digest for part in parts for digest in part.digests)
  held = io.BytesIO()
  np.savez(held, ids=np.frombuffer(ids, np.uint8), digests=np.frombuffer(digests, np.uint8).reshape(-1, 16),
           hashes=np.concatenate([part.hashes_NxP for part in parts] or [np.zeros((0, signing.num_perm), np.uint32)]),
           shingled=np.concatenate([part.shingled for part in parts] or [np.zeros(0, bool)]))
  with workdir.replacing(file) as f:
    f.write(held.getvalue())


def each(file: Signed) -> Iterator[tuple[str, bytes, np.ndarray, bool]]:
  return zip(file.ids, file.digests, file.hashes_NxP, map(bool, file.shingled))
