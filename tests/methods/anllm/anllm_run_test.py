"""AnLLM through the command line: arms that start from one model, an evaluation that is what the models give."""

import json
import pydoc_data.topics

import jax
import numpy as np
import pytest
import small_run

from datasel import main, metrics, prepare, pretrained, workdir
from datasel.data import tokenizer as tokenizers
from datasel.data.anchors import Rule
from datasel.data.store import Store
from datasel.lm_eval.model import DataselLM
from datasel.methods.anllm import arms, contexts
from datasel.models.mistral import Mistral

pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning', 'ignore::UserWarning')

CONFIG = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('anllm')
  config.anllm = config_lib.anllm()
  config = config_lib.finish(config, 'smoke').copy_and_resolve_references()
  with config.unlocked():
    config.data.demo, config.data.store = '', {store!r}
    config.data.length = {length}
    config.model.vocab_size, config.model.n_layers, config.model.d_model, config.model.d_ff = {vocab}, 2, 16, 32
    config.train.steps, config.train.checkpoint_every, config.train.eval_every = 4, 2, 2
    config.train.eval_sequences = 4
    config.optimizer.peak_lr = 1e-2
    section = config.anllm
    section.arms, section.init_from = 'full,ac,ep-sees-bos', {base!r}
    section.anchored_store, section.max_length = {anchored!r}, 9
    section.contexts, section.sets, section.shots = '32', {questions!r}, '2'
    section.questions, section.timed = 9, 2
  return config.lock()
