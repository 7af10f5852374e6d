"""The papers' evaluation suites as groups of the harness, and the index of tasks that has them.

A suite's score is a plain mean over its tasks, which no group of the harness can say: some tasks report acc_norm and
some do not, and a suite may be asked with several numbers of examples in the prompt.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from datasel.data import questions
from datasel.lm_eval import local_tasks, paper_tasks


@dataclasses.dataclass(frozen=True)
class Suite:
  """members: {name: its tasks of the harness or of this folder}; several tasks count as their plain mean.

  shots: numbers of examples in the prompt, each a run of every task.  metrics: a task's score is the first that it
  reports.  over_shots: the suite's score is the mean over shots; else each number of shots has a score of its own.
  """
  title: str
  members: dict[str, tuple[str, ...]]
  shots: tuple[int, ...] = (0,)
  metrics: tuple[str, ...] = ('acc_norm', 'acc')
  over_shots: bool = False


def _same(*names: str) -> dict[str, tuple[str, ...]]:
  return {name: (name,) for name in names}


SUITES = {
  'regmix13': Suite(
    'RegMix (Liu et al. 2025): 13 tasks, mean over 0 to 5 shots', _same(
      'social_iqa', 'hellaswag', 'piqa', 'openbookqa', 'lambada_standard', 'sciq', 'arc_easy', 'copa', 'race', 'logiqa',
      'qqp', 'winogrande', 'multirc'), shots=(0, 1, 2, 3, 4, 5), over_shots=True),
  'pds9': Suite(
    'PDS (Gu et al. 2025): 9 tasks, 0 shots', _same(
      'hellaswag', 'sciq', 'arc_easy', 'arc_challenge', 'boolq', 'openbookqa', 'piqa', 'winogrande', 'lambada_openai')),
  'doremi5': Suite(
    'DoReMi (Xie et al. 2023): 5 generative tasks, exact match, 1 shot',
    {name.removeprefix('doremi_'): (name,) for name in paper_tasks.doremi()}, shots=(1,), metrics=('exact_match',)),
  'prox10': Suite(
    'ProX (Zhou et al. 2024): 10 tasks, 0 shots, acc_norm, MMLU as one task', {
      **_same('arc_challenge', 'arc_easy', 'piqa'),
      **{name: (f'prox_{name}',) for name in ('commonsense_qa', 'hellaswag', 'openbookqa', 'sciq', 'siqa',
                                              'winogrande')},
      'mmlu': paper_tasks.PROX_MMLU}),
  'anllm8': Suite(
    'AnLLM (Pang et al. 2024): 8 tasks, accuracy, 0 and 5 shots', _same(
      'openbookqa', 'winogrande', 'arc_easy', 'arc_challenge', 'piqa', 'hellaswag', 'sciq', 'boolq'), shots=(0, 5),
    metrics=('acc',)),
  'local': Suite(
    'Sets that packages bring: 0 shots, acc_norm', {name: (f'datasel_{name}',) for name in questions.SETS}),
}


def task_name(suite: str, task: str, shots: int) -> str:
  """A suite's task is one of its own, so that suites that share a task may be run together."""
  return f'{suite}_{task}_{shots}shot'


@dataclasses.dataclass
class SuiteGroup(Group):
  """A group that aggregates as its suite does: 'score,N-shot', and 'score,mean' over the numbers of shots."""

  @property
  def suite(self) -> Suite:
    return SUITES[self.name]

  @property
  def has_aggregation(self) -> bool:
    return True

  def aggregate(self, task_metrics: dict[str, dict]) -> dict[str, Any]:
    """The suite's scores and their standard errors.

    The errors take tasks for independent, and the shots of one task, which share its questions, for fully correlated:
    that of a mean over shots is an upper bound.
    """
    found = {'alias': self.name, 'name': self.name,
             'sample_len': sum(task_metrics[task.task_name].get('sample_len', 0) for task in self.get_all_tasks())}
    of_task = {task.task_name: score(task_metrics[task.task_name], self.suite.metrics) for task in self.get_all_tasks()}
    value, error = (lambda name: of_task[name][1]), (lambda name: of_task[name][2])
    for shots in self.suite.shots:
      found[f'score,{shots}-shot'] = self.mean_over_members(value, (shots,))
      found[f'score_stderr,{shots}-shot'] = self._error(error, (shots,))
    if self.suite.over_shots:
      found['score,mean'], found['score_stderr,mean'] = self.mean_over_members(value), self._error(error)
    return found

  def mean_over_members(self, value: Callable[[str], float], shots: tuple[int, ...] | None = None) -> float:
    """The mean of value(task) over members, each the mean over its tasks and over `shots` (default: the suite's)."""
    return _mean(_mean(value(task_name(self.name, task, n)) for task in tasks for n in shots or self.suite.shots)
                 for tasks in self.suite.members.values())

  def _error(self, error: Callable[[str], float], shots: tuple[int, ...] | None = None) -> float | str:
    """'N/A', the harness's word, where one is not known."""
    of_members = [_error_of_mean([_mean(error(task_name(self.name, task, n)) for n in shots or self.suite.shots)
                                  for task in tasks]) for tasks in self.suite.members.values()]
    whole = _error_of_mean(of_members)
    return 'N/A' if math.isnan(whole) else whole


