"""Anchor flags, masks and their few numbers, against loops written from the paper's words and hand-drawn masks."""

import itertools

import jax
import jax.numpy as jnp
import nltk
import numpy as np
import pytest
import sentencepiece

from datasel.data import tokenizer as tokenizers
from datasel.methods.anllm import anchors
from datasel.methods.anllm.anchors import Open, Rule

RULES = {
  'none': Rule(), 'every': Rule((3,)), 'two ids': Rule((5, 3)), 'fixed': Rule(max_length=4),
  'at most 3': Rule((3,), 1, 3), 'at least 3': Rule((3,), 3), '3 to 5': Rule((3, 1), 3, 5),
  'always 4': Rule((3,), 4, 4), 'long': Rule((3,), 2, 40),
}
TEXTS = ['The cat sat. It slept! Did it dream?\n\nNo one knows.  Pi is 3.14, e.g. here... "Yes." He left.',
         'One only.', '', 'no end', 'Ends. ', ' Leads. Follows.', 'Ünïcode 世界. 🙂 Second.\nThird line. Fourth']
flags = jax.jit(anchors.flags, static_argnums=1)
visible, segments = (jax.jit(f, static_argnames=('anchor_sees_anchors', 'keep_bos')) for f in (anchors.visible,
                                                                                               anchors.segments))
compact = jax.jit(anchors.compact, static_argnums=1)
WHATS = [dict(anchor_sees_anchors=sees, keep_bos=bos) for sees in (False, True) for bos in (False, True)]


def one_by_one(tokens, segment, rule):
  """The rule in words, a token at a time: the flags of a row, the open length, and its document."""
  found, length, document = [], 0, 0
  for token, own in zip(tokens, segment, strict=True):
    if own == 0:
      found.append(False)
      continue
    if own != document:
      length, document = 0, own
    length += 1
    closes = (token in rule.anchor_ids and length >= rule.min_length) or length == rule.max_length
    found.append(closes)
    if closes:
      length = 0
  return found, length, document


def rows(rng, B=4, L=35, vocabulary=6, padding=0.1):
  """Tokens, and documents of 1 to 15 tokens among padding."""
  tokens = rng.integers(0, vocabulary, (B, L)).astype(np.int32)
  segment = 1 + np.cumsum(rng.random((B, L)) < rng.choice([0.0, 0.15]), axis=1)
  return tokens, np.where(rng.random((B, L)) < padding, 0, segment).astype(np.int32)


def mask(drawing):
  return np.array([[c == '#' for c in row] for row in drawing.split('|')])[None]


@pytest.mark.parametrize('name, form', [
  *((name, np.asarray) for name in RULES), *((name, jnp.asarray) for name in ('two ids', 'at most 3', '3 to 5')),
], ids=lambda x: getattr(x, '__module__', x))
def test_flags_are_the_rule_told_a_token_at_a_time(name, form):
  rng, rule = np.random.default_rng(0), RULES[name]
  find = anchors.flags if form is np.asarray else flags
  for _ in range(30):
    tokens, segment = rows(rng)
    found, state = find(form(tokens), rule, form(segment))
    wanted, lengths, documents = zip(*(one_by_one(*row, rule) for row in zip(tokens, segment, strict=True)))
    assert isinstance(found, np.ndarray if form is np.asarray else jax.Array)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(state.length_B, lengths)
    np.testing.assert_array_equal(state.document_B, documents)


