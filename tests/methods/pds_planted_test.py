"""A pool in which it is known what helps: the solver must rank it so."""

import functools

import jax
import numpy as np
import optax
import pytest
import small_store

from datasel import objectives
from datasel.methods.pds import pmp
from datasel.models.mistral import Mistral
from datasel.step import init_state, train_step

MODEL = Mistral(vocab_size=400, n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64)
KEYS = ('tokens_BxL', 'targets_BxL', 'loss_mask_BxL', 'segment_BxL', 'position_BxL')


def auc(positive, negative):
  """The probability that one of the first scores above one of the second."""
  return (positive[:, None] > negative[None, :]).mean() + 0.5 * (positive[:, None] == negative[None, :]).mean()


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
  """(256 rows: 80% prose, 10% code, 10% prose with its tokens shuffled; what each row is; rows of other code)."""
  store = small_store.make(tmp_path_factory.mktemp('store'), length=64)
  read = lambda split, name, numbers: {key: x for key, x in store.read(
    split, np.full(len(numbers), store.domains.index(name)), numbers).items() if key in KEYS}
  kind = np.repeat(['prose', 'code', 'shuffled'], [204, 26, 26])
  prose, code = read('train', 'pydocs', np.arange(230)), read('train', 'email', np.arange(26))
  rows = {key: np.concatenate([prose[key][:204], code[key], prose[key][204:]]) for key in KEYS}
  rng = np.random.default_rng(0)
  for n in np.flatnonzero(kind == 'shuffled'):
    order = rng.permutation(rows['tokens_BxL'].shape[1] + 1)
    stream = np.append(rows['tokens_BxL'][n], rows['targets_BxL'][n, -1])[order]
    rows['tokens_BxL'][n], rows['targets_BxL'][n] = stream[:-1], stream[1:]
  return rows, kind, read('validation', 'email', np.arange(64))


def test_what_is_of_the_targets_kind_ranks_high_and_shuffled_text_low(pool):
  rows, kind, dev = pool
  rng = np.random.default_rng(1)
  take = lambda n: {key: x[n] for key, x in rows.items()}
  tx = optax.adam(3e-3)
  step = jax.jit(functools.partial(train_step, objective=objectives.language_model(MODEL.token_nll), tx=tx))
  state = init_state(MODEL.init(jax.random.key(0)), tx)
  for _ in range(40):  # of ordinary training on the pool
    state, _ = step(state, take(rng.choice(256, 32, replace=False)))
  train = take(np.stack([rng.choice(256, 32, replace=False) for _ in range(8)]))
  scores = pmp.solve(objectives.per_example(MODEL.token_nll), state.params, train, take(np.arange(256)), dev,
                     learning_rate=0.1, score_stride=2)
  of = lambda name: scores[kind == name]
  found = auc(of('code'), scores[kind != 'code']), auc(of('shuffled'), of('prose'))
  assert found[0] > 0.9 and found[1] < 0.2, found
