"""Laws of the suites and tasks for lm-evaluation-harness, of its command, and of what a run's report shows of them."""

import collections
import functools
import json
import math
import os
import re
import string

import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'

import datasets  # noqa: E402
import lm_eval_test  # noqa: E402
import small_run  # noqa: E402
from lm_eval import evaluator  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import manager  # noqa: E402
from lm_eval.tasks._index import TaskIndex  # noqa: E402

from datasel import main as datasel_main  # noqa: E402
from datasel import workdir  # noqa: E402
from datasel.data import questions  # noqa: E402
from datasel.lm_eval import __main__ as command  # noqa: E402
from datasel.lm_eval import paper_tasks, results, suites  # noqa: E402
from datasel.report import lm_eval as report  # noqa: E402
from datasel.report.sections import Artefacts  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')

WORDS = ['ash', 'birch tree', 'cedar', 'a dogwood', 'elm', 'fir of the north', 'gum', 'hazel']


def record(dataset, n):
  """A record in the published form of a data set."""
  word, others = WORDS[n % 8], [WORDS[(n + k) % 8] for k in range(1, 4)]
  options = [word, *others]
  lettered = {'text': options, 'label': list('ABCD')}
  return {
    'Rowan/hellaswag': {'ctx_a': f'He [x] planted {n}.', 'ctx_b': 'the TREE', 'endings': options, 'label': str(n % 4),
                        'activity_label': 'Gardens [title]'},
    'allenai/sciq': {'support': f' About {n}.' if n else '', 'question': 'What?', 'correct_answer': word,
                     'distractor1': others[0], 'distractor2': others[1], 'distractor3': others[2]},
    'allenai/ai2_arc': {'question': f'Which {n}?', 'choices': lettered, 'answerKey': 'ABCD'[n % 4]},
    'aps/super_glue': {
      'passage': f'P{n}', 'question': 'is it', 'label': n % 2, 'premise': f'It fell {n}.', 'choice1': 'It was old.',
      'choice2': 'It sang.', 'paragraph': f'P{n}', 'answer': word, 'idx': n},
    'allenai/openbookqa': {'question_stem': f'Trees {n}', 'choices': lettered, 'answerKey': 'ABCD'[n % 4]},
    'baber/piqa': {'goal': f'To plant {n}', 'sol1': word, 'sol2': others[0], 'label': n % 2},
    'allenai/winogrande': {'sentence': f'The {n} fell on the _ and broke it.', 'option1': word, 'option2': others[0],
                           'answer': str(n % 2 + 1)},
    'EleutherAI/lambada_openai': {'text': f'They sat number {n} under the {word}'},
    'cimec/lambada': {'text': f'they sat number {n} under the {word}', 'domain': 'x'},
    'lighteval/siqa': {'context': f'Alex {n} sat.', 'question': 'Why?', 'answerA': word, 'answerB': others[0],
                       'answerC': others[1], 'label': str(n % 3 + 1)},
    'EleutherAI/logiqa': {'context': f'C{n}', 'question': 'Q', 'options': options, 'label': 'abcd'[n % 4]},
    'EleutherAI/race': {'article': f'Article {n}', 'problems': str([
      {'question': 'Which is it?', 'options': options, 'answer': 'ABCD'[n % 4]}])},
    'nyu-mll/glue': {'question1': f'A{n}?', 'question2': 'B?', 'label': n % 2, 'idx': n},
    'cais/mmlu': {'question': f'Q{n}?', 'choices': options, 'answer': n % 4, 'subject': 'x'},
    'tau/commonsense_qa': {'question': f'Where {n}?', 'choices': lettered, 'answerKey': 'ABCD'[n % 4]},
    'mandarjoshi/trivia_qa': {'question': f'Who {n}?', 'answer': {'aliases': [word, others[0]]}},
    'lucadiliello/naturalquestionsshortqa': {'question': f'when {n}', 'answers': [word, others[0]]},
    'stanfordnlp/web_questions': {'question': f'where {n}?', 'answers': [word], 'url': ''},
    'rajpurkar/squad_v2': {'id': str(n), 'title': f'T{n % 2}', 'context': f'C{n}', 'question': f'Q{n}?',
                           'answers': {'text': [word] if n % 3 else [], 'answer_start': [0] if n % 3 else []}},
  }[dataset]