@pytest.mark.parametrize('form', [np.asarray, jnp.asarray], ids=['numpy', 'jax'])
@pytest.mark.parametrize('rule', [RULES['every'], RULES['at most 3'], RULES['3 to 5']], ids=str)
def test_a_stream_in_chunks_has_the_flags_of_the_whole(rule, form):
  """Chunks of 1, 7 and ragged ones: each row takes its own number of tokens of each chunk, the rest is padding."""
  rng = np.random.default_rng(1)
  find = anchors.flags if form is np.asarray else flags
  tokens, segment = rows(rng, padding=0)
  whole, end = anchors.flags(tokens, rule, segment)
  fresh = jax.tree.map(form, Open(np.zeros(4, np.int32), np.zeros(4, np.int32)))
  for size in (1, 7):
    state, found = fresh, []
    for at in range(0, 35, size):
      part, state = find(form(tokens[:, at:at + size]), rule, form(segment[:, at:at + size]), state)
      found.append(part)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), whole)
    jax.tree.map(np.testing.assert_array_equal, state, end)

  state, found, at = fresh, [[] for _ in tokens], np.zeros(4, int)
  while (at < 35).any():
    take = np.minimum(rng.integers(0, 8, 4), 35 - at)
    chunk, own = np.zeros((2, 4, 7), np.int32)
    for row, n in enumerate(take):
      chunk[row, :n], own[row, :n] = tokens[row, at[row]:][:n], segment[row, at[row]:][:n]
    part, state = find(form(chunk), rule, form(own), state)
    for row, n in enumerate(take):
      found[row].extend(np.asarray(part)[row, :n].tolist())
      assert not np.asarray(part)[row, n:].any()
    at += take
  np.testing.assert_array_equal(found, whole)
  jax.tree.map(np.testing.assert_array_equal, state, end)


@pytest.mark.parametrize('rule, drawing', [
  (Rule((9,)), '. . 9 9 . 9 .  ->  --##-#-'),  # neighbours: segments of one token
  (Rule((9,), 2), '. . 9 9 . 9 . . 9  ->  --#--#--#'),  # too short: the text goes on
  (Rule((9,), 1, 3), '. . . . . 9 . .  ->  --#--#--'),
  (Rule((9,), 2, 3), '9 . . 9 9 9 .  ->  --#-#--'),
  (Rule(max_length=2), '. . . . .  ->  -#-#-'),
  (Rule(), '. 9 .  ->  ---'),
], ids=str)
def test_flags_by_hand(rule, drawing):
  text, wanted = drawing.split('  ->  ')
  tokens = np.array([[9 if c == '9' else 1 for c in text.split()]], np.int32)
  assert ''.join('-#'[int(x)] for x in anchors.flags(tokens, rule)[0][0]) == wanted


def seen_in_words(anchor, document, i, j, sees, protected):
  """Whether i sees j: 'previous tokens of its own sequence, and the anchors of preceding ones; an anchor only its own'.

  A sequence is what lies between anchors; it ends with one.  3.2, with the token itself as in Figure 2.
  """
  if j > i or document[i] == 0 or document[i] != document[j]:
    return False
  ended_between = any(anchor[t] for t in range(j, i) if document[t] == document[i])
  if not ended_between or protected[j]:
    return True
  return bool(anchor[j]) and (sees or not anchor[i])


@pytest.mark.parametrize('what', WHATS, ids=str)
def test_visible_is_the_papers_words(what):
  rng = np.random.default_rng(2)
  for density, padding, protects in itertools.product((0.0, 0.2, 0.6, 1.0), (0, 0.15), (False, True)):
    _, segment = rows(rng, B=2, L=15, padding=padding)
    anchor = rng.random(segment.shape) < density
    protected = rng.random(segment.shape) < 0.15 if protects else None
    found = visible(anchor, segment, protected_BxL=protected, **what)
    for b, own in enumerate(segment):
      keeps = np.zeros(15, bool) if protected is None else protected[b].copy()
      if what['keep_bos']:
        for document in set(own.tolist()) - {0}:
          keeps[own.tolist().index(document)] = True
      wanted = [[seen_in_words(anchor[b], own, i, j, what['anchor_sees_anchors'], keeps) for j in range(15)]
                for i in range(15)]
      np.testing.assert_array_equal(found[b], wanted)


