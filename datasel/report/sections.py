"""What the reports of all methods share: a run's artefacts, and its sections on data, cost and repetition."""

import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from datasel import metrics, workdir
from datasel.report.html import Html, element, panels, paragraph, table

NONE = '–'  # in a cell: not there


@dataclasses.dataclass(frozen=True)
class Artefacts:
  """The files of a finished run.  Those that a run may lack read as empty."""

  directory: pathlib.Path

  @functools.cached_property
  def summary(self) -> dict:
    if not (self.directory / 'summary.json').exists():
      raise FileNotFoundError(f'{self.directory} has no summary.json: the run is not finished; repeat its command to '
                              'continue it')
    return workdir.read_json(self.directory / 'summary.json')

  @functools.cached_property
  def lines(self) -> list[dict]:
    return metrics.read(self.directory)

  @property
  def stages(self) -> list[str]:
    """Stages that left metrics, in the order they began."""
    return list(dict.fromkeys(line['stage'] for line in self.lines))

  def read(self, name: str) -> dict:
    path = self.directory / name
    return workdir.read_json(path) if path.exists() else {}

  def of(self, stage: str, kind: str) -> list[dict]:
    """The metrics of a stage, of kind 'train' or 'eval', in order."""
    return [line for line in self.lines if line['stage'] == stage and line['kind'] == kind]

  def environment(self, key: str) -> Any:
    return self.read('environment.json').get(key)


def subtitle(run: Artefacts, method: str) -> str:
  started = run.environment('started')
  return f'datasel · {method} · ' + (f'started {started}' if started else 'start not recorded')


def count(n: float | None) -> str:
  """'1,234'."""
  return NONE if n is None else f'{n:,.0f}'


def number(x: float | None, digits: int = 3) -> str:
  return NONE if x is None else f'{x:.{digits}f}'


def some(items: Sequence[str], most: int = 4) -> str:
  """'a, b, c' or 'a, b, c, d and 3 more', for a sentence."""
  shown = ', '.join(items[:most])
  return shown if len(items) <= most else f'{shown} and {len(items) - most} more'


def warnings(found: Sequence[str]) -> Html:
  if not found:
    return paragraph('None.')
  return element('ul', *(element('li', warning) for warning in found), class_='warnings')


def data(run: Artefacts, stages: Sequence[str]) -> Html:
  """What the store holds, how often each of `stages` read it, and where the text came from."""
  described = run.read('data.json')
  if not described:
    return paragraph('This run left no data.json: the size of its data is not known.')
  domains = described['domains']
  epochs = {stage: run.read(f'{stage}/stage.json').get('epochs', {}) for stage in stages}
  selection = described.get('selection') or {}
  head = ['domain', 'documents', 'tokens', 'sequences', 'dropped', 'held-out documents', 'held-out tokens',
          *(f'epochs, {stage}' for stage in stages)]
  counted = [('train', 'documents'), ('train', 'tokens'), ('train', 'sequences'), ('train', 'dropped'),
             ('validation', 'documents'), ('validation', 'tokens')]
  columns = [[_counted(splits.get(split, {}), key) for splits in domains.values()] for split, key in counted]
  rows = [[domain, *(count(column[i]) for column in columns),
           *(number(epochs[stage].get(domain), 2) for stage in stages)] for i, domain in enumerate(domains)]
  known = [[x for x in column if x is not None] for column in columns]
  total = ['all', *(count(sum(column) if column else None) for column in known), *(NONE for _ in stages)]
  read = 'Epochs: how often a stage read a domain, 1.00 being all of it once. ' if stages else ''
  return Html(paragraph(
    'Token store ', element('code', described.get('store', NONE)), ', digest ',
    element('code', str(described.get('digest', NONE))[:16]), '. ', read,
    'Dropped: documents that the store left out (such as empty ones).')
    + (_selected(selection, domains) if selection else Html(''))
    + table(head, rows, caption='Data by domain', total=total) + _sources(described.get('sources') or {}))


def _selected(selection: dict, domains: dict) -> Html:
  """That the run saw a part of its store only, which, and how much of it."""
  whole, provenance = selection['of_sequences'], selection['provenance']
  kept = {name: splits['train']['sequences'] for name, splits in domains.items()}
  how = ', '.join(f'{key} {provenance[key]}' for key in ('method', 'ratio', 'temperature', 'seed') if key in provenance)
  said = paragraph(
    f'Trained on a selection: {count(sum(kept.values()))} of {count(sum(whole.values()))} sequences '
    f'({100 * sum(kept.values()) / sum(whole.values()):.1f}%), without copying them. File ',
    element('code', selection['file']), ', digest ', element('code', selection['digest'][:16]), f'; {how or NONE}. The '
    'counts of training data below are those of the selection; how many documents it touches is not recorded.')
  rows = [[name, count(kept[name]), count(whole[name]), f'{100 * kept[name] / whole[name]:.1f}%'] for name in domains]
  return Html(said + table(['domain', 'sequences kept', 'of', 'part'], rows, caption='What the selection keeps'))


