"""Laws of the PMP solver: its scores are what autodiff finds through the unrolled training, on any model and mesh."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from datasel import autodiff, sharding
from datasel.methods.pds import costates, pmp
from datasel.models.mistral import Mistral

ROOT = pathlib.Path(__file__).parents[2]
D = 3


def per_example_loss(params, batch):
  """A net of two layers."""
  hidden = jnp.tanh(batch['x'] @ params['in'] + params['b'][None])
  return jnp.square(hidden @ params['out'] - batch['y'])


def problem(T=6, B=4, n=3, seed=0, D=D, hidden=5):
  rng = np.random.default_rng(seed)
  batches = lambda *shape: {'x': rng.normal(size=(*shape, D)), 'y': rng.normal(size=shape)}
  params = {'in': rng.normal(size=(D, hidden)), 'b': rng.normal(size=hidden), 'out': rng.normal(size=hidden)}
  return jax.tree.map(jnp.asarray, params), batches(T, B), batches(n, 2), batches(2, 3)


def flat(batches):
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)


def unrolled(loss, params, train, proxies, dev, *, tx, stride):
  """Minus the derivative of sum over t of J(theta_t) with respect to each proxy's weight, by plain autodiff."""
  T, examples, held = len(jax.tree.leaves(train)[0]), flat(proxies), flat(dev)

  def target(weights_N):
    theta, opt_state, total = params, tx.init(params), 0.0
    for t in range(T):
      batch = jax.tree.map(lambda x, t=t: x[t], train)
      objective = lambda p, batch=batch, t=t: loss(p, batch).mean() + (t % stride == 0) * weights_N @ loss(p, examples)
      updates, opt_state = tx.update(jax.grad(objective)(theta), opt_state, theta)
      theta = optax.apply_updates(theta, updates)
      total += loss(theta, held).mean()
    return total

  return -jax.jit(jax.grad(target))(jnp.zeros(len(jax.tree.leaves(examples)[0])))


def example_grads(params, batches):
  """One for each example."""
  examples = flat(batches)
  return [jax.grad(lambda p, n=n: per_example_loss(p, jax.tree.map(lambda x: x[n:n + 1], examples))[0])(params)
          for n in range(len(examples['y']))]


@pytest.mark.parametrize(('T', 'stride'), [(1, 1), (2, 1), (5, 1), (6, 4), (7, 3), (16, 1), (16, 10), (13, 13)])
def test_scores_are_autodiff_through_the_unrolled_training(x64, T, stride):
  args = problem(T)
  got = pmp.solve(per_example_loss, *args, learning_rate=0.1, score_stride=stride)
  want = unrolled(per_example_loss, *args, tx=optax.sgd(0.1), stride=stride)
  np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def test_one_step_is_influence(x64):
  """T = 1: eta grad J(theta_1) . grad l_n(theta_0)."""
  params, train, proxies, dev = problem(T=1)
  first = jax.tree.map(lambda x: x[0], train)
  moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(lambda p: per_example_loss(p, first).mean())(params))
  grad_J = jax.grad(lambda p: per_example_loss(p, flat(dev)).mean())(moved)
  want = [0.1 * autodiff.tree_vdot(grad_J, grad) for grad in example_grads(params, proxies)]
  got = pmp.solve(per_example_loss, params, train, proxies, dev, learning_rate=0.1)
  np.testing.assert_allclose(got, want, rtol=1e-12)


OPTIMIZERS = {
  'momentum': functools.partial(optax.sgd, momentum=0.9),
  'adam': functools.partial(optax.adam, eps_root=1e-12),
  'adamw, clipped': lambda rate: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, eps_root=1e-12)),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_other_optimisers_have_costates_of_their_moments(x64, name):
  args = problem(T=7)
  got = pmp.solve(per_example_loss, *args, learning_rate=0.05, score_stride=2, optimizer=OPTIMIZERS[name])
  want = unrolled(per_example_loss, *args, tx=OPTIMIZERS[name](0.05), stride=2)
  np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())


