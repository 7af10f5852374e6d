"""Laws of the model `datasel` of lm-evaluation-harness: it answers as the harness's own `hf`, however it is cut."""

import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'

import lm_eval.models  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from datasel.data import tokenizer as tokenizers  # noqa: E402
from datasel.lm_eval import answers, scoring  # noqa: E402
from datasel.lm_eval.model import DataselLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')

TEXTS = sorted(pydoc_data.topics.topics.values())
MAX_LENGTH = 64


def llama(folder, *, bos):
  """A random Llama as transformers saves it, with a tokenizer that puts a bos before every text, or none."""
  tokenizers.train_bpe(TEXTS[:30], 600, folder / 'tokenizer.json')
  content = json.loads((folder / 'tokenizer.json').read_text())
  special = {'eos_token': '<|endoftext|>'}
  fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'), **special)
  if bos:
    fast.add_special_tokens({'bos_token': '<s>'})
    fast.save_pretrained(folder)
    content = json.loads((folder / 'tokenizer.json').read_text())
    content['post_processor'] = {
      'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}},
                                               {'Sequence': {'id': 'A', 'type_id': 0}}],
      'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
      'special_tokens': {'<s>': {'id': '<s>', 'ids': [fast.convert_tokens_to_ids('<s>')], 'tokens': ['<s>']}}}
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert fast.encode('a')[0] == fast.bos_token_id
  fast.save_pretrained(folder)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=MAX_LENGTH, initializer_range=0.3, bos_token_id=fast.bos_token_id,
    eos_token_id=fast.eos_token_id)
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return llama(tmp_path_factory.mktemp('llama'), bos=False)


@pytest.fixture(scope='module')
def ours(folder):
  return DataselLM(str(folder), batch_size=8)


@pytest.fixture(scope='module', params=['no bos', 'bos'])
def pair(request, ours, folder, tmp_path_factory):
  """(the harness's `hf`, ours) on the same weights."""
  if request.param == 'bos':
    folder = llama(tmp_path_factory.mktemp('llama'), bos=True)
    ours = DataselLM(str(folder), batch_size=8)
  return get_model('hf')(pretrained=str(folder), device='cpu', dtype='float32', batch_size=4), ours


def cut(rng, n):
  text = rng.choice(TEXTS)
  start = rng.randrange(max(1, len(text) - n))
  return text[start:start + n]


def choices(n, seed=0):
  """Requests as tasks make them: several continuations of a context, empty, short, and longer than the model reads."""
  rng = random.Random(seed)
  contexts = ['', '<s>A text', *(cut(rng, rng.choice([3, 30, 90, 400])) for _ in range(n))]
  return [Instance('loglikelihood', {}, (context, f' {continuation}'), k) for context in contexts
          for k, continuation in enumerate(['A', 'B', cut(rng, 12), cut(rng, 25)])]


def test_log_likelihoods_are_those_of_hf(pair):
  peer, ours = pair
  requests = choices(20)
  greedy = peer.tokenizer.decode(peer.model.generate(
    torch.tensor([peer.tok_encode('The')]), max_new_tokens=3, do_sample=False)[0, len(peer.tok_encode('The')):])
  requests.append(Instance('loglikelihood', {}, ('The', greedy), 0))
  wanted, found = peer.loglikelihood(requests, disable_tqdm=True), ours.loglikelihood(requests, disable_tqdm=True)
  # Sums of up to 25 float32 logarithms near 10, added in another order.
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], rtol=1e-5, atol=1e-4)
  assert [bool(g) for _, g in found] == [bool(g) for _, g in wanted]
  if peer.tok_encode('The' + greedy) == peer.tok_encode('The') + peer.tok_encode(greedy, add_special_tokens=False):
    assert found[-1][1]


def test_rolling_log_likelihoods_are_those_of_hf(pair):
  peer, ours = pair
  rng = random.Random(1)
  requests = [Instance('loglikelihood_rolling', {}, (cut(rng, n),), 0) for n in (5, 200, 1500)]
  np.testing.assert_allclose(ours.loglikelihood_rolling(requests, disable_tqdm=True),
                             peer.loglikelihood_rolling(requests, disable_tqdm=True), rtol=1e-5)


def test_generated_text_is_that_of_hf(pair):
  peer, ours = pair
  rng = random.Random(2)
  asked = [(20, ['\n']), (90, []), (600, ['.', ' t']), (50, 'e')]
  requests = [Instance('generate_until', {}, (cut(rng, n), {'until': until, 'max_gen_toks': 16, 'do_sample': False}), 0)
              for n, until in asked]
  assert ours.generate_until(requests, disable_tqdm=True) == peer.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize('arguments', [
  {'batch_size': 'auto'}, {'batch_size': 3, 'data': 2, 'tensor': 2}, {'batch_size': 4, 'fsdp': 4}])
def test_batches_and_meshes_do_not_matter(folder, ours, arguments):
  requests = choices(1, seed=3)
  wanted = ours.loglikelihood(requests, disable_tqdm=True)
  found = DataselLM(str(folder), **arguments).loglikelihood(requests, disable_tqdm=True)
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], rtol=1e-5, atol=1e-4)
  assert [g for _, g in found] == [g for _, g in wanted]


def test_one_input_is_read_once_for_all_that_is_asked_about_it(ours, monkeypatch):
  rows = []
  monkeypatch.setattr(ours, '_scorer', lambda given: rows.extend(given) or iter([]))
  monkeypatch.setattr(ours, '_answers', answers.Answers(None, 'another'))
  requests = [(('', ''), [5, 6, 7], [letter]) for letter in (1, 2, 3, 4, 1)] + [(('', ''), [5, 6], [7, 2])]
  with pytest.raises(KeyError):  # the scorer answered nothing
    ours._loglikelihood_tokens(requests, disable_tqdm=True)
  assert len(rows) == 1 and rows[0].tokens == (5, 6, 7)
  assert [(first, targets) for _, first, targets in rows[0].asked] == [
    (2, (1,)), (2, (2,)), (2, (3,)), (2, (4,)), (1, (7, 2))]


