"""ProX through the command line on a small noisy corpus: what it leaves, again and after a stop, to the bit."""

import json
import pydoc_data.topics

import pytest
import small_run

from datasel import config as config_lib
from datasel import main, metrics, workdir
from datasel.data import corpus as corpora
from datasel.methods.prox import audit, examples, lines, refine, rule_refiner, run
from datasel.models.mistral import Mistral

pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

CONFIG = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('prox')
  config.prox = config_lib.prox()
  config = config_lib.finish(config, 'smoke').copy_and_resolve_references()
  with config.unlocked():
    config.data.demo, config.data.store = '', {store!r}
    config.data.length = {length}
    for model in (config.model, config.prox.model):
      model.vocab_size, model.n_layers, model.d_model, model.d_ff = {vocab}, 1, 16, 32
    config.train.steps, config.train.eval_sequences = 4, 4
    config.prox.corpus, config.prox.examples = {corpus!r}, 'rules:boilerplate+gopher'
    config.prox.steps, config.prox.documents, config.prox.target = 4, 60, 'pydocs'
    config.prox.rules = 'boilerplate,gopher'
    for task in (config.prox.document, config.prox.chunk):
      task.length, task.max_new_tokens = 192, 40
  return config.lock()
'''
MENU = ['Home', 'Products', 'About us', 'Contact']


def write_corpus(folder):
  """Paragraphs of Python's help, every other one below a menu; each row says which of its lines are text."""
  paragraphs = [part.strip() for _, text in sorted(pydoc_data.topics.topics.items()) for part in text.split('\n\n')]
  long = [part for part in paragraphs if 200 < len(part) < 600][:240]
  (folder / 'train').mkdir(parents=True)
  with open(folder / 'train' / 'pages.jsonl', 'w') as f:
    for n, part in enumerate(long):
      noise = MENU if n % 2 else []
      kept = '0' * len(noise) + '1' * (part.count('\n') + 1)
      f.write(json.dumps({'id': f'p{n}', 'text': '\n'.join([*noise, part]), 'kept': kept}) + '\n')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,pages,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('prox')
  store = small_run.make_store(folder)
  write_corpus(folder / 'pages')
  (folder / 'config.py').write_text(CONFIG.format(store=str(store), length=small_run.LENGTH, vocab=small_run.VOCAB,
                                                  corpus=str(folder / 'pages')))
  assert command(folder, 'run') == 0
  return folder


def command(folder, name, *more):
  return main.main([f'--config={folder / "config.py"}', f'--workdir={folder / name}', *more])


def contents(folder, name):
  """Of the files that must be the same whenever the run is repeated."""
  own = folder / name
  files = [own / 'examples/manifest.json', *sorted(own.glob('refined/*/**/*.jsonl.gz')),
           *(own / f'refiner-{task}/test.json' for task in ('document', 'chunk'))]
  return {str(file.relative_to(own)): workdir.digest_file(file) for file in files} | {
    path.parent.name: workdir.read_json(path)['digest'] for path in own.glob('stores/*/manifest.json')}


def test_what_is_taken_away_is_what_is_missing(folder):
  """By hand, of the rules that remove menus: the rows say which lines these are."""
  found = workdir.read_json(folder / 'run/summary.json')['text']['boilerplate']['lines']['characters']
  [source] = corpora.Corpus(folder / 'pages').sources['train']['pages']
  left = {document.id: document.text.split('\n') for source in corpora.Corpus(
    folder / 'run/refined/boilerplate').sources['train']['pages'] for document in corpora.documents(source)}
  noise = text = gone_noise = gone_text = 0
  for document in corpora.documents(source):
    rows, flags = document.text.split('\n'), document.fields['kept']
    noise += sum(len(row) for row, flag in zip(rows, flags) if flag == '0')
    text += sum(len(row) for row, flag in zip(rows, flags) if flag == '1')
    kept = left.get(document.id, [])
    gone_noise += sum(len(row) for row, flag in zip(rows, flags) if flag == '0' and row not in kept)
    gone_text += sum(len(row) for row, flag in zip(rows, flags) if flag == '1' and row not in kept)
  assert found == {'noise': {'there': noise, 'gone': gone_noise}, 'text': {'there': text, 'gone': gone_text}}
  assert gone_noise == noise > 0


def test_filters_have_names_that_a_stage_can_have():
  names = run._rules(config_lib.prox())
  assert list(names.values())[-1] == 'c4+gopher+fineweb'
  assert all(metrics._STAGE.fullmatch(f'main-{name}') for name in names)


@pytest.mark.parametrize(('line', 'kind'), [
  ('', 'blank'), ('https://example.org/a?b=1', 'addresses'), ('Copyright 2020 Garden Inc.', 'rights and footers'),
  ('Share on Facebook', 'sharing and accounts'), ('About us', 'menus and labels'),
  ('Home | News | Shop', 'menus and labels'),
  ('Plant the seeds, then water them well.', 'text'), ('It is.', 'text')])
def test_a_line_has_one_kind(line, kind):
  assert lines.kind(line) == kind


def test_main_models_differ_by_the_text_alone(folder):
  first = {name: metrics.read(folder / 'run', f'main-{name}', 'eval')[0] for name in ('raw', 'boilerplate')}
  drop = lambda line: {k: v for k, v in line.items() if k != 'stage' and not k.startswith('time/')}
  assert drop(first['raw']) == drop(first['boilerplate']) and first['raw']['step'] == 0
  made = {name: workdir.read_json(folder / f'run/main-{name}/stage.json') for name in first}
  assert made['raw']['store'] != made['boilerplate']['store'] and made['raw']['flops'] == made['boilerplate']['flops']


def test_the_summary_is_that_of_the_main_models_and_the_audit(folder):
  summary = workdir.read_json(folder / 'run/summary.json')
  for name, loss in summary['target']['nll'].items():
    assert loss == metrics.read(folder / 'run', f'main-{name}', 'eval')[-1]['nll']['pydocs']
  for name in ('prox', 'boilerplate', 'gopher'):
    output = audit.Output(folder / 'run/refined' / name)
    output.verify()
    records = [record for _, record in output.records()]
    assert len(records) == 240 == sum(summary['text'][name]['statistics']['documents'].values())
    words = sum(record['after']['words'] for record in records)
    assert words == summary['text'][name]['statistics']['after']['words']
    left = sum(record['decision'] != 'dropped' for record in records)
    assert (f'main-{name}' in {path.name for path in (folder / 'run').iterdir()}) == (left >= run._FEWEST)


def test_the_cost_is_that_of_what_was_trained(folder):
  cost = workdir.read_json(folder / 'run/summary.json')['cost_flops']
  made = {path.parent.name: workdir.read_json(path)['flops'] for path in (folder / 'run').glob('*/stage.json')}
  refining = cost.pop('refining')
  assert cost == made and 'main-gopher' not in cost and cost['refiner-document'] != cost['refiner-chunk']
  records = [record for _, record in audit.Output(folder / 'run/refined/prox').records()]
  tokens = sum((record['document'] or {'tokens': 0})['tokens'] for record in records) + sum(
    chunk['read'] + chunk['generated'] for record in records for chunk in record['chunks'])
  model = Mistral(**workdir.read_json(folder / 'run/refiner-chunk/stage.json')['model'])
  assert refining == pytest.approx(tokens * model.flops_per_token(0) / 3)


def test_a_finished_run_is_left_as_it_is(folder):
  before = contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()
  assert command(folder, 'run') == 0
  assert (contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()) == before


def test_interrupted_while_refining_it_ends_with_the_same_bits(folder, monkeypatch):
  counted = []

  def interrupted(record):
    counted.append(record)
    if len(counted) == 100:
      raise KeyboardInterrupt
    return counts(record)

  counts = audit.counts
  with monkeypatch.context() as patch:
    patch.setattr(audit, 'counts', interrupted)
    assert command(folder, 'killed') == 143 and not (folder / 'killed/refined/prox').exists()
  assert command(folder, 'killed') == 0
  assert contents(folder, 'killed') == contents(folder, 'run')
  assert small_run.timeless(folder / 'killed') == small_run.timeless(folder / 'run')


def test_examples_that_teach_nothing_are_refused_before_the_base_is_trained(folder, tmp_path, capsys):
  one = lambda split, task, text, program: {split: {task: [examples.Example(split, split, text, 0, program)]}}
  long = {split: one(split, 'document', 'A text.', 'keep_doc()')[split] | one(
    split, 'chunk', 'word ' * 1000, 'keep_chunk()')[split] for split in ('train', 'validation')}
  examples.write(tmp_path / 'sft', long, {'annotator': 'by hand'})
  assert command(folder, tmp_path / 'run', f'--config.prox.examples={tmp_path / "sft"}') == 1
  assert 'no train example of a chunk that can be used' in capsys.readouterr().err
  assert not (tmp_path / 'run/base').exists()


def test_a_field_called_kept_may_mean_something_else(folder, tmp_path):
  rows = [{'id': f'{n}', 'text': f'Text {n}.\nMore of it.', 'kept': kept}
          for n, kept in enumerate([True, 'yes', '01', 3])]
  (tmp_path / 'in/train').mkdir(parents=True)
  (tmp_path / 'in/train/web.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  output = refine.refine(tmp_path / 'in', tmp_path / 'out', rule_refiner.RuleRefiner('boilerplate'))
  found = lines.removed(tmp_path / 'in', output)
  assert found['documents'] == 4
  assert {name: one['there'] for name, one in found['characters'].items()} == {'noise': 7, 'text': 11}


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('corpus', '', 'want a folder of text, or one of demo:pages'), ('corpus', 'demo:nothing', 'demo:pages, demo:offline'),
  ('corpus', '/nowhere', 'is not a folder'), ('examples', '/nowhere', 'holds no whole set of examples'),
  ('examples', 'pairs', "are of config.prox.corpus 'demo:pages'"), ('examples', 'rules:c5', 'want some of boilerplate'),
  ('rules', 'c5', 'want some of boilerplate'), ('rules', 'c4+gopher,gopher+c4', 'names one twice'),
  ('target', 'wiki', 'has no domain wiki'),
  ('document.length', 12, 'leaves none for the text of a document'), ('chunk.template', 'chat', "template 'chat'"),
  ('chunk.epochs', 0, 'config.prox.chunk.epochs is 0'), ('chunk.optimizer.schedule', 'steep', 'unknown learning-rate'),
  ('refine_batch', 2, 'want a multiple of the 4 parts'), ('refine_batch', 0, 'want at least 1'),
  ('model.vocab_size', 100, 'vocab_size is below'), ('steps', 0, 'want at least 1')])
def test_what_cannot_be_run_is_refused_beforehand(folder, tmp_path, capsys, key, value, message):
  arguments = [f'--config={folder / "config.py"}', f'--workdir={tmp_path / "run"}', f'--config.prox.{key}={value}']
  assert main.main(arguments) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run/config.json').exists()
