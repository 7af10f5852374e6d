"""Laws of decoding with a cache that forgets: tokens and log-probabilities are those of the dense mask."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from datasel import decode, sharding
from datasel.attention import anchors
from datasel.data.anchors import Rule
from datasel.decode import Automaton
from datasel.generate import Generator
from datasel.methods.anllm import generate
from datasel.methods.anllm.cache import slot_bytes
from datasel.methods.anllm.generate import AnchorGenerator
from datasel.models.mistral import Mistral

V, EOS, AC = 64, 7, 50
BASE = Mistral(vocab_size=V, n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40,
               attention='reference')
EP = dataclasses.replace(BASE, anchors=Rule(tuple(range(0, V, 9))))
FIXED = dataclasses.replace(BASE, anchors=Rule(max_length=3), keep_bos=True)
OWN = dataclasses.replace(BASE, anchors=Rule((AC,), min_length=2, max_length=6))
RAGGED = (3, 20, 1, 9, 33)
SAMPLED = dict(temperature=0.8, top_k=30, top_p=0.9)


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 5, BASE.init(jax.random.key(0)))  # large enough that every path matters


def prompts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V, n).astype(np.int32) for n in lengths]


@functools.cache
def generator(model=EP, **kwargs):
  return AnchorGenerator(model, params(), **{'batch_size': 4, 'chunk': 7, **kwargs})


@functools.cache
def _apply(model):
  return jax.jit(model.apply)


def logprobs(model, tokens, protected=()):
  """The log-softmax after each token of a text, by the whole forward pass under the dense mask."""
  row, kept = np.zeros((1, 128), np.int32), np.zeros((1, 128), bool)
  row[0, :len(tokens)], kept[0, :len(protected)] = tokens, protected
  logits = _apply(model)(params(), row, **({'protected_BxL': kept} if model.anchors else {}))
  return np.asarray(jax.nn.log_softmax(logits[0, :len(tokens)], axis=-1))


def check(model, prompt, got, protected=()):
  """Greedy: each token is the likeliest one, of that log-probability."""
  after = logprobs(model, [*prompt, *got.tokens], protected)[len(prompt) - 1:-1]
  assert got.tokens.tolist() == after.argmax(axis=-1).tolist()
  np.testing.assert_allclose(got.logprobs, after.max(axis=-1), rtol=1e-4, atol=5e-5)


def same(a, b, atol=0.0):
  for x, y in zip(a, b, strict=True):
    assert x.tokens.tolist() == y.tokens.tolist() and x.finished == y.finished
    np.testing.assert_allclose(x.logprobs, y.logprobs, rtol=0, atol=atol)


@pytest.mark.parametrize(('model', 'chunk'), [(EP, 7), (FIXED, 64)])
def test_greedy_tokens_are_those_of_the_dense_mask(model, chunk, monkeypatch):
  """Also where the buffers grow in the middle of a text."""
  rooms = set()
  grow = decode.grow
  monkeypatch.setattr(decode, 'grow', lambda *args, **kwargs: (rooms.add(kwargs['length']), grow(*args, **kwargs))[1])
  asked = prompts(RAGGED)
  for prompt, got in zip(asked, generator(model, chunk=chunk)(asked, max_new_tokens=40), strict=True):
    assert len(got.tokens) == 40
    check(model, prompt, got)
  assert rooms and all(room.slots < 73 for room in rooms)
  if model is FIXED:
    assert {dataclasses.astuple(room) for room in rooms} == {(1, 32, 2)}


def test_protected_tokens_of_each_prompt_stay():
  lengths, rng = RAGGED[:4], np.random.default_rng(1)
  asked, kept = prompts(lengths), [rng.random(n) < 0.3 for n in lengths]
  for prompt, mark, got in zip(asked, kept, generator()(asked, max_new_tokens=12, protected=kept), strict=True):
    check(EP, prompt, got, mark)


@pytest.mark.parametrize('shape', [None, (2, 1, 2)])
def test_a_prefix_read_once_stands_before_every_prompt(shape):
  """What follows is that of the whole text, also over a mesh; and of the prefix only what it says is kept."""
  ours = generator(mesh=None if shape is None else sharding.make_mesh(*shape))
  text, = prompts((45,), seed=3)
  kept = np.arange(45) % 20 == 4
  prefix = ours.read(text, protected=kept)
  anchor, state = anchors.flags(text[None], EP.anchors)
  tail = np.arange(45) >= 45 - state.length_B[0]
  assert (prefix.length, prefix.live) == (45, int((anchor[0] | tail | kept).sum()))
  assert prefix.live_bytes == prefix.live * slot_bytes(EP)
  assert prefix.allocated_bytes == slot_bytes(EP) * prefix.cache.room.slots
  assert dataclasses.astuple(prefix.cache.room) == (4, 16, 16)
  asked = prompts((2, 8, 1, 15, 5), seed=4)
  streamed = dict(ours.stream(iter(asked), max_new_tokens=8, prefix=prefix))
  for results in (ours(asked, max_new_tokens=8, prefix=prefix), [streamed[n] for n in range(len(asked))]):
    for prompt, got in zip(asked, results, strict=True):
      check(EP, [*text, *prompt], got, kept)
  given = [prompts((1, 6), seed=n) for n in range(len(asked))]
  for prompt, row, scores in zip(asked, given, ours.score(asked, given, prefix=prefix), strict=True):
    for tokens, found in zip(row, scores, strict=True):
      after = logprobs(EP, [*text, *prompt, *tokens], kept)[44 + len(prompt):-1]
      np.testing.assert_allclose(found, np.take_along_axis(after, tokens[:, None], 1)[:, 0], rtol=1e-4, atol=5e-5)


def test_scores_are_the_log_softmax_of_the_whole_text():
  asked = prompts((3, 20, 1, 33, 9))
  given = [prompts(lengths, seed=n) for n, lengths in enumerate(((2, 7), (1,), (), (20, 3, 4), (5, 5)))]
  got = generator().score(asked, given)
  assert [[len(x) for x in row] for row in got] == [[2, 7], [1], [], [20, 3, 4], [5, 5]]
  for prompt, row, scores in zip(asked, given, got, strict=True):
    for tokens, found in zip(row, scores, strict=True):
      after = logprobs(EP, [*prompt, *tokens])[len(prompt) - 1:-1]
      np.testing.assert_allclose(found, np.take_along_axis(after, tokens[:, None], 1)[:, 0], rtol=1e-4, atol=5e-5)


def automaton():
  """From a state, the tokens of one half; never the anchor."""
  table = np.full((2, V), -1)
  table[0, :32], table[1, 32:] = 1, 0
  table[:, AC] = -1
  return Automaton(table)


@pytest.mark.parametrize('constraint', [None, automaton()], ids=['free', 'constrained'])
def test_where_a_segment_must_close_its_anchor_is_said(constraint):
  """As `insert` writes it in training: no other token ever closes a segment.  The constraint is of the rest."""
  ours = AnchorGenerator(OWN, params(), batch_size=4, chunk=7, anchor_id=AC, constraint=constraint)
  asked = [prompt[:5] for prompt in prompts(RAGGED)]  # an open segment of 5 tokens must close at once
  assert sorted(map(len, asked)) == [1, 3, 5, 5, 5]
  for prompt, got in zip(asked, ours(asked, max_new_tokens=30), strict=True):
    text = np.array([*prompt, *got.tokens])
    anchor, _ = anchors.flags(text[None], OWN.anchors)
    assert (text[anchor[0]] == AC).all() and anchor.sum() >= 4
    after = logprobs(OWN, text)[len(prompt) - 1:-1]
    np.testing.assert_allclose(got.logprobs, after[np.arange(30), got.tokens], rtol=1e-4, atol=5e-5)
    length = np.arange(1, len(text) + 1) - np.concatenate([[0], np.maximum.accumulate(
      np.where(anchor[0], np.arange(1, len(text) + 1), 0))[:-1]])
    free = length[len(prompt):] < 6
    if constraint is None:
      assert got.tokens[free].tolist() == after[free].argmax(axis=-1).tolist()
    else:
      halves = got.tokens[free] >= 32
      assert halves.tolist() == (np.arange(free.sum()) % 2 == 1).tolist()


def test_without_an_id_of_its_own_any_token_closes_a_segment():
  ours = AnchorGenerator(OWN, params(), batch_size=4, chunk=7)
  for prompt, got in zip(prompts((5, 2)), ours(prompts((5, 2)), max_new_tokens=20), strict=True):
    check(OWN, prompt, got)
    assert (got.tokens != AC).any()


def test_a_row_does_not_depend_on_its_batch():
  """To the bit, where the padded lengths are alike: neither what it says nor what is drawn for it."""
  first, *others = prompts((20, 20, 17, 19))
  settings = dict(max_new_tokens=30, seed=3, **SAMPLED)
  alone, beside = generator()([first], **settings), generator()([first, *others], **settings)
  same(alone, beside[:1])
  again = generator()([first] * 2, **settings)
  same(alone, again[:1])
  assert again[1].tokens.tolist() != again[0].tokens.tolist()  # another number, other draws


def test_a_model_without_anchors_decodes_as_ever():
  """The same code with a full cache: eos, stops and draws are those of `Generator`."""
  asked = prompts((3, 9, 12))
  text = lambda tokens: ''.join(chr(97 + t % 26) for t in tokens)
  make = functools.partial(dict, batch_size=4, eos_ids=(EOS,), detokenize=text)
  ours, theirs = AnchorGenerator(BASE, params(), **make(chunk=16)), Generator(BASE, params(), **make())
  settings = dict(max_new_tokens=13, seed=1, stop=['ab', [3, 4], 'q'], **SAMPLED)
  got, want = ours(asked, **settings), theirs(asked, **settings)
  same(got, want, atol=1e-4)
  assert [x.text for x in got] == [x.text for x in want] and len({x.finished for x in got}) > 1


def test_many_lengths_are_few_programs():
  model = dataclasses.replace(EP, d_ff=41)  # compiled by no other test
  ours = AnchorGenerator(model, model.init(jax.random.key(0)), batch_size=4, chunk=16)
  programs = (generate._begin, generate._extend, decode.begin, decode.add, decode.grow)
  before = [f._cache_size() for f in programs]
  for n in range(1, 24, 2):
    ours([*prompts((n, (3 * n) % 24 + 1))], max_new_tokens=1 + n % 6)
  found = np.subtract([f._cache_size() for f in programs], before)
  # Windows and anchors of 16, and at times of 32; one width of chunk.
  assert (found <= (4, 4, 1, 4, 2)).all() and found.min(where=[True] * 4 + [False], initial=9) > 0, found


@pytest.mark.parametrize(('model', 'change', 'message'), [
  (EP, {'chunk': 0}, 'chunk 0, want at least 1'),
  (EP, {'anchor_id': 9}, 'anchor_id 9: the model has Rule'),
  (BASE, {'anchor_id': 9}, 'want the one id of its rule'),
  (dataclasses.replace(BASE, anchors=Rule((V,))), {'anchor_id': V}, rf'has ids \[{V}\], the model knows 0 to {V - 1}'),
  (dataclasses.replace(BASE, window=8), {}, 'the model has a sliding window of 8'),
])
def test_a_generator_that_cannot_be_is_refused(model, change, message):
  with pytest.raises(ValueError, match=message):
    AnchorGenerator(model, params(), **change)


@pytest.mark.parametrize(('model', 'change', 'message'), [
  (EP, {'protected': [[True]]}, '2 prompts and protected tokens of 1'),
  (EP, {'protected': [[True], [True]]}, r'prompt 0: protected is bool \(1,\), want bool \(3,\)'),
  (EP, {'protected': [[1, 0, 1], [True]]}, r'prompt 0: protected is int64 \(3,\)'),
  (BASE, {'protected': [[True] * 3, [True]]}, 'given to a model without anchors'),
])
def test_what_cannot_be_done_is_refused(model, change, message):
  with pytest.raises(ValueError, match=message):
    generator(model)([[1, 2, 3], [4]], max_new_tokens=2, **change)


def test_a_prefix_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='prefix has 60 tokens.* more than max_length 48'):
    generator(max_length=48).read(prompts([60])[0])
  ours, text = generator(max_length=48), prompts((40,))[0]
  prefix = ours.read(text)
  with pytest.raises(ValueError, match='prompt 0 has 44 tokens and 5 may follow: more than max_length 48'):
    ours([[1] * 4], max_new_tokens=5, prefix=prefix)
  with pytest.raises(ValueError, match='the prefix was read by another generator'):
    generator()([[1]], max_new_tokens=2, prefix=prefix)
  with pytest.raises(ValueError, match='prefix has token ids from 64'):
    ours.read([V])