RATES = np.linspace(0.2, 0.01, 7)


@pytest.mark.parametrize('rate', [RATES, lambda count: jnp.asarray(RATES)[count]], ids=['table', 'schedule'])
def test_the_learning_rate_may_change(x64, rate):
  args = problem(T=7)
  want = unrolled(per_example_loss, *args, tx=optax.sgd(lambda count: jnp.asarray(RATES)[count]), stride=1)
  np.testing.assert_allclose(pmp.solve(per_example_loss, *args, learning_rate=rate), want, rtol=1e-9, atol=1e-12)


def test_scores_of_several_checkpoints_are_averaged(x64):
  first, *batches = problem()
  second, *_ = problem(seed=1)
  got = pmp.solve_checkpoints(per_example_loss, iter([first, second]), *batches, learning_rate=0.1)
  want = [unrolled(per_example_loss, p, *batches, tx=optax.sgd(0.1), stride=1) for p in (first, second)]
  np.testing.assert_allclose(got, np.mean(want, 0), rtol=1e-9)


def test_a_stream_of_ragged_batches_is_the_same_examples(x64):
  params, train, proxies, dev = problem()
  want = pmp.solve(per_example_loss, params, train, proxies, dev, learning_rate=0.1)
  rows = lambda batches, first, last: jax.tree.map(lambda x: x[first:last], flat(batches))
  cut = lambda batches, *sizes: [rows(batches, *ends) for ends in itertools.pairwise(sizes)]
  got = pmp.solve(per_example_loss, params, train, cut(proxies, 0, 3, 4, 6), cut(dev, 0, 2, 4, 6), learning_rate=0.1)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  got = pmp.solve(per_example_loss, params, train, flat(proxies), flat(dev), learning_rate=0.1, microbatches=2)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_finite_differences_agree(x64):
  args = problem()
  want = pmp.solve(per_example_loss, *args, learning_rate=0.1)
  got = pmp.solve(per_example_loss, *args, learning_rate=0.1, derivatives='finite_difference')
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)
  assert not np.array_equal(got, want)


def test_normalised_scores_are_cosines(x64):
  """Of one step, by hand."""
  params, train, proxies, dev = problem(T=1)
  first = jax.tree.map(lambda x: x[0], train)
  moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(lambda p: per_example_loss(p, first).mean())(params))
  grad_J = jax.grad(lambda p: per_example_loss(p, flat(dev)).mean())(moved)
  cosine = lambda a, b: autodiff.tree_vdot(a, b) / autodiff.tree_norm(a) / autodiff.tree_norm(b)
  want = [cosine(grad_J, grad) for grad in example_grads(params, proxies)]
  got = pmp.solve(per_example_loss, params, train, proxies, dev, learning_rate=0.1, normalize=True)
  np.testing.assert_allclose(got, want, rtol=1e-12)


class Killed(Exception):
  pass


@pytest.mark.parametrize('segments', [1, 2])
def test_a_killed_solve_goes_on_where_it_was(x64, segments, tmp_path):
  args, options = problem(T=9), {'learning_rate': 0.1, 'directory': tmp_path / 'pmp'}
  want = pmp.solve(per_example_loss, *args, learning_rate=0.1)
  reports = []

  def kill(trace):
    reports.append(trace)
    if len(reports) == 2 + segments:  # after that of theta_T, and before this segment is kept
      raise Killed

  with pytest.raises(Killed):
    pmp.solve(per_example_loss, *args, **options, report=kill)
  rest = []
  np.testing.assert_array_equal(pmp.solve(per_example_loss, *args, **options, report=rest.append), want)
  assert len(rest) == 1 + 3 - segments


def louder(params, batch):
  return 1.001 * per_example_loss(params, batch)


