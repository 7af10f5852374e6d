"""Laws of the reports: they say what the artefacts say, whichever way it fell, and stand alone."""

import html.parser
import json
import math
import re
import shlex

import numpy as np
import pytest

from datasel import evaluate, workdir
from datasel.methods.doremi import report as doremi
from datasel.methods.pretrain import report as pretrain
from datasel.report import comparison, plots
from datasel.report.html import element, text

DOMAINS = ('apidocs', 'c4', 'code', 'literature', 'math', 'news', 'noisy_web', 'parliament', 'tweets', 'wiki')
STEPS = 300
LOADING = ('src', 'href', 'xlink:href', 'srcset', 'data', 'action')  # attributes that make a browser load something


def by_domain(values):
  return dict(zip(DOMAINS, map(float, values)))


def eval_values(nll_M):
  return {'nll': by_domain(nll_M), 'bits_per_byte': by_domain(nll_M / math.log(2) / 3.1),
          'uniform_nll': float(nll_M.mean()), 'worst_nll': float(nll_M.max())}


def timing(rng):
  return {'time/tokens_per_second': float(rng.normal(20e3, 1e3)), 'time/mfu': float(rng.normal(0.3, 0.01)),
          'time/data_wait_fraction': 0.004}


def training(stage, rng, final_M, every=10):
  """Lines of a plain stage: a falling loss, and an evaluation each 50 steps that ends at final_M."""
  nll = lambda step: final_M + 4.5 / (1 + step / 12) - 4.5 / (1 + STEPS / 12)
  for step in range(0, STEPS + 1, every):
    if step % 50 == 0:
      yield {'stage': stage, 'kind': 'eval', 'step': step, **eval_values(nll(step))}
    if step:
      yield {'stage': stage, 'kind': 'train', 'step': step, 'loss': float(nll(step).mean() + rng.normal(0, 0.05)),
             'grad_norm': 1.0, **timing(rng)}


def proxy(stage, rng, final_M):
  """A proxy whose harder domains gain weight, by the algorithm's own rule."""
  log_alpha_M, sum_M = np.zeros(len(DOMAINS)), np.zeros(len(DOMAINS))
  for line in training(stage, rng, final_M + 0.15):
    if line['kind'] == 'eval':
      yield line
      continue
    behind_M = np.linspace(-0.1, 0.5, len(DOMAINS)) * np.exp(-line['step'] / 200)
    difference_M = behind_M + rng.normal(0, 0.15, len(DOMAINS))
    excess_M = np.maximum(difference_M, 0)
    log_alpha_M = log_alpha_M + 0.3 * excess_M
    alpha_M = np.exp(log_alpha_M) / np.exp(log_alpha_M).sum()
    sum_M += alpha_M
    columns = {'alpha': alpha_M, 'average': sum_M * 10 / line['step'], 'excess': excess_M, 'difference': difference_M,
               'nll': final_M, 'present': rng.random(len(DOMAINS)) > 0.05}
    yield line | {name: by_domain(x) for name, x in columns.items()}


