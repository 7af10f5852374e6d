"""Laws of the grammar: what it lets a model write is what the canonical writer writes, and it always ends."""

import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers as huggingface

from datasel.data import tokenizer as tokenizers
from datasel.methods.prox import executor, grammar, programs, refiner, rows, vocabulary
from datasel.methods.prox.examples import Example
from datasel.methods.prox.templates import Prompts

BYTES = [bytes([b]) for b in range(256)]
EOS = 256
# With words, a range is a few tokens and a normalize many; and a number's digits come in several ways.
WORDS = [*BYTES, None, b'remove_lines(start=', b', end=', b')\n', b'10', b'00', b'11']


def build(tokens, task='chunk', *, max_new_tokens=256, lead=''):
  return grammar.build([*tokens, None], task, eos_id=len(tokens), vocab_size=len(tokens) + 3, lead=lead,
                       max_new_tokens=max_new_tokens)


BLOCK = 512


@jax.jit
def look(built, carry, token_B):
  """What may come after these tokens, and the states after them."""
  carry = built.advance(carry, token_B)
  return built.mask(carry), carry


def accepted(built, alphabet, n, span=(0, 1)):
  """Every sequence of up to n tokens of the alphabet that may be followed by end of text, by the mask alone."""
  eos = built.next_SxV.shape[1] - 3
  carry = built.of_chunks([span]).begin(np.zeros(1, int))
  ids, allowed, found = np.zeros((1, 0), int), np.asarray(jax.jit(type(built).mask)(built, carry)), set()
  for length in range(n + 1):
    assert allowed.any(axis=1).all(), 'a row that may say nothing'
    assert not allowed[:, eos + 1:].any()
    found |= {tuple(row) for row in ids[allowed[:, eos]].tolist()}
    rows, columns = np.nonzero(allowed[:, alphabet])
    if length == n or not len(rows):
      return found
    token_B = np.asarray(alphabet)[columns]
    ids = np.concatenate([ids[rows], token_B[:, None]], axis=1)
    parts = []
    for at in range(0, len(rows), BLOCK):  # of one size, compiled once
      block = np.resize(np.arange(at, min(at + BLOCK, len(rows))), BLOCK)
      parts.append(jax.device_get(look(built, {k: v[rows[block]] for k, v in carry.items()}, token_B[block])))
    allowed = np.concatenate([mask for mask, _ in parts])[:len(rows)]
    carry = {k: np.concatenate([after[k] for _, after in parts])[:len(rows)] for k in carry}


def canonical(text, start, stop):
  """Whether the text is a program in its one form, each range in the chunk and after the one before, that the executor
  refuses nothing of but for its words."""
  calls = programs.parse(text)
  if not calls or any(isinstance(call, programs.Fault) for call in calls) or programs.serialise(calls) != text:
    return False
  ranges = [call for call in calls if isinstance(call, programs.RemoveLines)]
  if any(not start <= call.start <= call.end < stop for call in ranges):
    return False
  if any(a.end >= b.start for a, b in itertools.pairwise(ranges)):
    return False
  if len(calls) > 1 and any(isinstance(call, programs.KeepChunk | programs.RemoveAll) for call in calls):
    return False
  if any(isinstance(call, programs.DropDoc | programs.KeepDoc) for call in calls):
    return False
  return not any(isinstance(call, programs.Normalize) and (not call.source or refused(call)) for call in calls)


def refused(call):
  """What the executor has against a call itself, whatever the words: here they get two letters more."""
  call = programs.Normalize('xyz' + call.source, call.target)
  outcomes = executor.execute(call.source * 2 + ' ' * len(call.target) * 2, programs.serialise([call])).outcomes
  return outcomes[0].kind == 'refused'


def spellings(text, tokens, n):
  """Every way of writing a text in up to n tokens, where a token of digits and others is none."""
  if not text:
    return {()}
  if not n:
    return set()
  return {(i, *rest) for i, token in enumerate(tokens) if text.startswith(token)
          for rest in spellings(text[len(token):], tokens, n - 1)}


def test_ranges_are_those_of_the_writer_to_the_token():
  digits = [b'%d' % n for n in range(10)]
  words = [b'keep_chunk()', b'remove_lines(', b'all=True)', b'start=', b', end=', b')', b')\nremove_lines(start=',
           b'\n', b'12', b'10', b'07', b'=1', b'1,', b'2)']
  tokens, mixed = digits + words, (b'=1', b'1,', b'2)')
  built, most = build(tokens), 10
  for start, stop in ((9, 13), (0, 2), (0, 1), (98, 108), (1, 12)):
    lines = range(start, stop)
    one = [[programs.RemoveLines(a, b)] for a in lines for b in lines if a <= b]
    two = [[*x, *y] for x in one for y in one if x[0].end < y[0].start]
    texts = [programs.serialise(p) for p in [*one, *two, [programs.KeepChunk()], [programs.RemoveAll()]]]
    plain = [token if token not in mixed else b'\0' for token in tokens]
    wanted = set().union(*(spellings(text.encode(), plain, most) for text in texts))
    got = accepted(built, list(range(len(tokens))), most, (start, stop))
    assert got == wanted


