"""Laws of AnLLM's report: it says what the artefacts say, whichever way it fell, and draws the masks that are used."""

import dataclasses
import math
import pydoc_data.topics
import re

import numpy as np
import pytest
from report_test import number, read, read_lines, write_lines

from datasel import workdir
from datasel.data import tokenizer as tokenizers
from datasel.data.anchors import Rule, insert, punctuation_ids, split_sentences
from datasel.methods.anllm import cache_sections, pictures, report, usage

DOMAINS = ('code', 'math', 'wiki')
ARMS = {'full': 0.0, 'ep': 0.021, 'ep-sees-bos': 0.008, 'ac': 0.034, 'fixed': 0.11}  # bits/byte above full attention
STEPS = 40


@pytest.fixture(scope='module')
def documents(tmp_path_factory):
  """Real documents as the run draws them: tokens of a real tokenizer, flags and counts by the functions it uses."""
  topics = pydoc_data.topics.topics
  tokenizer = tokenizers.train_bpe(topics.values(), 1024, tmp_path_factory.mktemp('bpe') / 'tokenizer.json')
  period, anchor_id = punctuation_ids(tokenizer), tokenizer.vocab_size
  rules = {'ep': Rule(period, 4, 64), 'ep-sees-bos': Rule(period), 'ac': Rule((anchor_id,)),
           'fixed': Rule(max_length=16)}
  found = []
  for name in ('if', 'objects'):
    plain, arms = tokenizer.encode_batch([topics[name]])[0], {}
    sentences = insert(tokenizer.encode_batch(split_sentences(topics[name])), anchor_id, rules['ac'])
    for arm, rule in rules.items():
      one = usage.document(sentences if arm == 'ac' else plain, rule, keep_bos='bos' in arm)
      spell = lambda i: '<AC>' if i == anchor_id else tokenizer.decode([i])
      arms[arm] = {'tokens': [spell(i) for i in one.pop('ids')], **one}
    found.append({'name': f'pydocs/{name}', 'arms': arms})
  return found, rules


