"""The report of a DoReMi run: the outcome in words, then the evidence for it."""

import pathlib
import re
import statistics
from collections.abc import Callable

from datasel import workdir
from datasel.report import comparison, lm_eval, plots, sections
from datasel.report.html import Html, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import Line, signed
from datasel.report.sections import Artefacts, number, some

_MAINS = ('main-baseline', 'main-tuned')


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json; all else that may be missing is
  said on the page.
  """
  run = Artefacts(pathlib.Path(directory))
  rounds = run.summary['rounds']
  content = [
    ('Domain weights', _weights(run)),
    ('Weights over time', _over_time(run)),
    ('Held-out losses', comparison.losses(run, *_MAINS, _by_weight(run))),
    *lm_eval.sections(run),
    ('Excess losses', _excess(run)),
    *([('Rounds', _rounds(rounds, _by_weight(run)))] if len(rounds) > 1 else []),
    ('Warnings', sections.warnings(run.summary.get('warnings', []))),
    ('Data', sections.data(run, [stage for stage in _MAINS if run.read(f'{stage}/stage.json')])),
    ('Cost', _cost(run)),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Domain weights by DoReMi', sections.subtitle(run, 'DoReMi'), _lead(run), content))
  return path


def _lead(run: Artefacts) -> Html:
  found, seeds = run.summary.get('comparison'), len(run.summary['rounds'][-1]['seeds'])
  one_seed = 'the weights come from one proxy seed, so their spread is not known'
  if found is None:
    said = ('No main model was trained (doremi.train_main is false): this run ends with the tuned weights, and whether '
            'they help is not measured here')
    return paragraph(said + (f'; {one_seed}.' if seeds == 1 else '.'), class_='lead')
  search = _search_cost(run)
  shown = [
    (f'{signed(comparison.percent(found["uniform_nll"]), 1)}%', 'average held-out loss, tuned against baseline'),
    (f'{len(found["domains_won"])} of {found["domains"]}', 'domains with a lower loss'),
    (f'{signed(comparison.percent(found["worst_nll"]), 1)}%', 'loss of the worst domain'),
    *([(f'{search:.2f}×', 'cost of the search, in main models')] if search else []),
  ]
  trained, length = run.read('main-tuned/stage.json'), run.read('config.json').get('data.length')
  tokens = trained['steps'] * trained['batch_size'] * length if trained and length else None
  size = f', trained on {sections.count(tokens)} tokens each,' if tokens else ''
  spread = one_seed if seeds == 1 else f'the weights are a mean over {seeds} proxy seeds, whose spread is below'
  return Html(paragraph(comparison.outcome(found), class_='lead') + tiles(shown) + paragraph(
    f'What this can show: the two main models{size} differ in their domain weights alone. What it cannot: each was '
    'trained with one seed, so there is no error bar, and a small difference may be the seed\'s; '
    f'{spread}. It says nothing about larger models, other data, or tasks beyond held-out loss.'))


def _weights(run: Artefacts) -> Html:
  baseline, tuned, seeds = run.summary['baseline'], run.summary['tuned'], run.summary['rounds'][-1]['seeds']
  order, looks, several = _by_weight(run), plots.palette(list(tuned)), len(seeds) > 1
  rows, spread = [], []
  for d in order:
    rows.append([d, number(baseline[d], 4), number(tuned[d], 4),
                 f'× {tuned[d] / baseline[d]:.2f}' if baseline[d] else sections.NONE])
    if several:
      each = [seed[d] for seed in seeds]
      spread.append((min(each), max(each)))
      rows[-1] += [number(statistics.stdev(each), 4), f'{min(each):.4f}–{max(each):.4f}']
  svg = plots.bars('weights', 'Weight of each domain', order, [baseline[d] for d in order], [tuned[d] for d in order],
                   [looks[d][0] for d in order], spread=spread or None, xlabel='part of the examples drawn')
  raised = [f'{d} ({baseline[d]:.3f} to {tuned[d]:.3f})'
            for d in sorted(order, key=lambda d: baseline[d] - tuned[d]) if tuned[d] > baseline[d]]
  whisker = f' Line: range over {len(seeds)} proxy seeds.' if several else ''
  chart = figure(svg, alt=f'Bars of baseline and tuned weight for {len(order)} domains; raised: {some(raised)}',
                 caption=f'Colour: tuned. Grey: baseline.{whisker}')
  head = ['domain', 'baseline', 'tuned', 'ratio', *(['std over seeds', 'range over seeds'] if several else [])]
  return panels(chart, table(head, rows, caption='Domain weights, largest tuned weight first'))


def _by_weight(run: Artefacts) -> list[str]:
  """The domains in the order of the tables."""
  return sorted(run.summary['tuned'], key=lambda d: (-run.summary['tuned'][d], d))


def _prefix(run: Artefacts) -> str:
  """Of the stages of the last round."""
  last = f'round-{len(run.summary["rounds"])}/'
  return last if any(stage.startswith(last) for stage in run.stages) else ''


def _proxies(run: Artefacts) -> list[str]:
  return [stage for stage in run.stages if re.fullmatch(re.escape(_prefix(run)) + r'proxy-\d+', stage)]


def _curves(run: Artefacts, ylabel: str, lines_of: Callable[[list[dict], str, str, str], list[Line]]) -> dict[str, str]:
  """{proxy: figure} of lines_of(training metrics, domain, colour, dash).  Many curves have fewer points each."""
  logged = {stage: [line for line in run.of(stage, 'train') if 'alpha' in line] for stage in _proxies(run)}
  looks = plots.palette(list(run.summary['tuned']))
  points = max(40, min(240, 8000 // (len(looks) * max(len(logged), 1))))
  lines = {stage: [line for d, look in looks.items() for line in lines_of(train, d, *look)]
           for stage, train in logged.items() if train}
  return {stage: plots.curves(f'{ylabel} {stage}', stage, drawn, ylabel=ylabel, most_points=points)
          for stage, drawn in lines.items()}


def _over_time(run: Artefacts) -> Html:
  uniform = 1 / len(run.summary['tuned'])

  def lines(train: list[dict], d: str, color: str, dash: str) -> list[Line]:
    steps = [0, *(line['step'] for line in train)]
    values = lambda key: [uniform, *(line[key][d] for line in train)]
    return [Line(steps, values('alpha'), color=color, width=0.7, alpha=0.45),
            Line(steps, values('average'), label=d, color=color, dash=dash, width=2.2)]

  drawn = []
  for stage, svg in _curves(run, 'weight', lines).items():
    final = run.of(stage, 'train')[-1]['average']
    largest = some([f'{d} {final[d]:.3f}' for d in sorted(final, key=lambda d: -final[d])])
    drawn.append(figure(svg, alt=f'Domain weights of {stage} over time, from uniform; final averages: {largest}',
                        caption='Thin: the weight at each step. Thick: its running average, the output of DoReMi.'))
  if not drawn:
    return paragraph('The proxy models left no weights in metrics.jsonl.')
  which = 'Drawn are the proxies of the last round. ' if len(run.summary['rounds']) > 1 else ''
  return Html(paragraph(f'{which}Each proxy starts from uniform weights at step 0; domains on which it is furthest '
                        'behind the reference model gain weight.') + panels(*drawn))


def _excess(run: Artefacts) -> Html:
  window = lambda train: max(1, len(train) // 6)

  def lines(train: list[dict], d: str, color: str, dash: str) -> list[Line]:
    values, present = ([line[key][d] for line in train] for key in ('excess', 'present'))
    smooth = plots.smoothed(values, present, window(train))
    return [Line([line['step'] for line in train], smooth, label=d, color=color, dash=dash)]

  drawn = [
    figure(svg, alt=f'Excess loss of {stage} over the reference model, by domain, over time',
           caption=f'Smoothed: mean over up to {window(run.of(stage, "train"))} logged steps, absences skipped.')
    for stage, svg in _curves(run, 'excess, nats/token', lines).items()]
  reference, proxies = run.of(f'{_prefix(run)}reference', 'eval'), [run.of(stage, 'eval') for stage in _proxies(run)]
  if reference and proxies and all(proxies):
    drawn.append(_reference(_by_weight(run), reference[-1]['nll'], [lines[-1]['nll'] for lines in proxies]))
  if not drawn:
    return paragraph('The proxy models left no excess losses in metrics.jsonl.')
  return Html(paragraph(
    'The excess loss of a domain is how much worse the proxy is than the reference model on its tokens, counted as '
    'zero where it is better (unless doremi.clip is off). It is what moves the weights.') + panels(*drawn))


def _reference(order: list[str], reference: dict, proxies: list[dict]) -> Html:
  looks = plots.palette(order)
  svg = plots.dots('reference', 'Held-out loss: reference and proxy', order, [reference[d] for d in order],
                   [[proxy[d] for d in order] for proxy in proxies], [looks[d][0] for d in order], xlabel='nats/token')
  ahead = [d for d in order if all(proxy[d] < reference[d] for proxy in proxies)]
  return figure(
    svg, alt=f'Final held-out loss of reference and proxies; all proxies are lower on: {some(ahead) or "none"}',
    caption=f'Hollow: the reference model. Filled: {"the proxy" if len(proxies) == 1 else "each proxy"}. Where a proxy '
            'is left of the reference, little excess is left to learn.')


def _rounds(rounds: list[dict], order: list[str]) -> Html:
  head = ['domain', 'start', *(f'round {n + 1}' for n in range(len(rounds)))]
  rows = [[d, number(rounds[0]['reference'][d], 4), *(number(r['tuned'][d], 4) for r in rounds)] for d in order]
  change = ['largest change', sections.NONE, *(number(r['largest_change'], 4) for r in rounds)]
  return Html(paragraph('Each round takes the weights of the one before as its reference weights.')
              + table(head, rows, total=change, caption='Weights after each round'))


def _flops(run: Artefacts) -> dict[str, float]:
  """Of the stages that ran: iterated DoReMi may have stopped before its last planned round."""
  rounds = len(run.summary['rounds'])
  ran = lambda stage: not (match := re.match(r'round-(\d+)/', stage)) or int(match[1]) <= rounds
  return {stage: x for stage, x in run.summary.get('cost_flops', {}).items() if ran(stage)}


def _search_cost(run: Artefacts) -> float | None:
  """FLOPs of everything but the main models, in FLOPs of one main model."""
  flops = _flops(run)
  main = flops.get('main-tuned')
  return sum(x for stage, x in flops.items() if stage not in _MAINS) / main if main else None


def _cost(run: Artefacts) -> Html:
  flops, search, notes = _flops(run), _search_cost(run), []
  if search:
    notes.append('The search for the weights (reference models, their losses, proxies) cost '
                 f'{search:.2f} times the training of one main model.')
  if skipped := run.summary.get('cost_flops', {}).keys() - flops.keys():
    notes.append(f'{len(skipped)} planned stages of later rounds were not needed and are not counted.')
  if any(stage.endswith('reference_nll') for stage in flops):
    notes.append('The cost of the reference losses (reference_nll) is an upper bound: a sequence that the proxies draw '
                 'twice is computed once.')
  return sections.cost(run, flops, notes)
