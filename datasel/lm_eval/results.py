"""What an evaluation found, as rows with their chance levels, and as files of the run whose model it was."""

import collections
import datetime
import math
import pathlib
from typing import Any

from lm_eval.api.task import Task

from datasel import workdir
from datasel.lm_eval.suites import SuiteGroup


def chance(task: Task) -> float | None:
  """Accuracy of guessing among the choices of the questions that were asked; None where nothing is chosen from."""
  choices = collections.Counter(instance.doc_id for instance in task.instances if instance.arguments[0] != '')
  if task.OUTPUT_TYPE != 'multiple_choice' or not choices:
    return None
  return sum(1 / n for n in choices.values()) / len(choices)


def chance_levels(loaded: dict[str, Any]) -> dict[str, float]:
  """{task or suite: chance} of what `Tasks.load` gave, after it was evaluated.  Free answers count 0 in a suite."""
  levels = {name: level for name, task in loaded['tasks'].items() if (level := chance(task)) is not None}
  for name, group in loaded.get('groups', {}).items():
    if isinstance(group, SuiteGroup):
      levels[name] = group.mean_over_members(lambda task: levels.get(task, 0.0))
  return levels


def rows(results: dict[str, Any], loaded: dict[str, Any]) -> list[dict[str, Any]]:
  """One row for each task, metric and filter: {task, suite, metric, filter, value, stderr, n, shots, version, chance}.

  task: the harness's name, without what a suite adds to it.  A suite's own scores have its name as task and as suite.
  chance is that of accuracies, else None.  What the harness cannot know (a standard error of one question) is None.
  """
  groups = {name: group for name, group in loaded.get('groups', {}).items() if isinstance(group, SuiteGroup)}
  suite_of = {task.task_name: name for name, group in groups.items() for task in group.get_all_tasks()}
  found = []
  for name, metrics in results['results'].items():
    for key, value in metrics.items():
      metric, _, chosen = key.partition(',')
      if not chosen or metric.endswith('_stderr') or not isinstance(value, int | float):
        continue
      error = metrics.get(f'{metric}_stderr,{chosen}')
      shots = chosen.removesuffix('-shot') if name in groups else str(results['n-shot'].get(name, ''))
      if name in suite_of:  # also where the example is part of the task's own prompt
        shots = name.rsplit('_', 1)[1].removesuffix('shot')
      found.append({
        'task': metrics.get('alias', name) if name in suite_of else name,
        'suite': name if name in groups else suite_of.get(name),
        'metric': metric, 'filter': chosen, 'value': _finite(value), 'stderr': _finite(error),
        'n': metrics.get('sample_len'), 'shots': shots, 'version': results['versions'].get(name),
        'chance': results['chance'].get(name) if metric in ('acc', 'acc_norm', 'score') else None})
  return found


def _finite(x: Any) -> float | None:
  return float(x) if isinstance(x, int | float) and math.isfinite(x) else None


def run_of(source: str) -> tuple[pathlib.Path, str] | None:
  """(WORKDIR, name) if a model is a stage of a run: name 'main', or 'round-1-reference' for round-1/reference."""
  stage = pathlib.Path(source).absolute()
  if not (stage / 'stage.json').is_file():
    return None
  for directory in stage.parents[:2]:
    if (directory / 'config.json').is_file() and 'method' in workdir.read_json(directory / 'config.json'):
      return directory, '-'.join(stage.relative_to(directory).parts)
  return None


def keep(results: dict[str, Any], loaded: dict[str, Any], directory: pathlib.Path, name: str) -> pathlib.Path:
  """Puts the rows into DIRECTORY/lm_eval/NAME.json, in place of those of the same task, metric and shots."""
  path = directory / 'lm_eval' / f'{name}.json'
  identity = lambda row: (row['suite'], row['task'], row['metric'], row['filter'], row['shots'])
  old = workdir.read_json(path)['rows'] if path.exists() else []
  config = results['config']
  new = [row | {'limit': config['limit'], 'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
                'harness': results.get('lm_eval_version'), 'model': config.get('model_identity')}
         for row in rows(results, loaded)]
  replaced = set(map(identity, new))
  workdir.write_json(path, {'stage': name, 'rows': [row for row in old if identity(row) not in replaced] + new})
  return path
