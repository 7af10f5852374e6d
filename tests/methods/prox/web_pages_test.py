"""Laws of the pairs made from web pages, and of the noise that is taken from them."""

import io
import itertools
import json
import random
import tarfile

import pytest
import trafilatura

from datasel.data import demo, demo_archives
from datasel.methods.prox import examples, labels, noise, seeds, web_pages

TEXT = ['Bees find their way home by the position of the sun, which they see even behind clouds, as it was found.',
        'A dance tells the others in the hive where to fly, and the longer the dance is, the farther it is to go.',
        'When the flowers are close to the hive, the dance is round, and it says nothing of where they may be found.',
        'Other insects have no such language, though ants leave traces of scent on the ground that others can read.',
        'It was von Frisch who found all of this out, and for it he was given a prize, with two of his colleagues.']
MENU, FOOTER = ['Home', 'Products', 'About our company'], ['Share on Facebook', '© 2020 Bee News', 'Terms and privacy']


def html(paragraphs, language='en'):
  items = lambda lines: ''.join(f'<li><a href="/{line[:3]}">{line}</a></li>' for line in lines)
  return (f'<html lang="{language}"><head><title>Bees</title></head><body><nav><ul>{items(MENU)}</ul></nav><article>'
          f'<h1>How bees find their way</h1>{"".join(f"<p>{one}</p>" for one in paragraphs)}</article>'
          f'<footer><ul>{items(FOOTER)}</ul></footer></body></html>')


def archive_of(path, page_by_url, index=True):
  members = {f'data/html/{n}.html': page.encode() for n, page in enumerate(page_by_url.values())}
  if index:
    members['data/index.json'] = json.dumps(
      {f'html/{n}.html': {'url': url} for n, url in enumerate(page_by_url)}).encode()
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(f'formasaurus-0.10.0/formasaurus/{name}')
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


def test_a_pages_text_is_told_from_what_is_around_it():
  pair, left_out = web_pages.from_page('page:1', 'https://www.bees.example/way', html(TEXT), trafilatura)
  assert not left_out and (pair.id, pair.source) == ('page:1', 'bees.example')
  lines = pair.noisy.split('\n')
  assert set(MENU) | set(FOOTER) | set(TEXT) <= set(lines)
  assert set(TEXT) <= set(pair.clean.split('\n')) and not set(MENU + FOOTER) & set(pair.clean.split('\n'))
  assert '\n'.join(itertools.compress(lines, pair.kept)) == pair.clean
  assert labels.label(pair, lambda some: [1] * len(some)).exact


def test_a_page_of_little_text_is_one_to_drop():
  page = html(TEXT[:2]).replace('</nav>', ''.join(f'<p>Item {n} of the list to buy</p>' for n in range(20)) + '</nav>')
  pair, _ = web_pages.from_page('page:1', 'https://a.example/', page, trafilatura)
  assert len(pair.clean) < labels.MIN_CLEAN
  assert labels.label(pair, lambda some: [1] * len(some)).document.program == 'drop_doc()'


@pytest.mark.parametrize('page, reason', [
  (html(TEXT[:1]), 'of fewer than 500 characters'),
  (html([' '.join(['Bienen finden den Weg nach Hause, weil sie die Sonne sehen.'] * 4)] * 3, 'de'), 'not English')])
def test_what_is_no_pair_says_why(page, reason):
  assert web_pages.from_page('page:1', 'https://a.example/', page, trafilatura) == (None, reason)


def test_an_extraction_that_is_not_lines_of_the_page_makes_no_pair():
  class Other:  # an extractor that writes a text of its own
    extract = staticmethod(lambda page, **_: 'A summary that nobody can find on the page. ' * 20)

  pair, reason = web_pages.from_page('page:1', 'https://a.example/', html(TEXT), Other)
  assert pair is None and reason == 'with a text that is not made of their lines'


@pytest.mark.parametrize('line, kept', [
  ('Home', False), ('HOW  bees?', True), ('find their way', False),  # short: as a line alone
  ('bees find their way home by the position', True),  # long: anywhere
  ('bees find their way back by the position', False), ('***', False)])
def test_lines_are_marked(line, kept):
  assert web_pages.mark([line], 'How bees\nBees find their way home, by the position of the sun.') == [kept]


def test_pages_are_extracted_once(tmp_path, monkeypatch, caplog):
  pages = {f'https://www.site{n}.example/{n}': html(TEXT[n % 5:] + TEXT[:n % 5]) for n in range(6)}
  pages['https://short.example/'] = html(TEXT[:1])
  archive = archive_of(tmp_path / 'formasaurus-0.10.0.tar.gz', pages)
  monkeypatch.setattr(demo_archives, 'archive', lambda name, cache=None: archive)
  first = web_pages.pairs(tmp_path)
  assert [pair.source for pair in first] == [f'site{n}.example' for n in range(6)]
  assert json.loads((tmp_path / 'pages.json').read_text())['counts'] == {
    'pairs': 6, 'of fewer than 500 characters': 1}
  monkeypatch.setattr(web_pages, 'pages', None)  # is not read again
  assert web_pages.pairs(tmp_path) == first
  (tmp_path / 'pages.jsonl').unlink()
  with pytest.raises(TypeError):
    web_pages.pairs(tmp_path)


def test_an_archive_without_urls_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'no data/index\.json'):
    list(web_pages.pages(archive_of(tmp_path / 'a.tar.gz', {'https://a.example': html(TEXT)}, index=False)))


