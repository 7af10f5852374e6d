"""Laws of the swarm: a proxy in it is the proxy trained alone, however they are split, grouped, stopped and resumed."""

import dataclasses
import functools
import itertools
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import small_store

from datasel import build, evaluate, hlo, hlo_costs, metrics, objectives, sharding, train
from datasel import config as config_lib
from datasel.data import sampler
from datasel.methods.regmix import planning, stacked, swarm, tables
from datasel.methods.regmix.streams import Streams
from datasel.models.mistral import Mistral
from datasel.step import train_step

STEPS, BATCH, LENGTH = 5, 4, 32
MODEL = Mistral(vocab_size=400, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32)
OBJECTIVE = objectives.language_model(MODEL.token_nll)
# Of email, json and pydocs: two proxies never read the first, one of them nothing but the last.
WEIGHTS = np.array([[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0, 1], [0.125, 0.625, 0.25], [1 / 3, 1 / 3, 1 / 3]])
INDEX = tuple('abcde')


class Killed(BaseException):
  """Stands for a kill: nobody catches it."""


class Seen:
  """A store with something done to what is read of a split: act(number of the read, batch)."""

  def __init__(self, store, split, act):
    self._store, self._split, self._act, self._reads = store, split, act, itertools.count()

  def __getattr__(self, name):
    return getattr(self._store, name)

  def read(self, split, domain_B, record_B):
    batch = self._store.read(split, domain_B, record_B)
    return self._act(next(self._reads), batch) if split == self._split else batch


def at(n, action):
  def act(number, batch):
    if number == n:
      action()
    return batch

  return act


def kill():
  raise Killed


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def mixtures(store):
  return tables.Table(store.domains, INDEX, WEIGHTS)


def make_config():
  config = config_lib.base('regmix')
  config.data.length, config.data.block = LENGTH, 4096
  config.train.log_every, config.train.checkpoint_every = 1, 2
  config.train.eval_every, config.train.eval_sequences = 2, 3  # nine sequences: three batches, the last nearly empty
  config.optimizer.peak_lr = 1e-2
  config.tracking.tensorboard = False
  return config


def make_stage():
  return build.Stage('swarm', MODEL, OBJECTIVE, STEPS, BATCH, 1, LENGTH)


def some(devices):
  return sharding.make_mesh(devices, devices=jax.devices()[:devices])


def trained(directory, store, mixtures, *, devices=4, peak_lr=1e-2, **options):
  config = make_config()
  config.optimizer.peak_lr = peak_lr
  with build.begin(config, directory, store, 1.0) as run:
    run = dataclasses.replace(run, mesh=some(devices))
    return swarm.train(run, make_stage(), mixtures, config.optimizer, role='swarm', init_role='init-swarm', **options)


@pytest.fixture(scope='module')
def left_alone(store, mixtures, tmp_path_factory):
  """The folder of a swarm on four devices that nothing disturbed: two proxies on each, three of them padding."""
  directory = tmp_path_factory.mktemp('left_alone')
  trained(directory, store, mixtures)
  return directory


def results(directory):
  """The bits of what a swarm is for."""
  files = {name: (directory / 'swarm' / name).read_bytes() for name in ('mixtures.csv', 'losses.csv')}
  with np.load(directory / 'swarm/losses_by_step.npz') as kept:
    return files, {name: (kept[name].dtype, kept[name].tobytes()) for name in kept}


@pytest.mark.parametrize('p', [1, 4])
def test_a_proxy_has_the_losses_of_the_proxy_trained_alone_to_the_bit(store, left_alone, tmp_path, p):
  config = make_config()
  with build.begin(config, tmp_path, store, 1.0) as run:
    build.train_stage(dataclasses.replace(run, mesh=some(1)), make_stage(), role='swarm', init_role='init-swarm',
                      weights_M=WEIGHTS[p])
  lines = metrics.read(tmp_path, kind='eval')
  with np.load(left_alone / 'swarm/losses_by_step.npz') as kept:
    assert kept['steps'].tolist() == [line['step'] for line in lines] == [0, 2, 4, 5]
    assert kept['domains'].tolist() == list(store.domains) and kept['index'].tolist() == list(INDEX)
    for losses_PxM, line in zip(kept['losses'], lines):
      assert losses_PxM[p].tolist() == [line['nll'][name] for name in store.domains]