def lines_of(arm, rng):
  for step in (0, STEPS // 2, STEPS):
    if step:
      yield {'stage': f'main-{arm}', 'kind': 'train', 'step': step, 'loss': 3.0, 'time/tokens_per_second': 9e3,
             'time/mfu': 0.3, 'time/data_wait_fraction': 0.01}
    bits_M = np.array([0.9, 1.4, 1.2]) + ARMS[arm] + 2 / (1 + step) + rng.normal(0, 0.002, 3)
    bits = dict(zip(DOMAINS, bits_M.tolist()))
    nll = {d: x * 2.1 for d, x in bits.items()}
    yield {'stage': f'main-{arm}', 'kind': 'eval', 'step': step, 'bits_per_byte': bits, 'nll': nll,
           'uniform_nll': sum(nll.values()) / 3, 'worst_nll': max(nll.values())}


def losses_by_context(worse, own):
  found = {}
  for length in (64, 128, 256, 512):
    nll = 2.4 + worse + 4 / length**0.5
    found[str(length)] = {'nll': nll, 'ppl': math.exp(nll), 'bits_per_byte': nll / 2.1 / math.log(2),
                          'nll_without_anchors': nll * (1.03 if own else 1)}
  return found


def questions_of(rng):
  """Rows of two sets and three numbers of demonstrations, and their times."""
  rows, speed = [], []
  for arm in ('full', 'ep', 'ac'):
    for name, right in (('socialiqa', 0.40), ('quartz', 0.55)):
      for shots, tokens, live in ((0, 0, 0), (1, 61, 7), (5, 322, 23)):
        for cache in ['full'] if arm == 'full' else ['evicted', 'full']:
          accuracy = right + 0.01 * shots - 0.03 * (cache == 'evicted') + rng.normal(0, 0.01)
          rows.append({'arm': arm, 'cache': cache, 'set': name, 'shots': shots, 'n': 100, 'accuracy': accuracy,
                       'accuracy_norm': accuracy + 0.01, 'stderr': 0.049, 'chance': 1 / 3, 'prefix_tokens': tokens,
                       'live': live if cache == 'evicted' else tokens, 'longest': tokens + 90, 'seconds': 4.2,
                       'allocated_bytes': shots and (shots * 3 * 2**18 if cache == 'evicted' else 5 * 2**20)})
        if arm != 'full' and shots:
          speed.append({'arm': arm, 'set': name, 'shots': shots, 'prefix_tokens': tokens, 'no_cache': 0.31,
                        'full_cache': 0.065, 'anchor_cache': 0.05 + 0.001 * shots})
  return rows, speed


def anllm_run(directory, documents):
  """A finished run of five arms."""
  rng = np.random.default_rng(0)
  drawn, rules = documents
  directory.mkdir(parents=True)
  rows, speed = questions_of(rng)
  stated = lambda arm: dataclasses.asdict(rules[arm]) if arm in rules else None
  workdir.write_json(directory / 'evaluation.json', {
    'arms': {arm: {'rule': stated(arm), 'anchor_sees_anchors': 'sees' in arm, 'keep_bos': 'bos' in arm,
                   'vocab_size': 1025 if arm == 'ac' else 1024, 'anchor_share': 0.0 if arm == 'full' else 0.041,
                   'mean_segment': None if arm == 'full' else 24.4} for arm in ARMS},
    'context': {arm: {'full': losses_by_context(0.02 if worse else 0, arm == 'ac')}
                | ({} if arm == 'full' else {'masked': losses_by_context(worse, arm == 'ac')})
                for arm, worse in ARMS.items()},
    'questions': rows, 'documents': drawn, 'speed': speed,
    'cache': {arm: {'prefix': 0.93 - worse, 'peak_live': 0.88 - worse, 'allocated': 0.5, 'allocated_bytes': 3 * 2**20,
                    'full_bytes': 6 * 2**20} for arm, worse in ARMS.items() if arm != 'full'}})
  write_lines(directory, [line for arm in ARMS for line in lines_of(arm, rng)])
  workdir.write_json(directory / 'summary.json', {
    'warnings': ['ac: 3% of its segments have 1 token'], 'cost_flops': {f'main-{arm}': 1.5e13 for arm in ARMS}})
  workdir.write_json(directory / 'config.json', {
    'method': 'anllm', 'data.length': 512, 'train.eval_sequences': 0, 'anllm.context_sequences': 64})
  return directory


@pytest.fixture(scope='module')
def directory(tmp_path_factory, documents):
  return anllm_run(tmp_path_factory.mktemp('anllm') / 'run', documents)


@pytest.fixture(scope='module')
def found(directory):
  return workdir.read_json(directory / 'evaluation.json')


@pytest.fixture(scope='module')
def shown(directory):
  return read(report.write_report(directory))


def altered(directory, tmp_path, **evaluation):
  """A run like that of `directory`, with other parts of evaluation.json; None leaves one out."""
  run = tmp_path / 'run'
  run.mkdir()
  for path in directory.glob('*.json*'):
    (run / path.name).write_bytes(path.read_bytes())
  content = workdir.read_json(run / 'evaluation.json') | evaluation
  workdir.write_json(run / 'evaluation.json', {key: x for key, x in content.items() if x is not None})
  return run


def test_the_page_loads_nothing_is_small_and_the_same_again(directory, shown):
  path = directory / 'report.html'
  source = path.read_bytes()
  assert all(link.startswith('#') for link in shown.links) and {link[1:] for link in shown.links} <= set(shown.ids)
  assert len(shown.ids) == len(set(shown.ids)) and not shown.tags & {'script', 'link', 'iframe', 'object', 'img'}
  assert len(source) < 1_500_000
  assert len(shown.alts) == len(set(shown.alts)) == 13 and min(map(len, shown.alts)) > 40
  assert report.write_report(directory).read_bytes() == source


def test_the_arms_are_those_of_the_evaluation_and_their_losses_the_last(directory, found, shown):
  rows = shown.rows('The arms')
  last = {line['stage'].removeprefix('main-'): line for line in read_lines(directory) if line['kind'] == 'eval'}
  bits = {arm: np.mean(list(line['bits_per_byte'].values())) for arm, line in last.items()}
  for arm, stated in found['arms'].items():
    closes, vocabulary, _, segment, b, against, nats = rows[arm]
    assert number(vocabulary) == stated['vocab_size'] and number(b) == pytest.approx(bits[arm], abs=5e-4)
    assert number(nats) == pytest.approx(last[arm]['uniform_nll'], abs=5e-4)
    assert against == '–' if arm == 'full' else number(against) == pytest.approx(bits[arm] - bits['full'], abs=5e-4)
    assert segment == ('–' if arm == 'full' else '24.4') and (closes == 'nothing') == (arm == 'full')
  assert rows['ep'][0].endswith('; from 4 tokens on; 64 tokens at most') and rows['fixed'][0] == '16 tokens at most'
  assert rows['ep-sees-bos'][0].endswith('; anchors see earlier ones; the first token is kept')
  by_domain = shown.rows('Held-out loss by domain at the last step, bits/byte')
  for domain in DOMAINS:
    wanted = [last[arm]['bits_per_byte'][domain] for arm in ARMS]
    assert [*map(number, by_domain[domain])] == pytest.approx(wanted, abs=5e-4)


def test_arms_are_said_to_read_the_same_documents_only_where_they_do(found, shown):
  same, other = 'of the same documents', 'of equally many records of the same corpus, evenly spread'
  assert f'Compare bits per byte: they are {same}, and' in shown.text  # 0: all, see the run's config
  assert f'What different arms read is {other}.' in shown.text
  assert f'they are {other}, and' in report._arms(found['arms'], {}, {'train.eval_sequences': 16})
  for length, says in ((512, same), (1024, other)):  # windows of 512 leave half of a record of 1,024
    config = {'data.length': length, 'anllm.context_sequences': 0}
    assert f'What different arms read is {says}.' in report._contexts(found['context'], config)


def test_the_losses_by_context_are_those_measured_with_and_without_the_mask(found, shown):
  rows = shown.rows('Losses by context')
  for arm in ARMS:
    for kind, of in found['context'][arm].items():
      name = arm if arm == 'full' or kind == 'masked' else f'{arm}, no mask'
      for length, values in of.items():
        wanted = [values[key] for key in ('bits_per_byte', 'nll', 'nll_without_anchors', 'ppl')]
        assert [*map(number, rows.pop(f'{name}, {length}'))] == pytest.approx(wanted, abs=5e-4)
  assert set(rows) == {'arm, context'}
  [alt] = [alt for alt in shown.alts if alt.startswith('Perplexity by context')]
  plain = math.exp(found['context']['ac']['masked']['512']['nll_without_anchors'])
  assert f'ac {plain:.3f}' in alt  # of the text's own tokens: comparable with the other arms


def size_of(cache, shots):
  return '–' if not shots else {'full': '5.00 MiB', 'evicted': {1: '768.0 KiB', 5: '3.75 MiB'}[shots]}[cache]


def test_accuracy_stands_beside_the_cache_and_the_time_of_its_run(found, shown):
  for name in ('socialiqa', 'quartz'):
    rows = shown.rows(f'{name}: accuracy, cache and time')
    asked = [row for row in found['questions'] if row['set'] == name]
    assert len(rows) == len(asked) + 1
    for row in asked:
      how = {'evicted': ', evicted', 'full': '' if row['arm'] == 'full' else ', full cache'}[row['cache']]
      tokens, live, saved, buffers, right, error, _, n, seconds = rows[f'{row["arm"]}{how}, {row["shots"]}-shot']
      assert (number(tokens), number(live), number(n)) == (row['prefix_tokens'], row['live'], 100)
      assert saved == '–' if not row['shots'] else number(saved) == pytest.approx(
        100 * (1 - row['live'] / row['prefix_tokens']), abs=0.05)
      assert number(right) == pytest.approx(100 * row['accuracy'], abs=0.05) and error == '±4.9'
      assert buffers == size_of(row['cache'], row['shots'])
      timed = {'evicted': 0.05 + 0.001 * row['shots'], 'full': 0.065}[row['cache']]
      assert (seconds == '–') if row['arm'] == 'full' or not row['shots'] else number(seconds) == pytest.approx(timed)


@pytest.mark.parametrize('p', [0, 1, 0.5])
def test_an_accuracy_of_all_or_nothing_has_an_error_too(p):
  """Wilson 1927, with z = 1: the interval's ends are the q whose own standard error is |p - q|."""
  n = 12
  row = {'arm': 'ep', 'cache': 'evicted', 'set': 'quartz', 'shots': 1, 'n': n, 'accuracy': p, 'accuracy_norm': p,
         'stderr': math.sqrt(p * (1 - p) / (n - 1)), 'chance': 0.5, 'prefix_tokens': 9, 'live': 4,
         'allocated_bytes': 4096}
  q = np.linspace(0, 1, 130_001)
  inside = q[n * (p - q)**2 <= q * (1 - q) + 1e-12]
  wanted = row['stderr'] if p == 0.5 else (inside[-1] - inside[0]) / 2
  assert cache_sections.error(row) == pytest.approx(wanted, abs=1e-5) and wanted > 0.03
  shown = cache_sections.questions([row], [])
  assert f'>±{100 * wanted:.1f}<' in shown and '>4.0 KiB<' in shown
  found = {'arms': {'full': {}, 'ep': {}}, 'questions': [row]}
  assert f'right at {100 * p:.1f}% (± {100 * wanted:.1f})' in report._lead(found, {})
  assert cache_sections._asked('quartz', [row], {'ep': 'red'}) != cache_sections._asked(
    'quartz', [row | {'accuracy': p, 'n': 2 * n, 'stderr': row['stderr'] / 2}], {'ep': 'red'})  # bars have it


def test_demonstrations_without_an_anchor_are_named(found, shown):
  said = 'These demonstrations have no anchor'
  assert said not in shown.text
  rows = [row | {'live': row['prefix_tokens']} if (row['arm'], row['shots']) == ('ep', 1) else row
          for row in found['questions'] if row['set'] == 'quartz']
  [sentence] = re.findall(f'{said}[^<]*', cache_sections.questions(rows, []))
  assert sentence.endswith(': ep, 1-shot.')


def test_a_speed_never_stands_alone(found, shown):
  rows = shown.rows('Seconds a question')
  assert len(rows) == len(found['speed']) + 1
  for row in found['speed']:
    *cells, full, kept = rows[f'{row["arm"]}, {row["set"]}, {row["shots"]}-shot']
    times = [row[key] for key in ('no_cache', 'full_cache', 'anchor_cache')]
    wanted = [row['prefix_tokens'], *times, times[0] / times[2], times[1] / times[2]]
    assert [*map(number, cells)] == pytest.approx(wanted, abs=5e-3)
    assert (full, kept) == (size_of('full', row['shots']), size_of('evicted', row['shots']))
  pair = [alt for alt in shown.alts if alt.startswith('Seconds a question')]
  assert ['no cache;' in alt for alt in pair] == [True, False] and 'a full cache; times faster' in pair[1]
  slower = cache_sections.speed([found['speed'][0] | {'full_cache': 0.02}], [])
  assert '×0.39' in slower  # a loss is told as one


def test_the_cache_is_what_the_documents_leave_of_it(found, shown):
  rows = shown.rows('Part of a cache of all tokens')
  for arm, one in found['cache'].items():
    wanted = [100 * one[key] for key in ('prefix', 'peak_live', 'allocated')]
    assert [*map(number, rows[arm][:3])] == pytest.approx(wanted, abs=0.05)
    assert rows[arm][3:] == ['3.00 MiB', '6.00 MiB']
  for document in found['documents']:
    ends = [f'{arm} {one["live"][-1]:,} of {one["at"][-1] + 1:,}' for arm, one in document['arms'].items()]
    assert any(', '.join(ends) in alt for alt in shown.alts) and len(ends) == 4


@pytest.mark.parametrize('gain, says', [(0.02, '0.020 more than with full attention'), (-0.03, '0.030 less than'),
                                        (0.0001, 'as much as with full attention')])
def test_the_outcome_is_told_whichever_way_it_fell(gain, says):
  line = lambda x: [{'bits_per_byte': {'wiki': 1.0 + x}, 'nll': {'wiki': 2.0 + x}}]
  rows = [{'arm': arm, 'cache': cache, 'set': 'quartz', 'shots': shots, 'n': 90, 'accuracy': 0.5 + shots / 100,
           'stderr': 0.05, 'live': 9 if cache == 'evicted' else 300}
          for arm, cache in (('full', 'full'), ('ep', 'evicted'), ('ep', 'full')) for shots in (0, 5)]
  found = {'arms': {'full': {}, 'ep': {}}, 'questions': rows, 'cache': {'ep': {'prefix': 0.94}},
           'documents': [{'arms': {'ep': {'at': [0, 5, last]}}} for last in (899, 299)] + [{'arms': {}}]}
  said = report._lead(found, {'full': line(0), 'ep': line(gain)})
  assert f'With ep held-out text costs {1 + gain:.3f} bits/byte, {says}' in said and '(1.000)' in said
  assert 'of a full cache, 6.0% is left when a text is read (2 documents of 1,200 tokens in all)' in said
  assert 'once a text is read: 2 documents of 1,200 tokens in all' in said
  assert '5-shot questions of quartz are answered right at 55.0% (± 5.0) from 9 cache entries' in said
  assert 'against 55.0% (± 5.0) from 300 cache entries with full attention' in said


def test_the_best_arm_is_named_as_the_best_of_so_many(directory, shown):
  assert 'With ep-sees-bos, the best of 4 arms with anchors, held-out text costs' in shown.text


def test_an_arm_has_one_colour_and_no_other_has_it():
  once, often = cache_sections.colors(ARMS), cache_sections.colors([*ARMS, 'ep', 'ac', 'ep'])
  assert once == often and len(set(once.values())) == len(ARMS)


@pytest.mark.parametrize('part, heading', [
  ('questions', 'Questions'), ('context', 'Perplexity by context'), ('speed', 'Speed'), ('arms', 'The arms'),
  ('documents', 'What a token sees')])
def test_what_was_not_measured_has_no_section(part, heading, directory, shown, tmp_path):
  run = altered(directory, tmp_path, **{part: None})
  source = report.write_report(run).read_text(encoding='utf-8')
  gone = [name for name in re.findall('<h2[^>]*>([^<]*)', (directory / 'report.html').read_text(encoding='utf-8'))
          if name not in re.findall('<h2[^>]*>([^<]*)', source)]
  assert gone == [heading]


def test_full_attention_alone_makes_a_page_and_so_does_the_summary(directory, found, tmp_path):
  full = {key: {'full': found[key]['full']} for key in ('arms', 'context')}
  run = altered(directory, tmp_path, **full, cache={}, speed=[], documents=[{'name': 'wiki/1', 'arms': {}}],
                questions=[row for row in found['questions'] if row['arm'] == 'full'])
  write_lines(run, [line for line in read_lines(run) if line['stage'] == 'main-full'])
  page = read(report.write_report(run))
  assert 'No model with anchors was trained' in page.text and page.rows('quartz: accuracy').keys() > {'full, 5-shot'}
  for file in ('evaluation.json', 'metrics.jsonl', 'config.json'):
    (run / file).unlink()
  assert 'left no environment.json' in read(report.write_report(run)).text
  (run / 'summary.json').unlink()
  with pytest.raises(FileNotFoundError, match='has no summary.json'):
    report.write_report(run)


def test_no_text_can_leave_its_place(directory, found, tmp_path):
  hostile = '</svg><script>alert(1)</script>&amp; $x$'
  arms = found['documents'][0]['arms']
  documents = [{'name': hostile, 'arms': {arm: one | {'tokens': [hostile] * 64} for arm, one in arms.items()}}]
  questions = [row | {'set': hostile} for row in found['questions'] if row['set'] == 'quartz']
  page = read(report.write_report(altered(directory, tmp_path, documents=documents, questions=questions, speed=[])))
  assert 'script' not in page.tags and page.text.count(hostile) >= 3 and '</svg><sc…'[:9] in page.text


def drawn(svg):
  """The squares of a mask's picture as bool L x L for each colour's reason, read off the file."""
  size = int(re.search(r'viewBox="0 0 (\d+) ', svg)[1])
  L = (size - 68) // 12
  found = {}
  for path in re.findall('<path[^>]*>', svg):
    cells = np.zeros((L, L), bool)
    for x, y in re.findall(r'M(\d+) (\d+)h11v11h-11z', path):
      cells[(int(y) - 68) // 12, (int(x) - 68) // 12] = True
    found[re.search('data-kind="([a-z]+)"', path)[1]] = cells
  return found


def grid(drawing):
  return np.array([[c == '#' for c in row] for row in drawing.split('|')])


def test_the_picture_of_a_mask_is_the_papers_figure():
  """Figure 2: eight tokens, the third and the sixth are anchors; w2 sees its own segment, w6 and w7 both anchors."""
  svg = pictures.mask(list('abcdefgh'), [0, 0, 1, 0, 0, 1, 0, 0])
  cells = drawn(svg)
  seen = '#.......|##......|###.....|..##....|..###...|...###..|..#..##.|..#..###'
  np.testing.assert_array_equal(cells['own'] | cells['kept'], grid(seen))
  np.testing.assert_array_equal(
    cells['kept'], grid('........|........|........|..#.....|..#.....|........|..#..#..|..#..#..'))
  np.testing.assert_array_equal(cells['hidden'], np.tri(8, dtype=bool) & ~grid(seen))
  assert not cells['protected'].any()
  assert [*re.findall('font-weight="bold"[^>]*>(.)<', svg)] == ['c', 'c', 'f', 'f']


@pytest.mark.parametrize('sees', [False, True])
@pytest.mark.parametrize('bos', [False, True])
def test_the_switches_of_a_mask_are_drawn(sees, bos):
  rng = np.random.default_rng(0)
  anchor_L = rng.random(20) < 0.3
  cells = drawn(pictures.mask(['t'] * 20, anchor_L, anchor_sees_anchors=sees, keep_bos=bos))
  s = np.cumsum(anchor_L) - anchor_L
  for i in range(20):
    for j in range(i + 1):
      own, kept = s[i] == s[j], anchor_L[j] and (sees or not anchor_L[i])
      why = 'own' if own else 'kept' if kept else 'protected' if bos and j == 0 else 'hidden'
      assert [kind for kind in cells if cells[kind][i, j]] == [why], (i, j)


def test_a_long_text_is_cut_and_tokens_can_be_read():
  svg = pictures.mask(['\n', ' ', '&<b>', 'internationalisation'] * 40, [0] * 160)
  assert len(drawn(svg)['own']) == pictures.MOST_TOKENS
  assert all(f'>{label}<' in svg for label in ('⏎', '␣', '&amp;&lt;b&gt;', 'internati…'))
