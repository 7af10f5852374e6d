"""Laws of fine-tuning a refiner: what it is trained on, that it learns, and that it survives being killed."""

import dataclasses
import itertools
import json
import math
import shutil

import jax
import numpy as np
import pytest
import small_refiner
from sklearn import metrics as sklearn_metrics

from datasel import metrics
from datasel.methods.prox import examples, f1, refiner, sft
from datasel.methods.prox import rows as rows_lib
from datasel.methods.prox.chunks import Chunk
from datasel.methods.prox.examples import Example
from datasel.methods.prox.templates import Prompts


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = small_refiner.write(tmp_path_factory.mktemp('sft'), 48, 12)
  small_refiner.tokenizer(made)
  return made


@pytest.fixture(scope='module')
def tokenizer(folder):
  return small_refiner.tokenizers.load(folder / 'tokenizer.json')


def encoded(folder, tokenizer, task, split='train', **options):
  prompts = Prompts(tokenizer, task, **{'length': 192, 'max_new_tokens': 96} | options)
  return rows_lib.encode(examples.read(folder, split, task), prompts, refiner.grammar_of(prompts, 420)), prompts


@pytest.mark.parametrize('task', examples.TASKS)
def test_rows_hold_every_example_once_and_count_its_program_alone(folder, tokenizer, task):
  found, prompts = encoded(folder, tokenizer, task)
  rows = rows_lib.Rows(found, 192, seed=1)
  assert len(rows) < len(found) == 48 and sum(found.left_out.values()) == 0
  batch = rows.read('train', np.zeros(len(rows), int), np.arange(len(rows)))
  seen = []
  for b in range(len(rows)):
    for segment in range(1, batch['segment_BxL'][b].max() + 1):
      own = batch['segment_BxL'][b] == segment
      np.testing.assert_array_equal(batch['position_BxL'][b][own], np.arange(own.sum()))
      read, told = batch['tokens_BxL'][b][own], batch['targets_BxL'][b][own]
      np.testing.assert_array_equal(read[1:], told[:-1])
      counted = batch['loss_mask_BxL'][b][own] == 1
      assert told[counted][-1] == tokenizer.eos_id
      seen.append((tokenizer.decode([read[0], *told[~counted]]), tokenizer.decode(told[counted][:-1])))
  assert not batch['loss_mask_BxL'][batch['segment_BxL'] == 0].any()
  wanted = []
  for one in found.examples:
    lines = enumerate(one.text.split('\n'), one.start)
    text = one.text if task == 'document' else '\n'.join(f'[{n:03d}]{line}' for n, line in lines)
    wanted.append((f'[doc]\n{text}\n[/doc]\n', one.program))
  assert sorted(seen) == sorted(wanted)


def test_neighbours_in_a_row_change_nothing(folder, tokenizer):
  found, _ = encoded(folder, tokenizer, 'chunk')
  model = small_refiner.MODEL
  params = jax.jit(model.init)(jax.random.key(0))
  nll = jax.jit(model.token_nll)

  def losses(length, alone):
    rows = rows_lib.Rows(found, length, seed=1)
    rows.packed = [[i] for i in range(len(found))] if alone else rows.packed
    batch = rows.read('train', np.zeros(len(rows.packed), int), np.arange(len(rows.packed)))
    nll_BxL, of = np.asarray(nll(params, batch)), {}
    for b, row in enumerate(rows.packed):
      for segment, i in enumerate(row, 1):
        own = (batch['segment_BxL'][b] == segment) & (batch['loss_mask_BxL'][b] == 1)
        of[i] = nll_BxL[b][own].sum()
    return [of[i] for i in range(len(found))]

  np.testing.assert_allclose(losses(192, False), losses(192, True), rtol=1e-4)


def test_packing_fills_rows():
  lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
  packed = rows_lib.pack(lengths, 100, seed=3)
  assert sorted(i for row in packed for i in row) == list(range(500))
  filled = [sum(lengths[i] for i in row) for row in packed]
  assert max(filled) <= 100 and len(packed) < 1.15 * sum(lengths) / 100
  with pytest.raises(ValueError, match='101 tokens for rows of 100'):
    rows_lib.pack([101], 100, seed=0)


