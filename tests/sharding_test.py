"""Laws of sharding: on any mesh the same numbers, each array where the rules say, the head's gradient summed once."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasel import hlo, objectives, optim, sharding, train
from datasel.models.mistral import Mistral

ROOT = pathlib.Path(__file__).parents[1]
# A vocabulary that no other axis is as long as; three chunks of the loss, the last one padded.
MODEL = Mistral(vocab_size=232, n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, loss_chunk=3)
B, L = 8, 8


def batch(seed=1):
  tokens, targets = jax.random.randint(jax.random.key(seed), (2, B, L), 0, MODEL.vocab_size)
  mask = (jnp.arange(L)[None] < jnp.arange(1, B + 1)[:, None]).astype(jnp.float32)  # ragged
  return {'tokens_BxL': tokens, 'targets_BxL': targets, 'loss_mask_BxL': mask}


def loss(params, rows, model=MODEL):
  return objectives.language_model(model.token_nll)(params, (), rows)[0]


def in_micro_batches(params, rows):
  return objectives.language_model(objectives.in_microbatches(MODEL.token_nll, 2))(params, (), rows)[0]


def hvp(function, params, rows):
  tangent = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
  return jax.jvp(jax.grad(lambda p: function(p, rows)), (params,), (tangent,))[1]


DERIVATIVES = {
  'gradient': lambda params, rows: jax.grad(loss)(params, rows),
  'gradient, tied': lambda params, rows: jax.grad(loss)(params, rows, dataclasses.replace(MODEL, tied=True)),
  'forward mode': lambda params, rows: jax.jvp(lambda p: MODEL.token_nll(p, rows), (params,), (params,))[1],
  'forward over reverse': functools.partial(hvp, loss),
  'forward over reverse, in micro-batches': functools.partial(hvp, in_micro_batches),
}
CASES = [*((name, (2, 1, 2)) for name in DERIVATIVES), ('gradient', (1, 4, 1))]


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 5, MODEL.init(jax.random.key(0)))  # large enough that every path matters


@functools.cache
def alone():
  """Every derivative on one device."""
  return jax.jit(lambda p, rows: {name: function(p, rows) for name, function in DERIVATIVES.items()})(params(), batch())


def compiled(function, mesh):
  place = sharding.tree_shardings(mesh, MODEL.abstract(), MODEL.logical_axes())
  rows = sharding.batch_sharding(mesh)

  def laid_out(params, batch):
    with sharding.use(mesh):
      return function(params, batch)

  return jax.jit(laid_out, in_shardings=(place, rows)).lower(
    MODEL.abstract(), jax.eval_shape(batch)).compile(), place, rows


@functools.cache
def derivative(name, shape):
  return compiled(DERIVATIVES[name], sharding.make_mesh(*shape))


@pytest.mark.parametrize(('name', 'shape'), CASES)
def test_every_derivative_of_the_loss_is_that_of_one_device(name, shape):
  program, place, rows = derivative(name, shape)
  got = jax.block_until_ready(program(jax.device_put(params(), place), jax.device_put(batch(), rows)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone()[name]), strict=True):
    # float32 sums in another order: 1e-5 of the largest entry.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 1e-9)


def reductions_in_loops(text, depth):
  """The arrays that an all-reduce or reduce-scatter inside `depth` nested loops, or more, gives."""
  module, found = hlo.parse(text), []

  def visit(computation, level):
    for instruction in computation.instructions.values():
      if level >= depth and instruction.op.removesuffix('-start') in ('all-reduce', 'reduce-scatter'):
        found.extend(instruction.outputs)
      for names in instruction.called.values():
        for name in names:
          visit(module.computations[name], level + (instruction.op == 'while'))

  visit(module.entry, 0)
  return found


def head_sums(program, shape, depth=1):
  """How many sums of (a shard of) the head's gradient are inside loops."""
  shard = MODEL.vocab_size // shape[2]
  return sum(shard in array.dims for array in reductions_in_loops(program.as_text(), depth))