def test_the_tables_are_the_mixtures_and_the_last_losses(store, mixtures, left_alone):
  losses = tables.read(left_alone / 'swarm/losses.csv')
  weights_PxM, losses_PxM = tables.join(tables.read_mixtures(left_alone / 'swarm/mixtures.csv'), losses)
  assert losses.columns == store.domains
  np.testing.assert_array_equal(weights_PxM, WEIGHTS)
  with np.load(left_alone / 'swarm/losses_by_step.npz') as kept:
    np.testing.assert_array_equal(losses_PxM, kept['losses'][-1])
    assert (kept['losses'][-1] < kept['losses'][0] - 0.01).all()
    assert len(np.unique(kept['losses'][-1])) == losses_PxM.size  # every proxy another model
    np.testing.assert_array_equal(kept['losses'][0], kept['losses'][0][:1].repeat(5, 0))  # which began as one
    for line, now in zip(metrics.read(left_alone, kind='eval'), kept['losses'], strict=True):
      np.testing.assert_allclose(line['nll']['json'], now[:, 1].mean(), rtol=1e-12)
      assert (line['lowest_nll']['json'], line['highest_nll']['json']) == (now[:, 1].min(), now[:, 1].max())


def test_devices_and_groups_change_no_bit(store, mixtures, left_alone, tmp_path):
  trained(tmp_path / 'one_device', store, mixtures, devices=1)
  trained(tmp_path / 'groups', store, mixtures, devices=2, group=2)
  for name in ('one_device', 'groups'):
    assert results(tmp_path / name) == results(left_alone)
  assert sorted(p.name for p in (tmp_path / 'groups/swarm').glob('group-*')) == ['group-0', 'group-1', 'group-2']
  assert not list((tmp_path / 'groups/swarm').rglob('checkpoints'))


@pytest.mark.parametrize('reads', [[0], [2 * 3 + 1], [3 + 1, 2, 5]])  # three batches to an evaluation
def test_a_killed_swarm_resumes_to_the_same_bits(store, mixtures, left_alone, tmp_path, reads):
  for n in reads:
    with pytest.raises(Killed):
      trained(tmp_path, Seen(store, 'validation', at(n, kill)), mixtures)
    assert not (tmp_path / 'swarm/losses.csv').exists()
  trained(tmp_path, store, mixtures)
  assert results(tmp_path) == results(left_alone)
  assert small_run.timeless(tmp_path) == small_run.timeless(left_alone)


def test_a_signal_saves_the_step_it_falls_in(store, mixtures, left_alone, tmp_path):
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(train.Interrupted, match='swarm/group-0: stopped after step 3 of 5'):
    trained(tmp_path, Seen(store, 'validation', at(4, stop)), mixtures)
  trained(tmp_path, store, mixtures)
  assert results(tmp_path) == results(left_alone)


def test_a_finished_group_and_a_finished_swarm_are_not_trained_again(store, mixtures, left_alone, tmp_path):
  with pytest.raises(Killed):
    trained(tmp_path, Seen(store, 'validation', at(4 * 3 + 1, kill)), mixtures, devices=2, group=2)
  first = tmp_path / 'swarm/group-0'
  assert (first / 'manifest.json').exists() and not (tmp_path / 'swarm/group-1/manifest.json').exists()
  before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
  trained(tmp_path, store, mixtures, devices=2)  # in the groups that it was begun in
  assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
  assert results(tmp_path) == results(left_alone)
  shutil.rmtree(first)
  nothing = lambda n, batch: kill()
  trained(tmp_path, Seen(Seen(store, 'train', nothing), 'validation', nothing), mixtures, devices=2)