def test_strings_are_those_of_the_writer_by_brute_force():
  # Every text of up to six of these tokens, after the call's beginning.
  words = [b'normalize(source_str="', b'a', b'\\', b'"', b'n', b'", target_str="', b'")', b'\n', b't', b'\x01', b'\xc3',
           b'\xa9', b'\xed\xa0']
  digits = [b'%d' % n for n in range(10)]
  tokens = words + digits
  got = accepted(build(tokens), list(range(len(words))), 5)
  wanted = set()
  for n in range(1, 5):
    for rest in itertools.product(range(len(words)), repeat=n):
      text = b''.join(words[i] for i in (0, *rest))
      try:
        if canonical(text.decode(), 0, 1):
          wanted.add((0, *rest))
      except UnicodeDecodeError:
        pass
  assert got == wanted and len(wanted) > 20


@pytest.mark.parametrize('task, wanted', [('document', ['drop_doc()', 'keep_doc()']), ('chunk', ['keep_chunk()'])])
def test_decisions_are_all_of_a_document_and_a_lead_comes_first(task, wanted):
  tokens = [b' ', b'dr', b'op_', b'keep_', b'doc', b'chunk', b'()', *(b'%d' % n for n in range(10)), b'remove_lines(',
            b'start=', b', end=', b')']
  got = accepted(build(tokens, task, lead=' '), list(range(7)), 6)
  assert {b''.join(tokens[i] for i in row).decode() for row in got} == {' ' + program for program in wanted}


def walk(built, tokens, spans, *, seed):
  """A program for each span, from logits of noise: token after token, whatever is allowed."""
  @jax.jit
  def step(built, carry, key):
    mask = built.mask(carry)
    likes_V = jax.random.normal(key, mask.shape) + 3 * (jax.numpy.arange(mask.shape[1]) > EOS)[None]
    token_B = jax.numpy.where(mask, likes_V, -jax.numpy.inf).argmax(-1)
    return mask.any(1), token_B, built.advance(carry, token_B)

  carry, rows = built.of_chunks(spans).begin(np.arange(len(spans))), [[] for _ in spans]
  ended = np.zeros(len(spans), bool)
  for n in range(built.max_new_tokens):
    alive, token_B, carry = step(built, carry, jax.random.fold_in(jax.random.key(seed), n))
    assert np.asarray(alive).all()
    for row, token, over in zip(rows, np.asarray(token_B), ended):
      if not over and token != EOS:
        row.append(int(token))
    ended |= np.asarray(token_B) == EOS
  assert ended.all(), 'a program that does not close in its tokens'
  return [b''.join(tokens[i] for i in row) for row in rows]


@pytest.mark.parametrize('tokens', [BYTES, WORDS], ids=['bytes', 'words'])
@pytest.mark.parametrize('most', [52, 120])
def test_whatever_a_model_prefers_its_program_is_whole_and_carried_out(tokens, most):
  spans = [(0, 1), (0, 3), (7, 12), (98, 103), (995, 1011), (5, 200000), (9, 10), (0, 11)] * 16
  built = grammar.build([*tokens, None], 'chunk', eos_id=EOS, vocab_size=len(tokens) + 3, max_new_tokens=most)
  for (start, stop), text in zip(spans, walk(built, tokens, spans, seed=most)):
    assert canonical(text.decode(), start, stop), (text, start, stop)


def test_any_character_of_a_text_can_be_written():
  built = build(BYTES)
  characters = [chr(c) for c in (*range(0x20, 0x180), 0x7ff, 0x800, 0xfff, 0x1000, 0xd7ff, 0xe000, 0xfffd, 0x10000,
                                 0x3ffff, 0x40000, 0xfffff, 0x10ffff)]
  for character in characters:
    text = programs.serialise([programs.Normalize('a' + character, 'b' + (character if character > '\x9f' else ''))])
    assert grammar.accepts(built, [*text.encode(), EOS]), hex(ord(character))


@pytest.mark.parametrize('bad', [
  'keep_chunk', 'keep_chunk()\nkeep_chunk()', 'remove_lines(start=3, end=2)', 'remove_lines(start=03, end=4)',
  'remove_lines(start=3, end=13)', 'remove_lines(start=2, end=4)', 'normalize(source_str="", target_str="a")',
  'remove_lines(start=5, end=6)\nremove_lines(start=6, end=7)', 'normalize(source_str="a\\nb", target_str="")',
  'remove_lines(start=5, end=6)\n', 'remove_lines(start=12, end=12)\nremove_lines(start=', ''])
def test_what_is_no_program_of_the_chunk_is_not_accepted(bad):
  built = build(BYTES)
  assert grammar.accepts(built, [*b'remove_lines(start=3, end=12)', EOS], (3, 13))
  assert not grammar.accepts(built, [*bad.encode(), EOS], (3, 13))


