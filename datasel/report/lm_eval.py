"""The section of a report on lm-evaluation-harness: what `python -m datasel.lm_eval` found for a run's models."""

import math
from collections.abc import Iterable

from datasel import workdir
from datasel.report import plots
from datasel.report.html import Html, element, figure, panels, paragraph, table
from datasel.report.plots import ACCENT
from datasel.report.sections import NONE, Artefacts, count, number

_SCORES = ('score', 'acc_norm', 'acc', 'exact_match')  # what is drawn of a task: the first that it has
_COLORS = ((ACCENT, 'blue'), ('#e69f00', 'orange'), ('#009e73', 'green'), ('#d55e00', 'red'))
_MOST_ROWS = 40


def sections(run: Artefacts) -> list[tuple[str, Html]]:
  """(heading, body), or nothing for a run whose models were not evaluated on tasks."""
  found = {kept['stage']: kept['rows'] for kept in
           (workdir.read_json(path) for path in sorted((run.directory / 'lm_eval').glob('*.json'))) if kept['rows']}
  if not found:
    return []
  limits = {row['limit'] for rows in found.values() for row in rows if row['limit'] is not None}
  said = [paragraph('Measured by lm-evaluation-harness on the models of this run. ± is one standard error over the '
                    'questions; it does not tell how another seed of training would score.')]
  if limits:
    said.append(paragraph(f'Some tasks were asked the first {", ".join(f"{x:g}" for x in sorted(limits))} questions '
                          'only (--limit): a test, no result.', class_='soft'))
  return [('Tasks', Html(''.join(said) + _charts(found) + ''.join(
    element('details', element('summary', f'All metrics of {stage}'), _table(stage, rows))
    for stage, rows in found.items())))]


def _charts(found: dict[str, list[dict]]) -> Html:
  """A figure for each suite, its own score last, and one for tasks of none."""
  suites = list(dict.fromkeys(row['suite'] for rows in found.values() for row in rows))
  drawn = {suite: {stage: _by_task(row for row in rows if row['suite'] == suite) for stage, rows in found.items()}
           for suite in suites}
  return panels(*(_chart(suite, stages) for suite, stages in drawn.items() if any(stages.values())))


def _chart(suite: str | None, drawn: dict[str, dict[str, dict[str, float]]]) -> Html:
  names = list(dict.fromkeys(name for tasks in drawn.values() for name in tasks))
  shown = names if len(names) <= _MOST_ROWS else [*names[:_MOST_ROWS - 1], names[-1]]
  stages = [stage for stage, tasks in drawn.items() if tasks][:len(_COLORS)]
  percent = lambda stage, key: [100 * drawn[stage].get(name, {}).get(key, math.nan) for name in shown]
  levels = [100 * next(tasks[name]['chance'] for tasks in drawn.values() if name in tasks) for name in shown]
  title = f'{suite}: score and one standard error' if suite else 'Score and one standard error'
  said = '; '.join(f'{stage}: ' + ', '.join(f'{name} {x:.1f}' for name, x in zip(shown, percent(stage, 'value'))
                                            if not math.isnan(x)) for stage in stages)
  colours = ', '.join(f'{stage} {what}' for stage, (_, what) in zip(stages, _COLORS))
  return figure(
    plots.intervals(f'lm_eval {suite}', title, shown, [(percent(stage, 'value'), percent(stage, 'stderr'))
                                                       for stage in stages], [color for color, _ in _COLORS],
                    levels=levels, xlabel='percent'),
    alt=f'{title}, in percent. {said}',
    caption=f'Dots: {colours}. Grey tick: chance, where answers are chosen from.'
            + (f' {len(names) - len(shown)} more are in the table only.' if len(shown) < len(names) else ''))


def _by_task(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
  """{task: {value, stderr, chance}} of its main metric, a mean over numbers of examples where there are several (its
  error then an upper bound: they share their questions)."""
  groups: dict[str, dict[str, list[dict]]] = {}
  for row in sorted(rows, key=lambda row: row['task'] == row['suite']):
    if row['metric'] in _SCORES and row['value'] is not None:
      groups.setdefault(row['task'], {}).setdefault(row['metric'], []).append(row)
  shown = {}
  for name, metrics in groups.items():
    chosen = metrics[min(metrics, key=_SCORES.index)]
    chosen = [row for row in chosen if row['shots'] == 'mean'] or chosen
    shown[name] = {key: sum(math.nan if row[key] is None else row[key] for row in chosen) / len(chosen)
                   for key in ('value', 'stderr', 'chance')}
  return shown


def _table(stage: str, rows: list[dict]) -> Html:
  cell = lambda x: NONE if x is None else number(x, 4)
  return table(
    ['task', 'suite', 'metric', 'examples', 'value', '±', 'chance', 'questions', 'version'],
    [[row['task'], row['suite'] or NONE, row['metric'] if row['filter'] in ('none', f'{row["shots"]}-shot', 'mean')
      else f'{row["metric"]} ({row["filter"]})', row['shots'], cell(row['value']), cell(row['stderr']),
      cell(row['chance']), count(row['n']), str(row['version'])] for row in rows],
    caption=f'{stage}: everything that was measured')