def write_lines(directory, lines):
  (directory / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def read_lines(directory):
  return [json.loads(line) for line in (directory / 'metrics.jsonl').read_text().splitlines()]


def counts(rng):
  def split(share):
    documents, tokens, sequences = (int(share * rng.integers(low, 5 * low)) for low in (400, 300_000, 1200))
    return {'documents': documents, 'tokens': tokens, 'targets': 9, 'bytes': 9, 'sequences': sequences,
            'dropped': {'empty': 2, 'too long': 1}}

  return {'train': split(1), 'validation': split(0.05)}


def write_common(directory, rng):
  workdir.write_json(directory / 'config.json', {
    'method': 'doremi', 'data.length': 256, 'train.steps': STEPS, 'doremi.seeds': 2, 'data.tokenizer': '',
    'model.window': None, 'optimizer.peak_lr': 4e-3})
  workdir.write_json(directory / 'environment.json', {
    'command': ['python', '-m', 'datasel.main', '--config=configs/doremi/demo.py', "--workdir=/tmp/it's here"],
    'python': '3.11.9', 'jax': '0.10.2', 'jaxlib': '0.10.2', 'flax': '0.12.8', 'devices': '1 x cpu, 1 process(es)',
    'peak_flops_per_device': 9.1e10, 'peak_flops_source': 'cpu: best of 3 float32 1536^3 matrix products', 'git': None,
    'started': '2026-11-21T10:00:00+00:00'})
  source = {'package': 'some-package', 'version': '1.2', 'licence': 'CC-BY 4', 'documents': 9, 'dropped': {'twin': 2}}
  sources = {'domains': {d: source for d in DOMAINS}, 'left_out': {'legal': 'no network'}}
  workdir.write_json(directory / 'data.json', {'store': '/data/store', 'digest': 'ab' * 32, 'sources': sources,
                                               'domains': {d: counts(rng) for d in DOMAINS}})


def write_stage(directory, stage, rng):
  (directory / stage).mkdir(parents=True)
  workdir.write_json(directory / stage / 'stage.json', {
    'stage': stage, 'steps': STEPS, 'batch_size': 16, 'model': {'n_layers': 4},
    'epochs': by_domain(rng.uniform(0.2, 5, len(DOMAINS)))})


def doremi_run(directory, *, gain=0.03, seeds=2, rounds=1, main=True):
  """A finished run of DoReMi whose tuned main model ends `gain` nats/token below the baseline's, on average."""
  rng = np.random.default_rng(0)
  directory.mkdir(parents=True, exist_ok=True)
  write_common(directory, rng)
  prefixes = [f'round-{r + 1}/' for r in range(rounds)] if rounds > 1 else ['']
  base_M = np.array([2.1, 4.6, 2.4, 4.9, 3.2, 4.3, 4.8, 3.9, 5.4, 4.4])
  baseline = by_domain(rng.dirichlet(np.full(len(DOMAINS), 2)))
  lines, summary_rounds, flops, reference = [], [], {}, baseline
  for prefix in prefixes:
    lines += training(f'{prefix}reference', rng, base_M + 0.2)
    flops |= {f'{prefix}reference': 4.3e13, f'{prefix}reference_nll': 2.2e13}
    averages = []
    for s in range(seeds):
      made = list(proxy(f'{prefix}proxy-{s}', rng, base_M))
      lines += made
      averages.append(made[-1]['average'])
      flops[f'{prefix}proxy-{s}'] = 4.3e13
    averages = [{d: x / sum(a.values()) for d, x in a.items()} for a in averages]
    tuned = by_domain(np.mean([list(a.values()) for a in averages], axis=0))
    summary_rounds.append({'reference': reference, 'tuned': tuned, 'seeds': averages,
                           'largest_change': max(abs(tuned[d] - reference[d]) for d in DOMAINS)})
    reference = tuned
  summary = {'baseline': baseline, 'tuned': tuned, 'rounds': summary_rounds,
             'warnings': ['main-tuned: domains read more than 4 times: math (4.7)'], 'cost_flops': flops}
  if main:
    tuned_lines = list(training('main-tuned', rng, base_M - gain + np.linspace(-0.04, 0.04, len(DOMAINS))))
    base_lines = list(training('main-baseline', rng, base_M))
    lines += base_lines + tuned_lines
    only = lambda lines: [line for line in lines if line['kind'] == 'eval']
    summary['comparison'] = evaluate.compare(only(tuned_lines), only(base_lines))
    flops |= {'main-baseline': 1.6e14, 'main-tuned': 1.6e14}
    write_stage(directory, 'main-baseline', rng)
    write_stage(directory, 'main-tuned', rng)
  write_lines(directory, lines)
  workdir.write_json(directory / 'summary.json', summary)
  return directory


def pretrain_run(directory):
  rng = np.random.default_rng(1)
  directory.mkdir(parents=True)
  write_common(directory, rng)
  lines = list(training('main', rng, np.linspace(2, 5, len(DOMAINS))))
  write_lines(directory, lines)
  write_stage(directory, 'main', rng)
  workdir.write_json(directory / 'mixture.json', {'domains': by_domain(rng.dirichlet(np.ones(len(DOMAINS))))})
  workdir.write_json(directory / 'summary.json', {'final': lines[-2], 'cost_flops': {'main': 1.6e14}, 'warnings': []})
  return directory


class Page(html.parser.HTMLParser):
  """Refuses tags that do not balance; keeps text, links, tables as {caption: rows of cells}, and figures' words."""

  def __init__(self, source: str):
    super().__init__()
    self.open, self.text, self.links, self.tables, self.alts, self.tags, self.ids = [], '', [], {}, [], set(), []
    self._cell = self._caption = None
    self.feed(source)
    self.close()
    assert not self.open, f'left open: {self.open}'

  def handle_starttag(self, tag, attrs):
    if tag != 'meta':
      self.open.append(tag)
    self._see(tag, dict(attrs))
    if tag == 'table':
      self._rows = []
    elif tag == 'tr':
      self._rows.append([])
    elif tag in ('th', 'td'):
      self._rows[-1].append('')

  def handle_startendtag(self, tag, attrs):
    self._see(tag, dict(attrs))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f'</{tag}> closes nothing'
    if tag == 'table':
      assert self._caption not in self.tables
      self.tables[self._caption] = self._rows

  def handle_data(self, data):
    self.text += data
    if 'caption' in self.open:
      self._caption = data
    elif {'th', 'td'} & set(self.open):
      self._rows[-1][-1] += data

  def _see(self, tag, attrs):
    self.tags.add(tag)
    self.links += [value for name, value in attrs.items() if name in LOADING]
    self.ids += [attrs['id']] if 'id' in attrs else []
    if tag == 'svg':
      assert attrs['role'] == 'img'
      self.alts.append(attrs['aria-label'])

  def rows(self, caption):
    """{first cell: the others} of the table whose caption starts so."""
    [rows] = [rows for name, rows in self.tables.items() if name.startswith(caption)]
    return {row[0]: row[1:] for row in rows}


def read(path):
  return Page(path.read_text(encoding='utf-8'))


def number(cell):
  return float(cell.replace('−', '-').replace(',', '').removeprefix('×').removesuffix('%'))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return doremi_run(tmp_path_factory.mktemp('doremi') / 'run', rounds=2)


@pytest.fixture(scope='module')
def source(directory):
  return doremi.write_report(directory).read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def shown(source):
  return Page(source)


def test_the_page_loads_nothing_and_is_small(shown, source):
  assert all(link.startswith('#') for link in shown.links)
  assert {link[1:] for link in shown.links} <= set(shown.ids)
  assert len(shown.ids) == len(set(shown.ids))
  assert not shown.tags & {'script', 'link', 'iframe', 'object', 'img'}
  assert '@import' not in source and all(target.startswith('#') for target in re.findall(r'url\(["\']?([^)]*)', source))
  assert len(source.encode()) < 2_000_000


def test_equal_artefacts_give_equal_bytes(directory, source):
  assert doremi.write_report(directory).read_text(encoding='utf-8') == source


def test_every_figure_has_words_for_who_cannot_see_it(shown):
  assert len(shown.alts) == 9  # bars, 2 x weights, dots, 2 x learning, 2 x excess, reference
  assert len(set(shown.alts)) == len(shown.alts) and min(map(len, shown.alts)) > 30


def test_the_weights_are_those_of_the_summary(directory, shown):
  summary, rows = workdir.read_json(directory / 'summary.json'), shown.rows('Domain weights')
  seeds = summary['rounds'][-1]['seeds']
  for d in DOMAINS:
    baseline, tuned, ratio, std, spread = rows[d]
    a, b = (s[d] for s in seeds)
    assert number(baseline) == pytest.approx(summary['baseline'][d], abs=5e-5)
    assert number(tuned) == pytest.approx(summary['tuned'][d], abs=5e-5)
    assert number(ratio) == pytest.approx(summary['tuned'][d] / summary['baseline'][d], abs=5e-3)
    assert number(std) == pytest.approx(abs(a - b) / math.sqrt(2), abs=5e-5)
    assert [*map(float, spread.split('–'))] == pytest.approx(sorted([a, b]), abs=5e-5)


def test_the_losses_are_the_last_evaluations(directory, shown):
  lines = read_lines(directory)
  last = {line['stage']: line for line in lines if line['kind'] == 'eval'}
  base, tuned, rows = last['main-baseline'], last['main-tuned'], shown.rows('Held-out losses')
  for d in DOMAINS:
    a, b = base['nll'][d], tuned['nll'][d]
    wanted = [a, b, b - a, base['bits_per_byte'][d], tuned['bits_per_byte'][d]]
    assert [*map(number, rows[d][:5])] == pytest.approx(wanted, abs=5.1e-4)
    assert rows[d][5] == ('tuned' if b < a else 'baseline')
  assert number(rows['average'][0]) == pytest.approx(base['uniform_nll'], abs=5e-4)


def test_the_data_and_epochs_are_those_recorded(directory, shown):
  recorded, rows = workdir.read_json(directory / 'data.json')['domains'], shown.rows('Data by domain')
  epochs = workdir.read_json(directory / 'main-tuned/stage.json')['epochs']
  for d in DOMAINS:
    train = recorded[d]['train']
    assert [*map(number, rows[d][:4])] == [train['documents'], train['tokens'], train['sequences'], 3]
    assert number(rows[d][-1]) == pytest.approx(epochs[d], abs=5e-3)
  assert number(rows['all'][0]) == sum(recorded[d]['train']['documents'] for d in DOMAINS)


def test_the_cost_counts_the_stages_that_ran(directory, tmp_path):
  summary = workdir.read_json(directory / 'summary.json')
  ran = dict(summary['cost_flops'])
  run = doremi_run(tmp_path / 'run', rounds=2)
  summary['cost_flops'] = {'round-3/reference': 1e20} | ran  # planned, but the weights stood still before
  workdir.write_json(run / 'summary.json', summary)
  page = read(doremi.write_report(run))
  rows = page.rows('Compute')
  assert rows.keys() - {'stage', 'all'} == ran.keys()
  assert float(rows['all'][0]) == pytest.approx(sum(ran.values()), rel=5e-3)
  search = sum(x for stage, x in ran.items() if 'main' not in stage) / ran['main-tuned']
  assert f'cost {search:.2f} times the training of one main model' in page.text and '1 planned stages' in page.text


def test_the_speed_is_the_median_of_the_logged(directory, shown):
  lines = read_lines(directory)
  tuned = [line for line in lines if (line['stage'], line['kind']) == ('main-tuned', 'train')]
  speeds = [line['time/tokens_per_second'] for line in tuned]
  assert number(shown.rows('Speed')['main-tuned'][0]) == round(float(np.median(speeds)))


def test_the_command_can_be_pasted(directory, shown):
  argv = workdir.read_json(directory / 'environment.json')['command']
  assert shlex.join(argv) in shown.text


COMPARISON = {
  'uniform_nll': {'candidate': 3.881, 'baseline': 3.912}, 'worst_nll': {'candidate': 5, 'baseline': 5.1},
  'domains_won': list('abcdefg'), 'domains': 10, 'baseline_steps': 300, 'steps_to_baseline': 220}


@pytest.mark.parametrize('changed, says, not_says', [
  ({}, ['lowers the average held-out loss by 0.8% (3.912 → 3.881', 'wins 7 of 10',
        'reaches the baseline\'s final loss at step 220 of 300, 1.36 times sooner'], 'not beat'),
  ({'steps_to_baseline': 300}, ['lowers', 'step 300 of 300.'], 'sooner'),
  ({'steps_to_baseline': 0}, ['lowers', 'step 0 of 300.'], 'sooner'),
  ({'uniform_nll': {'candidate': 4.0, 'baseline': 3.9}, 'steps_to_baseline': None},
   ['does not beat the baseline here', '2.6% higher (3.900 → 4.000', 'never reaches'], 'lowers'),
  ({'uniform_nll': {'candidate': 4.0, 'baseline': 3.9}},
   ['does not beat', 'reached the baseline\'s final loss at step 220 of 300, but ends above it'], 'never'),
  ({'uniform_nll': {'candidate': 3.9119, 'baseline': 3.912}}, ['ties with the baseline'], 'lowers'),
])
def test_the_outcome_is_told_whichever_way_it_fell(changed, says, not_says):
  sentence = comparison.outcome(COMPARISON | changed)
  assert all(part in sentence for part in says), sentence
  assert not_says not in sentence


def test_a_loss_is_the_headline_of_its_page(tmp_path):
  page = read(doremi.write_report(doremi_run(tmp_path / 'run', gain=-0.05, seeds=1)))
  assert 'does not beat the baseline here' in page.text and 'no error bar' in page.text
  assert 'std over seeds' not in page.text and 'one proxy seed' in page.text


def test_a_run_without_main_models_says_so(tmp_path):
  page = read(doremi.write_report(doremi_run(tmp_path / 'run', main=False)))
  assert 'No main model was trained' in page.text and 'nothing to compare' in page.text


def test_the_summary_alone_makes_a_page(tmp_path):
  run = doremi_run(tmp_path / 'run', main=False)
  summary = workdir.read_json(run / 'summary.json')
  for file in ('config.json', 'environment.json', 'data.json', 'metrics.jsonl'):
    (run / file).unlink()
  workdir.write_json(run / 'summary.json', {key: summary[key] for key in ('baseline', 'tuned', 'rounds')})
  page = read(doremi.write_report(run))
  said = ('no weights in metrics.jsonl', 'nothing to compare', 'no data.json', 'no environment.json', 'None.')
  assert all(words in page.text for words in said)


def test_an_unfinished_run_is_refused_by_name(tmp_path):
  with pytest.raises(FileNotFoundError, match=f'{re.escape(str(tmp_path))} has no summary.json'):
    doremi.write_report(tmp_path)


def test_one_evaluation_makes_a_page_that_says_so(tmp_path):
  run = doremi_run(tmp_path / 'run', seeds=1)
  lines = read_lines(run)
  write_lines(run, [line for line in lines if line['kind'] == 'train' or line['step'] == STEPS])
  assert 'Evaluated once' in read(doremi.write_report(run)).text


def test_no_text_can_leave_its_place(tmp_path):
  hostile = '</style></svg><script>alert("1")</script>&amp; $x_1$ \udcff\x00'
  run = doremi_run(tmp_path / 'run', seeds=1)
  places = r'(?<=")wiki(?=")|it.s here|no network|CC-BY|/data/store|domains read more'
  for path in run.rglob('*.json*'):
    path.write_text(re.sub(places, lambda _: json.dumps(hostile)[1:-1], path.read_text()))
  page = read(doremi.write_report(run))
  visible = hostile[:-2] + '\ufffd\ufffd'
  assert 'script' not in page.tags and page.text.count(visible) > 8
  assert visible in page.rows('Domain weights')
  assert text(element('b', '<')) == '<b>&lt;</b>' and element('a', href='"<') == '<a href="&quot;&lt;"></a>'


def test_the_page_of_plain_training_says_what_the_artefacts_say(tmp_path):
  run = pretrain_run(tmp_path / 'run')
  page = read(pretrain.write_report(run))
  final = workdir.read_json(run / 'summary.json')['final']
  weights, rows = workdir.read_json(run / 'mixture.json')['domains'], page.rows('Held-out losses')
  for d in DOMAINS:
    wanted = [weights[d], final['nll'][d], final['bits_per_byte'][d]]
    assert [*map(number, rows[d])] == pytest.approx(wanted, abs=5.1e-4)
  assert f'held-out loss is {final["uniform_nll"]:.3f} nats/token' in page.text
  assert 'the worst is wiki with 5.000' in page.text
  assert len(page.alts) == 2 and all(link.startswith('#') for link in page.links)


def test_plain_training_without_metrics_makes_a_page(tmp_path):
  workdir.write_json(tmp_path / 'summary.json', {})
  assert 'left no evaluation' in read(pretrain.write_report(tmp_path)).text


def test_a_domain_looks_the_same_whatever_the_order_and_unlike_the_others():
  names = [f'd{n:02}' for n in range(24)]
  assert plots.palette(names) == plots.palette(names[::-1])
  assert len(set(plots.palette(names).values())) == 24


def test_smoothing_is_the_mean_over_a_window_of_what_was_there():
  rng = np.random.default_rng(2)
  values, present = rng.random(30), (rng.random(30) > 0.4).astype(float)
  for n, got in enumerate(plots.smoothed(values, present, 5)):
    near = [values[k] for k in range(max(n - 2, 0), min(n + 3, 30)) if present[k]]
    assert got == pytest.approx(np.mean(near)) if near else math.isnan(got)


def test_a_long_curve_keeps_its_ends_and_few_points():
  x = np.arange(5000)
  svg = plots.curves('k', 'a title', [plots.Line(x, np.sin(x / 300), label='one')], ylabel='y')
  assert len(svg) < 15_000 and 'currentColor' in svg


def test_labels_are_apart_in_order_and_near_their_curves():
  rng = np.random.default_rng(3)
  for n in (1, 2, 10, 20):
    for places in (rng.random(n), np.full(n, 1.0), rng.random(n) * 0.05):
      got = np.array(plots._apart(places, 0.05))
      order = np.argsort(places, kind='stable')
      assert (np.diff(got[order]) >= 0.05 - 1e-9).all() and got.min() >= -1e-9 and got.max() <= 1 + 1e-9
  assert plots._apart([0.1, 0.9, 0.5], 0.05) == pytest.approx([0.1, 0.9, 0.5])
  assert plots._apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])


def test_a_name_is_drawn_as_it_is_written():
  names, weights = ['$a^$<b', 'long_name_' * 5, 'é\n'], [0.5, 0.3, 0.2]
  svg = plots.bars('k', '', names, weights, weights[::-1], [plots.INK] * 3, xlabel='')
  for drawn in ('$a^$&lt;b', 'long_name...ng_name_', '??'):
    assert f'>{drawn}</text>' in svg
