"""DoReMi's tasks and most of ProX's: the papers' code words them otherwise than the harness, or asks another split."""

import random
import re
import string
from typing import Any

import datasets

_MMLU_SUBJECTS = (
  'abstract_algebra', 'anatomy', 'astronomy', 'business_ethics', 'clinical_knowledge', 'college_biology',
  'college_chemistry', 'college_computer_science', 'college_mathematics', 'college_medicine', 'college_physics',
  'computer_security', 'conceptual_physics', 'econometrics', 'electrical_engineering', 'elementary_mathematics',
  'formal_logic', 'global_facts', 'high_school_biology', 'high_school_chemistry', 'high_school_computer_science',
  'high_school_european_history', 'high_school_geography', 'high_school_government_and_politics',
  'high_school_macroeconomics', 'high_school_mathematics', 'high_school_microeconomics', 'high_school_physics',
  'high_school_psychology', 'high_school_statistics', 'high_school_us_history', 'high_school_world_history',
  'human_aging', 'human_sexuality', 'international_law', 'jurisprudence', 'logical_fallacies', 'machine_learning',
  'management', 'marketing', 'medical_genetics', 'miscellaneous', 'moral_disputes', 'moral_scenarios', 'nutrition',
  'philosophy', 'prehistory', 'professional_accounting', 'professional_law', 'professional_medicine',
  'professional_psychology', 'public_relations', 'security_studies', 'sociology', 'us_foreign_policy', 'virology',
  'world_religions')
PROX_MMLU = tuple(f'prox_mmlu_{subject}' for subject in _MMLU_SUBJECTS)


def _metric(name: str) -> dict:
  return {'metric': name, 'aggregation': 'mean', 'higher_is_better': True}


def normalised(text: str) -> str:
  """DoReMi's comparison: lower case, without punctuation and outer spaces; articles stay."""
  return text.strip().lower().translate(str.maketrans('', '', string.punctuation))


def _exact_match(answers: Any) -> Any:
  """process_results: is the first line of what was generated one of answers(doc)?"""

  def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    line = results[0].strip().split('\n')[0]
    return {'exact_match': float(normalised(line) in map(normalised, answers(doc)))}

  return process_results


def with_shots_of_their_title(docs: datasets.Dataset) -> datasets.Dataset:
  """SQuAD: each question gets another one of its article as its one example (`shot_question`, `shot_answer`).

  The released code pairs the questions of a shuffled article front to back, which gives the middle one itself; here
  each gets the next one of the shuffled article.
  """
  by_title: dict[str, list[int]] = {}
  for n, title in enumerate(docs['title']):
    by_title.setdefault(title, []).append(n)
  shot_of = {}
  for title, members in by_title.items():
    if len(members) < 2:
      raise ValueError(f'SQuAD: the article {title!r} has one question only, so there is no example for it')
    random.Random(title).shuffle(members)
    shot_of |= dict(zip(members, members[1:] + members[:1]))
  questions, answers = list(docs['question']), [_squad_answers(doc) for doc in docs]
  return docs.add_column('shot_question', [questions[shot_of[n]] for n in range(len(docs))]).add_column(
    'shot_answer', [answers[shot_of[n]][0] for n in range(len(docs))])


def _squad_answers(doc: dict) -> list[str]:
  return list(doc['answers']['text']) or ['unanswerable']


_SQUAD_ANSWER = 'Answer (use Background or answer "unanswerable"):'


def doremi() -> dict[str, dict]:
  """One-shot, generative, exact match (DoReMi, section 3 and its released eval_datasets.py): greedy, 20 new tokens.

  The line is cut after stripping, so `until` stays empty: a newline that comes first ends nothing.
  """
  common = {'output_type': 'generate_until', 'metric_list': [_metric('exact_match')],
            'generation_kwargs': {'until': [], 'max_gen_toks': 20, 'do_sample': False}, 'metadata': {'version': 1.0}}
  listed = lambda key: {'doc_to_target': lambda doc: doc[key][0], 'process_results': _exact_match(lambda d: d[key])}
  aliases = lambda doc: doc['answer']['aliases']
  return {
    'doremi_triviaqa': common | {
      'dataset_path': 'mandarjoshi/trivia_qa', 'dataset_name': 'rc.nocontext', 'training_split': 'train',
      'validation_split': 'validation', 'doc_to_text': 'Question: {{question}}\nAnswer:',
      'doc_to_target': lambda doc: aliases(doc)[0], 'process_results': _exact_match(aliases)},
    'doremi_nq': common | {
      'dataset_path': 'lucadiliello/naturalquestionsshortqa', 'training_split': 'train',
      'validation_split': 'validation', 'doc_to_text': 'Q: {{question}}?\n\nA:', **listed('answers')},
    'doremi_webquestions': common | {
      'dataset_path': 'stanfordnlp/web_questions', 'training_split': 'train', 'test_split': 'test',
      'doc_to_text': 'Question: {{question}}\nAnswer:', **listed('answers')},
    'doremi_lambada': common | {
      'dataset_path': 'cimec/lambada', 'fewshot_split': 'validation', 'test_split': 'test',
      'description': 'Complete the following sentences.\n\n',
      'doc_to_text': "Input: {{text.split(' ')[:-1]|join(' ')}}\nOutput:",
      'doc_to_target': "{{text.split(' ')[-1]}}",
      'process_results': _exact_match(lambda doc: [doc['text'].split(' ')[-1]])},
    'doremi_squadv2': common | {
      'dataset_path': 'rajpurkar/squad_v2', 'validation_split': 'validation',
      'process_docs': with_shots_of_their_title, 'num_fewshot': 0,  # the one example is in the prompt
      'doc_to_text': f'Title: {{{{title}}}}\n\nBackground: {{{{context}}}}\n\nQuestion: {{{{shot_question}}}}\n\n'
                     f'{_SQUAD_ANSWER} {{{{shot_answer}}}}\n\nQuestion: {{{{question}}}}\n\n{_SQUAD_ANSWER}',
      'doc_to_target': lambda doc: _squad_answers(doc)[0], 'process_results': _exact_match(_squad_answers)},
  }


