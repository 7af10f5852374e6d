"""AnLLM through the command line: arms that start from one model, an evaluation that is what the models give."""

import json
import math
import pydoc_data.topics

import compilation
import jax
import numpy as np
import pytest
import small_run

from datasel import config as config_lib
from datasel import main, metrics, prepare, pretrained, workdir
from datasel.data import tokenizer as tokenizers
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
    section.arms, section.init_from = 'full,ep,ac,fixed-sees-bos', {base!r}
    section.anchored_store, section.fixed_length = {anchored!r}, 5
    section.contexts, section.sets, section.shots = '8,32', {questions!r}, '0,2'
    section.questions, section.timed = 9, 2
  return config.lock()
'''


@pytest.fixture(scope='module', autouse=True)
def compiled(tmp_path_factory):
  with compilation.kept_in(tmp_path_factory.mktemp('compiled')):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,store-ac,base,questions.jsonl,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('anllm')
  store = small_run.make_store(folder)
  tokenizers.with_anchor(tokenizers.load(store)).save(folder / 'tokenizer-ac')
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
  """Without what a clock measured."""
  found = workdir.read_json(folder / name / 'evaluation.json')
  return found | {'speed': [], 'questions': [{k: v for k, v in row.items() if k != 'seconds'}
                                             for row in found['questions']]}


def test_arms_differ_by_what_they_see_and_all_start_from_one_model(folder):
  models = {arm: stage(folder, arm).model for arm in ('full', 'ep', 'ac', 'fixed-sees-bos')}
  period = tokenizers.load(folder / 'store').encode_batch(['a.'])[0][-1]
  assert models['full'].anchors is None and models['ep'].anchors.anchor_ids == (period,)
  assert models['ac'].anchors.anchor_ids == (small_run.VOCAB,) and models['ac'].vocab_size == small_run.VOCAB + 1
  fixed = models['fixed-sees-bos']
  assert (fixed.anchors.max_length, fixed.anchor_sees_anchors, fixed.keep_bos) == (5, True, True)
  first = {arm: metrics.read(folder / 'run', f'main-{arm}', 'eval')[0]['uniform_nll'] for arm in models}
  batch = Store(folder / 'store').read('validation', np.zeros(4, int), np.arange(4) * 3)
  base = pretrained.find(folder / 'base')
  assert len(set(first.values())) == 4 and max(first.values()) - min(first.values()) < 0.1
  tokens = batch['tokens_BxL']
  np.testing.assert_array_equal(pretrained.find(folder / 'run/base').params()['embed']['kernel'],
                                base.params()['embed']['kernel'])
  grown = pretrained.find(folder / 'run/base-ac').params()['embed']['kernel']
  np.testing.assert_array_equal(grown[:-1], base.params()['embed']['kernel'])
  np.testing.assert_allclose(grown[-1], grown[:-1].mean(0), rtol=1e-5)
  assert not np.allclose(models['ep'].apply(base.params(), tokens), models['full'].apply(base.params(), tokens))


def test_the_evaluation_is_of_the_trained_models(folder):
  """By hand, in one window of a whole record: the reference's dense mask on the checkpoint's parameters."""
  found, store = evaluation(folder)['context'], Store(folder / 'store')
  for arm in ('ep', 'fixed-sees-bos'):
    model, params = stage(folder, arm).model, stage(folder, arm).params()
    for mask, own in (('masked', model), ('full', contexts.unmasked(model))):
      total = count = 0.0
      for domain, size in enumerate(store.sizes('validation')):
        records = np.arange(min(size, 4)) * size // min(size, 4)
        batch = store.read('validation', np.full(len(records), domain), records)
        nll_BxL = own.token_nll(params, batch)
        total, count = total + float((nll_BxL * batch['loss_mask_BxL']).sum()), count + batch['loss_mask_BxL'].sum()
      assert found[arm][mask]['32']['nll'] == pytest.approx(total / count, rel=1e-5)
  assert found['full'].keys() == {'full'} and found['ep']['masked']['32'] != found['ep']['full']['32']
  assert math.exp(found['ep']['masked']['8']['nll']) == pytest.approx(found['ep']['masked']['8']['ppl'])


def test_questions_are_asked_of_every_arm_and_cache(folder):
  found = workdir.read_json(folder / 'run/evaluation.json')
  asked = {(row['arm'], row['cache'], row['shots']): row for row in found['questions']}
  assert len(asked) == len(found['questions']) == 2 * (1 + 2 * 3)
  for (_, cache, shots), row in asked.items():
    assert row['n'] == 9 and (shots == 0) == (row['prefix_tokens'] == 0)
    assert row['live'] == row['prefix_tokens'] if cache == 'full' else row['live'] <= row['prefix_tokens']
  kept = asked['fixed-sees-bos', 'evicted', 2]
  assert 0 < kept['live'] <= kept['prefix_tokens'] // 5 + 5
  assert {row['arm'] for row in found['speed']} == {'ep', 'ac', 'fixed-sees-bos'}
  summary = workdir.read_json(folder / 'run/summary.json')['arms']
  assert summary['fixed-sees-bos']['cache_saved'] == found['cache']['fixed-sees-bos']['prefix'] > 0.5


def test_the_harness_asks_with_anchors_between_sentences(folder):
  text = 'One sentence. Another one.\n\nQuestion: what?'
  for arm in ('ac', 'ep'):
    asked = DataselLM(pretrained=str(folder / f'run/main-{arm}'))
    [ids] = pretrained.find(folder / f'run/main-{arm}').tokenizer().encode_batch([text])
    assert asked.tok_encode(text) == ids.tolist()
    assert (small_run.VOCAB in asked.tok_encode(text)) == (arm == 'ac')
    context, continuation = asked._encode_pair(text, ' this one')
    assert context == asked.tok_encode(text) and small_run.VOCAB not in continuation


def test_killed_between_two_arms_it_ends_with_the_same_numbers(folder, monkeypatch):
  def interrupted(model, *args, **kwargs):
    if model.anchors is not None:
      raise KeyboardInterrupt
    return by_context(model, *args, **kwargs)

  by_context = contexts.by_context
  with monkeypatch.context() as patch:
    patch.setattr(contexts, 'by_context', interrupted)
    with pytest.raises(KeyboardInterrupt):
      command(folder, 'killed')
  assert (folder / 'killed/evaluation/full.json').exists() and not (folder / 'killed/evaluation/ep.json').exists()
  assert command(folder, 'killed') == 0
  assert evaluation(folder, 'killed') == evaluation(folder)
  assert small_run.timeless(folder / 'killed') == small_run.timeless(folder / 'run')


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('arms', 'full,eq', "'eq' is no arm"), ('arms', 'ep-sees,ep-sees', 'names one twice'), ('arms', 'full-bos', 'no arm'),
  ('anchored_store', '', 'name its store, --config.anllm.anchored_store'), ('anchor_row', 'zero', 'copy_period, mean'),
  ('contexts', '8,24', 'each a divisor of the longest'), ('contexts', '64', 'up to config.data.length 32'),
  ('shots', '0,many', 'want whole numbers'), ('sets', 'nothing', 'unknown set of questions'),
  ('symbols', 'q.', 'choose a symbol'), ('init_from', '/nowhere', 'nowhere'), ('max_length', '-1', 'at least 0'),
])
def test_what_cannot_be_run_is_refused_before_any_work(key, value, message, folder, tmp_path, capsys):
  assert command(folder, tmp_path / 'run', f'--config.anllm.{key}={value}') == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'run/base').exists()


def test_an_anchored_store_is_for_the_arm_with_anchor_tokens_alone(folder, tmp_path, capsys):
  assert command(folder, tmp_path / 'run', f'--config.data.store={folder / "store-ac"}') == 2
  assert 'for the arm ac alone' in capsys.readouterr().err
  assert command(folder, tmp_path / 'run', f'--config.anllm.anchored_store={folder / "store"}') == 2
  assert 'with an anchor' in capsys.readouterr().err


def test_names_of_arms():
  names = 'full,ep,ac-bos,fixed-sees-bos'
  assert [arm.name for arm in arms.parse(names)] == names.split(',')
  assert arms.parse('fixed-sees-bos')[0].switches == ('anchor_sees_anchors', 'keep_bos')
  assert all(metrics._STAGE.fullmatch(f'main-{arm.name}') for arm in arms.parse(names))
  assert config_lib.anllm().arms == 'full,ep'
