"""Laws of mixtures: what is written is read back, what cannot be meant is refused, baselines are proportions."""

import json
import math

import numpy as np
import pytest

from datasel.data import mixture

DOREMI = {'train_domain_weights': {'Gutenberg (PG-19)': 0.25, 'Pile-CC': 0.7, 'DM Mathematics': 0.05},
          'eval_domain_weights': {'Gutenberg (PG-19)': 0.5, 'Pile-CC': 0.5, 'DM Mathematics': 0.0}}
REGMIX = '''train:
  train_the_pile_arxiv: 0.2
  train_the_pile_github: 0.6
  train_the_pile_europarl: 1e-05
valid:
  valid_the_pile_pile_cc: 1.0
model_name: tinyllama_1_1b
'''


class Store:
  """Three domains with known counts."""
  domains = ('books', 'code', 'web')
  digest = 'a' * 64
  tokenizer = {'name': 'bpe', 'digest': 'b' * 64}

  def sizes(self, split):
    return {'train': np.array([10, 30, 60], np.int64), 'validation': np.array([5, 5, 0], np.int64)}[split]

  def counts(self, split):
    assert split == 'train'
    return {name: {'tokens': tokens, 'documents': 7} for name, tokens in zip(self.domains, (1000, 1000, 6000))}


def _file(tmp_path, name, value):
  path = tmp_path / name
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return path


def test_mixture_json_round_trips_weights_and_provenance(tmp_path):
  m = mixture.Mixture({'web': 1 / 3, 'code': 2 / 3, 'math': 0}, {'method': 'doremi', 'seed': 3, 'git': None})
  mixture.write(tmp_path / 'mixture.json', m)
  assert json.loads((tmp_path / 'mixture.json').read_text())['domains'] == {'web': 1 / 3, 'code': 2 / 3, 'math': 0.0}
  assert mixture.load(tmp_path / 'mixture.json') == m


def test_numpy_weights_can_be_written(tmp_path):
  mixture.write(tmp_path / 'm.json', mixture.Mixture(dict(zip('ab', np.array([0.25, 0.75], np.float32)))))
  assert mixture.load(tmp_path / 'm.json').weights == {'a': 0.25, 'b': 0.75}


def test_doremi_labels_become_domains_and_come_back(tmp_path):
  m = mixture.load(_file(tmp_path, 'pile.json', DOREMI))
  assert m.weights == {'Gutenberg_PG-19': 0.25, 'Pile-CC': 0.7, 'DM_Mathematics': 0.05}
  mixture.write_doremi(tmp_path / 'out.json', m)
  assert json.loads((tmp_path / 'out.json').read_text()) == DOREMI


def test_doremi_weights_printed_with_four_digits_are_renormalised_and_others_refused(tmp_path):
  m = mixture.load(_file(tmp_path, 'rp.json', {'train_domain_weights': {'c4': 0.3333, 'book': 0.6666}}))
  assert math.isclose(m.weights['c4'], 1 / 3, rel_tol=1e-9)
  assert math.isclose(m.provenance['renormalised_from_sum'], 0.9999)
  with pytest.raises(ValueError, match='rp.json.*sum to 0.9'):
    mixture.load(_file(tmp_path, 'rp.json', {'train_domain_weights': {'c4': 0.3, 'book': 0.6}}))


def test_regmix_yaml_is_renormalised_and_says_so(tmp_path):
  m = mixture.load(_file(tmp_path, 'human.yaml', REGMIX))
  assert list(m.weights) == ['the_pile_arxiv', 'the_pile_github', 'the_pile_europarl']
  np.testing.assert_allclose(list(m.weights.values()), np.array([0.2, 0.6, 1e-5]) / 0.80001, rtol=1e-15)
  assert math.isclose(m.provenance['renormalised_from_sum'], 0.80001)
  mixture.write_regmix(tmp_path / 'out.yaml', m)
  again = mixture.load(tmp_path / 'out.yaml')
  assert again.weights == m.weights
  assert again.provenance['valid'] == {'valid_the_pile_pile_cc': 1.0}
  assert again.provenance['settings'] == {'model_name': 'tinyllama_1_1b'}


def test_plain_weights_round_trip(tmp_path):
  m = mixture.load(_file(tmp_path, 'plain.json', {'web': 0.5, 'train': 0.5}))
  mixture.write_plain(tmp_path / 'out.json', m)
  assert mixture.load(tmp_path / 'out.json').weights == {'web': 0.5, 'train': 0.5}