def test_what_cannot_be_trained_on_is_left_out_and_counted(tokenizer):
  prompts = Prompts(tokenizer, 'chunk', length=128, max_new_tokens=70)
  grammar, chosen = refiner.grammar_of(prompts, 420), {
    'fine': ('a\nb', 'remove_lines(start=1, end=1)'), 'long prompt': ('word ' * 200, 'keep_chunk()'),
    'long program': ('a', 'normalize(source_str="' + 'ab ' * 60 + '", target_str="")'),
    'out of range': ('a\nb', 'remove_lines(start=1, end=2)'), 'twice': ('a\nb', 'keep_chunk()\nkeep_chunk()'),
    'surrogate': ('a\ud800', 'keep_chunk()'), 'in a program': ('a', 'normalize(source_str="\udc00", target_str="")')}
  found = rows_lib.encode([Example(name, 's', text, 0, program) for name, (text, program) in chosen.items()], prompts,
                          grammar)
  assert [one.id for one in found.examples] == ['fine']
  assert found.left_out == {'prompt too long': 1, 'program too long': 1, 'not in the grammar': 2,
                            'changed by the tokenizer': 2}
  documents = Prompts(tokenizer, 'document', length=64)
  cut = rows_lib.encode([Example('d', 's', 'word ' * 200, 0, 'keep_doc()')], documents,
                        refiner.grammar_of(documents, 420))
  assert len(cut) == cut.truncated == 1 and len(cut.prompts[0].ids) + len(cut.answers[0]) <= 64


def test_f1_is_that_of_scikit_learn_and_counts_merge():
  rng = np.random.default_rng(0)
  keep_N, wanted_N = rng.random((2, 200)) < 0.4
  found = f1.of_documents(keep_N, wanted_N)
  np.testing.assert_allclose(found.f1, sklearn_metrics.f1_score(wanted_N, keep_N))
  assert f1.of_documents(keep_N[:70], wanted_N[:70]) + f1.of_documents(keep_N[70:], wanted_N[70:]) == found
  program, wanted = 'remove_lines(start=5, end=9)\nremove_lines(start=11, end=40)', 'remove_lines(start=7, end=11)'
  lines = np.arange(4, 14)
  np.testing.assert_allclose(f1.of_chunk(program, wanted, 4, 14).f1, sklearn_metrics.f1_score(
    (lines >= 7) & (lines <= 11), (lines >= 5) & (lines <= 9) | (lines >= 11)))
  assert f1.removed('remove_lines(all=True)', 4, 14) == set(range(4, 14))
  assert f1.F1().f1 == 1 and f1.F1(missed=1).f1 == 0


def test_the_threshold_is_the_best_of_all():
  rng = np.random.default_rng(1)
  wanted_N = rng.random(120) < 0.3
  score_N = np.round(rng.normal(size=120) + wanted_N, 1)  # with ties
  found = f1.calibrate(score_N, wanted_N)
  best = max(f1.of_documents(score_N >= t, wanted_N).f1 for t in np.linspace(-4, 4, 1601))
  np.testing.assert_allclose(found['f1'], best)
  assert found['f1'] == f1.of_documents(score_N >= found['threshold'], wanted_N).f1
  for point in found['curve']:
    np.testing.assert_allclose(point['f1'], f1.of_documents(score_N >= point['threshold'], wanted_N).f1)
    np.testing.assert_allclose(point['kept'], (score_N >= point['threshold']).mean())
  with pytest.raises(ValueError, match='2 scores, 1 of them not finite'):
    f1.calibrate([1.0, math.nan], [False, True])


@pytest.mark.parametrize('keep', [False, True])
def test_documents_of_one_kind_leave_the_threshold_at_zero(keep, caplog):
  found = f1.calibrate([1.0, -2.0], [keep, keep])
  assert (found['threshold'], found['calibrated']) == (0, False) and f'{2 * keep} are to keep' in caplog.text
  assert {key: found[key] for key in found['at_zero']} == found['at_zero']
  assert f1.calibrate([1.0, -2.0], [True, False])['calibrated']


def test_both_kinds_of_documents_are_looked_at_where_there_are_both(folder, tokenizer):
  found, _ = encoded(folder, tokenizer, 'document')
  keep = [one.program == 'keep_doc()' for one in found.examples]
  order = np.argsort(keep)  # those to drop come first
  training = object.__new__(sft._Training)
  training.task, training.section = 'document', small_refiner.config(validation=2)[1]
  for keeps in (1, 5, 0):
    chosen = [*order[:20], *order[len(order) - keeps:]]
    training.splits = {'validation': dataclasses.replace(found, examples=[found.examples[i] for i in chosen])}
    looked_at = training._chosen('validation')
    assert len(set(looked_at)) == 2 and sum(keep[chosen[i]] for i in looked_at) == min(keeps, 1)
    assert looked_at == training._chosen('validation')


@pytest.mark.parametrize('program, wanted', [
  ('', {'empty'}), ('keep_chunk()', set()),
  ('remove_lines(start=3, end=4)\nremove_lines(start=3, end=4)', {'repeated'}),
  ('normalize(source_str="zz", target_str="")', {'no match'}), ('remove_lines(start=3, en', {'truncated'}),
  ('remove_lines(start=3)', {'malformed'}), ('remove_lines(start=2, end=3)', {'out of range'}),
  ('remove_lines(start=4, end=5)', {'out of range'})])
def test_failures_are_told(program, wanted):
  assert f1.failures(program, 'a\nb', 3) == wanted


