"""Tasks of the harness whose data a package brings: they run without a hub."""

import re
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from datasel.data import demo_archives, questions


class LocalTask(ConfigurableTask):
  """A task whose documents are `questions.load(metadata['set'])`: split 'test', and 'shots' for few-shot prompts."""

  def __init__(self, config: dict[str, Any]):
    super().__init__(config={key: value for key, value in config.items() if key != 'class'})

  def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
    name = self.config.metadata['set']
    try:
      found, self.dropped = questions.load(name)
    except demo_archives.Unavailable as e:
      raise ValueError(f'task {self.config.task}: its data cannot be had: {e}') from e
    asked = [r['held_out'] if name == 'gsm8k' else n % questions.SHOTS > 0 for n, r in enumerate(found)]
    self.dataset = {
      'test': datasets.Dataset.from_list([r for r, is_asked in zip(found, asked) if is_asked]),
      'shots': datasets.Dataset.from_list([r for r, is_asked in zip(found, asked) if not is_asked])}

  def dump_config(self) -> dict:
    return super().dump_config() | {'records_dropped': self.dropped}


def configs() -> dict[str, dict]:
  """{task: its config}, 'datasel_SET'."""
  metric = lambda name: {'metric': name, 'aggregation': 'mean', 'higher_is_better': True}
  common = {'class': LocalTask, 'test_split': 'test', 'fewshot_split': 'shots', 'target_delimiter': ' '}
  chosen = {f'datasel_{name}': common | {
    'output_type': 'multiple_choice', 'doc_to_text': 'Question: {{question}}' + of_set.after,
    'doc_to_choice': 'choices', 'doc_to_target': 'gold', 'metric_list': [metric('acc'), metric('acc_norm')],
    'metadata': {'version': 1.0, 'set': name}} for name, of_set in questions.SETS.items()}
  written = {'datasel_gsm8k': common | {
    'output_type': 'generate_until', 'doc_to_text': 'Question: {{question}}\nAnswer:', 'doc_to_target': 'answer',
    'num_fewshot': 5, 'process_results': _gsm8k_results, 'metric_list': [metric('exact_match')],
    'generation_kwargs': {'until': ['Question:', '\n\n'], 'max_gen_toks': 256, 'do_sample': False},
    'metadata': {'version': 1.0, 'set': 'gsm8k'}}}
  return chosen | written


def _gsm8k_results(doc: dict, results: list[str]) -> dict[str, float]:
  """Whether the number after '####' is the right one."""
  return {'exact_match': float(_number(results[0]) == _number(doc['answer']))}


def _number(text: str) -> str | None:
  found = re.search(r'####\s*(-?[\d.,]*\d)', text)
  return found and found[1].replace(',', '')
