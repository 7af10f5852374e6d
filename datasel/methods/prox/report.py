"""The report of a ProX run: what the refiners can do, what they took away, and what the text was worth."""

import pathlib
from typing import Any

from datasel import workdir
from datasel.methods.prox import audit, inspect_page, lines
from datasel.report import comparison, lm_eval, plots, sections
from datasel.report.html import Html, figure, page, panels, paragraph, table, tiles
from datasel.report.plots import ACCENT, GREY, Line, signed
from datasel.report.sections import NONE, Artefacts, count, number, some


def write_report(directory: pathlib.Path) -> pathlib.Path:
  """Writes DIRECTORY/report.html from the artefacts of a finished run; returns its path.

  Equal artefacts give equal bytes.  FileNotFoundError if the run has no summary.json.
  """
  run = Artefacts(pathlib.Path(directory))
  mains = [stage for stage in run.stages if stage.startswith('main-')]
  domains = list(run.read('data.json')['domains'])
  content = [
    ('What is left of the text', _left(run)),
    ('What was taken away', _taken(run)),
    ('Documents, before and after', _documents(run)),
    ('The refiners', _refiners(run)),
    *([('Main models', _mains(run, mains)),
       ('Held-out losses by domain', comparison.losses(run, 'main-raw', 'main-prox', domains, ('raw', 'refined')))]
      if mains else []),
    *lm_eval.sections(run),
    ('Warnings', sections.warnings(run.summary['warnings'])),
    ('Held-out data', sections.data(run, [])),
    ('Cost', _cost(run)),
    ('Repeat this run', sections.repeat(run)),
  ]
  path = run.directory / 'report.html'
  with workdir.replacing(path, 'w') as f:
    f.write(page('Text refined by programs', sections.subtitle(run, 'ProX'), _lead(run), content))
  return path


def _share(left: float, of: float) -> str:
  return f'{100 * left / of:.1f}%' if of else NONE


def _size(counted: dict[str, Any]) -> str:
  """What text is measured by: tokens, where they were counted."""
  return 'tokens' if 'tokens' in counted['before'] else 'words'


def _lead(run: Artefacts) -> Html:
  counted = run.summary['text']['prox']['statistics']
  size, judged = _size(counted), run.summary['refiners']
  left = _share(counted['after'][size], counted['before'][size])
  shown = [(left, f'of the {size} are left by the refiners'),
           (_share(audit.n_left(counted), audit.n_documents(counted)), 'of the documents')]
  shown += [(number(result['f1']), f'F1 of the {task} refiner on sources whose programs it was not taught')
            for task, result in judged.items() if result]
  said = f'Of {count(audit.n_documents(counted))} documents the refiners leave {left} of the {size}.'
  if (target := run.summary.get('target')) and 'prox' in target['nll']:
    loss = target['nll']
    others = [f'{name} {loss[name]:.3f}' for name in loss if name != 'prox']
    better = [name for name in loss if name != 'prox' and loss['prox'] < loss[name]]
    verdict = ('lower than of every other' if len(better) == len(others) else 'lower than of no other' if not better
               else f'lower than of {some(better)}, but not of the others')
    said += (f' A model trained on them has a held-out loss of {loss["prox"]:.3f} nats/token on '
             f'{some(target["domains"])}, {verdict}: {some(others, 6)}.')
    shown.append((f'{signed(100 * (loss["prox"] / loss["raw"] - 1), 1)}%', 'loss on the target, against the raw text'))
  return Html(paragraph(said, class_='lead') + tiles(shown) + paragraph(
    'What this can show: the main models differ in their text alone, and share their size, steps and initial '
    'parameters; each reads as many tokens, so what is left of less text it reads more often. What it cannot: each was '
    "trained with one seed, so a small difference may be the seed's."))


def _left(run: Artefacts) -> Html:
  text = run.summary['text']
  size = _size(text['prox']['statistics'])
  rows, names = [], list(text)
  for name in names:
    counted = text[name]['statistics']
    n, decided = audit.n_documents(counted), counted['documents']
    rows.append([name, count(decided.get('kept', 0)), count(decided.get('edited', 0)), count(decided.get('dropped', 0)),
                 _share(audit.n_left(counted), n), _share(counted['after']['lines'], counted['before']['lines']),
                 _share(counted['after'][size], counted['before'][size]),
                 count(counted['after'][size] / audit.n_left(counted)) if audit.n_left(counted) else NONE])
  of = lambda key: [text[name]['statistics']['after'][key] / max(text[name]['statistics']['before'][key], 1)
                    for name in names]
  chart = plots.bars('left', f'Part of the lines (grey) and {size} that is left', names, of('lines'), of(size),
                     [plots.palette(names)[name][0] for name in names],
                     xlabel='part of the raw text')
  before = text['prox']['statistics']['before']
  return Html(panels(
    figure(chart, alt=f'Bars of the part of the {size} that each leaves',
           caption='prox: the refiners. The others: published rules.'),
    table(['text', 'kept whole', 'edited', 'dropped', 'documents left', 'lines left', f'{size} left',
           f'{size} a document'], rows,
          caption=f'Of {count(before["lines"])} lines and {count(before[size])} {size}'))
    + _stages(text['prox']['statistics']) + table(
      ['text', 'why', 'documents'], [[name, reason, count(n)] for name in names for reason, n in sorted(
        text[name]['statistics']['reasons'].get('dropped', {}).items(), key=lambda item: -item[1])[:5]],
      caption='The commonest reasons to drop a document'))


