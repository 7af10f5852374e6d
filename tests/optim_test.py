"""Schedules against optax's and by hand; AdamW against NumPy; Adafactor against optax's; what weight decay spares."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from datasel import optim
from datasel.models.presets import PRESETS

PEAK, END, WARMUP, TOTAL = 3e-3, 2e-4, 5, 40
SCHEDULES = ('constant', 'cosine', 'exponential', 'exponential_gap')


def rates(name, *, peak=PEAK, end=END, warmup=WARMUP, total=TOTAL, steps=TOTAL + 3):
  schedule = optim.schedule(name, peak=peak, end=end, warmup_steps=warmup, total_steps=total)
  return np.array([schedule(jnp.int32(step)) for step in range(steps)], np.float64)


@pytest.mark.parametrize('name', SCHEDULES)
def test_warm_up_is_a_line_to_the_peak(name):
  np.testing.assert_allclose(rates(name)[:WARMUP + 1], [PEAK / 5, PEAK * 2 / 5, PEAK * 3 / 5, PEAK * 4 / 5, PEAK, PEAK],
                             rtol=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_decay_ends_where_it_should_and_stays_there(name):
  end = {'constant': PEAK, 'exponential_gap': END + 1e-10}.get(name, END)
  np.testing.assert_allclose(rates(name)[TOTAL:], end, rtol=1e-6)


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_schedule_may_have_no_warm_up_or_nothing_else(name):
  assert rates(name, warmup=0)[0] == pytest.approx(PEAK, rel=1e-6)
  np.testing.assert_allclose(rates(name, warmup=4, total=4, steps=4), PEAK * np.array([0.25, 0.5, 0.75, 1]), rtol=1e-6)


def test_cosine_is_optax_cosine():
  """optax's warm-up begins with an update of rate 0, which ours leaves out."""
  theirs = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, TOTAL, END)
  want = [theirs(step + 1 if step < WARMUP else step) for step in range(TOTAL + 3)]
  np.testing.assert_allclose(rates('cosine'), want, rtol=1e-6)


def test_exponential_is_optax_exponential():
  """DoReMi's paper: a constant factor per step."""
  theirs = optax.exponential_decay(PEAK, TOTAL - WARMUP, END / PEAK, transition_begin=WARMUP)
  np.testing.assert_allclose(rates('exponential')[WARMUP:TOTAL], [theirs(s) for s in range(WARMUP, TOTAL)], rtol=2e-6)


def test_exponential_gap_shrinks_the_gap_by_a_constant_factor():
  """DoReMi's repository: rate - end falls to 1e-10.  float32 rates hold the gap to 1e-7 of the rate, no better."""
  gap, want = PEAK - END, []
  factor = math.exp(math.log(1e-10 / gap) / (TOTAL - WARMUP))
  for _ in range(WARMUP, TOTAL):
    want.append(END + gap)
    gap *= factor
  np.testing.assert_allclose(rates('exponential_gap')[WARMUP:TOTAL], want, rtol=2e-6)


@pytest.mark.parametrize(('change', 'message'), [
  ({'name': 'cosin'}, 'known.*cosine'), ({'peak': 0.0}, 'peak > 0'), ({'end': -1e-3}, 'end >= 0'),
  ({'warmup': 41}, '41 steps does not fit in 40'), ({'warmup': -1}, 'does not fit'),
  ({'name': 'exponential', 'end': 0.0}, 'never reaches'), ({'name': 'exponential_gap', 'end': PEAK}, 'above end')])
def test_impossible_schedules_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    rates(**({'name': 'cosine'} | change))


def toy_params():
  r = np.random.default_rng(0)
  return {'kernel': jnp.asarray(r.normal(size=(3, 4)), jnp.float32), 'norm': {'scale': jnp.ones(4)}}


def toy_gradient(params):
  """Of a quadratic bowl around 1, steep in some directions."""
  steepness = jnp.linspace(0.1, 30, 4)
  return jax.grad(lambda p: sum((steepness * jnp.square(x - 1).reshape(-1, 4).sum(0)).sum()
                                for x in jax.tree.leaves(p)))(params)


def follow(tx, params, steps=3):
  state, passed = tx.init(params), []
  for _ in range(steps):
    updates, state = tx.update(toy_gradient(params), state, params)
    params = optax.apply_updates(params, updates)
    passed.append(params)
  return passed