def test_a_directory_takes_no_other_arguments(tmp_path):
  params, train, proxies, dev = problem(T=4)
  names = ('per_example_loss', 'params', 'train_batches', 'proxy_batches', 'dev_batches')
  known = dict(zip(names, (per_example_loss, params, train, proxies, dev))) | {
    'learning_rate': 0.1, 'directory': tmp_path}
  want = pmp.solve(**known)
  # What changes no score may differ.
  parts = [jax.tree.map(lambda x, at=at: x[at], flat(proxies)) for at in (slice(0, 4), slice(4, 5), slice(5, 6))]
  again = known | {'proxy_batches': parts, 'dev_batches': flat(dev), 'microbatches': 2}
  np.testing.assert_array_equal(pmp.solve(**again), want)

  nudged = lambda tree: jax.tree.map(lambda x: x * (1 + 1e-6), tree)
  turned = lambda tree: jax.tree.map(lambda x: x[:, ::-1], tree)
  changes = {
    'params': nudged(params), 'train_batches': turned(train), 'dev_batches': nudged(dev), 'learning_rate': 0.1000001,
    'proxy_batches': turned(proxies), 'per_example_loss': louder, 'weights_TxB': np.full((4, 4), 0.2500001),
    'optimizer': lambda rate: optax.chain(optax.sgd(rate), optax.scale(1 + 1e-6)), 'normalize': True,
    'derivatives': 'finite_difference', 'score_stride': 2}
  for name, value in changes.items():
    with pytest.raises(ValueError, match='another problem, which differs in') as refused:
      pmp.solve(**known | {name: value})
    assert {'per_example_loss': 'J(theta_T)'}.get(name, name) in str(refused.value)
  with pytest.raises(ValueError, match='proxy_batches'):
    pmp.solve(**known | {'proxy_batches': jax.tree.map(lambda x: x[:2], proxies)})
  with pytest.raises(ValueError, match='use the model and optimiser it was made with'):
    pmp.solve(**known | {'optimizer': functools.partial(optax.sgd, momentum=1e-9)})


def test_proxies_that_change_from_pass_to_pass_are_refused():
  params, train, proxies, dev = problem(T=4)

  class Shuffled:
    passes = 0

    def __iter__(self):
      self.passes += 1
      yield jax.tree.map(lambda x: np.roll(x, self.passes, 0), flat(proxies))

  with pytest.raises(ValueError, match='held 6 examples when last read and 6 now, or others; want the same'):
    pmp.solve(per_example_loss, params, train, Shuffled(), dev, learning_rate=0.1)


def test_a_segment_without_a_scored_step_reads_no_proxies():
  params, train, proxies, dev = problem(T=9)
  read = []

  class Read:
    def __iter__(self):
      read.append(0)
      yield flat(proxies)

  pmp.solve(per_example_loss, params, train, Read(), dev, learning_rate=0.1, score_stride=6)
  assert len(read) == 2  # of three: at steps 0 and 6


@pytest.mark.parametrize(('learning_rate', 'broken', 'reports'), [(1e30, 1, 0), (0.1, np.nan, 1)])
def test_what_is_not_finite_is_neither_reported_nor_kept(learning_rate, broken, reports, tmp_path):
  """J(theta_T) at once; scores with their first segment."""
  params, train, proxies, dev = problem(T=4)
  read, traces = [], []

  class Read:
    def __iter__(self):
      read.append(0)
      yield jax.tree.map(lambda x: broken * x, flat(proxies))

  for _ in range(2):
    with pytest.raises(FloatingPointError, match='not finite: the training diverges'):
      pmp.solve(per_example_loss, params, train, Read(), dev, learning_rate=learning_rate, directory=tmp_path,
                report=traces.append)
  assert len(read) == len(traces) == 2 * reports and not [*tmp_path.glob('steps/*')]


def test_bfloat16_is_added_up_in_float32():
  """By hand: l_n = w x_n, so that grad J = 1, lambda_{t+1} = T - t and the scores are T (T + 1) / 2 x_n; bfloat16 has
  neither 465 nor 257."""
  ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
  args = ones(), ones(30, 2), ones(1, 3), ones(512, 1)
  loss = lambda params, batch: params * batch
  got = pmp.solve(loss, *args, learning_rate=1.0)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, 465)
  np.testing.assert_allclose(pmp.solve(loss, *args, learning_rate=1.0, normalize=True), 30, rtol=1e-6)


