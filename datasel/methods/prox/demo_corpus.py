"""A noisy corpus to refine, and which of its lines are noise: real pages, and clean documents with what pages show.

Nothing of it is in the examples that a refiner is taught on (`seeds.demo_pairs` of the same seed): its pages, the
sources of its documents and the pages that its noise is from are those of the validation and test splits.
"""

import hashlib
import heapq
import json
import logging
import pathlib
from typing import Any

from datasel import workdir
from datasel.data import corpus as corpora
from datasel.data import demo, shards
from datasel.methods.prox import examples, noise, web_pages
from datasel.methods.prox.seeds import CLEAN_DOMAINS, MIN_CHARACTERS, source_of

logger = logging.getLogger(__name__)
DOMAIN = 'web'


def build(folder: pathlib.Path, pages: pathlib.Path, *, documents: int, holdout: float,
          seed: int = 0) -> dict[str, Any]:
  """Writes FOLDER/train/web.jsonl, rows {id, text, kept}, kept a '0' or '1' for each line; returns its manifest.

  documents: clean ones, by hash of their ids; those of a rank below `holdout` are left out, so that a store that holds
  out so many can judge what is trained on the rest.  pages: the folder where `web_pages.pairs` keeps its pages.
  Nothing is done where the same corpus is there; ValueError where the demo corpus has fewer clean documents.
  """
  unseen = lambda source: examples.split_of(source, seed=seed) != 'train'
  lean = demo.fetch('lean')
  real = [pair for pair in web_pages.pairs(pages) if unseen(pair.source)]
  stated = {'documents': documents, 'holdout': holdout, 'seed': seed, 'corpus': lean.name,
            'pages': workdir.digest([[pair.id, pair.noisy, pair.kept] for pair in real]),
            'code': [workdir.digest_file(one) for one in (__file__, noise.__file__)]}
  manifest, path = folder / 'manifest.json', folder / 'train' / f'{DOMAIN}.jsonl'
  if manifest.exists() and path.exists() and (found := workdir.read_json(manifest))['made_from'] == stated:
    return found
  train = corpora.Corpus(lean).sources['train']
  clean = heapq.nsmallest(documents, (
    (hashlib.sha256(f'{seed}\0{document.id}'.encode()).digest(), document.id, source, document.text)
    for domain in CLEAN_DOMAINS for one in train.get(domain, ()) for document in corpora.documents(one)
    if len(document.text) >= MIN_CHARACTERS and unseen(source := source_of(domain, document))
    and shards.holdout_rank(document.id) >= holdout))
  if len(clean) < documents:
    raise ValueError(f'config.prox.documents is {documents}, and the demo corpus has {len(clean)} clean documents that '
                     'no example is made of; set it to so many at most')
  pairs = real + list(noise.add((row[1:] for row in clean), noise.boilerplate(real), seed=seed))
  with workdir.replacing(path, 'w') as f:
    for pair in pairs:
      kept = ''.join('01'[keeps] for keeps in pair.kept)
      f.write(json.dumps({'id': pair.id, 'text': pair.noisy, 'kept': kept}, ensure_ascii=False) + '\n')
  made = {'made_from': stated, 'pages': len(real), 'documents': len(pairs) - len(real),
          'lines': sum(len(pair.kept) for pair in pairs), 'kept_lines': sum(sum(pair.kept) for pair in pairs)}
  workdir.write_json(manifest, made)
  logger.info('the corpus to refine: %(pages)d pages and %(documents)d documents with noise, %(kept_lines)d of '
              '%(lines)d lines to be kept', made)
  return made