def states(proxies, mesh, *, chunk, microbatches, steps):
  """(stacked state after some steps on ragged batches, the last metrics, the batches)."""
  tx = build.optimizer(make_config().optimizer, STEPS)
  one = stacked.initial(MODEL.init, tx)
  rng = np.random.default_rng(0)
  batches = []
  for _ in range(steps):
    batch = {name: rng.integers(1, 400, (proxies * BATCH, LENGTH)).astype(np.int32)
             for name in ('tokens_BxL', 'targets_BxL')}
    ragged_BxL = rng.random((proxies * BATCH, LENGTH)) < rng.random((proxies * BATCH, 1))
    batch['loss_mask_BxL'] = ragged_BxL.astype(np.float32)
    batches.append(batch)
  step = stacked.step(OBJECTIVE, tx, mesh, proxies=proxies, chunk=chunk, microbatches=microbatches)
  state = stacked.init(one, proxies, mesh)(jax.random.key(0))
  for batch in batches:
    state, last = jax.block_until_ready(step(state, sharding.put(mesh, batch, stacked.RULES)))
  return jax.device_get(state), jax.device_get(last), batches


@functools.cache
def of_proxies(chunk, microbatches=1, steps=3):
  return states(6, stacked.mesh(np.array(jax.devices()[:1])), chunk=chunk, microbatches=microbatches, steps=steps)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_every_array_of_every_state_is_that_of_the_plain_step(microbatches):
  state, last, batches = of_proxies(1, microbatches)
  tx = build.optimizer(make_config().optimizer, STEPS)
  alone = jax.jit(functools.partial(train_step, objective=OBJECTIVE, tx=tx, microbatches=microbatches))
  for p in range(6):
    want = jax.jit(stacked.initial(MODEL.init, tx))(jax.random.key(0))
    for batch in batches:
      want, metrics = alone(want, {name: jnp.asarray(x[p * BATCH:][:BATCH]) for name, x in batch.items()})
    for a, b in zip(jax.tree.leaves((state, last)), jax.tree.leaves((want, metrics)), strict=True):
      assert a.dtype == b.dtype and a[p].tobytes() == np.asarray(b).tobytes()


