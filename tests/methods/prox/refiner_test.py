"""Laws of the refiner: what it reads, what it decides, what it writes, and what these depend on."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import small_refiner

from datasel import pretrained, workdir
from datasel.data.corpus import Document
from datasel.methods.prox import chunks, f1, programs, refiner, refining
from datasel.methods.prox.templates import DECISIONS, Prompts

TEXTS = ['Home | tree | About\nThe old harbour was slow.\n\nhttp://tree.org/moss', 'Stone under light.',
         '\n'.join(f'Line {n} of paper, {n * 7}.' for n in range(30)), 'caf\u00e9 \u6f22\u5b57 \u2028 "quoted" \\ x\ty']


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return small_refiner.tokenizer(small_refiner.write(tmp_path_factory.mktemp('sft'), 40, 4))


def writer(tokenizer, task, *, seed=0, scale=20, template='plain', length=220, **options):
  """A writer of random parameters, wild enough to write all kinds of things."""
  params = jax.tree.map(lambda x: x * (scale if x.ndim > 2 else 1),
                        jax.jit(small_refiner.MODEL.init)(jax.random.key(seed)))
  prompts = Prompts(tokenizer, task, template, length=length, max_new_tokens=80)
  return refiner.Writer(small_refiner.MODEL, params, prompts, **options)


def made(tokenizer, **options):
  return refiner.Refiner(writer(tokenizer, 'document', **options), writer(tokenizer, 'chunk', **options), name='random',
                         fingerprint='0')


def split(own, texts):
  return [chunk for found in chunks.split(texts, own.count_tokens, max_tokens=own.max_tokens) for chunk in found]


@pytest.mark.parametrize('template', ['plain', 'llama2'])
def test_any_model_writes_programs_that_are_carried_out(tokenizer, template):
  length = 220 if template == 'plain' else 320
  own = made(tokenizer, template=template, length=length)
  pieces = split(own, TEXTS)
  assert len(pieces) > len(TEXTS)
  for chunk, written in zip(pieces, own.write(pieces), strict=True):
    calls = programs.parse(written.program)
    assert calls and programs.serialise(calls) == written.program
    assert not f1.failures(written.program, chunk.text, chunk.start) - {'repeated', 'no match'}
    assert 0 < written.tokens <= 80 and written.prompt_tokens > chunk.tokens


def test_neither_the_batch_nor_the_order_changes_an_answer(tokenizer):
  alone, together = made(tokenizer, batch_size=1), made(tokenizer, batch_size=8)
  pieces = split(alone, TEXTS)
  wanted = [alone.write([chunk])[0] for chunk in pieces]
  assert len({one.program for one in wanted}) > 2
  assert together.write(pieces) == wanted and together.write(pieces[::-1]) == wanted[::-1]
  scores = [alone.decide([text])[0] for text in TEXTS]
  for one, other in zip(scores, reversed(together.decide(TEXTS[::-1]))):
    assert math.isclose(one.score, other.score, abs_tol=1e-4)
    assert dataclasses.replace(one, score=0) == dataclasses.replace(other, score=0)


def test_a_score_is_the_difference_of_two_programs_log_probabilities(tokenizer):
  own = writer(tokenizer, 'document', scale=2)
  prompts = own.prompts.documents(TEXTS)
  for prompt, score in zip(prompts, own.scores(prompts)):
    total = []
    for program in DECISIONS:
      answer = [*tokenizer.encode_batch([program])[0], tokenizer.eos_id]
      ids = np.concatenate([prompt.ids, answer])
      logits_LxV = jax.nn.log_softmax(own.model.apply(own._generator.params, ids[None])[0])
      total.append(sum(float(logits_LxV[len(prompt.ids) - 1 + n, token]) for n, token in enumerate(answer)))
    assert math.isclose(score, total[1] - total[0], abs_tol=1e-3)


def test_the_threshold_decides_and_generation_takes_the_likelier_program(tokenizer):
  found = made(tokenizer, scale=2).decide(TEXTS)
  middle = float(np.median([one.score for one in found]))
  document = writer(tokenizer, 'document', scale=2)
  own = refiner.Refiner(document, None, name='', fingerprint='', threshold=middle)
  assert [one.program for one in own.decide(TEXTS)] == [
    'keep_doc()' if one.score >= middle else 'drop_doc()' for one in found]
  greedy = refiner.Refiner(document, None, name='', fingerprint='', by_score=False).decide(TEXTS)
  assert {one.program for one in greedy} <= set(DECISIONS) and all(math.isnan(one.score) for one in greedy)


def test_a_prompt_holds_the_text_between_its_marks_and_cuts_no_more_than_it_must(tokenizer):
  prompts = Prompts(tokenizer, 'document', length=64)
  short, long = prompts.documents(['Stone.', 'Stone under light. ' * 50])
  assert prompts.vocabulary.text(short.ids) == '[doc]\nStone.\n[/doc]\n' and not short.truncated
  text = prompts.vocabulary.text(long.ids)
  assert text.startswith('[doc]\nStone under') and text.endswith('\n[/doc]\n') and long.truncated
  assert len(long.ids) + max(map(len, prompts.answers(DECISIONS))) == 64
  own = Prompts(tokenizer, 'chunk', length=200, max_new_tokens=80)
  prompt, = own.chunks(['a\n\nb '], [998])
  assert own.vocabulary.text(prompt.ids) == '[doc]\n[998]a\n[999]\n[1000]b \n[/doc]\n'
  assert prompt.tokens == sum(own.count_tokens(['[998]a', '[999]', '[1000]b ']))


def test_the_chat_string_is_the_authors(tokenizer):
  said = '[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n{} [/INST]'
  document, chunk = (Prompts(tokenizer, task, 'llama2', length=300, max_new_tokens=80) for task in refining.STAGES)
  assert document.vocabulary.text(document.documents(['a\nb'])[0].ids) == said.format('a\nb')
  assert chunk.vocabulary.text(chunk.chunks(['a\nb'], [6])[0].ids) == said.format('[doc]\n[006]a\n[007]b\n[/doc]')
  assert document.vocabulary.text(document.answers(['drop_doc()'])[0]) == ' drop_doc()'


def test_skipped_chunks_are_kept_and_no_model_is_asked(tokenizer):
  own = made(tokenizer)
  long = chunks.Chunk(0, 1, 'word ' * 300, 400, True)
  unmarked = dataclasses.replace(long, skipped=False)
  assert own.write([long, unmarked]) == [refining.Written('keep_chunk()', 'skipped')] * 2
  assert own.write([]) == [] and own.decide([]) == []


def stage(folder, tokenizer, *, seed=0, **stated):
  model = small_refiner.MODEL
  tokenizer.save(folder / 'given')
  found = pretrained.Source('random', model, folder / 'given', 256, lambda *_: None)
  pretrained.save_stage(found, jax.jit(model.init)(jax.random.key(seed)), folder)
  if stated:
    workdir.write_json(folder / 'stage.json', workdir.read_json(folder / 'stage.json') | {'refiner': stated})
  return folder


def test_a_fingerprint_is_of_all_that_answers_depend_on(tokenizer, tmp_path):
  one = stage(tmp_path / 'one', tokenizer, task='document', template='plain', length=200, max_new_tokens=70)
  same = stage(tmp_path / 'same', tokenizer, task='document', template='plain', length=200, max_new_tokens=70)
  load = lambda folder=one, **options: refiner.Refiner.load(document=folder, **options).fingerprint
  assert load() == load() == load(same) == load(batch_size=2)
  others = [load(stage(tmp_path / 'weights', tokenizer, seed=1, task='document', length=200, max_new_tokens=70)),
            load(stage(tmp_path / 'length', tokenizer, length=180)), load(threshold=0.5), load(by_score=False),
            load(template='llama2')]
  bare = stage(tmp_path / 'bare', tokenizer, max_new_tokens=70)
  others.append(refiner.Refiner.load(chunk=bare).fingerprint)
  assert len({load(), *others}) == 7
  (one / 'calibration.json').write_text('{"threshold": -1.5}')
  calibrated = refiner.Refiner.load(document=one)
  assert calibrated.threshold == -1.5 and calibrated.fingerprint not in others
  with pytest.raises(ValueError, match='the model of documents'):
    refiner.Refiner.load(chunk=one)
  with pytest.raises(ValueError, match='name the folder'):
    refiner.Refiner.load()
  with pytest.raises(ValueError, match='max_tokens of a chunk is 5000'):
    refiner.Refiner.load(chunk=tmp_path / 'bare', max_tokens=5000)


def test_a_refiner_refines(tokenizer):
  own = made(tokenizer)
  assert own.stages == refining.STAGES and own.flops_per_token['chunk'] == 2 * (
    small_refiner.MODEL.n_params)
  documents = [Document(str(n), text, {}) for n, text in enumerate(TEXTS)]
  for document, refined in zip(documents, refining.refine(documents, own), strict=True):
    assert refined.record['decision'] in ('kept', 'edited', 'dropped')
    assert (refined.text == document.text) == (refined.record['decision'] == 'kept')
