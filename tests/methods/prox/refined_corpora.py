"""A small corpus of real text with planted noise, and a refiner that knows it, wrong now and then as models are."""

import gzip
import json
import pathlib
import pydoc_data.topics
import random

from datasel import workdir
from datasel.methods.prox import refining

NOISE = ('Home | Products | Contact', 'Share on Facebook', 'Copyright 2020. All rights reserved')


class Refiner:
  """Drops documents with few words; removes noise lines; of chunks with an even start also writes bad calls."""

  name, fingerprint, stages, max_tokens = 'of the tests', 'v1', ('document', 'chunk'), 60

  def __init__(self, **different):
    self.asked: list[str] = []
    for key, value in different.items():
      setattr(self, key, value)

  def count_tokens(self, lines):
    return [len(line.split()) + 1 for line in lines]

  def decide(self, texts):
    self.asked += texts
    return [refining.Decision('drop_doc()' if len(text.split()) < 60 else 'keep_doc()', score=len(text.split()) - 60.5,
                              reason='short' if len(text.split()) < 60 else '', tokens=len(text.split()) + 2,
                              truncated=len(text) > 5000) for text in texts]

  def write(self, chunks):
    written = []
    for chunk in chunks:
      lines = chunk.text.split('\n')
      calls = [f'remove_lines(start={n}, end={n})' for n, line in enumerate(lines, chunk.start) if line in NOISE]
      if chunk.start % 2 == 0 and calls:
        calls.append('normalize(source_str="the parser", target_str="it")')
        calls.append('remove_lines(start=99999, end=99999)')
        calls.append('remove_lines(start=1, e')
      written.append(refining.Written('\n'.join(calls) or 'keep_chunk()', 'length' if calls else 'eos',
                                      tokens=5 * len(calls) + 1, prompt_tokens=chunk.tokens))
    return written


def rows(seed=0):
  """Rows {id, text, url, n}: Python's help topics with lines of noise."""
  rng = random.Random(seed)
  found = []
  for n, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
    lines = text.split('\n')[:120]
    for noise in rng.sample(NOISE, rng.randint(0, 3)):
      lines.insert(rng.randint(0, len(lines)), noise)
    found.append({'id': name, 'text': '\n'.join(lines), 'url': f'http://example.org/{n}', 'n': n})
  return found


def jsonl(some) -> bytes:
  return b''.join(json.dumps(row).encode() + b'\n' for row in some)


def write(root: pathlib.Path) -> pathlib.Path:
  """Three domains, two of them in several files, one compressed, and a validation split; some rows without an id."""
  every = rows()
  files = {'train/help-0.jsonl': every[:25], 'train/help-1.jsonl.gz': every[25:50],
           'train/blank.jsonl': [*every[50:55], {'text': ' \n\t', 'url': ''}, {'text': '', 'n': None}],
           'train/anonymous.jsonl': [{'text': row['text'], 'more': {'deep': [row['n'], 'ü']}} for row in every[55:70]],
           'validation/help.jsonl': every[70:]}
  for name, some in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(jsonl(some)) if name.endswith('.gz') else jsonl(some))
  return root


def content(folder: pathlib.Path) -> dict[str, str]:
  """{file: digest} of all under a folder."""
  return {path.relative_to(folder).as_posix(): workdir.digest_file(path) for path in sorted(folder.rglob('*'))
          if path.is_file()}
