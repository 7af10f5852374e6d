"""The target of a selection: what counts in it, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_store

from datasel import objectives
from datasel.data import tokenizer as tokenizers
from datasel.methods.pds import gammas, target


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


def load(name, store, most=100):
  return target.load(str(name), store, tokenizers.load(store.path), most=most)


def written(path, *records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def test_of_a_pair_the_response_counts(store, tmp_path):
  """With the end of text, and not the prompt."""
  tokenizer = tokenizers.load(store.path)
  found = load(written(tmp_path / 'pairs.jsonl', {'prompt': 'import ', 'response': 'json'}), store)
  counted = found.batch['loss_mask_BxL'][0] > 0
  ids = [*tokenizer.encode_batch(['json'])[0], *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
  np.testing.assert_array_equal(found.batch['targets_BxL'][0][counted], ids)
  first = int(np.flatnonzero(counted)[0])
  read = found.batch['tokens_BxL'][0, :first + 1]
  assert tokenizer.decode(read[read != tokenizer.bos_id]) == 'import '
  assert (found.cut, found.left_out, len(found)) == (0, 0, 1)


def test_a_text_is_predicted_from_its_first_token_on(store, tmp_path):
  tokenizer = tokenizers.load(store.path)
  found = load(written(tmp_path / 'texts.jsonl', {'text': 'import json'}), store)
  n = len(tokenizer.encode_batch(['import json'])[0]) + (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)
  assert found.batch['loss_mask_BxL'].sum() == n - 1 and (found.batch['segment_BxL'][0] > 0).sum() == n - 1


def test_what_is_too_long_is_counted(store, tmp_path):
  long = 'import json ' * 100
  found = load(written(tmp_path / 'pairs.jsonl', {'text': 'x = 1'}, {'prompt': 'x', 'response': long},
                       {'prompt': long, 'response': 'x'}), store)
  assert (len(found), found.cut, found.left_out) == (2, 1, 1)
  assert found.batch['tokens_BxL'].shape == (2, store.length)
  with pytest.raises(ValueError, match='none of 1 examples has a token to predict'):
    load(written(tmp_path / 'long.jsonl', {'prompt': long, 'response': 'x'}), store)


def test_held_out_records_are_those_of_the_store(store):
  found = load('validation:json,email', store, most=7)
  assert len(found) == 7
  every = load('validation:json', store, most=10**6)
  json_rows = store.read('validation', np.full(len(every), store.domains.index('json')), np.arange(len(every)))
  for name, values in every.batch.items():
    np.testing.assert_array_equal(values, json_rows[name])


@pytest.mark.parametrize(('name', 'message'), [
  ('', 'no such file is there; want validation:DOMAIN'), ('validation:nothing', r"has no domain \['nothing'\]"),
  ('/nowhere.jsonl', 'no such file')])
def test_what_is_no_target_is_refused(store, name, message):
  with pytest.raises(ValueError, match=message):
    load(name, store)


@pytest.mark.parametrize('line', ['{', '{"prompt": "x"}', '{"text": 3}', '[]'])
def test_a_bad_line_is_named(store, tmp_path, line):
  path = tmp_path / 'bad.jsonl'
  path.write_text('{"text": "x = 1"}\n' + line + '\n')
  with pytest.raises(ValueError, match='bad.jsonl, line 2: want JSON'):
    load(path, store)


def test_the_proxies_are_drawn_without_repetition(store):
  total = int(store.sizes('train').sum())
  names = lambda seed, n: list(zip(*(x.tolist() for x in gammas.drawn(seed, store, n))))
  assert len(set(names(1, total))) == total and names(1, 50) == names(1, 50) != names(2, 50)
  with pytest.raises(ValueError, match=f'has {total} sequences to train on'):
    names(1, total + 1)


def test_a_rows_loss_is_the_mean_over_its_counted_tokens():
  batch = {'loss_mask_BxL': np.array([[1, 1, 0], [0, 0, 0]], np.float32)}
  losses = objectives.per_example(lambda params, batch: jnp.array([[1.0, 3.0, 100.0], [5.0, 6.0, 7.0]]))
  np.testing.assert_array_equal(jax.jit(losses)({}, batch), [2.0, 0.0])
