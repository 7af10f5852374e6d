"""Laws of second-order and per-example derivatives: each equals what brute force finds, on any model and any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from datasel import autodiff, sharding
from datasel.models.mistral import Mistral

MODEL = Mistral(vocab_size=32, n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, loss_chunk=5)


def normal_like(tree, seed=7):
  return optax.tree.random_like(jax.random.key(seed), tree, jax.random.normal)


def close(a, b, rtol):
  """Leaf by leaf, relative to the largest number of the leaf."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * (float(jnp.abs(y).max()) + 1e-12))


def plain_losses(params, batch):
  """A net of two layers, one squared error for each example."""
  hidden = jnp.tanh(batch['x_BxD'] @ params['in']['w'] + params['in']['b'][None])
  return jnp.square(hidden @ params['out'] - batch['y_B'])


def scanned_losses(params, batch):
  """The same hidden layer thrice, in a scan with rematerialisation."""
  layer = jax.checkpoint(lambda h, _: (jnp.tanh(h @ params['in']['w'] + params['in']['b'][None]), None))
  hidden, _ = jax.lax.scan(layer, batch['x_BxD'], None, length=3)
  return jnp.square(hidden @ params['out'] - batch['y_B'])


def plain(B=6, D=4, dtype=float):
  keys = jax.random.split(jax.random.key(0), 5)
  params = {'in': {'w': jax.random.normal(keys[0], (D, D), dtype), 'b': jax.random.normal(keys[1], (D,), dtype)},
            'out': jax.random.normal(keys[2], (D,), dtype)}
  return params, {'x_BxD': jax.random.normal(keys[3], (B, D), dtype), 'y_B': jax.random.normal(keys[4], (B,), dtype)}


def mistral_losses(params, batch, model=MODEL):
  nll_BxL = model.token_nll(params, batch)
  return (nll_BxL * batch['loss_mask_BxL']).sum(-1) / batch['loss_mask_BxL'].sum(-1)


@functools.cache
def mistral(B=8, L=9):
  """Ragged masks and packed documents."""
  tokens = jax.random.randint(jax.random.key(1), (B, L + 1), 0, MODEL.vocab_size)
  params = jax.jit(lambda key: optax.tree.scale(4.0, MODEL.init(key)))(jax.random.key(0))  # away from the flat start
  return params, {
    'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:],
    'loss_mask_BxL': (jnp.arange(L)[None] < jnp.arange(2, B + 2)[:, None]).astype(jnp.float32),
    'segment_BxL': jnp.broadcast_to(1 + jnp.arange(L) // 5, (B, L))}


@pytest.mark.parametrize('losses', [plain_losses, scanned_losses])
def test_hvp_is_the_dense_hessian_times_the_vector(x64, losses):
  params, batch = plain()
  tangent, loss = normal_like(params), lambda p, b: losses(p, b).mean()
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  hessian = jax.hessian(lambda f: loss(unravel(f), batch))(flat)
  want = unravel(hessian @ jax.flatten_util.ravel_pytree(tangent)[0])
  close(jax.jit(functools.partial(autodiff.hvp, loss))(params, tangent, batch), want, 1e-12)


def test_hvp_is_the_slope_of_the_gradient(x64):
  """Central differences, whose error is of the step's square."""
  params, batch = plain()
  loss = lambda p: scanned_losses(p, batch).sum()
  tangent, gradient = normal_like(params), jax.jit(jax.grad(loss))
  up, down = (gradient(optax.tree.add_scale(params, step, tangent)) for step in (1e-5, -1e-5))
  slope = optax.tree.scale(0.5e5, optax.tree.sub(up, down))
  close(jax.jit(functools.partial(autodiff.hvp, loss))(params, tangent), slope, 1e-8)


def test_hvp_is_linear_and_symmetric(x64):
  params, batch = plain()
  a, b = normal_like(params, 1), normal_like(params, 2)
  product = jax.jit(lambda t: autodiff.hvp(lambda p: plain_losses(p, batch).sum(), params, t))
  close(product(optax.tree.add_scale(a, 3.0, b)), optax.tree.add_scale(product(a), 3.0, product(b)), 1e-12)
  np.testing.assert_allclose(autodiff.tree_vdot(a, product(b)), autodiff.tree_vdot(b, product(a)), rtol=1e-12)


def test_hvp_returns_what_the_loss_returns_beside():
  params, batch = plain()
  loss = lambda p, b: (plain_losses(p, b).sum(), {'rows': jnp.arange(3), 'mean': plain_losses(p, b).mean()})
  product, aux = jax.jit(functools.partial(autodiff.hvp, loss, has_aux=True))(params, params, batch)
  close(product, jax.jit(functools.partial(autodiff.hvp, lambda p, b: loss(p, b)[0]))(params, params, batch), 1e-6)
  np.testing.assert_array_equal(aux['rows'], [0, 1, 2])
  np.testing.assert_allclose(aux['mean'], plain_losses(params, batch).mean(), rtol=1e-6)


def brute_force(losses, params, direction, weights, batch):
  """Every example's own gradient, and the dense way round: reverse over reverse."""
  one = lambda p, row: losses(p, jax.tree.map(lambda x: x[None], row))[0]
  gradients = jax.vmap(jax.grad(one), (None, 0))(params, batch)
  derivatives = sum((g * d[None]).reshape(len(weights), -1).sum(1)
                    for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction)))
  weighted = lambda p: (lambda each: ((weights * each).sum(), each))(losses(p, batch))

  def inner(p):
    gradient, each = jax.grad(weighted, has_aux=True)(p)
    dot = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    return dot, (gradient, each)

  product, (gradient, each) = jax.grad(inner, has_aux=True)(params)
  return autodiff.SecondOrder(each, gradient, product, derivatives)