def test_proxies_stepped_together_are_those_stepped_one_by_one():
  """Four, and then the two that are left; up to float32 rounding: another order of the sums inside a product.  Of the
  first step: where a gradient is next to nothing, Adam divides the rounding by as little."""
  (state, last, _), (want, want_last, _) = of_proxies(4, steps=1), of_proxies(1, steps=1)
  for a, b in zip(jax.tree.leaves((state.opt_state, last)), jax.tree.leaves((want.opt_state, want_last)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_the_new_states_take_the_places_of_the_old_ones():
  """A loop holds no second copy of them, however many there are."""
  mesh = stacked.mesh(np.array(jax.devices()[:1]))
  tx = build.optimizer(make_config().optimizer, STEPS)

  def beside(proxies):
    state = stacked.abstract_state(stacked.initial(MODEL.init, tx), proxies, mesh)
    step = stacked.step(OBJECTIVE, tx, mesh, proxies=proxies, chunk=1, microbatches=1)
    found = step.lower(state, stacked.abstract_batch(proxies * BATCH, LENGTH, mesh)).compile().memory_analysis()
    assert found.alias_size_in_bytes >= 0.99 * build.bytes_on_device(state)
    return found.temp_size_in_bytes, build.bytes_on_device(state)

  (few, small), (many, large) = beside(6), beside(60)
  assert many - few < 0.05 * (large - small)


def test_the_step_has_no_collectives():
  mesh = stacked.mesh(np.array(jax.devices()))
  tx = build.optimizer(make_config().optimizer, STEPS)
  state = stacked.abstract_state(stacked.initial(MODEL.init, tx), 8, mesh)
  for chunk in (1, 2):  # in a loop, and all of a device at once
    step = stacked.step(OBJECTIVE, tx, mesh, proxies=8, chunk=chunk, microbatches=1)
    text = step.lower(state, stacked.abstract_batch(8 * BATCH, LENGTH, mesh)).compile().as_text()
    assert 'num_partitions=4' in text
    assert not hlo_costs.count(hlo.parse(text)).collectives


def test_losses_are_those_of_the_evaluator(store):
  options = dict(batch_size=7, max_sequences=9)
  params = [jax.jit(MODEL.init)(jax.random.key(n)) for n in range(4)]
  mesh = stacked.mesh(np.array(jax.devices()[:2]))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(stacked.AXIS))
  together = jax.device_put(jax.tree.map(lambda *x: jnp.stack(x), *params), place)
  alone = evaluate.evaluator(MODEL.token_nll, store, some(1), **options)
  want = [[alone(jax.device_get(one))['nll'][name] for name in store.domains] for one in params]
  np.testing.assert_array_equal(stacked.evaluator(MODEL.token_nll, store, mesh, chunk=1, **options)(together), want)
  np.testing.assert_allclose(stacked.evaluator(MODEL.token_nll, store, mesh, chunk=2, **options)(together), want,
                             rtol=1e-6)


def streams(store, rows=None, padded=8, seed=3):
  rows = np.arange(padded * BATCH) if rows is None else rows
  return Streams(store, WEIGHTS, BATCH, seed=seed, block=64, padded=padded, rows=rows, names=INDEX)


def test_a_stream_is_what_the_sampler_gives_alone(store):
  """Beyond a block's end, and after a restart; the padding repeats the last."""
  alone = [iter(sampler.Sampler(store, 'train', weights_M, BATCH, seed=3, block=64)) for weights_M in WEIGHTS]
  together = iter(streams(store))
  for n in range(20):
    if n == 11:
      saved, together = together.get_state(), iter(streams(store))
      together.set_state(saved)
    got, want = next(together), [next(one) for one in alone]
    for name in got:
      np.testing.assert_array_equal(got[name], np.concatenate([batch[name] for batch in [*want, *want[-1:] * 3]]))


def test_processes_read_their_own_rows(store):
  whole = next(iter(streams(store)))
  for rows in (np.arange(8, 16), np.array([2, 3, 17, 30])):
    part = next(iter(streams(store, rows)))
    for name in whole:
      np.testing.assert_array_equal(part[name], whole[name][rows])


def test_a_stream_of_another_swarm_is_not_taken_up(store):
  state = iter(streams(store)).get_state()
  with pytest.raises(ValueError, match='of a swarm of other mixtures, or of another store, seed or block'):
    iter(streams(store, seed=4)).set_state(state)


def test_proxies_that_diverge_are_named(store, mixtures, tmp_path):
  def poison(n, batch):
    poisoned_B = (batch['domain_B'] == 0) & (n == 3)  # step 4 of the proxies that read email
    return batch | {'loss_mask_BxL': np.where(poisoned_B[:, None], np.float32(np.nan), batch['loss_mask_BxL'])}

  with pytest.raises(FloatingPointError, match='step 4 gave loss nan.*those of 3 of 5 proxies, of mixture a, d, e'):
    trained(tmp_path, Seen(store, 'train', poison), mixtures)


def no_validation(store, name):
  """The store without held-out sequences of a domain."""
  view = Seen(store, '', None)
  view.sizes = lambda split: store.sizes(split) * [n != name or split != 'validation' for n in store.domains]
  return view


def test_what_cannot_be_trained_is_refused_before_anything_is_written(store, mixtures, tmp_path, monkeypatch):
  refused = lambda *args, **options: trained(tmp_path, *args, **options)
  with pytest.raises(ValueError, match='^json: nothing in the validation split to measure a loss on'):
    refused(no_validation(store, 'json'), mixtures)
  with pytest.raises(ValueError, match="no column 'pydocs'"):
    refused(store, tables.Table(('email', 'json', 'web'), INDEX, WEIGHTS))
  with pytest.raises(ValueError, match='mixture b: the weights sum to 0.5'):
    refused(store, dataclasses.replace(mixtures, values_NxC=WEIGHTS * [[1], [0.5], [1], [1], [1]]))
  with pytest.raises(ValueError, match='mixture c: in a block of 4096 positions these domains would never be drawn'):
    rare = np.where(np.arange(5)[:, None] == 2, [1e-6, 0.5, 0.5], WEIGHTS)
    refused(store, dataclasses.replace(mixtures, values_NxC=rare))
  with pytest.raises(ValueError, match='a group of -1 proxies: want at least 1'):
    refused(store, mixtures, group=-1)
  monkeypatch.setattr(planning, '_USABLE', 1e-9)
  with pytest.raises(ValueError, match='one proxy needs .* of a device that has 0.00 GiB for it; raise microbatches'):
    refused(store, mixtures)
  monkeypatch.undo()
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
  with pytest.raises(OSError, match='the checkpoints of 8 proxies need 0.00 GiB more'):
    refused(store, mixtures)
  assert not (tmp_path / 'swarm').exists()


def test_another_swarm_in_the_folder_is_refused(store, mixtures, left_alone, tmp_path):
  shutil.copytree(left_alone / 'swarm', tmp_path / 'swarm')
  with pytest.raises(ValueError, match='holds another swarm'):
    trained(tmp_path, store, dataclasses.replace(mixtures, values_NxC=WEIGHTS[::-1]))
  with pytest.raises(ValueError, match='holds another swarm'):
    trained(tmp_path, store, mixtures, peak_lr=2e-2)
  (tmp_path / 'swarm/losses.csv').write_text('index,email,json,pydocs\na,1,1,1\n')
  with pytest.raises(ValueError, match='losses.csv is missing or damaged'):
    trained(tmp_path, store, mixtures)


SIZE = 2**20  # of a state, below


def widening(proxies, chunk):
  """A compiled step that keeps much beside a state of SIZE bytes while it works on it."""
  one = lambda x: jnp.tanh(jnp.ones((10, 10)) @ jnp.outer(jnp.arange(10.0), x)).sum(0)
  step = jax.jit(lambda x: jax.lax.map(one, x, batch_size=chunk), donate_argnums=0)
  return step.lower(jax.ShapeDtypeStruct((proxies, SIZE // 4), jnp.float32)).compile()


def planned(proxies, room, chunk):
  return planning.plan(widening, proxies, 1, state_bytes=SIZE, chunk=chunk, available=room * SIZE)


def needs(proxies, chunk):
  return build.compiled_bytes(widening(proxies, chunk).memory_analysis())


@pytest.mark.parametrize('room', [25, 60, 110, 1000])
@pytest.mark.parametrize('chunk', [1, 8])
def test_plans_fit_and_cover_all(room, chunk):
  found, step = planned(50, room, chunk)
  assert needs(found.padded, found.chunk) == found.needed <= found.available
  groups = [range(50)[found.group(number)] for number in range(found.groups)]
  assert [p for group in groups for p in group] == list(range(50))
  assert max(map(len, groups)) == found.padded and found.padded - min(map(len, groups)) <= 1
  assert found.words().startswith(f'50 proxies in {"one" if found.groups == 1 else found.groups} group')
  if chunk == 1:
    assert found.chunk == 1 and (found.groups == 1) == (needs(50, 1) <= found.available)
  else:  # as many at a time as fit, and no more in a group
    most = next(n for n in (8, 4, 2, 1) if needs(n, n) <= found.available)
    assert found.chunk == found.padded <= most and found.groups == -(-50 // most)


def test_a_proxy_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='one proxy needs .* GiB of a device that has 0.00 GiB for it'):
    planned(50, 1, 8)


def test_cost_counts_every_proxy_and_the_output_head():
  stage = make_stage()
  matrices = sum(x.size for name, x in jax.tree_util.tree_leaves_with_path(MODEL.abstract())) - MODEL.vocab_size * 16
  attention = 12 * 1 * 2 * 8 * LENGTH / 2
  assert swarm.cost(stage, 7).flops == 7 * STEPS * BATCH * LENGTH * (6 * matrices + attention)
  assert swarm.cost(stage, 7).objective is None
