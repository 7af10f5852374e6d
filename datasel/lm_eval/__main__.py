"""`python -m datasel.lm_eval --model datasel --model_args pretrained=MODEL --tasks TASKS [lm-eval's own flags]`

lm-evaluation-harness with the model `datasel`, the suites regmix13, pds9, doremi5, prox10, anllm8 and tasks whose data
come from packages (`local`, `datasel_*`).  Its subcommands (run, ls, validate), models and tasks are all there.

With --output_path, or for a model that is a stage of a run, every answer is kept as it comes: the same command goes on
where it was killed.  What a stage of a run scores is kept in WORKDIR/lm_eval and shown in its report.
"""

import contextlib
import functools
import inspect
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
  """The command line; returns the exit status: 0, or 2 for what cannot be done."""
  try:
    import lm_eval.models  # noqa: F401  (before ours is registered: else the harness's own models are not)
    from lm_eval.__main__ import cli_evaluate

    import datasel.lm_eval.model  # noqa: F401  (registers the model)
  except ImportError as e:
    print(f"error: this needs lm-evaluation-harness ({e}); pip install 'datasel[eval]'", file=sys.stderr)
    return 2
  for noisy in ('httpx', 'jax', 'orbax', 'absl'):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  arguments, sys.argv = sys.argv, ['lm-eval', *argv]  # where the harness reads them
  try:
    with _extended():
      cli_evaluate()
  except (ValueError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  finally:
    sys.argv = arguments
  return 0


@contextlib.contextmanager
def _extended() -> Iterator[None]:
  """Inside, the harness's commands see our tasks, and what they find is kept.  It has no other door to come in by."""
  import lm_eval
  import lm_eval.tasks

  from datasel.lm_eval import suites
  tasks, evaluate = lm_eval.tasks.TaskManager, lm_eval.simple_evaluate
  lm_eval.tasks.TaskManager, lm_eval.simple_evaluate = suites.Tasks, _keeping(evaluate)
  try:
    yield
  finally:
    lm_eval.tasks.TaskManager, lm_eval.simple_evaluate = tasks, evaluate


def _keeping(evaluate: Callable) -> Callable:

  @functools.wraps(evaluate)
  def wrapped(*, model: str, model_args: dict, tasks: list, num_fewshot: int | None, evaluation_tracker: Any,
              task_manager: Any, **rest: Any) -> dict | None:
    from datasel.lm_eval import results, suites
    if num_fewshot is not None and (chosen := [name for name in tasks if name in suites.SUITES]):
      raise ValueError(f'--num_fewshot={num_fewshot}: {", ".join(chosen)} fix the number of examples themselves; leave '
                       'the flag out, or name single tasks')
    run = results.run_of(str(model_args.get('pretrained', ''))) if model == 'datasel' else None
    if model == 'datasel':
      _check_arguments(model_args)
      path = _answers_path(evaluation_tracker.output_path, run)
      model_args = ({'answers': str(path)} if path else {}) | model_args
    loaded = task_manager.load(tasks)  # fails before the model is read, where data cannot be had
    found = evaluate(model=model, model_args=model_args, tasks=_objects(loaded, tasks), num_fewshot=num_fewshot,
                     evaluation_tracker=evaluation_tracker, task_manager=task_manager, **rest)
    if found is None:  # the harness's word to all but the first of several processes
      return None
    found['chance'] = results.chance_levels(loaded)
    if found['chance']:
      print('chance: ' + ', '.join(f'{name} {level:.4f}' for name, level in found['chance'].items()))
    if run:
      print(f'results: {results.keep(found, loaded, *run)}')
      _rewrite_report(run[0])
    return found

  return wrapped


def _check_arguments(given: dict) -> None:
  """Raises ValueError for --model_args that our model does not take, before any data is read."""
  from datasel.lm_eval.model import DataselLM
  known = [name for name in inspect.signature(DataselLM).parameters if name not in ('batch_size', 'device')]
  if unknown := sorted(given.keys() - {*known, 'batch_size', 'device'}):
    raise ValueError(f'--model_args: {", ".join(unknown)} is no argument of the model datasel; known: '
                     f'{", ".join(known)}')
  if 'pretrained' not in given:
    raise ValueError('--model_args has no pretrained=MODEL; want a stage of a run (WORKDIR/main), a Hugging Face '
                     'folder or name, a .gguf file, or demo:smollm2')


def _objects(loaded: dict, names: list) -> list:
  """What was loaded under the names that were asked for: groups whole, and tasks that are in none of them."""
  inside = {task.task_name for group in loaded.get('groups', {}).values() for task in group.get_all_tasks()}
  nested = {name for group in loaded.get('groups', {}).values() for name in group.child_names}
  return ([group for name, group in loaded.get('groups', {}).items() if name not in nested]
          + [task for name, task in loaded['tasks'].items() if name not in inside])


def _answers_path(output: str | None, run: tuple[pathlib.Path, str] | None) -> pathlib.Path | None:
  if output:
    output = pathlib.Path(output)
    return (output.parent if output.suffix == '.json' else output) / 'answers.jsonl'
  return run[0] / 'lm_eval' / 'answers.jsonl' if run else None


def _rewrite_report(directory: pathlib.Path) -> None:
  if not (directory / 'summary.json').exists():
    return
  from datasel.methods.doremi import report as doremi
  from datasel.methods.pretrain import report as pretrain
  write = {'doremi': doremi.write_report, 'pretrain': pretrain.write_report}
  method = json.loads((directory / 'config.json').read_text())['method']
  if method in write:
    print(f'report:  {write[method](directory)}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