def prox() -> dict[str, dict]:
  """Of ProX's ten, those whose prompts or splits in its lighteval tasks are not the harness's own: answers are always
  spelt out, never letters, and OpenBookQA is asked on its validation split, lighteval's default."""
  common = {'output_type': 'multiple_choice', 'metric_list': [_metric('acc'), _metric('acc_norm')],
            'metadata': {'version': 1.0}}
  mmlu = {f'prox_mmlu_{subject}': common | {
    'dataset_path': 'cais/mmlu', 'dataset_name': subject, 'test_split': 'test', 'fewshot_split': 'dev',
    'doc_to_text': f'The following are questions about {subject.replace("_", " ")}.\nQuestion: {{{{question}}}}\n'
                   'Answer:', 'doc_to_choice': 'choices', 'doc_to_target': 'answer'} for subject in _MMLU_SUBJECTS}
  return mmlu | {
    'prox_commonsense_qa': common | {
      'dataset_path': 'tau/commonsense_qa', 'training_split': 'train', 'validation_split': 'validation',
      'doc_to_text': '{{question}}', 'doc_to_choice': '{{choices.text}}',
      'doc_to_target': "{{choices.label.index(answerKey.strip())}}"},
    'prox_openbookqa': common | {
      'dataset_path': 'allenai/openbookqa', 'dataset_name': 'main', 'training_split': 'train',
      'validation_split': 'validation', 'doc_to_text': '{{question_stem}}', 'doc_to_choice': '{{choices.text}}',
      'doc_to_target': '{{choices.label.index(answerKey.strip())}}'},
    'prox_sciq': common | {
      'dataset_path': 'allenai/sciq', 'training_split': 'train', 'test_split': 'test',
      # Of some questions the support is empty: theirs begin without a blank line.
      'doc_to_text': "{{(support ~ '\nQuestion: ' ~ question ~ '\nAnswer:').strip()}}",
      'doc_to_choice': '{{[distractor1, distractor2, distractor3, correct_answer]}}', 'doc_to_target': 3},
    'prox_siqa': common | {
      'dataset_path': 'lighteval/siqa', 'training_split': 'train', 'validation_split': 'validation',
      'doc_to_text': '{{context}} {{question}}', 'doc_to_choice': '{{[answerA, answerB, answerC]}}',
      'doc_to_target': '{{(label|int) - 1}}'},
    'prox_hellaswag': common | {
      'dataset_path': 'Rowan/hellaswag', 'training_split': 'train', 'validation_split': 'validation',
      'doc_to_text': _hellaswag_prompt, 'doc_to_choice': lambda doc: [_unbracketed(e) for e in doc['endings']],
      'doc_to_target': '{{label|int}}'},
    'prox_winogrande': common | {
      'dataset_path': 'allenai/winogrande', 'dataset_name': 'winogrande_xl', 'training_split': 'train',
      'validation_split': 'validation', 'target_delimiter': '',
      'doc_to_text': "{{sentence.split('_')[0]}}",
      'doc_to_choice': "{{[option1 + ' ' + sentence.split('_')[1].strip(), "
                       "option2 + ' ' + sentence.split('_')[1].strip()]}}",
      'doc_to_target': '{{(answer|int) - 1}}'},
  }


def _unbracketed(text: str) -> str:
  """HellaSwag's texts without the marks of WikiHow."""
  return re.sub(r'\[.*?\]', '', text.replace(' [title]', '. ')).replace('  ', ' ')


def _hellaswag_prompt(doc: dict) -> str:
  return _unbracketed(f'{doc["activity_label"]}: {doc["ctx_a"]} {doc["ctx_b"].capitalize()} ')