def _stages(counted: dict[str, Any]) -> Html:
  reasons = counted['reasons'].get('dropped', {})
  n = audit.n_documents(counted) - reasons.get('blank', 0)
  after = n - reasons.get('drop_doc', 0) - reasons.get('drop', 0)
  return paragraph(f'The document refiner keeps {count(after)} of {count(n)} documents ({_share(after, n)}); of these '
                   f'the chunk refiner leaves something of {count(audit.n_left(counted))}.')


def _taken(run: Artefacts) -> Html:
  text = run.summary['text']
  found = text['prox']['lines']
  rows = [[name, count(one['there']), count(one['gone']), _share(one['gone'], one['there'])]
          for name, one in found['kinds'].items()]
  calls = [[call, kind, count(n)] for call, kinds in text['prox']['statistics']['calls'].items()
           for kind, n in kinds.items()]
  characters = {name: each['lines']['characters'] for name, each in text.items()}
  known = [[name, *(_share(one[kind]['gone'], one[kind]['there']) for kind in ('noise', 'text'))]
           for name, one in characters.items() if {'noise', 'text'} <= one.keys()]
  return Html(
    (table(['text', 'noise that is gone', 'text that is gone'], known,
           caption='By characters, where it is known which lines are noise') if known else Html(''))
    + panels(table(['kind of line', 'there', 'gone', ''], rows,
                   caption=f'Lines of the first {count(found["documents"])} documents that were not dropped whole, '
                   'sorted roughly, by rules'),
             table(['call', 'what came of it', 'times'], calls, caption='Calls of the refiners\' programs')))


def _documents(run: Artefacts) -> Html:
  output = audit.Output(run.directory / 'refined' / 'prox')
  try:
    cases = lines.shown(run.summary['corpus'], output)
  except (ValueError, OSError) as e:  # the corpus has gone, or changed: the figures stand without it
    return paragraph(f'The raw text is not there to be shown: {e}')
  if not cases:
    return paragraph('Every document was left as it was.')
  return Html(paragraph('All of them: ', Html('<code>python -m datasel.methods.prox.inspect</code>'),
                        f' {output.path} --corpus {run.summary["corpus"]}')
              + inspect_page.documents(cases, unfolded=1))


def _refiners(run: Artefacts) -> Html:
  parts, looks = [], {'document': ACCENT, 'chunk': GREY}
  epochs = {task: run.of(f'refiner-{task}', 'held_out') for task in looks}
  curves = [Line([line['step'] for line in of], [line['f1'] for line in of], task, looks[task], dots=True)
            for task, of in epochs.items() if of]
  if curves:
    parts.append(figure(plots.curves('f1', 'F1 on the validation examples', curves, ylabel='F1'),
                        alt='F1 of both refiners after each epoch', caption='The best epoch of each is taken.'))
  rows = []
  for task, result in run.summary['refiners'].items():
    if not result:
      continue
    failures = ', '.join(f'{name} {100 * part:.1f}%' for name, part in result.get('failures', {}).items() if part)
    rows.append([task, number(result['f1']), number(result['precision']), number(result['recall']),
                 _share(result['exact'], 1) if 'exact' in result else NONE, failures or NONE])
  parts.append(table(['refiner', 'F1', 'precision', 'recall', 'programs exactly as wanted', 'failures'], rows,
                     caption='On test examples: programs of their sources neither taught nor chose anything, but a '
                     'model trained here has read raw text. Documents: keeping one. Chunks: the lines removed'))
  files = run.summary['examples']['files']
  said = ', '.join(f'{one["examples"]} {name}' for name, one in files.items())
  return Html(paragraph(f'Programs of {run.summary["examples"]["settings"]["annotator"]}: {said}.')
              + panels(*parts))


def _mains(run: Artefacts, mains: list[str]) -> Html:
  names = [stage.removeprefix('main-') for stage in mains]
  evaluated = {name: run.of(f'main-{name}', 'eval') for name in names}
  target = run.summary['target']
  mean = lambda line: sum(line['nll'][d] for d in target['domains']) / len(target['domains'])
  looks = plots.palette(names)
  curves = [Line([line['step'] for line in of], [mean(line) for line in of], name, looks[name][0])
            for name, of in evaluated.items()]
  stages = {name: run.read(f'main-{name}/stage.json') for name in names}
  rows = [[name, number(mean(of[-1])), number(of[-1]['uniform_nll']),
           some([f'{domain} {passes:.2f}' for domain, passes in stages[name]['epochs'].items()], 3)]
          for name, of in sorted(evaluated.items(), key=lambda item: mean(item[1][-1]))]
  return panels(
    figure(plots.curves('mains', f'Held-out loss on {some(target["domains"])}', curves, ylabel='nats per token'),
           alt='Held-out loss of each main model by step', caption='All read as many tokens.'),
    table(['text', 'target', 'all domains', 'times read'], rows, caption='Held-out losses at the end, nats/token'))


def _cost(run: Artefacts) -> Html:
  flops = run.summary['cost_flops']
  notes = ['Of the refining: twice the parameters of matrices for each token that is read or generated.']
  mains = [x for name, x in flops.items() if name.startswith('main-')]
  if mains:
    before = sum(x for name, x in flops.items() if not name.startswith('main-'))
    notes.append(f'All that comes before the main models costs {before / mains[0]:.2f} times one of them.')
  return sections.cost(run, flops, notes)
