"""Laws of decoding: the tokens of transformers, the distribution of its warpers, and nothing of one row in another."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from datasel import decode, sharding
from datasel.decode import Automaton
from datasel.generate import Generator
from datasel.models import hf
from datasel.models.mistral import Mistral

V, EOS = 64, 7
TINY = Mistral(vocab_size=V, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40)
PIECES = [*'abcdefgh', 'ab', 'ba', 'abc', 'cab', ' ', '. ', 'é', 'dd'] * 4


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 5, TINY.init(jax.random.key(0)))  # large enough that every path matters


def prompts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, n).astype(np.int32) for n in lengths]


def text(tokens):
  return ''.join(PIECES[t] for t in tokens)


RAGGED = (3, 20, 1, 9, 33)
SAMPLED = dict(temperature=0.8, top_k=30, top_p=0.9)


@functools.cache
def generator(**kwargs):
  return Generator(TINY, params(), **{'batch_size': 4, 'detokenize': text, **kwargs})


def next_logits(tokens, model=TINY):
  """The logits after a text, by the whole forward pass."""
  row = np.zeros((1, 96), np.int32)
  row[0, :len(tokens)] = tokens
  return np.asarray(_apply(model)(params(), row)[0, len(tokens) - 1])


@functools.cache
def _apply(model):
  return jax.jit(model.apply)


def same(a, b, atol=0.0):
  for x, y in zip(a, b, strict=True):
    assert x.tokens.tolist() == y.tokens.tolist() and x.finished == y.finished and x.text == y.text
    np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=0, atol=atol)


class Weights:
  """The tensors of a PyTorch model, as `hf.load` reads them."""

  def __init__(self, module):
    head = 'embed_out' if module.config.model_type == 'gpt_neox' else 'lm_head'  # as its files have it
    self.tensors = {name.replace('lm_head', head): x.detach().numpy() for name, x in module.state_dict().items()}

  def shapes(self):
    return {name: x.shape for name, x in self.tensors.items()}

  def array(self, name):
    return self.tensors[name]

  def verify(self):
    pass


SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             initializer_range=0.4, bos_token_id=None, eos_token_id=EOS, pad_token_id=0)
THEIRS = {
  'untied': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
  'tied, one key head': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
    **SIZES, tie_word_embeddings=True, num_key_value_heads=1)),
  'window, grouped': lambda: transformers.MistralForCausalLM(transformers.MistralConfig(
    **SIZES, num_key_value_heads=2, sliding_window=6)),
  'neox': lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
}


@pytest.mark.parametrize('name', THEIRS)
def test_greedy_tokens_are_those_of_transformers(name):
  torch.manual_seed(0)
  theirs = THEIRS[name]().eval()
  model = hf.from_config(theirs.config.to_dict())
  ours = Generator(model, hf.load(Weights(theirs), model), batch_size=3, eos_ids=(EOS,))
  asked, ended = prompts(RAGGED), []
  for prompt, got in zip(asked, ours(asked, max_new_tokens=40)):
    row = torch.tensor(prompt[None].astype(np.int64))  # the mask, or padding ids in it would not be seen
    want = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=40, do_sample=False)
    want = want[0, len(prompt):].tolist()
    ended.append(want[-1] == EOS)
    assert got.tokens.tolist() == (want[:-1] if ended[-1] else want)
    assert got.finished == ('eos' if ended[-1] else 'length')
  assert len(set(ended)) == 2 or name != 'untied'  # both kinds of end are seen


@pytest.mark.parametrize('window', [None, 6])
@pytest.mark.parametrize('chunk', [1, 7, 64])
def test_a_cache_gives_the_logits_of_the_whole_text(window, chunk):
  model = dataclasses.replace(TINY, window=window)
  tokens = jax.random.randint(jax.random.key(1), (3, 80), 0, V)
  begin = np.array([5, 11, 1])  # each row is read so far at once, then in chunks
  whole = np.asarray(_apply(model)(params(), tokens))
  _, cache = model.prefill(params(), tokens[:, :11], 96)
  extend = jax.jit(model.extend)
  for start in range(0, 64, chunk):
    position = begin[:, None] + np.arange(start, min(start + chunk, 64))[None]
    hidden, cache = extend(params(), jnp.take_along_axis(tokens, position, axis=1), jnp.asarray(position), cache)
    want = np.take_along_axis(whole, position[..., None], axis=1)
    np.testing.assert_allclose(model.logits(params(), hidden), want, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize('settings', [{}, SAMPLED])
def test_padding_leaks_nothing(settings):
  """To the bit: neither the columns after a prompt nor the rows that fill a batch."""
  asked = prompts(RAGGED)
  same(generator(eos_ids=(EOS,))(asked, max_new_tokens=30, **settings),
       generator(eos_ids=(EOS,), pad_id=5)(asked, max_new_tokens=30, **settings))


def test_a_row_does_not_depend_on_its_batch():
  """To the bit, where the padded lengths are alike: neither what it says nor what is drawn for it."""
  first, *others = prompts((20, 20, 17, 19))
  settings = dict(max_new_tokens=30, seed=3, **SAMPLED)
  alone = generator(eos_ids=(EOS,))([first], **settings)
  same(alone, generator(eos_ids=(EOS,))([first, *others], **settings)[:1])
  again, shorter = generator(eos_ids=(EOS,))([first, first], **settings)
  same(alone, [again])
  assert shorter.tokens.tolist() != again.tokens.tolist()  # another number, other draws
  # In other places of other batches; products of other shapes round otherwise.
  many = prompts((3, 9, 1, 12, 5, 7))
  same(generator()(many, **settings), generator(batch_size=2)(many, **settings), atol=1e-4)
  assert generator(eos_ids=(EOS,))([first], **settings | {'seed': 4})[0].tokens.tolist() != again.tokens.tolist()


def warped_by_transformers(logits_BxV, temperature, top_k, top_p):
  scores = torch.tensor(np.asarray(logits_BxV))
  scores = logits_process.TemperatureLogitsWarper(temperature)(None, scores)
  if top_k:
    scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
  return torch.softmax(logits_process.TopPLogitsWarper(top_p)(None, scores), -1).numpy()


@pytest.mark.parametrize(('temperature', 'top_k', 'top_p'), [
  (1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 500, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.9), (1.0, 0, 1e-6),
  (1.5, 20, 0.6), (0.01, 40, 0.99)])
def test_the_warped_distribution_is_that_of_transformers(temperature, top_k, top_p):
  logits_BxV = 3 * jax.random.normal(jax.random.key(0), (50, V))
  ours = jax.nn.softmax(decode.warp(logits_BxV, temperature, top_k, top_p if top_p < 1 else None), axis=-1)
  want = warped_by_transformers(logits_BxV, temperature, top_k, top_p)
  np.testing.assert_array_equal(np.asarray(ours) > 0, want > 0)
  np.testing.assert_allclose(ours, want, rtol=2e-5, atol=1e-7)


def test_draws_follow_the_distribution():
  prompt, N = prompts((5,))[0], 3000
  settings = dict(temperature=1.3, top_k=12, top_p=0.95)
  drawn = Generator(TINY, params(), batch_size=500)([prompt] * N, max_new_tokens=2, **settings)
  first, second = np.array([x.tokens for x in drawn]).T
  likeliest = np.bincount(first).argmax()
  for tokens, seen in ((prompt, first), ([*prompt, likeliest], second[first == likeliest])):
    want = len(seen) * warped_by_transformers(next_logits(tokens)[None], **settings)[0]
    counts, possible = np.bincount(seen, minlength=V), want > 0
    assert not counts[~possible].any()
    freedom = possible.sum() - 1
    assert freedom > 2
    statistic = ((counts - want)[possible] ** 2 / want[possible]).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)  # five standard deviations of chi-square


def test_log_probabilities_are_the_models_own():
  settings = dict(max_new_tokens=6, **SAMPLED)
  for prompt, got in zip(prompts((4, 18)), generator()(prompts((4, 18)), **settings)):
    for n, (token, logprob) in enumerate(zip(got.tokens, got.logprobs, strict=True)):
      want = jax.nn.log_softmax(next_logits([*prompt, *got.tokens[:n]]))[token]
      np.testing.assert_allclose(logprob, want, rtol=1e-4, atol=1e-5)


def cut_by_a_loop(tokens, stops, detokenize):
  """(text, finished) by looking after each token."""
  for n in range(1, len(tokens) + 1):
    so_far, found = detokenize(tokens[:n]), []
    for stop in stops:
      if isinstance(stop, str):
        found += [so_far[:so_far.index(stop)]] if stop in so_far else []
      elif list(tokens[:n][-len(stop):]) == list(stop):
        found.append(detokenize(tokens[:n - len(stop)]))
    if found:
      return min(found, key=len), 'stop'
  return detokenize(tokens), 'length'


def in_bytes(tokens):
  """Two tokens make one character, and half of one is no character yet."""
  return b''.join(bytes([0xc3 if t % 2 else 0xa0 + t // 2]) for t in tokens).decode(errors='replace')


@pytest.mark.parametrize('detokenize', [text, in_bytes])
@pytest.mark.parametrize('stops', [['ab'], ['cab', 'b. '], ['aba', 'bab', 'é'], ['zzz'], ['è', 'ã'],
                                   [[3]], [[8, 1], 'dd'],
                                   ['a', 'ab', 'abc']])
def test_stops_are_those_of_a_plain_loop(stops, detokenize):
  asked, settings = prompts((4, 7, 2, 12, 6, 6), seed=5), dict(max_new_tokens=40, temperature=1.5, seed=2)
  free = generator(detokenize=detokenize)(asked, **settings)
  for whole, got in zip(free, generator(detokenize=detokenize)(asked, stop=stops, **settings), strict=True):
    want = cut_by_a_loop(whole.tokens.tolist(), stops, detokenize)
    assert (got.text, got.finished) == want
    assert got.tokens.tolist() == whole.tokens[:len(got.tokens)].tolist()
    assert len(got.logprobs) == len(got.tokens)
    # The tokens are those that lie in the text, and not one fewer.
    assert got.text.startswith(detokenize(got.tokens).rstrip('\ufffd'))
    if got.finished == 'stop':
      assert len(detokenize(whole.tokens[:len(got.tokens) + 1])) > len(got.text) or not isinstance(stops[0], str)


def automaton(start=0):
  """Four states at random; a text may end in the last one alone."""
  rng = np.random.default_rng(3)
  table = np.where(rng.random((4, V)) < 0.1, rng.integers(0, 4, (4, V)), -1)
  table[:, 11] = [1, 2, 3, 0]  # there is always a way on
  table[:, EOS] = [-1, -1, -1, 3]
  return Automaton(table, start)


def walk(table, state, tokens):
  for token in tokens:
    assert table[state, token] >= 0
    state = table[state, token]
  return state


@pytest.mark.parametrize('settings', [{}, {'temperature': 2.0, 'top_k': 3, 'top_p': 0.5}])
def test_every_text_is_one_that_the_automaton_accepts(settings):
  starts = np.arange(9) % 4
  constraint = automaton(starts)
  constrained = Generator(TINY, params(), batch_size=4, eos_ids=(EOS,), constraint=constraint)
  got = constrained(prompts((4, 9, 2, 5, 7, 3, 8, 30, 1)), max_new_tokens=25, **settings)
  for start, x in zip(starts, got, strict=True):
    last = walk(constraint.next_SxV, start, x.tokens)
    assert last == 3 or x.finished == 'length'
    assert np.isfinite(x.logprobs).all()
  assert 'eos' in {x.finished for x in got} or not settings


def test_a_constrained_choice_is_the_likeliest_that_is_allowed():
  constraint, (prompt,) = automaton(), prompts((6,))
  got, = Generator(TINY, params(), batch_size=4, eos_ids=(EOS,), constraint=constraint)([prompt], max_new_tokens=12)
  state, tokens = 0, []
  for _ in range(12):
    logits = np.where(constraint.next_SxV[state] >= 0, next_logits([*prompt, *tokens]), -np.inf)
    if logits.argmax() == EOS:
      break
    tokens.append(int(logits.argmax()))
    state = constraint.next_SxV[state, tokens[-1]]
  assert got.tokens.tolist() == tokens


def test_a_row_with_nothing_allowed_is_named():
  table = np.full((3, V), -1)
  table[0, 5], table[1, 6] = 1, 2
  stuck = Generator(TINY, params(), batch_size=2, constraint=Automaton(table))
  with pytest.raises(ValueError, match=r'prompt 0: the constraint allows no token after 2 new ones \(\[5, 6\]'):
    stuck(prompts((4,)), max_new_tokens=9)
  # What comes after a stop is nobody's business.
  assert stuck(prompts((4,)), max_new_tokens=9, stop=[[6]])[0].tokens.tolist() == [5]


@pytest.mark.parametrize(('shape', 'settings'), [((2, 1, 2), SAMPLED), ((1, 4, 1), {})])
def test_a_mesh_changes_nothing(shape, settings):
  constraint = automaton()
  make = functools.partial(Generator, TINY, params(), batch_size=4, eos_ids=(EOS,), constraint=constraint)
  one, many = make(), make(mesh=sharding.make_mesh(*shape))
  asked = prompts((3, 14, 1, 9))
  # Results are fetched after every program, so no two of them run at a time.
  same(one(asked, max_new_tokens=20, **settings), many(asked, max_new_tokens=20, **settings), atol=1e-4)
  given = [prompts((3, 6), seed=n) for n in range(len(asked))]
  for a, b in zip(one.score(asked, given), many.score(asked, given), strict=True):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), a, b)


def test_many_lengths_are_few_programs():
  model = dataclasses.replace(TINY, d_ff=41)  # compiled by no other test
  ours = Generator(model, model.init(jax.random.key(0)), batch_size=4)
  before = [f._cache_size() for f in (decode.read, decode.add, decode.grow)]
  for n in range(1, 41, 3):
    ours([*prompts((n, (3 * n) % 40 + 1))], max_new_tokens=1 + n % 20)
  after = [f._cache_size() for f in (decode.read, decode.add, decode.grow)]
  # Prompts of 16, 32, 64 in caches of 16, 32, 64; a cache of 32 or 64 is added to, or grown to the next.
  read, add, grow = np.subtract(after, before)
  assert 3 <= read <= 6 and 2 <= add <= 3 and grow <= 2, (read, add, grow)


def test_scores_are_the_log_softmax_of_the_whole_text():
  asked = prompts((3, 20, 1, 33, 9))
  given = [prompts(lengths, seed=n) for n, lengths in enumerate(((2, 7), (1,), (), (20, 3, 4), (5, 5)))]
  got = generator().score(asked, given)
  assert [[len(x) for x in row] for row in got] == [[2, 7], [1], [], [20, 3, 4], [5, 5]]
  for prompt, row, scores in zip(asked, given, got, strict=True):
    for tokens, score in zip(row, scores, strict=True):
      for n, token in enumerate(tokens):
        want = jax.nn.log_softmax(next_logits([*prompt, *tokens[:n]]))[token]
        np.testing.assert_allclose(score[n], want, rtol=1e-5, atol=1e-5)


def test_parameters_are_kept_in_the_dtype_of_computing():
  model = dataclasses.replace(TINY, dtype='bfloat16')
  ours = Generator(model, params(), batch_size=4)
  norms = {id(ours.params['norm']['scale']), *map(id, (ours.params['blocks'][f'{x}_norm']['scale']
                                                       for x in ('attention', 'mlp')))}
  for x in jax.tree.leaves(ours.params):
    assert x.dtype == (jnp.float32 if id(x) in norms else jnp.bfloat16)
  again = Generator(model, ours.params, batch_size=4)
  for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(again.params), strict=True):
    assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()  # no copy
  # bfloat16 rounds products to 2^-8: the tokens may differ, their log-probabilities hardly.
  got, = ours(prompts((5,)), max_new_tokens=5)
  for n, token in enumerate(got.tokens):
    want = jax.nn.log_softmax(next_logits([*prompts((5,))[0], *got.tokens[:n]]))[token]
    np.testing.assert_allclose(got.logprobs[n], want, atol=0.2)


def test_a_stream_is_read_some_batches_ahead():
  read = []

  def corpus():
    for n, prompt in enumerate(itertools.cycle(prompts(RAGGED))):
      read.append(n)
      yield prompt

  results = generator().stream(corpus(), max_new_tokens=2)
  assert not read
  first = [next(results) for _ in range(4 * 32)]
  assert len(read) == 4 * 32 and sorted(n for n, _ in first) == read
  want = generator()(prompts(RAGGED), max_new_tokens=2)
  for n, got in first:
    same([got], [want[n % len(RAGGED)]], atol=1e-5)


def test_a_text_may_fill_the_greatest_length():
  """Which is no power of two: nothing is read or written beyond it."""
  prompt, = prompts((30,))
  got, = generator(max_length=45)([prompt], max_new_tokens=np.int64(15))
  same([got], generator()([prompt], max_new_tokens=15), atol=1e-5)


@pytest.mark.parametrize(('asked', 'change', 'message'), [
  ([[1], []], {}, 'prompt 1 is empty'),
  ([[1], [[2]]], {}, r'prompt 1 is int64 \(1, 1\)'),
  ([[0.5]], {}, 'prompt 0 is float64'),
  ([[1, V]], {}, f'prompt 0 has token ids from 1 to {V}; the model knows 0 to {V - 1}'),
  ([[-1]], {}, 'prompt 0 has token ids from -1'),
  ([[1], [1] * 41], {}, 'prompt 1 has 41 tokens and 8 may follow: more than max_length 48'),
  ([[1]], {'max_new_tokens': 0}, 'max_new_tokens 0'),
  ([[1]], {'max_new_tokens': 2.5}, 'max_new_tokens 2.5, want a whole number'),
  ([[1]], {'temperature': -1.0}, 'temperature -1'),
  ([[1]], {'temperature': float('nan')}, 'temperature nan'),
  ([[1]], {'top_p': 0.0}, 'top_p 0'),
  ([[1]], {'top_k': -2}, 'top_k -2'),
  ([[1]], {'stop': 'ab'}, "stop is the string 'ab'"),
  ([[1]], {'stop': ['']}, 'stop has an empty string'),
  ([[1]], {'stop': [[]]}, 'stop 0 is empty'),
])
def test_what_cannot_be_done_is_refused(asked, change, message):
  with pytest.raises(ValueError, match=message):
    generator(max_length=48)(asked, **{'max_new_tokens': 8, **change})


@pytest.mark.parametrize(('change', 'message'), [
  ({'batch_size': 0}, 'batch_size 0'),
  ({'batch_size': 3, 'mesh': (2, 1, 2)}, 'batch_size 3: want a positive multiple of the 2 parts'),
  ({'max_length': 1}, 'max_length 1'),
  ({'pad_id': V}, 'pad_id has token ids'),
  ({'eos_ids': (1, -3)}, 'eos_ids has token ids'),
  ({'params': {'embed': 0}}, 'the parameters are'),
  ({'params': 'int'}, r'parameter blocks\.attention_norm\.scale is int32'),
])
def test_a_generator_that_cannot_be_is_refused(change, message):
  given = {'params': params(), **change}
  if given['params'] == 'int':
    given['params'] = jax.tree.map(lambda p: p.astype(jnp.int32), params())
  if 'mesh' in given:
    given['mesh'] = sharding.make_mesh(*given['mesh'])
  with pytest.raises(ValueError, match=message):
    Generator(TINY, **given)


def test_a_cache_ends_where_dynamic_positions_begin_to_move():
  scaled = dataclasses.replace(TINY, rope_scaling=(('rope_type', 'dynamic'), ('factor', 2.0),
                                                   ('original_max_position_embeddings', 40)))
  with pytest.raises(ValueError, match='max_length 41: with rope_type dynamic a cache holds to 40'):
    Generator(scaled, params(), max_length=41)
  ours, (prompt,) = Generator(scaled, params(), batch_size=4), prompts((20,))
  same(ours([prompt], max_new_tokens=20), Generator(TINY, params(), batch_size=4)([prompt], max_new_tokens=20),
       atol=1e-5)
  with pytest.raises(ValueError, match='more than max_length 40'):
    ours([prompt], max_new_tokens=21)


def test_strings_cannot_stop_without_a_detokenizer():
  with pytest.raises(ValueError, match=r"stop has strings, \['ab'\], and the generator no detokenize"):
    generator(detokenize=None)([[1]], max_new_tokens=3, stop=['ab'])


@pytest.mark.parametrize(('table', 'start', 'message'), [
  (np.zeros((2, 3)), 0, r'next_SxV is float64 \(2, 3\)'), (np.zeros(3, int), 0, r'next_SxV is int64 \(3,\)'),
  (np.full((2, 3), 2), 0, 'next_SxV has values from 2 to 2, want states of 0 to 1'),
  (np.zeros((2, 3), int), 2, 'start has values from 2 to 2'),
])
def test_an_automaton_that_is_none_is_refused(table, start, message):
  with pytest.raises(ValueError, match=message):
    Automaton(table, start)


def test_a_constraint_of_another_vocabulary_is_refused():
  narrow = Generator(TINY, params(), batch_size=2, constraint=Automaton(np.zeros((1, V - 4), int)))
  with pytest.raises(ValueError, match=rf'a mask of \(2, {V - 4}\) for logits of \(2, {V}\)'):
    narrow(prompts((3,)), max_new_tokens=2)


def test_every_prompt_needs_a_first_state():
  short = Generator(TINY, params(), batch_size=2, constraint=automaton(np.zeros(1, int)))
  with pytest.raises(ValueError, match='prompt 1 has no first state, start holds 1'):
    short(prompts((3, 3)), max_new_tokens=2)