@pytest.fixture(scope='module', autouse=True)
def index():
  """The harness reads its 15,000 task files once, not for every command."""
  with pytest.MonkeyPatch.context() as patch:
    build = functools.cache(lambda paths: TaskIndex.build(paths))
    patch.setattr(manager, 'TaskIndex', type('Once', (TaskIndex,), {
      'build': staticmethod(lambda paths: dict(build(tuple(paths))))}))
    yield


@pytest.fixture
def asked(monkeypatch):
  """{data set: the configurations that were asked for}, while the hub is these records."""
  found = collections.defaultdict(set)

  def load_dataset(path, name=None, **_):
    found[path].add(name)
    rows = [record(path, n) for n in range(9)]
    if path == 'aps/super_glue' and name == 'copa':
      rows = [row | {'question': 'cause'} for row in rows]
    told = lambda row, split: row | {key: f'{row[key]} of {split}' for key in row if key == 'question_stem'}
    return {split: datasets.Dataset.from_list([told(row, split) for row in rows])
            for split in ('train', 'validation', 'test', 'dev')}

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  return found


@pytest.fixture
def tasks(asked):
  return suites.Tasks()


class Guesser(LM):
  """Scores by a hash of the continuation, generates `text`; keeps what it is asked."""

  def __init__(self, text=''):
    super().__init__()
    self.text, self.asked = text, []

  def loglikelihood(self, requests):
    self.asked += [request.args for request in requests]
    return [(-float(int(workdir.digest(list(r.args))[:6], 16)) / 1e6, False) for r in requests]

  def loglikelihood_rolling(self, requests):
    raise NotImplementedError

  def generate_until(self, requests):
    self.asked += [request.args for request in requests]
    return [self.text for _ in requests]


def evaluated(tasks, name, model):
  loaded = tasks.load([name])
  groups = [group for group in loaded['groups'].values()]
  found = evaluator.simple_evaluate(model, tasks=groups, task_manager=tasks, limit=6, bootstrap_iters=10)
  return found | {'chance': results.chance_levels(loaded)}, loaded


# What the papers list, written out once more: name in the harness -> the metric that counts.
PUBLISHED = {
  'pds9': {'hellaswag': 'acc_norm', 'sciq': 'acc_norm', 'arc_easy': 'acc_norm', 'arc_challenge': 'acc_norm',
           'boolq': 'acc', 'openbookqa': 'acc_norm', 'piqa': 'acc_norm', 'winogrande': 'acc', 'lambada_openai': 'acc'},
  'regmix13': {'social_iqa': 'acc', 'hellaswag': 'acc_norm', 'piqa': 'acc_norm', 'openbookqa': 'acc_norm',
               'lambada_standard': 'acc', 'sciq': 'acc_norm', 'arc_easy': 'acc_norm', 'copa': 'acc', 'race': 'acc',
               'logiqa': 'acc_norm', 'qqp': 'acc', 'winogrande': 'acc', 'multirc': 'acc'},
  'anllm8': dict.fromkeys(('openbookqa', 'winogrande', 'arc_easy', 'arc_challenge', 'piqa', 'hellaswag', 'sciq',
                           'boolq'), 'acc'),
}
SHOTS = {'pds9': [0], 'regmix13': [0, 1, 2, 3, 4, 5], 'anllm8': [0, 5]}


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_a_suite_is_the_plain_mean_of_its_papers_tasks(tasks, name):
  found, _ = evaluated(tasks, name, Guesser())
  value = lambda task, shots: found['results'][f'{name}_{task}_{shots}shot'][f'{PUBLISHED[name][task]},none']
  each = {shots: np.mean([value(task, shots) for task in PUBLISHED[name]]) for shots in SHOTS[name]}
  assert len(found['n-shot'].keys() - {name}) == len(PUBLISHED[name]) * len(SHOTS[name])
  assert all(found['n-shot'][f'{name}_{task}_{n}shot'] == n for task in PUBLISHED[name] for n in SHOTS[name])
  for shots, mean in each.items():
    np.testing.assert_allclose(found['groups'][name][f'score,{shots}-shot'], mean)
  if name == 'regmix13':
    np.testing.assert_allclose(found['groups'][name]['score,mean'], np.mean(list(each.values())))
  else:
    assert 'score,mean' not in found['groups'][name]


