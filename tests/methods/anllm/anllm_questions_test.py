"""Questions after evicted demonstrations: scores against the dense mask, prompts and scores against the harness."""

import dataclasses
import functools
import json
import os
import pydoc_data.topics
import re

import jax
import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'

from datasel import sharding  # noqa: E402
from datasel.data import questions as packaged  # noqa: E402
from datasel.data import tokenizer as tokenizers  # noqa: E402
from datasel.data.anchors import Rule, punctuation_ids, split_sentences  # noqa: E402
from datasel.methods.anllm import questions, speed, usage  # noqa: E402
from datasel.methods.anllm.anchors import flags  # noqa: E402
from datasel.methods.anllm.contexts import unmasked  # noqa: E402
from datasel.models.mistral import Mistral  # noqa: E402

# Equal settings in the tests that read: so they share their compiled programs.
ASKED = {'limit': 4, 'seed': 1}
TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def real_questions(n=42):
  """Sentences of Python's manual; which word is their last?  Sometimes two sentences before it, to have anchors."""
  found = []
  for text in TEXTS:
    sentences = [' '.join(s.split()) for s in re.findall(r'[A-Z][^.*`|]{30,90}\w{4,}\.', text)]
    found += [f'{a} {b}' if (len(found) + k) % 4 == 0 else b
              for k, (a, b) in enumerate(zip(sentences, sentences[1:3]))]
  last = [sentence[:-1].split()[-1] for sentence in found]
  records = []
  for i, sentence in enumerate(found):
    others = list(dict.fromkeys(word for word in last[i + 1:] + last if word != last[i]))[:2 + i % 2]
    choices = others[:i % 3] + [last[i]] + others[i % 3:]
    if i % 5 == 0:
      choices[-1 if i % 3 == 0 else 0] += ' of it. Not here'  # an option may have an anchor inside
    choice = next(k for k, word in enumerate(choices) if word.startswith(last[i]))
    records.append({'question': sentence[:-len(last[i]) - 1].strip(), 'choices': choices, 'gold': choice})
  assert len(records) >= n
  return records[:n]


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('questions') / 'manual.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in real_questions()))
  return path


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  return tokenizers.train_bpe(TEXTS[:30], 500, tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json')


@pytest.fixture(scope='module')
def arms(plain):
  """{arm: (model, parameters, tokenizer)}: the paper's two and one that keeps the first token."""
  anchored = tokenizers.with_anchor(plain)
  base = Mistral(vocab_size=anchored.vocab_size, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32,
                 init_std=0.3)
  params = base.init(jax.random.key(0))
  ep = Rule(punctuation_ids(plain, '.,'), max_length=40)
  return {'ep-bos': (dataclasses.replace(base, anchors=ep, keep_bos=True), params, plain),
          'ac': (dataclasses.replace(base, anchors=anchored.anchors), params, anchored)}


@functools.partial(jax.jit, static_argnames='model')
def dense_logp(model, params, tokens_BxL):
  return jax.nn.log_softmax(dataclasses.replace(model, attention='reference').apply(params, tokens_BxL))


def dense_scores(model, params, prompts):
  """Of each option of each question: the whole as one row, under the dense mask; nothing is shared or evicted."""
  rows = [(np.concatenate([whole, option]), len(option))
          for whole, options in zip(prompts.whole, prompts.options) for option in options]
  assert len(rows) <= 16
  tokens_BxT = np.zeros((16, 192), np.int32)
  for row_T, (tokens, _) in zip(tokens_BxT, rows):
    row_T[:len(tokens)] = tokens
  logp_BxTxV = np.asarray(dense_logp(model, params, tokens_BxT), np.float64)
  flat = [sum(logp_TxV[t - 1, tokens[t]] for t in range(len(tokens) - n, len(tokens)))
          for logp_TxV, (tokens, n) in zip(logp_BxTxV, rows)]
  ends = np.cumsum([len(options) for options in prompts.options])
  return np.split(np.array(flat), ends[:-1])


@pytest.mark.parametrize(('arm', 'shots'), [('ep-bos', 2), ('ac', 2), ('ac', 0)])
def test_the_evaluation_is_that_of_the_dense_mask(arms, path, arm, shots):
  """And without the mask that of full attention: scores, what is made of them, and what is left in the cache."""
  model, params, tokenizer = arms[arm]
  found, = questions.load([path], [shots])
  prompts = questions.encode(found, tokenizer, shots=shots, **ASKED)
  readers = questions.generators(model, params, batch_size=4)
  rows = questions.evaluate(arm, model, params, tokenizer, sets=[path], shots=[shots], batch_size=4, **ASKED)
  assert [row['cache'] for row in rows] == ['evicted', 'full'] == list(readers)
  for row, of_cache in zip(rows, (model, unmasked(model))):
    want = dense_scores(of_cache, params, prompts)
    scores, prefix = questions.score(readers[row['cache']], prompts)
    for got, expected in zip(scores, want):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    asked = [found.asked[i * len(found.asked) // 4] for i in range(4)]
    right = [int(x.argmax()) == r['gold'] for x, r in zip(want, asked)]
    right_norm = [int(np.argmax([s / len(c.encode()) for s, c in zip(x, r['choices'])])) == r['gold']
                  for x, r in zip(want, asked)]
    assert row.pop('seconds') > 0
    assert row == pytest.approx({
      'arm': arm, 'cache': row['cache'], 'set': 'manual', 'shots': shots, 'n': 4, 'accuracy': np.mean(right),
      'accuracy_norm': np.mean(right_norm), 'stderr': np.std(right, ddof=1) / 2,
      'chance': np.mean([1 / len(r['choices']) for r in asked]), 'prefix_tokens': len(prompts.prefix),
      'live': prefix.live if shots else 0, 'allocated_bytes': prefix.allocated_bytes if shots else 0,
      'longest': max(len(w) + len(o) for w, options in zip(prompts.whole, prompts.options) for o in options)})
  if shots:
    anchor_L = flags(prompts.prefix[None], model.anchors)[0][0]
    kept = usage.live(anchor_L, np.arange(len(anchor_L)) < model.keep_bos)[-1]
    assert rows[0]['live'] == kept < len(prompts.prefix) / 2 and rows[1]['live'] == len(prompts.prefix)
    entry = 2 * 2 * 8 * 4  # in 2 layers, key and value of 8 channels in float32
    assert entry * kept <= rows[0]['allocated_bytes'] < entry * len(prompts.prefix) <= rows[1]['allocated_bytes']
    assert any(not np.allclose(a, b, rtol=1e-3) for a, b in zip(dense_scores(model, params, prompts), want))


@pytest.mark.parametrize('trailing', [False, True])
def test_an_anchor_closes_each_demonstration(plain, path, trailing):
  """The cache after k demonstrations is anchors alone, and the questions are none the longer for `trailing`."""
  tokenizer = tokenizers.with_anchor(plain, trailing=trailing)
  found, = questions.load([path], [3])
  prompts = questions.encode(found, tokenizer, shots=3, limit=9, seed=2)
  order = np.random.default_rng(2).permutation(3)
  shown = '\n\n'.join(f'Question: {r["question"]}\nAnswer: {r["choices"][r["gold"]]}'
                      for r in (found.demonstrations[i] for i in order))
  assert prompts.prefix[-1] == tokenizer.anchor_id and tokenizer.decode(prompts.prefix) == shown
  sentences = [x.strip() for x in tokenizer.decode(prompts.prefix, show_anchors=True).split('<AC>')]
  assert sentences == [*split_sentences(shown), ''] and len(sentences) > 4
  assert usage.live(prompts.prefix == tokenizer.anchor_id)[-1] == len(sentences) - 1
  for prompt, options in zip(prompts.prompts, prompts.options):
    assert prompt[-1] != tokenizer.anchor_id and all(option[-1] != tokenizer.anchor_id for option in options)
    assert tokenizer.decode(prompt).startswith('\n\nQuestion: ') and tokenizer.decode(prompt).endswith('\nAnswer:')


def test_a_prompt_with_an_option_is_the_text_as_the_tokenizer_writes_it(plain, path, tmp_path):
  """Also by a tokenizer that merges over white space and line breaks, and after a bos."""
  import tokenizers as library
  greedy = library.Tokenizer(library.models.BPE())
  greedy.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  greedy.decoder = library.decoders.ByteLevel()
  texts = [f'Question: {r["question"]}\nAnswer: {r["choices"][r["gold"]]}\n\n' for r in real_questions()]
  greedy.train_from_iterator(texts * 4, library.trainers.BpeTrainer(
    vocab_size=600, special_tokens=['<s>'], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
  greedy.save(str(tmp_path / 'tokenizer.json'))
  merging = tokenizers.load(tmp_path)
  assert merging.bos_id == 0
  found, = questions.load([path], [2])
  for tokenizer in (plain, merging):
    prompts = questions.encode(found, tokenizer, shots=2, seed=5)
    assert len(prompts.gold) == len(found.asked) == 39 and len(prompts.prefix) > 20
    for record, whole, options, sizes in zip(found.asked, prompts.whole, prompts.options, prompts.sizes):
      texts = [tokenizer.decode(np.concatenate([whole, option])).removeprefix('<s>') for option in options]
      head = texts[0].removesuffix(f' {record["choices"][0]}')
      assert texts == [f'{head} {choice}' for choice in record['choices']]
      assert head.endswith(f'\n\nQuestion: {record["question"]}\nAnswer:')
      begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
      for text, option in zip(texts, options):
        assert [*begin, *tokenizer.encode_batch([text])[0]] == [*whole, *option] and len(option)
      assert sizes.tolist() == [len(choice.encode()) for choice in record['choices']]
  crossing = [option for options in prompts.options for option in options
              if not tokenizer.decode(option).startswith(' ')]
  assert crossing  # where this tokenizer joins ':' and the space, the options begin earlier


def test_demonstrations_are_never_asked_and_fewer_are_the_first_of_more(plain, path):
  found, = questions.load([path], [3])
  records = real_questions()
  assert found.demonstrations == records[::20] and found.asked == [r for n, r in enumerate(records) if n % 20]
  shown = {k: plain.decode(questions.encode(found, plain, shots=k, seed=3).prefix) for k in (1, 2, 3)}
  assert shown[3].startswith(shown[2]) and shown[2].startswith(shown[1])
  assert {plain.decode(questions.encode(found, plain, shots=2, seed=seed).prefix) for seed in range(9)} != {shown[2]}
  spread = questions.encode(found, plain, shots=0, limit=4)
  whole = questions.encode(found, plain, shots=0, limit=999)
  assert len(spread.prefix) == 0 and len(whole.gold) == 39
  for n, prompt in enumerate(spread.prompts):
    np.testing.assert_array_equal(prompt, whole.prompts[n * 39 // 4])


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
def test_prompts_scores_and_accuracies_are_those_of_the_harness(monkeypatch, tmp_path):
  """Its task of a packaged set, here with these records, by its model `datasel`: full attention, nothing cached."""
  import lm_eval_test

  from datasel.lm_eval.local_tasks import LocalTask, configs
  from datasel.lm_eval.model import DataselLM
  monkeypatch.setattr(packaged, 'load', lambda name: (real_questions(), {}))
  lm = DataselLM(str(lm_eval_test.llama(tmp_path, bos=False)), batch_size=16, max_length=512)
  seed = next(seed for seed in range(99) if np.random.default_rng(seed).permutation(3)[:2].tolist() == [0, 1])
  for shots in (0, 2):
    task = LocalTask(configs()['datasel_quartz'] | {
      'task': 'datasel_quartz', 'num_fewshot': shots, 'fewshot_config': {'sampler': 'first_n'}})
    task.build_all_requests(limit=None, rank=0, world_size=1)
    found, = questions.load(['quartz'], [shots])
    assert found.asked == list(task.dataset['test']) and found.demonstrations == list(task.dataset['shots'])
    prompts = questions.encode(found, tokenizers.load(tmp_path), shots=shots, seed=seed)
    flat = [(tokens, option) for tokens, options in zip(prompts.whole, prompts.options) for option in options]
    for (tokens, option), request in zip(flat, task.instances):
      context, continuation = lm._encode_pair(*request.args)
      assert tokens.tolist() == list(context) and option.tolist() == list(continuation)
  answers = lm.loglikelihood(task.instances, disable_tqdm=True)
  scores, _ = questions.score(questions.generators(lm.model, lm._params, batch_size=16)['full'], prompts)
  np.testing.assert_allclose(np.concatenate(scores), [x for x, _ in answers], rtol=1e-5, atol=1e-4)
  of_options = iter(answers)
  wanted = [task.process_results(doc, [next(of_options) for _ in doc['choices']]) for doc in task.dataset['test']]
  got = questions.accuracy(scores, prompts)
  assert got['accuracy'] == np.mean([x['acc'] for x in wanted])
  assert got['accuracy_norm'] == np.mean([x['acc_norm'] for x in wanted])  # per letter there: here they are bytes


def test_batches_and_meshes_do_not_matter(arms, path):
  model, params, tokenizer = arms['ep-bos']
  prompts = questions.encode(questions.load([path])[0], tokenizer, shots=2, **ASKED)
  score = lambda **options: questions.score(questions.generators(model, params, **options)['evicted'], prompts)
  want, prefix = score(batch_size=4)
  found, there = score(batch_size=8, mesh=sharding.make_mesh(4, 1, 1))
  np.testing.assert_allclose(np.concatenate(found), np.concatenate(want), rtol=1e-5, atol=1e-4)
  assert there.live == prefix.live and there.allocated_bytes == prefix.allocated_bytes


def test_speed_is_of_three_ways_to_the_same_answers(arms, path):
  model, params, tokenizer = arms['ac']
  rows = speed.measure('ac', model, params, tokenizer, sets=[path], shots=[0, 2], timed=4, seed=1,
                       batch_size=4)
  assert [list(row) for row in rows] == [
    ['arm', 'set', 'shots', 'prefix_tokens', 'no_cache', 'full_cache', 'anchor_cache']]
  prompts = questions.encode(questions.load([path])[0], tokenizer, shots=2, **ASKED)
  assert (rows[0]['arm'], rows[0]['set'], rows[0]['shots'], rows[0]['prefix_tokens']) == (
    'ac', 'manual', 2, len(prompts.prefix))
  assert all(rows[0][name] > 0 for name in ('no_cache', 'full_cache', 'anchor_cache'))
  with pytest.raises(ValueError, match='full: the speed of an anchor cache is asked of a model without anchors'):
    speed.measure('full', unmasked(model), params, tokenizer, sets=[path], shots=[1], timed=1)


@pytest.mark.parametrize(('line', 'what'), [
  ('{"question": "Why", "choices": ["a", "b"]}', 'line 3'),
  ('{"question": "Why", "choices": "ab", "gold": 0}', 'line 3'),
  ('{"question": "Why", "choices": ["a", "a"], "gold": 0}', 'at least two different'), ('[]', 'line 3'),
  ('{"question": "Why", "choices": ["a", "b"], "gold": 2}', 'line 3'), ('Why?', 'want a JSON object')])
def test_a_line_that_is_no_question_is_named(tmp_path, line, what):
  good = [json.dumps(record) for record in real_questions()[:2]]
  (tmp_path / 'own.jsonl').write_text('\n'.join([*good, line]) + '\n')
  with pytest.raises(ValueError, match=what):
    questions.load([tmp_path / 'own.jsonl'])


def test_sets_that_cannot_be_asked_are_refused(path, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='unknown set of questions .no such.; known: cissp, crepe'):
    questions.load(['no such'])
  with pytest.raises(ValueError, match='absent.jsonl: no such file'):
    questions.load([tmp_path / 'absent.jsonl'])
  with pytest.raises(ValueError, match='39 to ask, and 3 kept for 4 demonstrations'):
    questions.load([path], [0, 4])
  (tmp_path / 'one.jsonl').write_text(json.dumps(real_questions()[0]) + '\n')
  with pytest.raises(ValueError, match='0 to ask'):
    questions.load([tmp_path / 'one.jsonl'])

  def unavailable(name):
    raise packaged.demo_archives.Unavailable('no registry')
  monkeypatch.setattr(packaged, 'load', unavailable)
  with pytest.raises(ValueError, match='questions of quartz cannot be had: no registry'):
    questions.load(['quartz'])


def test_scores_that_are_not_finite_are_an_error(arms, path):
  model, params, tokenizer = arms['ac']
  with pytest.raises(FloatingPointError, match='question 0: the log-likelihoods of its options are .nan'):
    questions.evaluate('ac', model, jax.tree.map(lambda x: x * np.nan, params), tokenizer, sets=[path], shots=[0],
                       batch_size=4, **ASKED)