def _counted(counts: dict, key: str) -> int | None:
  value = counts.get(key)
  return sum(value.values()) if isinstance(value, dict) else value


def _sources(sources: dict) -> Html:
  if not sources.get('domains'):
    return Html('')
  rows = []
  for domain, facts in sources['domains'].items():
    dropped = ', '.join(f'{n} {reason}' for reason, n in facts.get('dropped', {}).items())
    package = ' '.join(str(facts[key]) for key in ('package', 'version') if key in facts)
    rows.append([domain, package or NONE, facts.get('licence', NONE), count(facts.get('documents')), dropped or 'none'])
  left_out = [element('li', f'{domain}: {reason}') for domain, reason in sources.get('left_out', {}).items()]
  return element(
    'details', element('summary', 'Where the text came from'),
    table(['domain', 'package', 'licence', 'documents kept', 'left out, by reason'], rows, words=True,
          caption='Sources of the corpus'),
    *([paragraph('Domains that could not be had:'), element('ul', *left_out)] if left_out else []))


def cost(run: Artefacts, flops: dict[str, float], notes: Sequence[str] = ()) -> Html:
  """FLOPs of each stage by formula, and its speed as measured."""
  total = sum(flops.values())
  tables = []
  if total:
    tables.append(table(
      ['stage', 'FLOPs', 'share'], [[stage, f'{x:.3g}', f'{100 * x / total:.1f}%'] for stage, x in flops.items()],
      caption='Compute, by formula', total=['all', f'{total:.3g}', '100.0%']))
  rows = [row for row in (_speed(run, stage) for stage in run.stages) if row]
  if rows:
    tables.append(table(['stage', 'tokens/s', 'MFU', 'waiting for data', 'training time'], rows,
                        caption='Speed: medians over the logged intervals, without compilation and evaluation'))
  parts = [paragraph(note) for note in notes] + [panels(*tables)]
  peak, source = run.environment('peak_flops_per_device'), run.environment('peak_flops_source')
  against = f' The peak is {peak:.3g} FLOP/s a device ({source}).' if peak else ''
  parts.append(paragraph(
    'MFU = tokens/s × FLOPs per token / (devices × peak FLOP/s of a device), with FLOPs per token = ',
    element('code', '6 N + 12 · layers · heads · head_dim · min(L/2, window)'),
    '; N counts the parameters of matrix products (the output head once, the embedding look-up not), L is the sequence '
    f'length.{against}', class_='soft'))
  return Html(''.join(parts))


def _speed(run: Artefacts, stage: str) -> list[str] | None:
  timed = [line for line in run.of(stage, 'train') if 'time/tokens_per_second' in line]
  if not timed:
    return None
  speed, mfu, wait = (statistics.median(line[f'time/{key}'] for line in timed)
                      for key in ('tokens_per_second', 'mfu', 'data_wait_fraction'))
  trained, length = run.read(f'{stage}/stage.json'), run.read('config.json').get('data.length')
  known = trained and length
  took = f'≈ {metrics.clock(trained["steps"] * trained["batch_size"] * length / speed)}' if known else NONE
  return [stage, count(speed), f'{100 * mfu:.1f}%', f'{100 * wait:.1f}%', took]


def repeat(run: Artefacts) -> Html:
  """The command, the environment, the configuration."""
  environment, config = run.read('environment.json'), run.read('config.json')
  parts = []
  if environment.get('command'):
    parts += [paragraph('The command that made this run; given again, it continues or repeats it:'),
              element('pre', shlex.join(environment['command']))]
  else:
    parts.append(paragraph('This run left no environment.json: its command is not known.'))
  shown = {key: value for key, value in environment.items() if key != 'command'}
  if shown:
    parts.append(table(['', 'value'], [[key.replace('_', ' '), _plain(value)] for key, value in shown.items()],
                       caption='Environment', words=True))
  if config:
    parts.append(element('details', element('summary', f'Configuration ({len(config)} keys)'),
                         table(['key', 'value'], [[key, _plain(value)] for key, value in config.items()],
                               caption='config.json', words=True)))
  return Html(''.join(parts))


def _plain(value: Any) -> str:
  if value is None:
    return NONE
  return value or "''" if isinstance(value, str) else json.dumps(value)