def test_visible_is_the_mask_of_the_authors_loop():
  """Of each anchor: later rows lose what its segment had before it, and itself the anchors before; padding all."""
  rng = np.random.default_rng(3)
  for density in (0.0, 0.1, 0.3, 0.7, 1.0):
    anchor, real = rng.random((20, 24)) < density, np.arange(24) < rng.integers(1, 25, (20, 1))
    found = visible(anchor & real, real.astype(np.int32))
    for b in range(20):
      wanted, at = np.tril(np.ones((24, 24), bool)), np.flatnonzero(anchor[b] & real[b])
      start = 0
      for n, end in enumerate(at):
        wanted[end + 1:, start:end] = False
        wanted[end, at[:n]] = False
        start = end + 1
      wanted[~real[b]] = False
      wanted[:, ~real[b]] = False
      np.testing.assert_array_equal(found[b], wanted)


FIGURE_2 = '#.......|##......|###.....|####....|...##...|...###..|....###.|...#..##'


@pytest.mark.parametrize('what, drawing', [
  ({}, FIGURE_2),
  ({'anchor_sees_anchors': True}, '#.......|##......|###.....|####....|...##...|...###..|...####.|...#..##'),
  ({'keep_bos': True}, '#.......|##......|###.....|####....|#..##...|#..###..|#...###.|#..#..##'),
  ({'protected_BxL': np.arange(8)[None] == 4},
   '#.......|##......|###.....|####....|...##...|...###..|....###.|...##.##'),
], ids=['figure 2', 'anchors see anchors', 'keep bos', 'protected'])
def test_masks_drawn_by_hand(what, drawing):
  anchor = np.isin(np.arange(8), (3, 6))[None]
  np.testing.assert_array_equal(visible(anchor, **what), mask(drawing))


def test_figure_2_leaves_three_entries_of_eight():
  found = segments(np.isin(np.arange(8), (3, 6))[None])
  still_open = 8 - int(found.start_BxL[0, -1])
  assert int(found.kept_BxL.sum()) + still_open == 3 and 1 - 3 / 8 == 0.625


def test_two_documents_of_a_row_drawn_by_hand():
  anchor = np.isin(np.arange(7), (1, 4))[None]
  np.testing.assert_array_equal(visible(anchor, np.array([[1, 1, 1, 2, 2, 2, 0]])),
                                mask('#......|##.....|.##....|...#...|...##..|....##.|.......'))


@pytest.mark.parametrize('what', WHATS, ids=str)
@pytest.mark.parametrize('protects', [False, True])
def test_the_few_numbers_say_what_the_mask_says(what, protects):
  """And its two parts never hold both, so that one softmax may run over both."""
  rng = np.random.default_rng(4)
  for density in (0.0, 0.1, 0.3, 1.0):
    _, segment = rows(rng)
    anchor = rng.random(segment.shape) < density
    protected = rng.random(segment.shape) < 0.1 if protects else None
    few = jax.tree.map(np.array, segments(anchor, segment, protected_BxL=protected, **what))
    position_BxC, count_B = map(np.array, compact(few.kept_BxL, 40))
    truth = np.array(visible(anchor, segment, protected_BxL=protected, **what))
    i, j = np.arange(35)[:, None], np.arange(35)[None]
    for b in range(4):
      segment_L, first, stop = few.segment_BxL[b], few.first_BxL[b][:, None], few.stop_BxL[b][:, None]
      own = (j <= i) & (segment_L[:, None] == segment_L[None]) & (segment_L > 0)[:, None]
      c = np.arange(count_B[b])[None]
      kept, at = (first <= c) & (c < stop), position_BxC[b, :count_B[b]]
      if few.narrow_BxL is not None:
        kept &= few.protected_BxL[b, at][None] | ~few.narrow_BxL[b][:, None]
      beyond = np.zeros((35, 35), bool)
      beyond[:, at] = kept
      assert not (own & beyond).any()
      np.testing.assert_array_equal(own | beyond, truth[b])

      np.testing.assert_array_equal(at, np.flatnonzero(few.kept_BxL[b]))
      np.testing.assert_array_equal(few.index_BxL[b][at], np.arange(len(at)))
      assert (np.diff(segment_L[segment_L > 0]) >= 0).all()
      np.testing.assert_array_equal(few.start_BxL[b], [np.argmax(segment_L == own) if own else 0 for own in segment_L])