@pytest.mark.parametrize(('name', 'shape'), CASES)
def test_the_gradient_of_the_head_is_summed_once_and_not_for_every_chunk_of_the_loss(name, shape):
  # In micro-batches it is once for each of them.
  assert head_sums(derivative(name, shape)[0], shape, depth=2 if 'micro-batches' in name else 1) == 0


def test_without_the_shards_the_reader_finds_a_sum_for_every_chunk(monkeypatch):
  monkeypatch.setattr(sharding, 'by_batch_shard', lambda function, weight, axes, *rows: function(weight, *rows))
  program, _, _ = compiled(DERIVATIVES['gradient'], sharding.make_mesh(4, 1, 1))
  assert head_sums(program, (4, 1, 1)) > 0


def test_the_logits_are_split_as_the_rules_say():
  mesh = sharding.make_mesh(2, 1, 2)
  program, _, _ = compiled(lambda params, rows: MODEL.apply(params, rows['tokens_BxL']), mesh)
  assert program.output_shardings.spec == jax.sharding.PartitionSpec('data', None, 'tensor')


def test_a_table_of_rules_goes_into_a_config_and_back():
  table = sharding.rules_table()
  assert table['batch'] == 'data,fsdp' and table['norm'] == '' and table['embed'] == 'fsdp'
  assert sharding.rules_from(table) == sharding.RULES
  assert sharding.rules_from(table | {'embed': 'tensor', 'heads': '', 'kv_heads': ''})['embed'] == 'tensor'


@pytest.mark.parametrize(('change', 'message'), [
  ({'haeds': 'tensor'}, "'haeds'.*no logical axes.*want exactly.*heads"),
  ({'mlp': 'tensr'}, "rule mlp is 'tensr': want mesh axes"),
  ({'heads': 'fsdp'}, "'heads'.*collide.*twice"),
  ({'batch': 'data,tensor'}, "collide.*twice"),
])
def test_rules_that_no_mesh_can_follow_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    sharding.rules_from(sharding.rules_table() | change)
  with pytest.raises(ValueError, match="no rule for .'mlp'."):
    sharding.rules_from({name: place for name, place in sharding.rules_table().items() if name != 'mlp'})


def test_a_program_follows_its_rules():
  """Rules of another choosing: parameters split by nothing but the vocabulary, over fsdp; the batch over data alone."""
  rules = sharding.RULES | {'embed': None, 'vocab': 'fsdp', 'batch': 'data'}
  program = train.program(MODEL.init, MODEL.logical_axes(), objective=objectives.language_model(MODEL.token_nll),
                          tx=optim.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0),
                          mesh=sharding.make_mesh(2, 2, 1), rules=rules)
  state, metrics = program.step(program.init(jax.random.key(0)), program.put(jax.device_get(batch())))
  jax.block_until_ready(metrics)
  spread = lambda x: x.size // x.addressable_shards[0].data.size
  assert spread(state.params['head']['kernel']) == 2 and spread(state.params['blocks']['query']['kernel']) == 1
  np.testing.assert_allclose(metrics['loss'], loss(MODEL.init(jax.random.key(0)), batch()), rtol=2e-6)


def test_eight_devices_train_as_one_does():
  """In a process of its own, which has eight."""
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8 '
                              '--xla_backend_optimization_level=0',
                              'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  ended = subprocess.run([sys.executable, str(ROOT / 'tests' / 'eight_devices.py')], env=environment, text=True,
                         capture_output=True, check=False, timeout=300)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  outcome = json.loads(ended.stdout)
  assert sorted(outcome) == ['1x1x8', '1x4x2', '1x8x1', '2x2x2', '8x1x1']
  # The compiler found a way from every layout to the next without gathering activations on each device.
  assert 'Involuntary full rematerialization' not in ended.stderr
  for shape, found in outcome.items():
    # 3 steps of AdamW: the losses to float32 rounding; parameters, whose steps are of size 1e-2, to 1e-5.
    assert found['loss'] <= 2e-6 and found['params'] <= 1e-5, (shape, found)
    assert found['spread'] == {'embed': 8 // int(shape[0]), 'moments': 'as their parameters'}, shape