def test_tokens_of_a_trained_tokenizer_spell_its_programs(tmp_path):
  texts = ['remove_lines(start=12, end=345)\nkeep_chunk()', 'normalize(source_str="a b", target_str="")'] * 9
  tokenizer = tokenizers.train_bpe(texts, 330, tmp_path / 'tokenizer.json')
  found = vocabulary.Vocabulary(tokenizer)
  built = grammar.build(found.bytes_V, 'chunk', eos_id=tokenizer.eos_id, vocab_size=340, max_new_tokens=256)
  program = 'normalize(source_str="caf\u00e9 \\"x\\"  \u6f22", target_str="")\nremove_lines(start=12, end=345)'
  ids = found.spelled([program])[0]
  assert grammar.accepts(built, [*ids, tokenizer.eos_id], (0, 346))
  assert not grammar.accepts(built, [*ids, tokenizer.eos_id], (0, 345))


def changed(path, to, **parts):
  """A tokenizer.json with other parts."""
  to.write_text(json.dumps(json.loads(path.read_text()) | parts))
  return tokenizers.load(to)


def test_numbers_are_digits_alone_whatever_the_tokenizer_joins_them_with(tmp_path):
  ranges = [programs.RemoveLines(a, a + b) for a in (0, 9, 10, 100, 123) for b in (0, 1, 25)]
  texts = [programs.serialise([one, programs.RemoveLines(one.end + 1, 150)]) for one in ranges]
  regular = tokenizers.train_bpe(texts * 9, 320, tmp_path / 'regular.json')
  model = huggingface.Tokenizer(huggingface.models.BPE())
  model.pre_tokenizer = huggingface.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = huggingface.decoders.ByteLevel()
  model.train_from_iterator(texts * 9, huggingface.trainers.BpeTrainer(
    vocab_size=420, special_tokens=['<|endoftext|>'], show_progress=False,
    initial_alphabet=huggingface.pre_tokenizers.ByteLevel.alphabet()))
  model.save(str(tmp_path / 'joins.json'))
  for tokenizer, joins in ((regular, False), (tokenizers.load(tmp_path / 'joins.json'), True)):
    prompts = Prompts(tokenizer, 'chunk', length=400, max_new_tokens=200)
    built = refiner.grammar_of(prompts, 420)
    whole = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    assert all(grammar.accepts(built, ids, (0, 151)) for ids in whole) != joins
    for text, ids, answer in zip(texts, whole, prompts.answers(texts)):
      assert grammar.accepts(built, answer, (0, 151)) and prompts.program(answer[:-1]) == text
      assert joins or answer.tolist() == ids


def test_an_added_token_that_is_not_special_writes_its_text(tmp_path):
  tokenizers.train_bpe(['keep_chunk()'] * 9, 270, tmp_path / 'plain.json')
  stored = json.loads((tmp_path / 'plain.json').read_text())
  new = dict(id=len(stored['model']['vocab']), content='  \u00e9', single_word=False, lstrip=False, rstrip=False,
             normalized=False, special=False)
  tokenizer = changed(tmp_path / 'plain.json', tmp_path / 'added.json',
                      added_tokens=[*stored['added_tokens'], new])
  found = vocabulary.Vocabulary(tokenizer)
  ids, = found.spelled(['a  \u00e9b'])
  assert new['id'] in ids and found.text(ids) == 'a  \u00e9b' == tokenizer.decode(ids)
  assert found.bytes_V[tokenizer.eos_id] is None


def test_a_program_that_the_tokenizer_changes_is_left_out_and_no_other(tmp_path):
  tokenizers.train_bpe(['keep_chunk()'] * 9, 270, tmp_path / 'plain.json')
  prompts = Prompts(changed(tmp_path / 'plain.json', tmp_path / 'nfc.json', normalizer={'type': 'NFC'}), 'chunk',
                    length=400, max_new_tokens=200)
  written = [programs.serialise([programs.Normalize(source)]) for source in ('caf\u00e9', 'cafe\u0301', 'cafe')]
  found = rows.encode([Example(str(n), 's', 'caf', 0, one) for n, one in enumerate(written)], prompts,
                      refiner.grammar_of(prompts, 270))
  assert [one.id for one in found.examples] == ['0', '2'] and found.left_out == {
    'prompt too long': 0, 'program too long': 0, 'not in the grammar': 0, 'changed by the tokenizer': 1}


def test_what_cannot_be_built_is_refused():
  with pytest.raises(ValueError, match='no way through'):
    build([b for b in BYTES if b != b'7'])
  with pytest.raises(ValueError, match='no way through'):
    build([b for b in BYTES if b != b'('])
  with pytest.raises(ValueError, match='max_new_tokens is 5'):
    build(BYTES, max_new_tokens=5)
  with pytest.raises(ValueError, match='of prompt 1'):
    build(BYTES).of_chunks([(0, 1), (3, 3)])
