"""The report of a plain training run: its losses, what it read, what it cost."""

import pathlib

from datasel import workdir
from datasel.report import lm_eval, plots, sections
from datasel.report.html import Html, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import ACCENT, GREY, Line
from datasel.report.sections import Artefacts, number, some

_STAGE = 'main'


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json; all else that may be missing is
  said on the page.
  """
  run = Artefacts(pathlib.Path(directory))
  content = [
    ('Held-out losses', _losses(run)),
    ('Training', _training(run)),
    *lm_eval.sections(run),
    ('Warnings', sections.warnings(run.summary.get('warnings', []))),
    ('Data', sections.data(run, [_STAGE] if run.read(f'{_STAGE}/stage.json') else [])),
    ('Cost', sections.cost(run, run.summary.get('cost_flops', {}))),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Training on a mixture of domains', sections.subtitle(run, 'pretrain'), _lead(run), content))
  return path


def _lead(run: Artefacts) -> Html:
  evaluated = run.of(_STAGE, 'eval')
  if not evaluated:
    return paragraph('This run left no evaluation: its held-out loss is not known.', class_='lead')
  last = evaluated[-1]
  bits = sum(last['bits_per_byte'].values()) / len(last['bits_per_byte'])
  worst = max(last['nll'], key=last['nll'].get)
  said = paragraph(
    f'After {last["step"]:,} steps the held-out loss is {last["uniform_nll"]:.3f} nats/token ({bits:.3f} bits/byte), '
    f'mean over {len(last["nll"])} domains; the worst is {worst} with {last["worst_nll"]:.3f}.', class_='lead')
  shown = [(number(last['uniform_nll']), 'nats/token, mean over domains'),
           (number(bits), 'bits/byte, mean over domains'),
           (number(last['worst_nll']), f'nats/token, worst domain ({worst})')]
  return Html(said + tiles(shown) + paragraph('One model, one seed: the losses have no error bar.'))


def _losses(run: Artefacts) -> Html:
  evaluated = run.of(_STAGE, 'eval')
  if not evaluated:
    return paragraph('This run left no evaluation in metrics.jsonl.')
  last, weights = evaluated[-1], run.read('mixture.json').get('domains', {})
  order = sorted(last['nll'], key=lambda d: (last['nll'][d], d))
  rows = [[d, number(weights.get(d), 4), number(last['nll'][d]), number(last['bits_per_byte'][d])] for d in order]
  mean = lambda key: number(sum(last[key].values()) / len(order))
  steps = [line['step'] for line in evaluated]
  lines = [Line(steps, [line['nll'][d] for line in evaluated], label=d, color=color, dash=dash, dots=True)
           for d, (color, dash) in plots.palette(order).items()]
  once = 'The model was evaluated once: there is no curve. ' if len(steps) == 1 else ''
  curve = figure(plots.curves('domains', 'Held-out loss by domain', lines, ylabel='nats/token'),
                 alt=f'Held-out loss of {len(order)} domains over {steps[-1]} steps; lowest at the end: {some(order)}',
                 caption=f'{once}On sequences that the model never trains on.')
  return panels(curve, table(
    ['domain', 'weight', 'nats/token', 'bits/byte'], rows, caption='Held-out losses at the last step, lowest first',
    total=['average', sections.NONE, mean('nll'), mean('bits_per_byte')]))


def _training(run: Artefacts) -> Html:
  logged, evaluated = run.of(_STAGE, 'train'), run.of(_STAGE, 'eval')
  if not logged:
    return paragraph('This run left no training metrics in metrics.jsonl.')
  steps, losses = [line['step'] for line in logged], [line['loss'] for line in logged]
  lines = [Line(steps, losses, label='training', color=GREY, width=1)]
  if evaluated:
    lines.append(Line([line['step'] for line in evaluated], [line['uniform_nll'] for line in evaluated],
                      label='held-out', color=ACCENT, dots=True))
  return panels(figure(
    plots.curves('training', 'Training and held-out loss', lines, ylabel='nats/token'),
    alt=f'Training loss over {steps[-1]} steps, from {losses[0]:.3f} to {losses[-1]:.3f} nats/token',
    caption='Training: the mean over the tokens of a batch, drawn by the mixture. Held-out: the mean over domains, '
            'each counting alike; the two need not meet.'))
