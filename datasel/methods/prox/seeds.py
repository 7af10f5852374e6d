"""What is annotated: documents of a corpus, and the demo's pairs."""

import hashlib
import heapq
import pathlib
import urllib.parse
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
  """So many train documents of a corpus, by hash of their ids; all, where there are fewer.  Blank ones are passed over.
  """
  found = ((hashlib.sha256(f'{seed}\0{domain}\0{document.id}'.encode()).digest(), f'{domain}/{document.id}',
            source_of(domain, document), document.text)
           for domain, sources in corpora.Corpus(folder).sources['train'].items()
           for source in sources for document in corpora.documents(source) if document.text.strip())
  return [Seed(*row[1:]) for row in heapq.nsmallest(documents, found)]


def source_of(domain: str, document: corpora.Document) -> str:
  """The site that a document's URL names; else the domain and document that it is a part of."""
  url = document.fields.get('url')
  if isinstance(url, str) and urllib.parse.urlsplit(url).hostname:
    return web_pages.host(url)
  return f'{domain}:{document.id.rpartition("#")[0] or document.id}'


def demo_pairs(folder: str | pathlib.Path, *, synthetic: int = 1000, seed: int = 0,
               fractions: Sequence[float] = examples.FRACTIONS, cache: str | None = None) -> list[labels.Pair]:
  """The demo's pairs: real pages, and `synthetic` clean documents with noise, all of these in the train split.

  The noise is of pages in the train split of this seed and these fractions.  FOLDER/pages.jsonl keeps the real ones.
  ValueError where the demo corpus has fewer clean documents in the train split.
  """
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