def test_prox_counts_mmlu_as_one_task_and_spells_answers_out(tasks, asked):
  model = Guesser()
  found, _ = evaluated(tasks, 'prox10', model)
  value = lambda task: found['results'][f'prox10_{task}_0shot']['acc_norm,none']
  mmlu = [value(name) for name in paper_tasks.PROX_MMLU]
  nine = [value(name) for name in ('arc_challenge', 'arc_easy', 'piqa', 'prox_commonsense_qa', 'prox_hellaswag',
                                   'prox_openbookqa', 'prox_sciq', 'prox_siqa', 'prox_winogrande')]
  assert len(mmlu) == 57 and len(asked['cais/mmlu']) == 57 and None not in asked['cais/mmlu']
  np.testing.assert_allclose(found['groups']['prox10']['score,0-shot'], np.mean([np.mean(mmlu), *nine]))
  for pair in [('Where 1?', ' birch tree'), ('Alex 1 sat. Why?', ' a dogwood'),
               ('Gardens. : He planted 1. The tree ', ' birch tree'),
               ('The 1 fell on the ', 'birch tree and broke it.'), ('Trees 1 of validation', ' birch tree'),
               ('Question: What?\nAnswer:', ' ash'), ('About 1.\nQuestion: What?\nAnswer:', ' birch tree'),
               ('The following are questions about high school physics.\nQuestion: Q1?\nAnswer:', ' birch tree')]:
    assert pair in model.asked, pair


@pytest.mark.parametrize('task, prompt', [
  ('triviaqa', r'Question: Who \d\?\nAnswer: (\w|\s)+\n\nQuestion: Who 1\?\nAnswer:'),
  ('nq', r'Q: when \d\?\n\nA: (\w|\s)+\n\nQ: when 1\?\n\nA:'),
  ('webquestions', r'Question: where \d\?\nAnswer: (\w|\s)+\n\nQuestion: where 1\?\nAnswer:'),
  ('lambada', r'Complete the following sentences\.\n\nInput: they sat number \d under the( \w+)*\nOutput: \w+\n\n'
              r'Input: they sat number 1 under the birch\nOutput:'),
  ('squadv2', r'Title: T1\n\nBackground: C1\n\nQuestion: Q[357]\?\n\nAnswer \(use Background or answer '
              r'"unanswerable"\): (\w|\s)+\n\nQuestion: Q1\?\n\nAnswer \(use Background or answer "unanswerable"\):')])
def test_doremi_asks_as_its_code_does(tasks, task, prompt):
  model = Guesser()
  name = f'doremi_{task}'
  group = tasks.load(['doremi5'])['groups']['doremi5']
  own = [t for t in group.get_all_tasks() if t.task_name == f'doremi5_{name}_1shot']
  evaluator.simple_evaluate(model, tasks=own, task_manager=tasks, limit=6, bootstrap_iters=0)
  prompts = [context for context, _ in model.asked]
  assert [p for p in prompts if re.fullmatch(prompt, p)], prompts[1]
  assert all(given['max_gen_toks'] == 20 and not given['until'] and not given['do_sample'] for _, given in model.asked)


@pytest.mark.parametrize('text, right', [
  (' Birch, TREE.\nQuestion', True), ('\n\nbirch tree', True), ('cedar', True), ('the birch tree', False), ('', False)])
def test_doremi_compares_as_its_code_does(text, right):
  """By the rule of section 3: strip, cut at the newline, lower case, no punctuation; articles stay; any alias does."""
  answer = text.strip().lower().split('\n')[0].strip().translate(str.maketrans('', '', string.punctuation))
  assert (answer in ('birch tree', 'cedar')) == right
  found = paper_tasks.doremi()['doremi_triviaqa']['process_results'](record('mandarjoshi/trivia_qa', 1), [text])
  assert found == {'exact_match': float(right)}


def test_an_unanswerable_question_wants_that_word():
  judge = paper_tasks.doremi()['doremi_squadv2']['process_results']
  assert judge(record('rajpurkar/squad_v2', 3), ['Unanswerable.'])['exact_match'] == 1
  assert judge(record('rajpurkar/squad_v2', 4), ['unanswerable'])['exact_match'] == 0


