"""The report of a PDS run: what was kept and why, and what it was worth."""

import pathlib

from datasel import workdir
from datasel.report import comparison, lm_eval, plots, sections
from datasel.report.html import Html, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import ACCENT, GREY, Line, signed
from datasel.report.sections import Artefacts, count, number, some

_MAINS = {'main-all': GREY, 'main-random': plots.INK, 'main-selected': ACCENT}


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json; all else that may be missing is
  said on the page.
  """
  run = Artefacts(pathlib.Path(directory))
  mains = [stage for stage in _MAINS if run.of(stage, 'eval')]
  content = [
    ('The target', _target(run, mains)),
    ('What was kept', _kept(run)),
    ('Read for yourself', _extremes(run)),
    ('Optimal control', _control(run)),
    ('The scorer', _scorer(run)),
    *([('Held-out losses by domain', comparison.losses(run, 'main-all', 'main-selected', _order(run),
                                                          ('all', 'selected')))]
      if mains else []),
    *lm_eval.sections(run),
    ('Warnings', sections.warnings(run.summary.get('warnings', []))),
    ('Data', sections.data(run, mains)),
    ('Cost', _cost(run)),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Data selection as optimal control', sections.subtitle(run, 'pds'), _lead(run), content))
  return path


def _order(run: Artefacts) -> list[str]:
  """Domains by the part of them that was kept, most first."""
  kept = run.summary['kept']
  return sorted(kept, key=lambda d: (-kept[d]['selected'] / max(kept[d]['of'], 1), d))


def _losses(run: Artefacts) -> dict[str, float]:
  """{stage: the target's loss at the end}."""
  return {stage: lines[-1]['target_nll'] for stage in _MAINS if (lines := run.of(stage, 'eval'))}


def _lead(run: Artefacts) -> Html:
  summary, losses = run.summary, _losses(run)
  kept = sum(d['selected'] for d in summary['kept'].values())
  of = sum(d['of'] for d in summary['kept'].values())
  shown = [(f'{100 * kept / of:.1f}%', f'of {of:,} sequences kept'),
           (number(summary['scorer']['spearman']), 'Spearman, predicted against computed scores, held out')]
  if 'main-selected' not in losses:
    said = paragraph(f'{kept:,} of {of:,} sequences were selected; no main model was trained on them.', class_='lead')
    return Html(said + tiles(shown))
  ours, others = losses['main-selected'], {name: x for name, x in losses.items() if name != 'main-selected'}
  words = {'main-all': 'on all data', 'main-random': 'on as much at random'}
  change = ', and '.join(f'{abs(100 * (ours / x - 1)):.1f}% {"lower" if ours < x else "higher"} than that of the model '
                         f'trained {words[name]} ({x:.3f})' for name, x in others.items())
  said = paragraph(f'Trained on the selection, the loss on the target is {ours:.3f} nats/token: {change}.',
                   class_='lead')
  shown += [(signed(ours - x), f'nats/token on the target, against {words[name]}') for name, x in others.items()]
  return Html(said + tiles(shown) + paragraph(
    'What this can show: the main models differ in the data alone, and share their size, steps and initial parameters. '
    'What it cannot: each was trained with one seed, so a small difference may be the seed\'s. A selection is made for '
    'its target; what it costs elsewhere is below, by domain.'))


def _target(run: Artefacts, mains: list[str]) -> Html:
  target = run.summary['target']
  said = paragraph(
    f'J is the loss on {target["examples"]:,} examples of {target["name"]}'
    + (f'; {target["cut"]:,} of them were cut at the length of a sequence' if target['cut'] else '')
    + (f'; {target["left_out"]:,} more had nothing to predict within it' if target['left_out'] else '') + '.')
  if not mains:
    return said
  curves = []
  for stage in mains:
    lines = run.of(stage, 'eval')
    late = [line for line in lines if 5 * line['step'] >= lines[-1]['step']]
    curves.append(Line([line['step'] for line in late], [line['target_nll'] for line in late],
                       label=stage.removeprefix('main-'), color=_MAINS[stage], dots=True))
  final = _losses(run)
  svg = plots.curves('target', 'Loss on the target', curves, ylabel='nats/token', level=final.get('main-all'))
  return Html(said + panels(
    figure(svg, alt='Loss on the target while the main models train; at the end '
           + some([f'{stage.removeprefix("main-")} {x:.3f}' for stage, x in final.items()]),
           caption='The same steps on all data, on a random selection and on this one. Dotted: the final value on all '
                   'data. The first fifth of the steps is left out.'),
    table(['main model', 'target, nats/token', 'mean over domains', 'worst domain'],
          [[stage, number(final[stage]), number(run.of(stage, 'eval')[-1]['uniform_nll']),
            number(run.of(stage, 'eval')[-1]['worst_nll'])] for stage in mains], caption='At the last step')))


def _kept(run: Artefacts) -> Html:
  kept, order = run.summary['kept'], _order(run)
  looks, scores = plots.palette(order), run.summary['scores']
  share = lambda d, which: kept[d][which] / max(kept[d]['of'], 1)
  bars = plots.bars('kept', 'Part of each domain that is kept', order, [share(d, 'random') for d in order],
                    [share(d, 'selected') for d in order], [looks[d][0] for d in order], xlabel='part of its sequences')
  spread = plots.dots('scores', 'Predicted scores', order, [scores[d]['50'] for d in order],
                      [[scores[d][q] for d in order] for q in ('5', '95')], [looks[d][0] for d in order],
                      xlabel='score (standard deviations of the computed ones)')
  rows = [[d, count(kept[d]['of']), count(kept[d]['selected']), f'{100 * share(d, "selected"):.1f}%',
           count(kept[d]['random']), number(scores[d]['5'], 2), number(scores[d]['50'], 2), number(scores[d]['95'], 2)]
          for d in order]
  noise = run.summary['noise']
  return Html(paragraph(
    f'Kept are the sequences of largest score + {noise["temperature"]:g} × Gumbel noise. The noise has a standard '
    f'deviation of {noise["noise_std"]:.3f}, the scores one of {noise["score_std"]:.3f}; of what is kept, '
    f'{100 * noise["same_without"]:.0f}% would be kept without noise.') + panels(
      figure(bars, alt=f'Part of each domain that is kept; most of {some(order)}',
             caption='Colour: the selection. Grey: as many at random.'),
      figure(spread, alt='5%, 50% and 95% quantiles of the predicted scores by domain',
             caption='Hollow: the median. Filled: the 5% and 95% quantiles.'),
      table(['domain', 'sequences', 'kept', 'part', 'at random', '5%', 'median', '95%'], rows,
            caption='What is kept, and quantiles of predicted scores')))


def _extremes(run: Artefacts) -> Html:
  extremes = run.summary['extremes']
  cell = lambda one: f'{one["name"]} ({one["score"]:+.2f}): {one["text"]}'
  rows = [[str(n + 1), cell(high), cell(low)] for n, (high, low) in enumerate(zip(extremes['highest'],
                                                                                  extremes['lowest']))]
  return Html(paragraph('The beginnings of the sequences with the highest and the lowest predicted scores.')
              + table(['', 'highest', 'lowest'], rows, caption='Highest and lowest', words=True))


def _control(run: Artefacts) -> Html:
  drawn: list[Html] = []
  solved_from = run.read('pmp/manifest.json')['checkpoints']
  traces = {step: run.read(f'pmp/checkpoint-{step}/trace.json') for step in solved_from}
  colors = [color for color, _ in plots.palette([str(step) for step in traces]).values()]
  for key, title, ylabel in (('dev_loss', 'Loss on the target', 'nats/token'),
                             ('costate_norm', 'Length of the co-state', '|λ|')):
    lines = [Line([int(t) for t in trace], [x[key] for x in trace.values()], label=f'from {step}', color=color)
             for (step, trace), color in zip(traces.items(), colors)]
    drawn.append(figure(plots.curves(key, title, lines, ylabel=ylabel), alt=f'{title} over the inner steps',
                        caption='Over the inner steps, from each checkpoint of the proxy.'))
  gammas = run.summary['gammas']
  order = sorted(gammas, key=lambda d: -gammas[d]['50'])
  looks = plots.palette(order)
  drawn.append(figure(
    plots.dots('gammas', 'Computed scores', order, [gammas[d]['50'] for d in order],
               [[gammas[d][q] for d in order] for q in ('5', '95')], [looks[d][0] for d in order], xlabel='nats'),
    alt='5%, 50% and 95% quantiles of the computed scores by domain',
    caption='Hollow: the median. Filled: the 5% and 95% quantiles.'))
  config = run.read('config.json')
  return Html(paragraph(
    f'From each of {len(traces)} checkpoints of the proxy, {config.get("pds.horizon")} steps of gradient descent; the '
    'score of a sequence is minus the derivative of the summed target loss with respect to its weight in the training '
    'loss, at every step that is scored.') + panels(*drawn))


def _scorer(run: Artefacts) -> Html:
  evaluated = run.of('scorer', 'held_out')
  found = run.summary['scorer']
  said = paragraph(f'Of {found["proxies"]:,} sequences with computed scores, {found["held_out"]:,} were held out; '
                   'there predicted and computed scores have a rank correlation (Spearman) of '
                   f'{found["spearman"]:.3f}.')
  if not evaluated:
    return said
  curve = plots.curves('spearman', 'Rank correlation, held out', [
    Line([line['step'] for line in evaluated], [line['spearman'] for line in evaluated], label='Spearman',
         color=ACCENT, dots=True)], ylabel='Spearman')
  points = found['points']
  scatter = plots.scatter('scorer', 'Predicted against computed', points['true'], points['predicted'],
                          xlabel='computed score, z-scored and clipped', ylabel='predicted')
  return Html(said + panels(
    figure(scatter, alt=f'Predicted against computed scores, Spearman {found["spearman"]:.3f}',
           caption=f'{len(points["true"]):,} held-out sequences.'),
    figure(curve, alt='Spearman after each epoch', caption='After each epoch; the best one is used.')))


def _cost(run: Artefacts) -> Html:
  flops = run.summary.get('cost_flops', {})
  main, search = flops.get('main-selected'), sum(x for stage, x in flops.items() if not stage.startswith('main-'))
  notes = []
  if main:
    notes.append(f'The selection (proxy, its scores, the scorer) cost {search / main:.2f} times the training of one '
                 'main model.')
    reached, steps = run.summary['steps_to_target'], run.of('main-all', 'eval')[-1]['step']
    notes.append(
      f'On the selection, the target\'s loss of the model trained on all data is reached at step {reached} of {steps}: '
      f'{100 * (1 - reached / steps):.0f}% of the training is saved.' if reached is not None else
      'On the selection, the target\'s loss of the model trained on all data is never reached.')
  return sections.cost(run, flops, notes)