@pytest.mark.parametrize('losses,microbatches', [(plain_losses, 1), (plain_losses, 6), (scanned_losses, 2)])
def test_one_pass_is_brute_force(x64, losses, microbatches):
  params, batch = plain()
  direction, weights = normal_like(params), jnp.array([1.0, 0, 3, -0.5, 2, 1])
  want = jax.jit(functools.partial(brute_force, losses))(params, direction, weights, batch)
  found = jax.jit(functools.partial(autodiff.second_order, losses, microbatches=microbatches))(
    params, direction, weights, batch)
  close(found, want, 1e-12)
  alone = jax.jit(functools.partial(autodiff.directional_derivatives, losses))(params, direction, batch)
  close(alone, (want.losses_B, want.derivatives_B), 1e-12)


@functools.cache
def mistral_brute_force():
  """With the reference attention, which the flash one that MODEL has by itself is not."""
  losses = functools.partial(mistral_losses, model=dataclasses.replace(MODEL, attention='reference', remat='none'))
  params, batch = mistral()
  return jax.jit(functools.partial(brute_force, losses))(params, normal_like(params), jnp.arange(8.0), batch)


def test_one_pass_is_brute_force_on_the_language_model():
  """Scan over layers, rematerialisation, flash attention, packed documents; float32, hence the tolerance."""
  params, batch = mistral()
  found = jax.jit(functools.partial(autodiff.second_order, mistral_losses, microbatches=4))(
    params, normal_like(params), jnp.arange(8.0), batch)
  close(found, mistral_brute_force(), 2e-5)


def test_one_pass_is_the_same_on_four_devices():
  params, batch = mistral()
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  places = sharding.tree_shardings(mesh, params, MODEL.logical_axes())
  rows = NamedSharding(mesh, PartitionSpec('fsdp'))
  put = lambda x: jax.device_put(x, rows)
  with sharding.use(mesh):
    found = jax.jit(functools.partial(autodiff.second_order, mistral_losses, microbatches=2))(
      jax.device_put(params, places), jax.device_put(normal_like(params), places), put(jnp.arange(8.0)),
      jax.tree.map(put, batch))
    jax.block_until_ready(found)
  close(jax.device_get(found), mistral_brute_force(), 2e-5)


def test_a_population_is_differentiated_at_once(x64):
  params, batch = plain()
  population = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  run = functools.partial(autodiff.second_order, scanned_losses, weights_B=jnp.ones(6), batch=batch, microbatches=2)
  found = jax.jit(jax.vmap(run))(population, population)
  for i in range(2):
    member = jax.tree.map(lambda x, i=i: x[i], population)
    close(jax.tree.map(lambda x, i=i: x[i], found), jax.jit(run)(member, member), 1e-12)