'''
ARMS = ('full', 'ac', 'ep-sees-bos')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,store-ac,base,questions.jsonl,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('anllm')
  store = small_run.make_store(folder)
  tokenizers.with_anchor(tokenizers.load(store), max_length=9).save(folder / 'tokenizer-ac')
  prepare.prepare(folder / 'corpus', folder / 'store-ac', folder / 'tokenizer-ac', length=small_run.LENGTH, holdout=0.2)
  model = Mistral(vocab_size=small_run.VOCAB, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=32,
                  tied=True)
  pretrained.save_stage(pretrained.Source('made here', model, store, 32, None), model.init(jax.random.key(3)),
                        folder / 'base')
  words = [word for text in pydoc_data.topics.topics.values() for word in text.split() if word.isalpha()]
  questions = [{'question': ' '.join(words[8 * n:8 * n + 8]), 'choices': [f'{words[n]} a', f'{words[n]} bc'],
                'gold': n % 2}
               for n in range(60)]
  (folder / 'questions.jsonl').write_text(''.join(json.dumps(one) + '\n' for one in questions))
  (folder / 'config.py').write_text(CONFIG.format(
    store=str(store), length=small_run.LENGTH, vocab=small_run.VOCAB, base=str(folder / 'base'),
    anchored=str(folder / 'store-ac'), questions=str(folder / 'questions.jsonl')))
  assert command(folder, 'run') == 0
  return folder


def command(folder, name, *more):
  return main.main([f'--config={folder / "config.py"}', f'--workdir={folder / name}', *more])


def stage(folder, arm, name='run'):
  return pretrained.find(folder / name / f'main-{arm}')


def evaluation(folder, name='run'):
  """evaluation.json without what a clock measured."""
  found = workdir.read_json(folder / name / 'evaluation.json')
  return found | {'speed': [], 'questions': [{k: v for k, v in row.items() if k != 'seconds'}
                                             for row in found['questions']]}


def test_arms_differ_by_what_they_see_and_all_start_from_one_model(folder):
  full, ac, ep = (stage(folder, arm).model for arm in ARMS)
  period = tokenizers.load(folder / 'store').encode_batch(['a.'])[0][-1]
  assert full.anchors is None and (ep.anchor_sees_anchors, ep.keep_bos, ac.keep_bos) == (True, True, False)
  assert ep.anchors == Rule((period,), max_length=9) and ac.anchors == Rule((small_run.VOCAB,), max_length=9)
  assert ep.vocab_size == small_run.VOCAB == ac.vocab_size - 1
  base, own, grown = (pretrained.find(folder / name).params()['embed']['kernel']
                      for name in ('base', 'run/base', 'run/base-ac'))
  np.testing.assert_array_equal(own, base)
  np.testing.assert_array_equal(grown[:-1], base)
  np.testing.assert_allclose(grown[-1], base.mean(0), rtol=1e-5)
  first = [metrics.read(folder / 'run', f'main-{arm}', 'eval')[0]['uniform_nll'] for arm in ARMS]
  assert len(set(first)) == 3 and max(first) - min(first) < 0.1


def test_the_evaluation_is_of_the_trained_models(folder):
  """By hand, in one window of a whole record, with the parameters of the checkpoint."""
  found, store = evaluation(folder)['context'], Store(folder / 'store')
  trained = stage(folder, 'ep-sees-bos')
  for mask, model in (('masked', trained.model), ('full', contexts.unmasked(trained.model))):
    total = count = 0.0
    for domain, size in enumerate(store.sizes('validation')):
      records = np.arange(min(size, 4)) * size // min(size, 4)
      batch = store.read('validation', np.full(len(records), domain), records)
      nll_BxL = model.token_nll(trained.params(), batch)
      total, count = total + float((nll_BxL * batch['loss_mask_BxL']).sum()), count + batch['loss_mask_BxL'].sum()
    assert found['ep-sees-bos'][mask]['32']['nll'] == pytest.approx(total / count, rel=1e-5)
  assert found['full'].keys() == {'full'} and found['ac']['masked']['32'] != found['ac']['full']['32']


def test_questions_are_asked_of_every_arm_and_cache(folder):
  found = workdir.read_json(folder / 'run/evaluation.json')
  asked = {(row['arm'], row['cache']): row for row in found['questions']}
  assert len(asked) == len(found['questions']) == 1 + 2 * 2
  assert all(row['n'] == 9 and row['prefix_tokens'] > 20 for row in asked.values())
  for (_, cache), row in asked.items():
    assert row['live'] == row['prefix_tokens'] if cache == 'full' else row['live'] < row['prefix_tokens'] / 2
  assert {row['arm'] for row in found['speed']} == {'ac', 'ep-sees-bos'}
  summary = workdir.read_json(folder / 'run/summary.json')['arms']
  assert summary['ep-sees-bos']['cache_saved'] == found['cache']['ep-sees-bos']['prefix'] > 0.4


def test_the_harness_asks_with_anchors_between_sentences(folder):
  text = 'One here. Another.\n\nWhat? Is it'
  for arm in ('ac', 'ep-sees-bos'):
    asked = DataselLM(pretrained=str(folder / f'run/main-{arm}'))
    [ids] = stage(folder, arm).tokenizer().encode_batch([text])
    assert asked.tok_encode(text) == ids.tolist()
    assert (small_run.VOCAB in asked.tok_encode(text)) == (arm == 'ac')
    context, continuation = asked._encode_pair(text, ' this one')
    assert context == asked.tok_encode(text) and context + continuation == asked.tok_encode(f'{text} this one')


def test_killed_between_two_arms_it_ends_with_the_same_numbers(folder, monkeypatch):
  def interrupted(model, *args, **kwargs):
    if model.anchors is not None:
      raise KeyboardInterrupt
    return by_context(model, *args, **kwargs)

  by_context = contexts.by_context
  with monkeypatch.context() as patch:
    patch.setattr(contexts, 'by_context', interrupted)
    assert command(folder, 'killed') == 143
  assert (folder / 'killed/evaluation/full.json').exists() and not (folder / 'killed/evaluation/ac.json').exists()
  assert command(folder, 'killed') == 0
  assert evaluation(folder, 'killed') == evaluation(folder)
  assert small_run.timeless(folder / 'killed') == small_run.timeless(folder / 'run')


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('arms', 'full,eq', "'eq' is no arm"), ('arms', 'ep-sees,ep-sees', 'names one twice'), ('arms', 'full-bos', 'no arm'),
  ('anchored_store', '', 'name its store, --config.anllm.anchored_store'), ('anchor_row', 'zero', 'mean, copy_period'),
  ('contexts', '8,20', 'each a divisor of the longest'), ('contexts', '64', 'up to config.data.length 32'),
  ('shots', '0,many', 'want whole numbers'), ('sets', 'nothing', 'unknown set of questions'),
  ('symbols', 'é', 'choose a symbol'), ('symbols', '', 'characters that close'), ('symbols', '. ', 'nothing between'),
  ('max_length', '5', 'was prepared with 1 and 9'), ('question_batch', '6', 'a multiple of the 4 parts'),
  ('init_from', '/nowhere', 'nowhere'), ('max_length', '-1', 'at least 0'),
])
def test_what_cannot_be_run_is_refused_before_any_work(key, value, message, folder, tmp_path, capsys):
  assert command(folder, tmp_path / 'run', f'--config.anllm.{key}={value}') == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'run/base').exists()


def test_an_anchored_store_is_for_the_arm_with_anchor_tokens_alone(folder, tmp_path, capsys):
  assert command(folder, tmp_path / 'run', f'--config.data.store={folder / "store-ac"}') == 2
  assert 'for the arm ac alone' in capsys.readouterr().err
  assert command(folder, tmp_path / 'run', f'--config.anllm.anchored_store={folder / "store"}') == 2
  assert 'with an anchor' in capsys.readouterr().err
  prepare.prepare(folder / 'corpus', tmp_path / 'short', folder / 'tokenizer-ac', length=16, holdout=0.3)
  assert command(folder, tmp_path / 'run', f'--config.anllm.anchored_store={tmp_path / "short"}') == 2
  assert 'by its length, holdout' in capsys.readouterr().err
  mine = ('--config.data.demo=offline', '--config.anllm.anchored_store=')  # the demo is not its text
  assert command(folder, tmp_path / 'run', *mine) == 2
  assert 'name its store' in capsys.readouterr().err


def test_names_of_arms():
  names = 'full,ep,ac-bos,fixed-sees-bos'
  assert [arm.name for arm in arms.parse(names)] == names.split(',')
  assert arms.parse('fixed-sees-bos')[0].switches == ('anchor_sees_anchors', 'keep_bos')
  assert all(metrics._STAGE.fullmatch(f'main-{arm.name}') for arm in arms.parse(names))