def test_few_programs_serve_all_lengths():
  lengths = {scoring.length_bucket(n) for n in range(1, 2049)}
  assert len(lengths) == 13 and all(n <= scoring.length_bucket(n) <= max(32, 1.5 * n) for n in range(1, 2049))
  assert {scoring.targets_bucket(n) for n in range(1, 2049)} == {4, 16, 64, 256, 1024, 4096}


def test_an_answer_that_is_kept_is_not_computed_again(folder, tmp_path, monkeypatch):
  requests = choices(1, seed=3)
  generated = [Instance('generate_until', {}, ('Once', {'until': [], 'max_gen_toks': 8, 'do_sample': False}), 0)]
  path = tmp_path / 'answers.jsonl'
  first = DataselLM(str(folder), batch_size=4, answers=path)
  wanted = first.loglikelihood(requests, disable_tqdm=True), first.generate_until(generated, disable_tqdm=True)
  with open(path, 'a') as f:
    f.write('{"key": "half a li')  # as a kill leaves it
  again = DataselLM(str(folder), batch_size=2, answers=path)
  monkeypatch.setattr(again, '_scorer', lambda rows: iter([]) if not rows else pytest.fail('computed anew'))
  monkeypatch.setattr(again, '_generate', lambda *a, **k: pytest.fail('generated anew'))
  assert again.loglikelihood(requests, disable_tqdm=True) == wanted[0]
  assert again.generate_until(generated, disable_tqdm=True) == wanted[1]
  assert path.read_bytes().endswith(b'}\n')


def test_answers_of_one_model_are_not_those_of_another(ours, tmp_path):
  one, other = (answers.identity(ours.model, params) for params in (
    ours._params, jax.tree.map(lambda x: x, ours._params) | {'norm': {'scale': ours._params['norm']['scale'] * 1.001}}))
  swapped = jax.tree.map(lambda x: x[..., ::-1], ours._params)  # the same numbers elsewhere
  assert len({one, other, answers.identity(ours.model, swapped)}) == 3
  assert one == answers.identity(ours.model, jax.device_get(ours._params) | {})  # wherever they lie


def test_damage_in_the_kept_answers_is_named(tmp_path):
  path = tmp_path / 'answers.jsonl'
  path.write_text('{"key": "a", "answer": 1}\nrubbish\n')
  with pytest.raises(ValueError, match=r'answers.jsonl line 2 .* delete the file'):
    answers.Answers(path, 'x')


@pytest.mark.parametrize('arguments, message', [
  ({'batch_size': '0'}, "batch_size is '0'"), ({'max_length': 1}, 'max_length is 1'), ({'dtype': 'int3'}, 'int3'),
  ({'tensor': 3}, 'does not divide'), ({'revision': 'main'}, 'no revision')])
def test_bad_arguments_are_named(folder, arguments, message):
  with pytest.raises(ValueError, match=message):
    DataselLM(str(folder), **arguments)


def test_what_cannot_fit_is_said(ours):
  with pytest.raises(ValueError, match='want 1 to max_length=64'):
    ours.loglikelihood([Instance('loglikelihood', {}, ('A', ' ' + 'x y z ' * 100), 0)], disable_tqdm=True)
  given = {'until': [], 'max_gen_toks': 64}
  with pytest.raises(ValueError, match='leaves no room'):
    ours.generate_until([Instance('generate_until', {}, ('A', given), 0)], disable_tqdm=True)
  with pytest.raises(ValueError, match="'num_beams'.* known"):
    ours.generate_until([Instance('generate_until', {}, ('A', given | {'num_beams': 2, 'max_gen_toks': 4}), 0)],
                        disable_tqdm=True)


def test_a_killed_evaluation_goes_on(folder, ours, tmp_path):
  """SIGKILL in the middle: what was answered stays, the rest is added, and the result is that of an unbroken one."""
  code = f'''
import sys, time
from lm_eval.api.instance import Instance
from datasel.lm_eval.model import DataselLM
lm = DataselLM({str(folder)!r}, batch_size=4, answers=sys.argv[1])
of_batch = lm._scorer._answers
lm._scorer._answers = lambda *a: (time.sleep(0.5), of_batch(*a))[1]
lm.loglikelihood([Instance('loglikelihood', {{}}, ('word ' * n, ' and'), 0) for n in range(1, 33)])
'''
  path = tmp_path / 'answers.jsonl'
  environment = os.environ | {'PYTHONPATH': os.getcwd(), 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  killed = subprocess.Popen([sys.executable, '-c', code, str(path)], env=environment)
  deadline = time.monotonic() + 120
  while not path.exists() or len(path.read_bytes().splitlines()) < 8:
    assert killed.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  kept = path.read_bytes()
  assert 8 <= len(kept.splitlines()) < 32
  requests = [Instance('loglikelihood', {}, ('word ' * n, ' and'), 0) for n in range(1, 33)]
  found = DataselLM(str(folder), batch_size=8, answers=path).loglikelihood(requests, disable_tqdm=True)
  assert path.read_bytes().startswith(kept[:kept.rfind(b'\n') + 1]) and len(path.read_bytes().splitlines()) == 32
  whole = ours.loglikelihood(requests, disable_tqdm=True)
  np.testing.assert_allclose([x for x, _ in found], [x for x, _ in whole], rtol=1e-5)
  assert [g for _, g in found] == [g for _, g in whole]