def test_bfloat16_parameters_are_summed_in_float32():
  """256 rows of equal gradient: in bfloat16 a sum of 256 parts would stand still long before."""
  params = {'w': jnp.ones((3,), jnp.bfloat16)}
  batch = jnp.full((1024, 3), 1 / 64, jnp.bfloat16)
  losses = lambda p, x_BxD: (x_BxD @ p['w']).astype(jnp.float32)
  found = autodiff.second_order(losses, params, params, jnp.ones(1024), batch, microbatches=1024)
  assert found.grad['w'].dtype == jnp.float32
  np.testing.assert_array_equal(found.grad['w'], [16.0, 16, 16])
  assert autodiff.hvp(lambda p: losses(p, batch).sum(), params, params)['w'].dtype == jnp.bfloat16


def test_inner_product_and_norm_are_numpys(x64):
  params, _ = plain()
  other = normal_like(params)
  flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
  np.testing.assert_allclose(autodiff.tree_vdot(params, other), flat(params) @ flat(other), rtol=1e-13)
  np.testing.assert_allclose(autodiff.tree_norm(params), np.linalg.norm(flat(params)), rtol=1e-13)
  ones = jnp.full((3000,), 1, jnp.bfloat16)
  assert float(autodiff.tree_vdot([ones], [ones])) == 3000  # bfloat16 has no 3000
  assert float(autodiff.tree_norm({})) == 0


@pytest.mark.parametrize('change,message', [
  (lambda d: d | {'out': jnp.ones((5,))}, r"direction\['out'\] has shape \(5,\), want \(4,\)"),
  (lambda d: d | {'out': jnp.ones((4,), jnp.bfloat16)}, r"direction\['out'\] is bfloat16, want float32"),
  (lambda d: {'in': d['in']}, r"direction has no \['out'\]"),
  (lambda d: d | {'more': d['out']}, r"direction\['more'\] has no counterpart"),
  (lambda d: d | {'in': {'w': d['in']['w'], 'c': d['in']['b']}}, r"no \['in'\]\['b'\]; direction\['in'\]\['c'\]"),
])
def test_a_direction_that_does_not_fit_is_refused_by_leaf(change, message):
  params, batch = plain()
  direction = change(params)
  with pytest.raises(ValueError, match=message):
    autodiff.directional_derivatives(plain_losses, params, direction, batch)
  with pytest.raises(ValueError, match=message):
    autodiff.second_order(plain_losses, params, direction, jnp.ones(6), batch)
  with pytest.raises(ValueError, match=message.replace('direction', 'tangent')):
    autodiff.hvp(lambda p: plain_losses(p, batch).sum(), params, direction)


def test_other_misuse_is_refused():
  params, batch = plain()
  run = functools.partial(autodiff.second_order, plain_losses, params, params)
  with pytest.raises(ValueError, match=r'\[.y_B.\] has shape \(6,\); want 5 rows'):
    run(jnp.ones(5), batch | {'x_BxD': batch['x_BxD'][:5]})
  with pytest.raises(ValueError, match='4 micro-batches do not divide the batch of 6 rows'):
    run(jnp.ones(6), batch, microbatches=4)
  with pytest.raises(ValueError, match='one weight for each row'):
    run(jnp.ones(()), batch)
  with pytest.raises(ValueError, match='want a vector, one loss for each example'):
    autodiff.directional_derivatives(lambda p, b: plain_losses(p, b).mean(), params, params, batch)
  with pytest.raises(ValueError, match='returned 3 losses for 6 rows'):
    autodiff.second_order(lambda p, b: plain_losses(p, b)[:3], params, params, jnp.ones(6), batch)
  counted = params | {'step': jnp.zeros((), jnp.int32)}
  with pytest.raises(ValueError, match=r"params\['step'\] is int32"):
    autodiff.directional_derivatives(plain_losses, counted, counted, batch)
  with pytest.raises(ValueError, match='its containers are'):
    autodiff.tree_vdot([params['out']], (params['out'],))