@pytest.mark.parametrize('change, text', [
  ({'url': 'x'}, r'line 2, is no pair: its columns are clean, id, noisy, source, url; want id, source, noisy, clean'),
  ({'noisy': '\ud800'}, 'line 2, is no pair: half of a surrogate pair'), ({'id': 3}, 'line 2, .*"id" is no string')])
def test_a_line_that_is_no_pair_is_named(tmp_path, change, text):
  row = {'id': 'a', 'source': 's', 'noisy': 'x', 'clean': 'x'}
  (tmp_path / 'p.jsonl').write_text(f'{json.dumps(row)}\n{json.dumps(row | change)}\n')
  with pytest.raises(ValueError, match=text):
    list(web_pages.read(tmp_path / 'p.jsonl'))


def test_pairs_come_back_from_their_file(tmp_path):
  pairs = [labels.Pair('a', 's', 'x\n\u2028y', 'x', (True, False)), labels.Pair('b', 's', 'x', '')]
  web_pages.write(tmp_path / 'p.jsonl', pairs)
  assert list(web_pages.read(tmp_path / 'p.jsonl')) == pairs
  for line in ('{"id": "a"}', '[]', '{', '{"id": 1, "source": "s", "noisy": "", "clean": ""}'):
    (tmp_path / 'bad.jsonl').write_text(line)
    with pytest.raises(ValueError, match=r'bad.jsonl, line 1, is no pair'):
      list(web_pages.read(tmp_path / 'bad.jsonl'))


def page_pairs(count):
  made = []
  for n in range(count):
    lines = [(f'{n} head {k}', False) for k in range(1 + n % 80)]
    lines += [(f'{n} text {k}', True) for k in range(2)] + [(f'{n} inside', False), (f'{n} text', True)]
    lines += [(f'{n} tail {k}', False) for k in range(1 + n % 70)]
    kept = tuple(keeps for _, keeps in lines)
    made.append(labels.Pair(f'p{n}', f'site{n}.example', '\n'.join(line for line, _ in lines),
                            '\n'.join(line for line, keeps in lines if keeps), kept))
  return made


def test_noise_is_of_the_pages_given_and_labels_are_exact():
  pages = [pair for pair in page_pairs(100) if examples.split_of(pair.source) == 'train']
  allowed = {line for pair in pages for line, kept in zip(pair.noisy.split('\n'), pair.kept) if not kept}
  documents = [(f'd{n}', f'c4:{n}', '\n'.join(f'clean {n} {k}' for k in range(20))) for n in range(200)]
  empty = labels.Pair('empty', 'site0.example', 'a page\nwithout text', '', (False, False))  # neither head nor tail
  made = list(noise.add(documents, noise.boilerplate([empty, *pages])))
  assert len(made) == 200 and 0.1 < sum(not pair.clean for pair in made) / 200 < 0.3
  for (_, source, text), pair in zip(documents, made):
    assert pair.source == source and pair.clean in (text, '')
    removed = list(itertools.compress(pair.noisy.split('\n'), [not kept for kept in pair.kept]))
    assert set(removed) <= allowed
    if pair.clean:
      labelled = labels.label(pair, lambda some: [1] * len(some), max_tokens=50, min_clean=0)
      assert labelled.exact
  assert any('inside' in pair.noisy and pair.clean for pair in made)
  assert max(len(run) for run in noise.boilerplate(pages).heads) == noise.MAX_LINES


def test_noise_depends_on_seed_and_document_alone():
  found = noise.boilerplate(page_pairs(30))
  documents = [(f'd{n}', 'c4', f'clean {n}\nand more') for n in range(40)]
  made = list(noise.add(documents, found))
  assert list(noise.add(random.Random(0).sample(documents, 40), found)) != made
  assert sorted(noise.add(random.Random(0).sample(documents, 40), found), key=lambda pair: int(pair.id[7:])) == made
  assert list(noise.add(documents, found, seed=1)) != made


def test_noise_wants_pages_that_have_some():
  with pytest.raises(ValueError, match='more pages'):
    noise.boilerplate([labels.Pair('a', 's', 'x', 'x', (True,))])
  with pytest.raises(ValueError, match='does not say'):
    noise.boilerplate([labels.Pair('a', 's', 'x', 'x')])


def test_the_demos_noise_never_leaves_the_train_split(tmp_path, monkeypatch):
  rows = [{'id': f'{n // 2}#{n % 2}', 'text': f'clean {n} ' * 100} for n in range(200)]
  (tmp_path / 'train').mkdir()
  for domain in ('c4', 'tweets'):
    (tmp_path / 'train' / f'{domain}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  pages = page_pairs(60)
  monkeypatch.setattr(web_pages, 'pairs', lambda folder, cache=None: pages)
  monkeypatch.setattr(demo, 'fetch', lambda name, cache=None: tmp_path)
  made = seeds.demo_pairs(tmp_path, synthetic=50, seed=3)
  assert made[:60] == pages and len(made) == 110
  train = {pair.id for pair in pages if examples.split_of(pair.source, seed=3) == 'train'}
  held_out = {line for pair in pages if pair.id not in train for line in pair.noisy.split('\n')}
  for pair in made[60:]:
    assert pair.source.startswith('c4:') and '#' not in pair.source
    assert examples.split_of(pair.source, seed=3) == 'train'
    assert not held_out & set(pair.noisy.split('\n'))
  assert held_out and seeds.demo_pairs(tmp_path, synthetic=50, seed=3) == made
  with pytest.raises(ValueError, match='1000 synthetic pairs wanted'):
    seeds.demo_pairs(tmp_path, seed=3)