def test_arguments_come_in_any_form():
  args = problem(T=4)
  want = pmp.solve(per_example_loss, *args, learning_rate=[0.1] * 4, score_stride=2)
  got = pmp.solve(per_example_loss, *args, learning_rate=(rate for rate in [0.1] * 4), score_stride=np.int64(2),
                  weights_TxB=[[0.25] * 4] * 4)
  np.testing.assert_array_equal(got, want)


def test_meshes_that_would_need_another_solver_are_refused():
  mesh = jax.make_mesh((4,), ('d',), axis_types=(jax.sharding.AxisType.Explicit,))
  params, *batches = jax.device_put(problem(B=4), NamedSharding(mesh, PartitionSpec()))
  for args, name in (((params, *batches), 'params'), ((problem()[0], *batches), 'train_batches')):
    with pytest.raises(ValueError, match=rf'{name}\[.* lies on .*want axes of AxisType.Auto'):
      pmp.solve(per_example_loss, *args, learning_rate=0.1)


def test_the_trace_is_that_of_the_training(x64):
  params, train, proxies, dev = problem(T=7)
  traces = []
  pmp.solve(per_example_loss, params, train, proxies, dev, learning_rate=0.1, score_stride=2, report=traces.append)
  trace = {name: np.concatenate([np.asarray(t[name]) for t in traces]) for name in traces[0]}
  order = np.argsort(trace['step'])
  losses = []
  for t in range(7):
    grad = jax.grad(lambda p, t=t: per_example_loss(p, jax.tree.map(lambda x: x[t], train)).mean())(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
    losses.append(per_example_loss(params, flat(dev)).mean())
  np.testing.assert_array_equal(trace['step'][order], np.arange(1, 8))
  np.testing.assert_allclose(trace['dev_loss'][order], losses, rtol=1e-12)
  final = jax.grad(lambda p: per_example_loss(p, flat(dev)).mean())(params)
  np.testing.assert_allclose(trace['costate_norm'][order][-1], autodiff.tree_norm(final), rtol=1e-12)


MODEL = Mistral(vocab_size=32, n_layers=1, d_model=16, n_heads=4, n_kv_heads=4, head_dim=4, d_ff=24, loss_chunk=5)


def language_model_loss(params, batch, model=MODEL):
  mask_BxL = batch['loss_mask_BxL']
  return (model.token_nll(params, batch) * mask_BxL).sum(-1) / mask_BxL.sum(-1)


@functools.cache
def language_model_problem():
  """Packed documents and ragged masks."""
  rng = np.random.default_rng(0)
  L = 8

  def batches(n, B):
    tokens = rng.integers(0, MODEL.vocab_size, (n, B, L + 1), dtype=np.int32)
    return {'tokens_BxL': tokens[..., :-1], 'targets_BxL': tokens[..., 1:],
            'loss_mask_BxL': (np.arange(L) <= rng.integers(1, L, (n, B, 1))).astype(np.float32),
            'segment_BxL': np.broadcast_to(np.arange(L) // 4 + 1, (n, B, L)).astype(np.int32),
            'position_BxL': np.broadcast_to(np.arange(L) % 4, (n, B, L)).astype(np.int32)}

  params = jax.tree.map(lambda x: 3 * x, MODEL.init(jax.random.key(0)))
  return params, batches(3, 8), batches(2, 8), batches(1, 8)


def test_scores_of_a_language_model():
  """Through flash attention; the unrolled training, which is differentiated twice in reverse, through a plain one."""
  args = language_model_problem()
  got = pmp.solve(language_model_loss, *args, learning_rate=0.1, score_stride=2)
  plain = functools.partial(language_model_loss, model=dataclasses.replace(MODEL, attention='reference'))
  want = unrolled(plain, *args, tx=optax.sgd(0.1), stride=2)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize('shape', [(4, 1, 1), (1, 4, 1), (1, 2, 2)])
def test_a_mesh_changes_nothing(shape):
  params, *batches = language_model_problem()
  want = pmp.solve(language_model_loss, params, *batches, learning_rate=0.1, score_stride=2)
  mesh = sharding.make_mesh(*shape)
  params = jax.device_put(params, sharding.tree_shardings(mesh, params, MODEL.logical_axes()))
  rows = NamedSharding(mesh, PartitionSpec(None, sharding.RULES['batch']))
  with sharding.use(mesh):
    got = pmp.solve(language_model_loss, params, *jax.device_put(batches, rows), learning_rate=0.1, score_stride=2)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_eight_devices_find_what_autodiff_finds():
  """In a process of its own, which has eight."""
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu',
                              'JAX_ENABLE_X64': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests" / "methods"}'}
  ended = subprocess.run([sys.executable, str(ROOT / 'tests' / 'methods' / 'pmp_on_eight_devices.py')], env=environment,
                         text=True, capture_output=True, check=False, timeout=300)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  outcome = json.loads(ended.stdout)
  assert outcome.pop('spread') == 8
  assert len(outcome) == 3 and max(outcome.values()) <= 1e-9, outcome


@pytest.mark.parametrize('stride', [lambda T: 1, math.isqrt, lambda T: T], ids=['1', 'root', 'T'])
def test_memory_grows_as_the_root_of_the_steps(stride, monkeypatch):
  """Copies of the parameters that live between segments, and in the compiled program that takes one back."""
  backward = costates.backward

  def copies(T):
    params, train, proxies, dev = problem(T=T)
    params = params | {'unused': jnp.zeros(100_000)}
    live, compiled = [], []

    def watched(*args):
      found = backward.lower(*args).compile().memory_analysis()
      compiled.append(found.temp_size_in_bytes + found.output_size_in_bytes + found.argument_size_in_bytes)
      monkeypatch.setattr(costates, 'backward', backward)  # one segment is like another
      return backward(*args)

    monkeypatch.setattr(costates, 'backward', watched)
    pmp.solve(per_example_loss, params, train, proxies, dev, learning_rate=0.01, score_stride=stride(T),
              report=lambda trace: live.append(sum(x.size for x in jax.live_arrays())))
    return np.array([max(live), compiled[0] / 4]) / 100_000

  few, many = copies(16), copies(144)
  assert (many - few < 3.3 * (12 - 4)).all(), (few, many)


@pytest.mark.parametrize(('change', 'message'), [
  ({'score_stride': 0}, 'score_stride is 0; want a whole number from 1 to the 6 steps'),
  ({'score_stride': 7}, 'from 1 to the 6 steps'),
  ({'score_stride': 2.0}, 'score_stride is 2.0; want a whole number'),
  ({'params': {'in': np.zeros((D, 5)), 'step': np.int32(3)}}, r"params\['step'\] is int32; want floating arrays only"),
  ({'derivatives': 'guessed'}, "want 'exact', or 'finite_difference'"),
  ({'learning_rate': [0.1, 0.2]}, r'shape \(2,\); want a number, or one for each of 6 steps'),
  ({'learning_rate': 1e3}, 'not finite: the training diverges'),
  ({'proxy_batches': iter([])}, 'proxy_batches is an iterator, which is read once'),
  ({'proxy_batches': []}, 'proxy_batches is empty'),
  ({'dev_batches': {'x': np.zeros((2, D))}}, 'dev_batches is a tree'),
  ({'dev_batches': {'x': np.zeros(D), 'y': np.zeros(())}}, 'want as many axes as train_batches have'),
  ({'proxy_batches': {'x': np.zeros((2, 3, D)), 'y': np.zeros((2, 4))}}, 'want the same of each'),
])
def test_bad_input_is_refused(change, message):
  names = ('params', 'train_batches', 'proxy_batches', 'dev_batches')
  with pytest.raises((ValueError, FloatingPointError), match=message):
    pmp.solve(per_example_loss, **dict(zip(names, problem())) | {'learning_rate': 0.1} | change)