def test_adamw_by_hand():
  """Three steps in NumPy, float64: gradient clipped by its global norm, then AdamW with decay on all but the norm."""
  b1, b2, eps, decay, clip = 0.8, 0.95, 1e-3, 0.1, 2.0
  rate = optim.schedule('exponential', peak=0.1, end=0.01, warmup_steps=1, total_steps=3)
  got = follow(optim.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip=clip), toy_params())
  x = {'kernel': np.asarray(toy_params()['kernel'], np.float64), 'scale': np.ones(4) * 1.0}
  m, v = ({name: np.zeros_like(value) for name, value in x.items()} for _ in range(2))
  for step, params in enumerate(got):
    g = {name: 2 * np.linspace(0.1, 30, 4) * (value - 1) for name, value in x.items()}
    norm = math.sqrt(sum((value**2).sum() for value in g.values()))
    for name in x:
      clipped = g[name] * min(1, clip / norm)
      m[name] = b1 * m[name] + (1 - b1) * clipped
      v[name] = b2 * v[name] + (1 - b2) * clipped**2
      direction = (m[name] / (1 - b1 ** (step + 1))) / (np.sqrt(v[name] / (1 - b2 ** (step + 1))) + eps)
      spared = name == 'scale'
      x[name] = x[name] - float(rate(step)) * (direction + (0 if spared else decay) * x[name])
    np.testing.assert_allclose(params['kernel'], x['kernel'], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(params['norm']['scale'], x['scale'], rtol=2e-6, atol=1e-7)


def test_adamw_is_optax_adamw_where_nothing_is_clipped():
  mask = {'kernel': True, 'norm': {'scale': False}}
  ours = optim.adamw(0.05, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, clip=1e9)
  theirs = optax.adamw(0.05, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, mask=mask)
  jax.tree.map(np.testing.assert_array_equal, follow(ours, toy_params(), 6), follow(theirs, toy_params(), 6))


def large_params():
  r = np.random.default_rng(1)
  array = lambda *shape: jnp.asarray(r.normal(size=shape), jnp.float32)
  return {'kernel': array(2, 160, 132), 'small': array(5, 4), 'norm': {'scale': array(4)}}


@pytest.mark.parametrize('decay', [0.0, 0.3])
def test_adafactor_is_optax_adafactor_with_an_absolute_rate(decay):
  """optax's decay is not scaled by the rate; ours is (decoupled decay as in AdamW), and spares the norms."""
  rate = 0.02
  ours = optim.adafactor(rate, weight_decay=decay, clip=1e9)
  theirs = optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=rate * decay,
                           weight_decay_mask={'kernel': True, 'small': True, 'norm': {'scale': False}})
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               follow(ours, large_params(), 4), follow(theirs, large_params(), 4))


def test_adafactor_keeps_rows_and_columns_where_adamw_keeps_two_copies():
  model = PRESETS['doremi_280m']
  kept = lambda tx: sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, model.abstract())))
  adamw = kept(optim.adamw(1e-3, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0))
  adafactor = kept(optim.adafactor(1e-3, weight_decay=0.01, clip=1.0))
  assert adamw == pytest.approx(2 * model.n_params, rel=1e-6)
  # Heads of 64 channels are too narrow to factor: the attention matrices keep theirs.
  attention = 4 * 12 * 768 * 12 * 64
  assert attention < adafactor < attention + 0.01 * model.n_params


@pytest.mark.parametrize('preset', ['smoke', 'pds_160m'])
def test_weight_decay_leaves_norms_alone_and_nothing_else(preset):
  by_path = {jax.tree_util.keystr(path): value
             for path, value in jax.tree_util.tree_leaves_with_path(optim.decayed(PRESETS[preset].abstract()))}
  spared = {path for path, value in by_path.items() if not value}
  assert spared == {"['blocks']['attention_norm']['scale']", "['blocks']['mlp_norm']['scale']", "['norm']['scale']"}
  assert all(path.endswith("['kernel']") for path in by_path.keys() - spared)


@pytest.mark.parametrize('tx', [optim.adamw(0.1, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip=1.0),
                                optim.adafactor(0.1, weight_decay=0.01, clip=1.0)])
def test_decay_of_a_real_model_without_gradient(tx):
  """Every matrix shrinks by rate times decay, every norm stays to the bit."""
  params = PRESETS['smoke'].init(jax.random.key(0))
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    name, value = jax.tree_util.keystr(path), params
    for key in path:
      value = value[key.key]
    np.testing.assert_allclose(update, 0 * value if 'norm' in name else -1e-3 * value, rtol=1e-6, err_msg=name)
