"""Real web pages as pairs: all the lines that a page shows, and those of them that an extractor takes for its text.

The pages are test data of the package formasaurus, forms of all kinds of sites with their URLs; the extractor is
trafilatura.  The pages are other people's: read them here, don't publish them.
"""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import re
import tarfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator

from datasel import workdir
from datasel.data import demo_archives, demo_sources
from datasel.methods.prox.labels import MIN_CLEAN, Pair

logger = logging.getLogger(__name__)

MIN_NOISY = 500  # characters
MIN_FOUND = 0.6  # of the extraction's characters must be whole lines of the page
_COLUMNS = ('id', 'source', 'noisy', 'clean')  # of a file of pairs, beside 'kept'
_SHORT = 25  # a line of so many characters or fewer is kept only if it is a line of the extraction
_ENGLISH = frozenset('the of and to in a is for that with on as it by at from this be are you your or'.split())
_LANGUAGE = re.compile(r'<html\b[^>]*\blang\s*=\s*["\']?([a-z]+)', re.IGNORECASE)


def pairs(folder: str | os.PathLike, *, cache: str | os.PathLike | None = None) -> list[Pair]:
  """The pairs of the pages, made once and kept in FOLDER/pages.jsonl; FOLDER/pages.json counts what was left out.

  A page without a text of its own, MIN_CLEAN characters that the extractor finds, is a pair too: one to drop.
  cache: where archives are kept, see `demo_archives`.
  ImportError without trafilatura, demo_archives.Unavailable without the pages.
  """
  trafilatura = extractor()
  archive = demo_archives.archive('formasaurus', cache=cache)
  key = workdir.digest([demo_archives.ARCHIVES['formasaurus'].sha256, trafilatura.__version__,
                        workdir.digest_file(__file__), workdir.digest_file(demo_sources.__file__)])
  folder = pathlib.Path(folder)
  facts, kept = folder / 'pages.json', folder / 'pages.jsonl'
  if facts.exists() and kept.exists() and workdir.read_json(facts)['key'] == key:
    return list(read(kept))
  counts = collections.Counter()
  started = told = time.monotonic()
  made = []
  for n, (id, url, page) in enumerate(pages(archive), 1):
    pair, left_out = from_page(id, url, page, trafilatura)
    counts[left_out or 'pairs'] += 1
    if pair:
      made.append(pair)
    if time.monotonic() - told > 5:
      told = time.monotonic()
      logger.info('extracting the text of pages: %d done, %d pairs', n, len(made))
  logger.info('%d pairs of %d pages in %.0f s; left out: %s', len(made), n, time.monotonic() - started,
              ', '.join(f'{count} {reason}' for reason, count in counts.items() if reason != 'pairs'))
  write(kept, made)
  workdir.write_json(facts, {'key': key, 'pages': n, 'counts': dict(counts), 'trafilatura': trafilatura.__version__})
  return made


def pages(archive: pathlib.Path) -> Iterator[tuple[str, str, str]]:
  """(id, URL, HTML) of each page, in the archive's order; ValueError for an archive without its index of URLs."""
  with tarfile.open(archive) as members:
    index = next((json.load(members.extractfile(member)) for member in members
                  if member.name.endswith('/data/index.json')), None)
    if index is None:
      raise ValueError(f'{archive} has no data/index.json, which says where its pages are from')
    for member in members:
      if found := re.search(r'/data/(html/[^/]+\.html)$', member.name):
        page = members.extractfile(member).read().decode('utf-8', 'replace')
        yield f'page:{pathlib.PurePosixPath(member.name).stem}', index[found[1]]['url'], page


def from_page(id: str, url: str, page: str, trafilatura) -> tuple[Pair | None, str]:
  """A page's pair, or None and why there is none."""
  lines = demo_sources.page_lines(page)
  if sum(map(len, lines)) < MIN_NOISY:
    return None, f'of fewer than {MIN_NOISY} characters'
  if not is_english(page, lines):
    return None, 'not English'
  # Lines of text, not paragraphs: with the precision that it has by default, and no comments.
  extracted = trafilatura.extract(page, include_comments=False, include_tables=True) or ''
  kept = mark(lines, extracted)
  clean = '\n'.join(line for line, keeps in zip(lines, kept) if keeps)
  if len(extracted) >= MIN_CLEAN and len(clean) < MIN_FOUND * len(extracted):
    return None, 'with a text that is not made of their lines'
  return Pair(id, host(url), '\n'.join(lines), clean, tuple(kept)), ''


def mark(lines: Iterable[str], extracted: str) -> list[bool]:
  """Of each line whether the extraction has it: a short one as a line, a longer one anywhere; letters and digits count.
  """
  whole, single = _plain(extracted), {_plain(line) for line in extracted.split('\n')}
  plain = map(_plain, lines)
  return [bool(line) and (line in whole if len(line) > _SHORT else line in single) for line in plain]


def is_english(page: str, lines: Iterable[str]) -> bool:
  """By the share of the commonest English words among a page's; fewer will do where the page says that it is."""
  words = re.findall(r'\w+', ' '.join(lines).lower())
  share = sum(word in _ENGLISH for word in words) / max(len(words), 1)
  said = _LANGUAGE.search(page)
  return share >= (0.03 if said and said[1].lower() == 'en' else 0.08)


def host(url: str) -> str:
  """The site of a URL, without 'www.'; ValueError for a URL without one."""
  name = urllib.parse.urlsplit(url).hostname
  if not name:
    raise ValueError(f'{url!r} has no host, by which pages are split')
  return name.removeprefix('www.')


def write(path: str | os.PathLike, some: Iterable[Pair]) -> None:
  """Pairs as JSON lines {"id", "source", "noisy", "clean", "kept"}, with kept as '0110' or null."""
  with workdir.replacing(path, 'w') as f:
    for pair in some:
      kept = None if pair.kept is None else ''.join('01'[keeps] for keeps in pair.kept)
      f.write(json.dumps(dataclasses.asdict(pair) | {'kept': kept}, ensure_ascii=False) + '\n')


def read(path: str | os.PathLike) -> Iterator[Pair]:
  """The pairs of a file, as `write` writes them, or without "kept"; ValueError names a line that is no pair."""
  with open(path, encoding='utf-8') as f:
    for number, line in enumerate(f, 1):
      try:
        row = json.loads(line)
        kept = row.pop('kept', None)
        if set(row) != set(_COLUMNS):
          raise ValueError(f'its columns are {", ".join(sorted(row))}')
        for name, value in row.items():
          if not isinstance(value, str):
            raise ValueError(f'"{name}" is no string')
          value.encode()
        yield Pair(**row, kept=None if kept is None else tuple(one == '1' for one in kept))
      except UnicodeEncodeError as e:
        raise ValueError(f'{path}, line {number}, is no pair: half of a surrogate pair is no character ({e})') from e
      except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f'{path}, line {number}, is no pair: {e}; want {", ".join(_COLUMNS)} and, where it is known, '
                         'kept') from e


def extractor():
  """The module trafilatura; ImportError says what to install."""
  try:
    import trafilatura
  except ImportError as e:
    raise ImportError("telling a page's text from the rest needs trafilatura: pip install 'datasel[prox]'") from e
  return trafilatura


def _plain(text: str) -> str:
  return re.sub(r'\W+', ' ', text.lower()).strip()