@pytest.mark.parametrize('weights, message', [
    ({}, 'no domains'),
    ({'web': 0.5, 'code': 0.43}, r'sum to 0\.93, want 1 \(domains: web 0\.5, code 0\.43\); renormalise'),
    ({'web': 0.0, 'code': 0}, 'all weights of the mixture are 0'),
    ({'web': -0.5, 'code': 1.5}, r'web the weight -0\.5'),
    ({'web': float('nan'), 'code': 1.0}, 'web the weight nan'),
    ({'web': float('inf')}, 'web the weight inf'),
    ({'web': True}, 'web the weight True'),
    ({'web': '0.5', 'code': 0.5}, "web the weight '0.5'"),
    ({'../web': 1.0}, r"'\.\./web' in the mixture is not allowed"),
])
def test_what_is_no_mixture_is_refused(weights, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    mixture.Mixture(weights)
  with pytest.raises(ValueError, match='bad.json: .*' + message):
    mixture.load(_file(tmp_path, 'bad.json', {'domains': weights}))


def test_sum_may_be_off_by_1e_6_and_no_more():
  weights_M = mixture.Mixture({'a': 0.5, 'b': 0.5 + 9e-7}).for_domains('ab')
  assert math.isclose(math.fsum(weights_M), 1, rel_tol=0, abs_tol=1e-15)
  with pytest.raises(ValueError, match='sum to'):
    mixture.Mixture({'a': 0.5, 'b': 0.5 + 2e-6})


@pytest.mark.parametrize('name, text, message', [
    ('m.json', '{"domains": {"web": 1', 'not valid JSON'),
    ('m.json', '[0.5, 0.5]', 'want a mapping of domains to weights, got list'),
    ('m.yaml', 'train: {train_a: 1', 'not a valid mixture file'),
    ('m.yaml', 'train: {train_a: 0.5, train_b: 0.2, train_a: 0.1}', 'given twice: train_a'),
    ('m.yaml', 'train: {a: 1.0}', "do not start with 'train_'"),
    ('m.txt', 'web 1', "got '.txt'"),
])
def test_a_damaged_file_is_named(name, text, message, tmp_path):
  with pytest.raises(ValueError, match=f'{name}.*' + message):
    mixture.load(_file(tmp_path, name, text))


def test_provenance_that_cannot_be_written_is_refused_at_once():
  with pytest.raises(TypeError):
    mixture.Mixture({'a': 1.0}, {'when': object()})
  with pytest.raises(ValueError, match="key 'domains'"):
    mixture.Mixture({'a': 1.0}, {'domains': {}})


def test_weights_follow_the_order_of_the_store():
  m = mixture.Mixture({'web': 0.7, 'code': 0.3, 'books': 0.0})
  np.testing.assert_array_equal(m.for_domains(('books', 'code', 'web')), [0.0, 0.3, 0.7])


def test_mixture_and_store_must_name_the_same_domains():
  with pytest.raises(ValueError, match=r"does not have: 'wbe' \(close: web\)"):
    mixture.Mixture({'wbe': 0.7, 'code': 0.3}).for_domains(('code', 'web'))
  with pytest.raises(ValueError, match=r"does not name: 'books'; give each a weight, 0"):
    mixture.Mixture({'web': 0.7, 'code': 0.3}).for_domains(('books', 'code', 'web'))


def test_baselines_are_proportions():
  store = Store()
  assert mixture.uniform(store.domains).weights == {'books': 1 / 3, 'code': 1 / 3, 'web': 1 / 3}
  assert mixture.by_tokens(store).weights == {'books': 0.125, 'code': 0.125, 'web': 0.75}
  assert mixture.by_examples(store).weights == {'books': 0.1, 'code': 0.3, 'web': 0.6}
  assert mixture.by_examples(store, 'validation').weights == {'books': 0.5, 'code': 0.5, 'web': 0.0}
  pile = mixture.by_pile_convention(store, {'web': 1, 'books': 3, 'code': 2})
  assert pile.weights == {'books': 30 / 150, 'code': 60 / 150, 'web': 60 / 150}
  assert pile.provenance == {'method': 'by_pile_convention', 'store': store.digest, 'tokenizer': store.tokenizer,
                             'split': 'train', 'epochs': {'web': 1, 'books': 3, 'code': 2}}
  with pytest.raises(ValueError, match='want exactly the domains'):
    mixture.by_pile_convention(store, {'web': 1, 'books': 3})
