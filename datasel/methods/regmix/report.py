"""The report of a RegMix run: what is proposed, how far the regression can be trusted, and what it was worth."""

import itertools
import pathlib
from typing import Any

from datasel import workdir
from datasel.methods.regmix import study
from datasel.report import comparison, lm_eval, plots, sections
from datasel.report.html import Html, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import ACCENT, signed
from datasel.report.sections import Artefacts, count, number, some

_MOST_SHOWN = 6  # of the domains in a table of mixtures


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json or regression.json.
  """
  run = Artefacts(pathlib.Path(directory))
  found = workdir.read_json(run.directory / 'regression.json')
  order = sorted(found['domains'], key=lambda d: (-found['proposal']['weights'][d], d))
  mains = [f'main-{name}' for name in run.summary['weights'] if run.of(f'main-{name}', 'eval')]
  content = [
    ('The proposal', _proposal(run, found, order)),
    ('Predicted against true', _predicted(found)),
    ('How certain is the optimum', _certainty(found, order)),
    *([('Main models', _mains(run, mains))] if mains else []),
    *([('Held-out losses by domain', comparison.losses(run, 'main-prior', 'main-proposal', order,
                                                          ('prior', 'proposal')))]
      if {'main-prior', 'main-proposal'} <= set(mains) else []),
    *lm_eval.sections(run),
    ('What was sampled', _sampled(run, found, order)),
    ('Warnings', sections.warnings(run.summary.get('warnings', []))),
    ('Data', sections.data(run, mains)),
    ('Cost', _cost(run)),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Data mixture as regression', sections.subtitle(run, 'RegMix'), _lead(run, found), content))
  return path


def _wished(run: Artefacts) -> str:
  """The target in words."""
  wish = run.summary['wish']
  return some([d if len(set(wish.values())) == 1 else f'{d} × {weight:g}' for d, weight in wish.items()])


def _lead(run: Artefacts, found: dict[str, Any]) -> Html:
  held = [one['held_out'] for one in found['targets'].values() if one['held_out']]
  shown = [(f'{found["runs"]}', 'proxies trained')]
  if held:
    low = min(one['spearman'] for one in held)
    shown.append((number(low), f'{"lowest " if len(held) > 1 else ""}Spearman on {len(held[0]["true"])} proxies that '
                               'the regression had not seen'))
  target = run.summary.get('target')
  if target is None:
    said = f'The regression proposes a mixture for {_wished(run)}; no main model was trained on it.'
    return Html(paragraph(said, class_='lead') + tiles(shown))
  ours, beaten = target['proposal'], run.summary['beaten']
  others = {name: loss for name, loss in target.items() if name != 'proposal'}
  changes = [f'{name} {signed(100 * (ours / loss - 1), 1)}%' for name, loss in others.items()]
  verdict = ('beats every baseline' if len(beaten) == len(others) else 'beats no baseline' if not beaten
             else f'beats {some(beaten)}, but not {some([name for name in others if name not in beaten])}')
  shown += [(f'{signed(100 * (ours / loss - 1), 1)}%', f'loss on the target, against {name}')
            for name, loss in list(others.items())[:3]]
  return Html(paragraph(f'A model trained on the proposed mixture {verdict}: its loss on {_wished(run)} is {ours:.3f} '
                        f'nats/token ({some(changes)}).', class_='lead') + tiles(shown) + paragraph(
    'What this can show: the main models differ in the mixture alone, and share their size, steps and initial '
    "parameters. What it cannot: each was trained with one seed, so a small difference may be the seed's. A mixture is "
    'proposed for its target; what it costs elsewhere is below, by domain.'))


def _proposal(run: Artefacts, found: dict[str, Any], order: list[str]) -> Html:
  proposal, looks = found['proposal'], plots.palette(order)
  compared = proposal['compared']
  prior = compared['prior']['weights']
  chart = plots.bars('proposal', 'Weight of each domain', order, [prior[d] for d in order],
                     [proposal['weights'][d] for d in order], [looks[d][0] for d in order], xlabel='part of the tokens')
  how = ('by following the gradient from the best of many draws' if proposal['search'] == 'ascend'
         else 'as the mean of the best of many draws')
  names = list(found['targets'])
  rows = [[f'{name}, {target}', number(one['value']), f'{signed(gain)}', number(error)]
          for name, one in compared.items()
          for target, gain, error in zip(names, one['gain'], one['gain_error'])]
  mean = [f'{target} {value:.3f} ± {error:.3f}' for target, value, error in
          zip(names, proposal['predicted'], proposal['standard_error'])]
  return Html(paragraph(
    f'Found {how}. Predicted for a proxy trained on it: {some(mean)} nats/token. '
    + (f'{100 * proposal["left_out"]:.2g}% fell on domains too rare to be sampled and went to the others. '
       if proposal['left_out'] > 0 else '')) + panels(
    figure(chart, alt=f'Bars of prior and proposed weight; most is given to {some(order)}',
           caption='Colour: the proposal. Grey: the prior.'),
    table(['mixture, target', 'objective', 'proposal lower by', '± one standard error'], rows,
          caption='Predicted of proxies, nats/token')))


def _predicted(found: dict[str, Any]) -> Html:
  parts, rows = [], []
  for name, one in found['targets'].items():
    if held := one['held_out']:
      svg = plots.scatter(f'held-{name}', f'{name}, by {one["model"]}', held['true'], held['predicted'],
                          xlabel='true loss, nats/token', ylabel='predicted')
      low, high = held['spearman_interval']
      parts.append(figure(svg, alt=f'Predicted against true losses of {len(held["true"])} proxies, Spearman '
                          f'{held["spearman"]:.3f}', caption=f'Spearman {held["spearman"]:.3f} (95% from {low:.3f} to '
                          f'{high:.3f}), root mean square error {held["rmse"]:.4f} nats/token.'))
    rows += [[name, model, number(100 * each['spearman'], 2), number(each['mse'] ** 0.5, 4),
              'chosen' if model == one['model'] else ''] for model, each in one['models'].items()]
  curve = found['curve']['rows']
  said = [paragraph(f'{name}: {one["reason"]}.') for name, one in found['targets'].items()]
  return Html(paragraph('Proxies that the regression was not fitted on: what it said of them, and what they came to.')
              + panels(*parts, *([table(['target', 'model', 'Spearman × 100', 'RMSE', ''], rows,
                                        caption='Cross-validation, out of fold')] if rows else []))
              + Html(''.join(said)) + (table(
                ['proxies', 'Spearman × 100', '±', 'RMSE, nats'],
                [[count(row['runs']), number(100 * row['spearman'], 2), number(100 * row['spearman_error'], 2),
                  number(row['mse'] ** 0.5, 4)] for row in curve],
                caption=f'Were so many needed? {found["curve"]["target"]} predicted after fitting on so many')
                if curve else paragraph('So few proxies allow no curve over their number.')))


def _certainty(found: dict[str, Any], order: list[str]) -> Html:
  proposal = found['proposal']
  others, domains = proposal['others'], found['domains']
  shown = order[:_MOST_SHOWN]
  name, low, high = study.least_certain(others, domains)
  rows = [[row['objective'], row['search'] if row['seed'] is None else f'best {row["top"]} of seed {row["seed"]}',
           number(row['value'], 4), *(number(row['weights_M'][domains.index(d)]) for d in shown)] for row in others]
  spread = [[min(row['weights_M'][domains.index(d)] for row in others) for d in order],
            [max(row['weights_M'][domains.index(d)] for row in others) for d in order]]
  looks = plots.palette(order)
  svg = plots.dots('others', 'Weights that other choices give', order, [proposal['weights'][d] for d in order], spread,
                   [looks[d][0] for d in order], xlabel='part of the tokens')
  parts = [figure(svg, alt=f'Range of each weight over {len(others)} other searches; the widest is {name}, {low:.3f} '
                  f'to {high:.3f}', caption='Hollow: the proposal. Filled: the lowest and the highest weight that '
                  'another seed, another number of draws averaged, or a more careful objective gives.'),
           table(['objective', 'search', 'predicted', *shown], rows, caption='The proposals of other choices')]
  if front := found['front']:
    targets = list(found['targets'])
    values = front['values']
    parts += _fronts(targets, values, proposal)
    ends = [min(range(len(values)), key=lambda n, k=k: values[n][k]) for k in range(len(targets))]
    parts.append(table(
      ['best for', *targets, *shown],
      [*([target, *map(number, values[end]), *(number(front['weights'][end][domains.index(d)]) for d in shown)]
         for target, end in zip(targets, ends)),
       ['the proposal', *map(number, proposal['predicted']), *(number(proposal['weights'][d]) for d in shown)]],
      caption=f'Ends of the Pareto front of {len(values)} mixtures: predicted nats/token, and weights'))
  return Html(paragraph(f'Least certain is {name}: other choices give it {low:.3f} to {high:.3f}, and '
                        f'{proposal["weights"][name]:.3f} is proposed.') + panels(*parts))


def _fronts(targets: list[str], values: list[list[float]], proposal: dict[str, Any]) -> list[Html]:
  """The front as each two neighbouring targets see it."""
  drawn = []
  for a, b in itertools.pairwise(range(len(targets))):
    svg = plots.front(f'front-{targets[a]}-{targets[b]}', f'Pareto front: {targets[a]} and {targets[b]}',
                      [row[a] for row in values], [row[b] for row in values],
                      {'the proposal': (proposal['predicted'][a], proposal['predicted'][b])},
                      xlabel=f'{targets[a]}, nats/token', ylabel=f'{targets[b]}, nats/token')
    drawn.append(figure(svg, alt=f'Predicted losses of {len(values)} mixtures of which none is better in all targets',
                        caption='Each dot is a mixture that none other is predicted to beat in all targets.'
                        + (' Of more than two targets, two are drawn.' if len(targets) > 2 else '')))
  return drawn


def _mains(run: Artefacts, mains: list[str]) -> Html:
  target, weights = run.summary['target'], run.summary['weights']
  names = [stage.removeprefix('main-') for stage in mains]
  shown = sorted(weights['proposal'], key=lambda d: -max(weights[name][d] for name in names))[:_MOST_SHOWN]
  rows = [[name, number(target[name]), number(run.of(f'main-{name}', 'eval')[-1]['uniform_nll']),
           number(run.of(f'main-{name}', 'eval')[-1]['worst_nll']), *(number(weights[name][d]) for d in shown)]
          for name in names]
  svg = plots.dots('mains', 'Loss on the target', names, [target['proposal']] * len(names),
                   [[target[n] for n in names]], [ACCENT] * len(names), xlabel='nats/token')
  return Html(paragraph('The same model, steps and initial parameters; as many FLOPs each.') + panels(
    figure(svg, alt='Loss on the target of each main model: ' + some([f'{n} {target[n]:.3f}' for n in names], 8),
           caption='Hollow: the proposal. Left of it is better.'),
    table(['trained on', 'target', 'mean over domains', 'worst domain', *shown], rows,
          caption='Held-out losses at the end, nats/token, and the largest weights')))


def _sampled(run: Artefacts, found: dict[str, Any], order: list[str]) -> Html:
  lines = (run.directory / 'mixtures.csv').read_text(encoding='utf-8').splitlines()
  header = lines[0].split(',')
  columns = {name: sorted(float(line.split(',')[header.index(name)]) for line in lines[1:]) for name in order}
  at = lambda values, q: values[min(int(q * len(values)), len(values) - 1)]
  looks = plots.palette(order)
  svg = plots.dots('sampled', f'Weights of {found["runs"]} mixtures', order, [at(columns[d], 0.5) for d in order],
                   [[at(columns[d], q) for d in order] for q in (0.05, 0.95)], [looks[d][0] for d in order],
                   xlabel='part of the tokens')
  return panels(figure(svg, alt='5%, 50% and 95% quantiles of the sampled weights by domain',
                       caption='Hollow: the median. Filled: the 5% and 95% quantiles.'))


def _cost(run: Artefacts) -> Html:
  flops = run.summary['cost_flops']
  search = sum(x for stage, x in flops.items() if not stage.startswith('main-'))
  main = flops.get('main-proposal')
  notes = [f'The search for the mixture cost {search / main:.2f} times the training of one main model, the output head '
           'counted.'] if main else []
  return sections.cost(run, flops, notes)