def test_an_end_near_the_limit_is_not_said_to_be_cut_off():
  assert f1.failures('keep_chunk()', 'a', 0, finished=False) == {'near the limit'}


def files(directory, task):
  return {name: json.loads((directory / sft.name(task) / name).read_text()) for name in ('epochs.json', 'test.json')}


def test_a_killed_training_goes_on_as_if_it_had_not_been(folder, tmp_path, monkeypatch):
  options = {'epochs': 2, 'batch_size': 8, 'length': 192, 'max_new_tokens': 96}
  train = lambda name, **more: small_refiner.train(tmp_path / name, 'document', folder, checkpoint_every=1, **options,
                                                   **more)
  whole = train('whole')
  judged, counter = sft._Training._judged, itertools.count()

  def killed(self, params, split, threshold=0.0):
    if next(counter) in moments:
      raise KeyboardInterrupt
    return judged(self, params, split, threshold)

  # At the end of an epoch that is not listed yet, and before what ends the stage.
  moments = {0, 2, 4}
  monkeypatch.setattr(sft._Training, '_judged', killed)
  for _ in moments:
    with pytest.raises(KeyboardInterrupt):
      train('killed')
    assert not sft.build.is_finished(tmp_path / 'killed' / 'refiner-document')
  train('killed')
  assert files(tmp_path / 'killed', 'document') == files(tmp_path / 'whole', 'document')
  one, other = (refiner.Refiner.load(document=tmp_path / name / 'refiner-document') for name in ('whole', 'killed'))
  assert one.fingerprint == other.fingerprint
  assert not (whole / 'training').exists()
  moments.add(next(counter) + 1)
  shutil.copytree(whole / 'checkpoints', tmp_path / 'killed' / 'refiner-document' / 'training')  # killed at its end
  assert train('killed') == tmp_path / 'killed' / 'refiner-document'  # finished: nothing is done again
  assert not (tmp_path / 'killed' / 'refiner-document' / 'training').exists()
  with pytest.raises(ValueError, match='holds another training .other: .*epochs'):
    small_refiner.train(tmp_path / 'whole', 'document', folder, **options | {'epochs': 3})
  with pytest.raises(ValueError, match='holds another training .other: validation.'):
    small_refiner.train(tmp_path / 'whole', 'document', folder, **options | {'validation': 3})


@pytest.mark.parametrize('task, n, epochs', [('document', 320, 2), ('chunk', 1000, 3)])
def test_a_small_refiner_learns_to_clean_pages_of_sites_it_has_not_seen(tmp_path, task, n, epochs):
  made = small_refiner.write(tmp_path / 'sft', n, 40)
  small_refiner.tokenizer(made)
  small_refiner.train(tmp_path / 'run', task, made, epochs=epochs, length=192, max_new_tokens=96,
                      **{'optimizer.peak_lr': 6e-3, 'optimizer.end_lr': 6e-4})
  found = files(tmp_path / 'run', task)
  assert found['test.json']['f1'] > 0.9
  assert found['epochs.json'][-1]['loss'] < found['epochs.json'][0]['loss']
  lines = metrics.read(tmp_path / 'run', sft.name(task), 'held_out')
  assert [line['f1'] for line in lines] == [epoch['f1'] for epoch in found['epochs.json']]
  # What was trained is what a refiner reads from the folder, and writes the same.
  own = refiner.Refiner.load(**{task: tmp_path / 'run' / sft.name(task)})
  tested = examples.read(made, 'test', task)
  if task == 'document':
    kept = [one.program == 'keep_doc()' for one in own.decide([one.text for one in tested])]
    again = f1.of_documents(kept, [one.program == 'keep_doc()' for one in tested])
  else:
    pieces = [Chunk(0, one.text.count('\n') + 1, one.text, 1, False) for one in tested]
    again = sum((f1.of_chunk(written.program, one.program, 0, chunk.stop)
                 for chunk, written, one in zip(pieces, own.write(pieces), tested)), f1.F1())
  assert again.values().items() <= found['test.json'].items()


def test_settings_that_cannot_be_used_are_refused(folder, tmp_path):
  for changed, match in (({'epochs': 0}, 'refiner.epochs is 0'), ({'validation': -1}, 'validation is -1'),
                         ({'optimizer.name': 'sgd'}, 'refiner.optimizer: unknown'), ({'template': 'x'}, "template 'x'"),
                         ({'length': 30}, 'leaves none for the text')):
    with pytest.raises(ValueError, match=match):
      small_refiner.train(tmp_path / 'run', 'chunk', folder, **{'max_new_tokens': 96} | changed)
    assert not (tmp_path / 'run' / 'refiner-chunk').exists()
  with pytest.raises(ValueError, match='has 420 tokens, the model 419'):
    small_refiner.train(tmp_path / 'run', 'chunk', folder,
                        model=dataclasses.replace(small_refiner.MODEL, vocab_size=419))