def test_no_squad_question_is_its_own_example():
  docs = datasets.Dataset.from_list([record('rajpurkar/squad_v2', n) for n in range(9)])
  shown = paper_tasks.with_shots_of_their_title(docs)
  for n, doc in enumerate(shown):
    other = int(doc['shot_question'][1:-1])
    assert other != n and other % 2 == n % 2  # another question of the same title
    assert doc['shot_answer'] == (docs[other]['answers']['text'] or ['unanswerable'])[0]
  with pytest.raises(ValueError, match="'T1' has one question"):
    paper_tasks.with_shots_of_their_title(docs.select([0, 1, 2]))


def test_chance_is_that_of_guessing(tasks):
  found, _ = evaluated(tasks, 'pds9', Guesser())
  levels = {'hellaswag': 1 / 4, 'sciq': 1 / 4, 'arc_easy': 1 / 4, 'arc_challenge': 1 / 4, 'boolq': 1 / 2,
            'openbookqa': 1 / 4, 'piqa': 1 / 2, 'winogrande': 1 / 2}
  assert found['chance'] == {f'pds9_{name}_0shot': level for name, level in levels.items()} | {
    'pds9': pytest.approx(sum(levels.values()) / 9)}


def test_the_error_of_a_suite_follows_from_its_tasks():
  """Two tasks of known errors: independent between tasks, and the larger bound over the shots of one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(suites.SUITES, 'two', suites.Suite('', {'a': ('a',), 'b': ('b',)}, shots=(0, 1), over_shots=True))
    group = suites.SuiteGroup('two')
    metrics = {f'two_{task}_{n}shot': {'acc,none': 0.5, 'acc_stderr,none': error}
               for task, errors in (('a', (0.3, 0.5)), ('b', (0.3, 0.3))) for n, error in enumerate(errors)}
    patch.setattr(group, 'get_all_tasks', lambda: [type('T', (), {'task_name': name}) for name in metrics])
    found = group.aggregate(metrics)
  assert found['score_stderr,0-shot'] == pytest.approx(math.hypot(0.3, 0.3) / 2)
  assert found['score_stderr,mean'] == pytest.approx(math.hypot(0.4, 0.3) / 2)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run of 6 steps."""
  folder = tmp_path_factory.mktemp('run')
  config = small_run.write_config(folder / 'config.py', small_run.make_store(folder))
  assert datasel_main.main([f'--config={config}', f'--workdir={folder / "run"}']) == 0
  return folder / 'run'


def samples(folder):
  """{(task, question): (which answer was likeliest, log-likelihoods)} of --log_samples."""
  found = {}
  for path in folder.rglob('samples_*.jsonl'):
    for line in path.read_text().splitlines():
      sample = json.loads(line)
      scores = [float(response[0][0]) for response in sample['resps']]
      found[path.name.rsplit('_2', 1)[0], sample['doc_id']] = int(np.argmax(scores)), scores
  return found


@pytest.mark.needs_demo_data
def test_the_command_gives_what_hf_gives(tmp_path, capsys):
  """Both models by one command, on the tasks that need no hub: same predictions, scores equal to 1e-4."""
  folder = lm_eval_test.llama(tmp_path, bos=False)
  common = ['--tasks', 'datasel_quartz,datasel_cissp', '--num_fewshot', '1', '--limit', '8', '--batch_size', '8',
            '--log_samples']
  argument = f'pretrained={folder},dtype=float32,max_length=512'
  assert command.main(['run', '--model', 'hf', '--device', 'cpu', '--model_args', argument, *common,
                       '--output_path', str(tmp_path / 'hf')]) == 0
  assert command.main(['--model', 'datasel', '--model_args', argument, *common, '--output_path',
                       str(tmp_path / 'ours')]) == 0
  wanted, found = samples(tmp_path / 'hf'), samples(tmp_path / 'ours')
  assert wanted.keys() == found.keys() and len(found) == 16
  for key, (choice, scores) in wanted.items():
    assert found[key][0] == choice
    np.testing.assert_allclose(found[key][1], scores, rtol=1e-5, atol=1e-4)
  tables = [[line for line in part.splitlines() if line.startswith('|')]
            for part in re.split(r'^datasel \(', capsys.readouterr().out, flags=re.MULTILINE)]
  assert tables[0] == tables[1] and len(tables[0]) > 4
  assert 'chance' in json.loads(next((tmp_path / 'ours').rglob('results_*.json')).read_text())


