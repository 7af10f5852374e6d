"""What is annotated: documents of a corpus, and the demo's pairs."""

import contextlib
import hashlib
import heapq
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from datasel.data import corpus as corpora
from datasel.data import demo
from datasel.methods.prox import examples, labels, noise, web_pages

CLEAN_DOMAINS = ('c4', 'news', 'wiki')  # of the demo corpus: texts without a page around them
MIN_CHARACTERS = 600  # of a clean document


class Seed(NamedTuple):
  """A document to annotate; source as in `examples.Example`."""
  id: str
  source: str
  text: str


def choose(folder: str | pathlib.Path, documents: int, *, seed: int = 0) -> list[Seed]:
  """So many train documents of a corpus, by hash of their ids; all, where there are fewer.

  Blank ones are passed over, and so are those with the id and text of another one of their domain.  Of different ones
  with the same id all but one have '#2', '#3', ... after it.
  ValueError for fewer than one document.
  """
  if documents < 1:
    raise ValueError(f'{documents} documents to annotate; want at least 1')
  found: dict[tuple[bytes, str, str], str] = {}  # (place, id, text): source
  for domain, sources in corpora.Corpus(folder).sources['train'].items():
    for document in itertools.chain.from_iterable(map(corpora.documents, sources)):
      if document.text.strip():
        place = hashlib.sha256(f'{seed}\0{domain}\0{document.id}'.encode()).digest()
        found.setdefault((place, f'{domain}/{document.id}', document.text), source_of(domain, document))
        if len(found) >= 2 * documents + 1000:  # what is in memory is bounded
          found = {key: found[key] for key in heapq.nsmallest(documents, found)}
  chosen = heapq.nsmallest(documents, found)
  seeds, ids, numbers = [], {id for _, id, _ in chosen}, {}
  for key in chosen:
    _, id, text = key
    unique, numbers[id] = id, numbers.get(id, 0) + 1
    while numbers[id] > 1 and (unique := f'{id}#{numbers[id]}') in ids:
      numbers[id] += 1
    ids.add(unique)
    seeds.append(Seed(unique, found[key], text))
  return seeds


def source_of(domain: str, document: corpora.Document) -> str:
  """The site that a document's URL names; without one, the domain and document that it is a part of."""
  url = document.fields.get('url')
  if isinstance(url, str):
    with contextlib.suppress(ValueError):  # no URL, or none of a site
      site = web_pages.host(url)
      site.encode()  # not of half a surrogate pair, which no file can hold
      return site
  return f'{domain}:{document.id.rpartition("#")[0] or document.id}'


def demo_pairs(folder: str | pathlib.Path, *, synthetic: int = 1000, seed: int = 0,
               fractions: Sequence[float] = examples.FRACTIONS, cache: str | None = None) -> list[labels.Pair]:
  """The demo's pairs: real pages, and `synthetic` clean documents with noise, all of these in the train split.

  The noise is of pages in the train split of this seed and these fractions.  FOLDER/pages.jsonl keeps the real ones.
  ValueError where the demo corpus has fewer clean documents in the train split, and for `synthetic` below 0.
  """
  if synthetic < 0:
    raise ValueError(f'{synthetic} synthetic pairs wanted; want at least 0')
  split = lambda source: examples.split_of(source, seed=seed, fractions=tuple(fractions))
  real = web_pages.pairs(folder, cache=cache)
  if not synthetic:
    return real
  train = corpora.Corpus(demo.fetch('lean', cache=cache)).sources['train']
  clean = heapq.nsmallest(synthetic, (
    (hashlib.sha256(f'{seed}\0{document.id}'.encode()).digest(), document.id, source, document.text)
    for domain in CLEAN_DOMAINS for one in train.get(domain, ()) for document in corpora.documents(one)
    if len(document.text) >= MIN_CHARACTERS and split(source := source_of(domain, document)) == 'train'))
  if len(clean) < synthetic:
    raise ValueError(f'{synthetic} synthetic pairs wanted, and the demo corpus has {len(clean)} clean documents in the '
                     'train split')
  found = noise.boilerplate(pair for pair in real if split(pair.source) == 'train')
  return real + list(noise.add((row[1:] for row in clean), found, seed=seed))