def test_compact_tells_of_what_did_not_fit():
  position_BxC, count_B = compact(np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], bool), 2)
  assert position_BxC.tolist() == [[0, 2], [3, 4]] and count_B.tolist() == [3, 1]


def test_packed_documents_are_as_alone():
  rng = np.random.default_rng(5)
  lengths, rule = [12, 1, 12], Rule((3,), 2, 5)
  tokens = rng.integers(0, 6, (1, 28)).astype(np.int32)
  segment = np.array([*np.repeat([1, 2, 3], lengths), 0, 0, 0])[None]
  packed, _ = anchors.flags(tokens, rule, segment)
  seen = np.array(visible(packed, segment, keep_bos=True))
  at = 0
  for length in lengths:
    alone, _ = anchors.flags(tokens[:, at:at + length], rule)
    np.testing.assert_array_equal(packed[:, at:at + length], alone)
    np.testing.assert_array_equal(seen[:, at:at + length, at:at + length], visible(alone, keep_bos=True))
    seen[:, at:at + length, at:at + length] = False
    at += length
  assert not seen.any()


def test_rows_on_several_devices_exchange_nothing():
  def everything(tokens_BxL, segment_BxL):
    anchor_BxL, state = anchors.flags(tokens_BxL, Rule((3,), 2, 5), segment_BxL)
    few = anchors.segments(anchor_BxL, segment_BxL, keep_bos=True)
    return state, few, anchors.compact(few.kept_BxL, 16)

  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  rows_of = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=by_row)
  program = jax.jit(everything, out_shardings=by_row).lower(rows_of, rows_of).compile().as_text()
  assert 's32[2,32]' in program
  for exchange in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter'):
    assert exchange not in program


def test_at_most_so_many_anchors():
  """The room that `compact` needs: L // min_length."""
  tokens = np.full((1, 35), 3, np.int32)
  for least in (1, 2, 4, 5):
    assert anchors.flags(tokens, Rule((3,), least))[0].sum() == 35 // least


def decoded(parts, rule, trailing, bos, eos):
  """What a writer of the parts writes, who ends them with the anchor and is held to the longest segment."""
  ends, text = np.cumsum([len(part) for part in parts]), np.concatenate(parts).tolist()
  written, state = [], Open(np.zeros(1, np.int32), np.zeros(1, np.int32))

  def feed(token):
    nonlocal state
    if token != 9 and anchors.must_close(state, rule)[0]:
      feed(9)
    written.append(token)
    anchor, state = anchors.flags(np.array([[token]], np.int32), rule, state=state)
    assert anchor[0, 0] == (token == 9)

  if bos:
    feed(0)
  for n, token in enumerate(text, 1):
    feed(token)
    if n in ends and state.length_B[0] + 1 >= rule.min_length and (trailing or n < len(text)):
      feed(9)
  if eos:
    feed(0)
  return written


@pytest.mark.parametrize('trailing, bos, eos', [(False, False, False), (True, True, False), (False, True, True)])
@pytest.mark.parametrize('rule', [Rule((9,)), Rule((9,), 4), Rule((9,), 1, 5), Rule((9,), 4, 6), Rule((9,), 2, 2)],
                         ids=str)
def test_inserted_anchors_are_the_ones_found_and_the_ones_that_decoding_feeds(rule, trailing, bos, eos):
  rng = np.random.default_rng(6)
  for _ in range(20):
    parts = [rng.integers(1, 9, rng.integers(0, 12)).astype(np.int32) for _ in range(rng.integers(1, 6))]
    tokens = anchors.insert(parts, 9, rule, trailing=trailing, bos=bos, eos=eos)
    np.testing.assert_array_equal(tokens[tokens != 9], np.concatenate(parts))
    whole = np.array([[0] * bos + tokens.tolist() + [0] * eos], np.int32)
    assert decoded(parts, rule, trailing, bos, eos) == whole[0].tolist()
    if whole.size:
      np.testing.assert_array_equal(anchors.flags(whole, rule)[0], whole == 9)