@pytest.mark.needs_demo_data
def test_a_run_keeps_its_scores_and_shows_them(run, capsys):
  arguments = ['--model', 'datasel', '--model_args', f'pretrained={run / "main"},max_length=256', '--tasks']
  assert command.main([*arguments, 'local', '--limit', '4', '--batch_size', 'auto']) == 0
  printed = capsys.readouterr().out
  rows = workdir.read_json(run / 'lm_eval' / 'main.json')['rows']
  of = lambda task, metric: next(row for row in rows if (row['task'], row['metric']) == (task, metric))
  mean = np.mean([of(name, 'acc_norm')['value'] for name in questions.SETS])
  score = of('local', 'score')
  np.testing.assert_allclose(score['value'], mean)
  assert (of('quartz', 'acc')['chance'], of('quartz', 'acc')['n'], of('quartz', 'acc')['shots']) == (0.5, 4, '0')
  assert f'local {score["chance"]:.4f}' in printed
  html = (run / 'report.html').read_text()
  assert f'local {100 * score["value"]:.1f}' in html and 'first 4 questions only' in html
  # The same command computes nothing again; another task is added to the rows.
  kept = (run / 'lm_eval' / 'answers.jsonl').read_bytes()
  assert command.main([*arguments, 'datasel_quartz', '--limit', '4', '--batch_size', 'auto']) == 0
  assert (run / 'lm_eval' / 'answers.jsonl').read_bytes() == kept
  again = workdir.read_json(run / 'lm_eval' / 'main.json')['rows']
  assert again[:len(rows)] == rows and [row['task'] for row in again[len(rows):]] == ['datasel_quartz'] * 2


def test_the_harness_keeps_its_own(capsys):
  assert command.main(['validate', '--tasks', 'hellaswag,regmix13,datasel_quartz']) == 0
  assert 'All tasks found' in capsys.readouterr().out
  from lm_eval.api.registry import MODEL_REGISTRY
  assert {'hf', 'vllm', 'dummy', 'datasel'} <= set(MODEL_REGISTRY)


@pytest.mark.parametrize('arguments, message', [
  (['--tasks', 'pds9'], 'task hellaswag needs the data set Rowan/hellaswag from the Hugging Face hub'),
  (['--tasks', 'local', '--num_fewshot', '3'], 'local fix the number of examples themselves'),
  (['--tasks', 'no_such_task'], 'Tasks not found: no_such_task')])
def test_what_cannot_be_done_is_said_before_the_model_is_read(arguments, message, capsys):
  assert command.main(['run', '--model', 'datasel', '--model_args', 'pretrained=/nowhere', *arguments]) == 2
  assert message in capsys.readouterr().err


def test_a_report_shows_every_metric_with_its_error(tmp_path):
  row = {'task': 'hellaswag', 'suite': 'regmix13', 'metric': 'acc_norm', 'filter': 'none', 'value': 0.31,
         'stderr': 0.02, 'n': 100, 'shots': '0', 'version': 1.0, 'chance': 0.25, 'limit': None}
  rows = [row, row | {'shots': '1', 'value': 0.35}, row | {'metric': 'acc', 'value': 0.28},
          row | {'task': 'regmix13', 'metric': 'score', 'filter': 'mean', 'shots': 'mean', 'value': 0.33,
                 'stderr': None, 'chance': None}]
  for stage in ('main-baseline', 'main-tuned'):
    workdir.write_json(tmp_path / 'lm_eval' / f'{stage}.json', {'stage': stage, 'rows': rows})
  ((heading, html),) = report.sections(Artefacts(tmp_path))
  assert heading == 'Tasks' and 'main-baseline blue, main-tuned orange' in html
  assert 'main-tuned: hellaswag 33.0, regmix13 33.0' in html  # drawn: the mean over shots of the main metric
  for cell in ('0.3100', '0.3500', '0.2800', '0.0200', '0.2500'):
    assert html.count(f'<td>{cell}</td>') >= 2
  assert report.sections(Artefacts(tmp_path / 'another')) == []