def score(metrics: dict[str, Any], wanted: tuple[str, ...]) -> tuple[str, float, float]:
  """(metric, value, standard error or NaN) of the first of `wanted` that a task's results have, under any filter."""
  for metric in wanted:
    for key, value in metrics.items():
      name, _, chosen = key.partition(',')
      if name == metric:
        error = metrics.get(f'{metric}_stderr,{chosen}')
        return metric, float(value), float(error) if isinstance(error, int | float) else math.nan
  raise ValueError(f'{metrics.get("name")} reports none of {wanted}: {sorted(metrics)}')


def _mean(values: Iterable[float]) -> float:
  values = list(values)
  return sum(values) / len(values)


def _error_of_mean(errors: list[float]) -> float:
  return math.sqrt(sum(error**2 for error in errors)) / len(errors)


class Tasks(TaskManager):
  """The harness's index of tasks with the suites and tasks of this folder; data that cannot be had are named."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    ours = {name: Entry(name, Kind.PY_TASK if 'class' in config else Kind.TASK, None, {'task': name} | config)
            for configs in (local_tasks.configs(), paper_tasks.doremi(), paper_tasks.prox())
            for name, config in configs.items()}
    ours |= {name: Entry(name, Kind.GROUP, None, {'group': name}) for name in SUITES}
    if taken := sorted(ours.keys() & self._index.keys()):
      raise ValueError(f'--include_path: {taken} are names of tasks of datasel; rename yours')
    self._index |= ours
    self._all_tasks = sorted(self._index)
    self._all_subtasks = sorted(n for n, e in self._index.items() if e.kind in (Kind.TASK, Kind.PY_TASK))
    self._all_groups = sorted(n for n, e in self._index.items() if e.kind == Kind.GROUP)

  def _load_spec(self, spec: str | dict[str, Any]) -> Task | Group | list[Task]:
    if isinstance(spec, str) and spec in SUITES:
      return self._suite(spec)
    with _naming_data(spec, self._index):
      return super()._load_spec(spec)

  def _suite(self, name: str) -> SuiteGroup:
    suite = SUITES[name]
    group = SuiteGroup(name, alias=name, metadata={'version': 1.0})
    for shots in suite.shots:
      for member, tasks in suite.members.items():
        for task in tasks:
          # A prompt that has its one example in it (num_fewshot 0 in its config) gets no others.
          fixed = (self._index[task].cfg or {}).get('num_fewshot')
          with _naming_data(task, self._index):
            group.add(self._factory.build(self._index[task], registry=self._index, overrides={
              'task': task_name(name, task, shots), 'task_alias': member if len(tasks) == 1 else task,
              'num_fewshot': 0 if fixed == 0 else shots}))
    return group


@contextlib.contextmanager
def _naming_data(spec: str | dict[str, Any], index: dict[str, Entry]) -> Iterator[None]:
  try:
    yield
  except OSError as e:  # no network, offline mode, or no such data set: all are kinds of it
    entry = index.get(spec) if isinstance(spec, str) else None
    config = (entry.cfg if entry else spec if isinstance(spec, dict) else None) or {}
    data = ' '.join(config[key] for key in ('dataset_path', 'dataset_name') if config.get(key)) or 'of its own'
    raise ValueError(
      f'task {config.get("task", spec)} needs the data set {data} from the Hugging Face hub, which cannot be had here '
      f'({type(e).__name__}: {str(e).splitlines()[0] if str(e) else "no reason given"}); run where the hub can be '
      'reached, or fetch the data set there and bring its cache (HF_HOME); without a hub: --tasks local') from e
