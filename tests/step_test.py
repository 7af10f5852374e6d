"""The step's laws: pure, compiled once, exact in parts, the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import objectives, optim, sharding, train
from datasel.models.mistral import Mistral
from datasel.step import init_state, train_step

MODEL = Mistral(vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, loss_chunk=6)
LM = objectives.language_model(MODEL.token_nll)
TX = optim.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip=1.0)


def ragged_batch(seed=1, B=8, L=16):
  """Rows with 1 to L counted tokens: the mean of the parts' means is then not the mean."""
  tokens = jax.random.randint(jax.random.key(seed), (B, L + 1), 0, MODEL.vocab_size)
  counted = jnp.arange(L)[None] < jnp.linspace(1, L, B).astype(int)[:, None]
  return {'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:], 'loss_mask_BxL': counted.astype(jnp.float32),
          'domain_B': jnp.arange(B, dtype=jnp.int32) % 3}


@functools.cache
def fresh_state():
  return init_state(MODEL.init(jax.random.key(0)), TX)


def equal_bits(a, b):
  return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def largest_difference(a, b):
  return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_step_is_pure_and_compiles_once():
  step = jax.jit(functools.partial(train_step, objective=LM, tx=TX))
  first, second = step(fresh_state(), ragged_batch()), step(fresh_state(), ragged_batch())
  assert equal_bits(first, second)
  step(first[0], ragged_batch(seed=2))
  assert step._cache_size() == 1


@pytest.mark.parametrize('microbatches', [2, 4, 8])
def test_accumulated_gradient_is_the_batch_gradient_on_ragged_masks(microbatches):
  step = functools.partial(train_step, objective=LM, tx=TX)
  run = lambda k: jax.jit(functools.partial(step, microbatches=k))(fresh_state(), ragged_batch())
  (whole, metrics), (parts, part_metrics) = run(1), run(microbatches)
  for name in ('loss', 'grad_norm', 'weight'):
    np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5)
  # Adam divides by the gradient's size, so parameters whose gradient is rounding noise may differ by more.
  np.testing.assert_allclose(largest_difference(whole.opt_state, parts.opt_state), 0, atol=2e-7)
  assert largest_difference(whole.params, parts.params) < 1e-4


def test_any_loss_is_exact_in_microbatches():
  """A loss that is no sum over examples at all."""
  batch = ragged_batch()

  def objective(n):
    nll = objectives.in_microbatches(MODEL.token_nll, n)
    return lambda params: jnp.log(jnp.square(nll(params, batch)).mean()) + nll(params, batch).max()

  params = fresh_state().params
  whole, parts = (jax.jit(jax.value_and_grad(objective(n)))(params) for n in (1, 4))
  np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole[1], parts[1])


def test_example_weights():
  """Weight 0 drops an example, equal weights change nothing, weight 2 counts twice."""
  batch, params = ragged_batch(), fresh_state().params
  compiled = jax.jit(lambda b: LM(params, (), b)[0])
  loss = lambda b: float(compiled(b))
  ones = jnp.ones(8)
  assert loss(batch | {'weights_B': 0.01 * ones}) == pytest.approx(loss(batch), rel=1e-6)
  dropped = {name: x[1:] for name, x in batch.items()}
  assert loss(batch | {'weights_B': ones.at[0].set(0)}) == pytest.approx(loss(dropped), rel=1e-6)
  doubled = {name: jnp.concatenate([x, x[3:4]]) for name, x in batch.items()}
  assert loss(batch | {'weights_B': ones.at[3].set(2)}) == pytest.approx(loss(doubled), rel=1e-6)


def test_batch_with_nothing_to_predict_gives_zero():
  batch = ragged_batch() | {'loss_mask_BxL': jnp.zeros((8, 16))}
  state, metrics = jax.jit(functools.partial(train_step, objective=LM, tx=TX))(fresh_state(), batch)
  assert float(metrics['loss']) == 0 and float(metrics['grad_norm']) == 0
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params))


def test_microbatches_that_cannot_be_exact_are_refused():
  stateful = lambda params, aux, batch: (MODEL.token_nll(params, batch).mean(), (aux + 1, {'weight': jnp.ones(())}))
  silent = lambda params, aux, batch: (MODEL.token_nll(params, batch).mean(), (aux, {}))
  for objective, aux in ((stateful, jnp.zeros(())), (silent, ())):
    with pytest.raises(ValueError, match='in_microbatches'):
      train_step(init_state(fresh_state().params, TX, aux), ragged_batch(), objective=objective, tx=TX,
                 microbatches=2)
  with pytest.raises(ValueError, match='3 micro-batches do not divide the batch of .8. rows'):
    train_step(fresh_state(), ragged_batch(), objective=LM, tx=TX, microbatches=3)


def three_steps(mesh, tx, microbatches=1):
  program = train.program(MODEL.init, MODEL.logical_axes(), objective=LM, tx=tx, mesh=mesh, microbatches=microbatches)
  state, losses = program.init(jax.random.key(0)), []
  for seed in range(3):
    state, metrics = program.step(state, program.put(jax.device_get(ragged_batch(seed))))
    losses.append(float(jax.block_until_ready(metrics)['loss']))  # blocks: simulated devices share two cores
  return losses, jax.device_get(state.params), state


TRANSFORMS = {'adamw': TX, 'adafactor': optim.adafactor(1e-2, weight_decay=0.01, clip=1.0)}


@functools.cache
def three_steps_alone(optimizer):
  return three_steps(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), TRANSFORMS[optimizer])


@pytest.mark.parametrize(('optimizer', 'shape'), [('adamw', (4, 1, 1)), ('adamw', (1, 4, 1)), ('adamw', (1, 2, 2)),
                                                  ('adamw', (2, 2, 1)), ('adamw', (1, 1, 4)), ('adafactor', (1, 2, 2))])
def test_sharded_equals_unsharded(optimizer, shape):
  tx = TRANSFORMS[optimizer]
  if shape == (1, 1, 4):  # two key/value heads cannot be split over four devices
    with pytest.raises(ValueError, match='key.*cannot be split'):
      three_steps(sharding.make_mesh(*shape), tx)
    return
  alone = three_steps_alone(optimizer)
  spread = three_steps(sharding.make_mesh(*shape), tx, microbatches=2)
  np.testing.assert_allclose(alone[0], spread[0], rtol=2e-6)
  assert largest_difference(alone[1], spread[1]) < 1e-5
  if shape == (1, 2, 2):
    kernel = spread[2].params['blocks']['up']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    if optimizer == 'adamw':
      moment = spread[2].opt_state[1][0].mu['blocks']['up']['kernel']
      assert moment.sharding == kernel.sharding


def test_mesh_and_rules_refuse_what_cannot_be():
  with pytest.raises(ValueError, match='6 places for 4 devices'):
    sharding.make_mesh(3, 2, 1)
  with pytest.raises(ValueError, match='at most one of them -1'):
    sharding.make_mesh(-1, -1, 1)
  assert dict(sharding.make_mesh(-1, 2, 1).shape) == {'data': 2, 'fsdp': 2, 'tensor': 1}
  with pytest.raises(ValueError, match='collide'):
    sharding.spec(('heads', 'mlp'))
  with pytest.raises(ValueError, match='not in the sharding rules'):
    sharding.spec(('haeds',))