def test_inserted_by_hand():
  parts = [np.array(part, np.int32) for part in ([1, 2], [], [3], [4, 5, 6, 7])]
  assert anchors.insert(parts, 9, Rule((9,))).tolist() == [1, 2, 9, 3, 9, 4, 5, 6, 7]
  assert anchors.insert(parts, 9, Rule((9,)), trailing=True).tolist() == [1, 2, 9, 3, 9, 4, 5, 6, 7, 9]
  assert anchors.insert(parts, 9, Rule((9,), 3)).tolist() == [1, 2, 9, 3, 4, 5, 6, 7]
  assert anchors.insert(parts, 9, Rule((9,), 1, 4)).tolist() == [1, 2, 9, 3, 9, 4, 5, 6, 9, 7]
  assert anchors.insert([], 9, Rule((9,)), trailing=True).tolist() == []


@pytest.fixture(scope='module')
def encoders(tmp_path_factory):
  """A byte-level BPE; and a sentencepiece one which, like Llama's, begins every text with a space."""
  folder = tmp_path_factory.mktemp('anchors')
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS * 4), model_prefix=str(folder / 'spm'), vocab_size=320, model_type='bpe',
    byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False, minloglevel=2,
    hard_vocab_limit=False)
  return {'bytes': tokenizers.train_bpe(TEXTS * 4, 400, folder / 'tokenizer.json'),
          'pieces': tokenizers.load(folder / 'spm.model')}


@pytest.mark.parametrize('split', [anchors.split_sentences, nltk.PunktSentenceTokenizer().tokenize],
                         ids=['ours', 'nltk'])
@pytest.mark.parametrize('name', ['bytes', 'pieces'])
def test_a_text_with_anchors_is_its_tokens_and_one_anchor_between_sentences(encoders, name, split):
  encoder = encoders[name]
  anchor_id = encoder.vocab_size
  for trailing in (False, True):
    found = anchors.with_anchors(TEXTS, encoder, anchor_id, Rule((anchor_id,)), trailing=trailing, split=split)
    for text, ids, plain in zip(TEXTS, found, encoder.encode_batch(TEXTS), strict=True):
      np.testing.assert_array_equal(ids[ids != anchor_id], plain)
      assert (ids == anchor_id).sum() == max(len(split(text)) - (not trailing), 0)
  cut = np.split(found[0], np.flatnonzero(found[0] == anchor_id))
  assert encoder.decode(cut[0]) == split(TEXTS[0])[0]


def test_sentences():
  assert anchors.split_sentences(TEXTS[0]) == ['The cat sat.', 'It slept!', 'Did it dream?', 'No one knows.',
                                               'Pi is 3.14, e.g. here...', '"Yes."', 'He left.']
  assert anchors.split_sentences('A title\n \nsmall. "Quoted!" (So.) 7 of them. end') == [
    'A title', 'small.', '"Quoted!"', '(So.)', '7 of them. end']
  assert anchors.split_sentences(' \n') == []
  assert len(anchors.split_sentences('.' * 200_000 + ' ' * 200_000 + '.')) == 1  # in no time


@pytest.mark.parametrize('name', ['bytes', 'pieces'])
def test_the_period_alone_is_the_anchor(encoders, name):
  encoder = encoders[name]
  [period] = anchors.punctuation_ids(encoder)
  assert encoder.decode([period]) == '.'
  assert anchors.punctuation_ids(encoder, ('!', '.'))[1] == period
  [ids] = encoder.encode_batch(['It slept! The cat sat. So'])
  found, _ = anchors.flags(ids[None], Rule((period,)))
  assert found.sum() == 1 and encoder.decode(ids[:found.argmax() + 1]) == 'It slept! The cat sat.'
  assert anchors.flags(ids[None], Rule(anchors.punctuation_ids(encoder, '.!')))[0].sum() == 2
  with pytest.raises(ValueError, match="want one more token for 'zqx'"):
    anchors.punctuation_ids(encoder, ['zqx'])


def test_merged_periods_close_nothing(encoders):
  ids, = encoders['bytes'].encode_batch(['here... here...'])
  period, = anchors.punctuation_ids(encoders['bytes'])
  assert '...' in map(lambda i: encoders['bytes'].decode([i]), ids) and period not in ids


def test_the_anchor_row():
  kernel = jnp.array([[1, 2], [3, 6], [8, 1]], jnp.bfloat16)
  added = anchors.with_anchor_row(kernel, 3, 'mean')
  assert added.dtype == jnp.bfloat16 and added.tolist() == [[1, 2], [3, 6], [8, 1], [4, 3]]
  assert anchors.with_anchor_row(kernel, 3, 'copy_period', period_id=1)[3].tolist() == [3, 6]
  assert anchors.with_anchor_row(kernel, 0, 'mean').tolist() == [[5.5, 3.5], [3, 6], [8, 1]]
  assert anchors.with_anchor_row(kernel, 2, 'copy_period', period_id=0).tolist() == [[1, 2], [3, 6], [1, 2]]


BAD = {
  'min_length': lambda: Rule((3,), 0),
  'max_length 2': lambda: Rule((3,), 3, 2),
  'max_length True': lambda: Rule(max_length=True),
  'anchor_ids': lambda: Rule((-1,)),
  "anchor_ids '.'": lambda: Rule('.'),
  'tokens_BxL is float32': lambda: anchors.flags(np.zeros((1, 3), np.float32), Rule()),
  'tokens_BxL is int32 \\(3,\\)': lambda: anchors.flags(np.zeros(3, np.int32), Rule()),
  'not empty': lambda: anchors.flags(np.zeros((1, 0), np.int32), Rule()),
  'segment_BxL is int32 \\(1, 2\\)': lambda: anchors.flags(
    np.zeros((1, 3), np.int32), Rule(), np.ones((1, 2), np.int32)),
  'state.length_B is int32 \\(2,\\)': lambda: anchors.flags(
    np.zeros((1, 3), np.int32), Rule(), state=Open(np.zeros(2, np.int32), np.zeros(2, np.int32))),
  'anchor_BxL is int32': lambda: anchors.visible(np.zeros((1, 3), np.int32)),
  'segment_BxL is float32': lambda: anchors.segments(np.zeros((1, 3), bool), np.ones((1, 3), np.float32)),
  'protected_BxL is bool \\(1, 4\\)': lambda: anchors.visible(
    np.zeros((1, 3), bool), protected_BxL=np.zeros((1, 4), bool)),
  'does not fit': lambda: anchors.insert([], 9, Rule((8,))),
  'at least 2': lambda: anchors.insert([], 9, Rule((9,), 1, 1)),
  'the text has token 9': lambda: anchors.insert([np.array([4, 9])], 9, Rule((9,))),
  'unknown first value': lambda: anchors.with_anchor_row(np.zeros((3, 2)), 3, 'median'),
  'anchor_id 4, and 3 rows': lambda: anchors.with_anchor_row(np.zeros((3, 2)), 4, 'mean'),
  'period_id None': lambda: anchors.with_anchor_row(np.zeros((3, 2)), 3, 'copy_period'),
}


@pytest.mark.parametrize('message', BAD)
def test_what_makes_no_sense_is_refused(message):
  with pytest.raises(ValueError, match=message):
    BAD[message]()


@pytest.mark.parametrize('sentences', [['One.', 'Three.'], ['One.'], ['Two.'], ['one. Two.'], []])
def test_a_split_that_loses_text_is_refused(encoders, sentences):
  with pytest.raises(ValueError, match='all of'):
    anchors.with_anchors(['One. Two.'], encoders['bytes'], 400, Rule((400,)), split=lambda text: sentences)
