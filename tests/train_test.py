"""Laws of the loop: however often it is stopped, the outcome is that of a run left alone, bit for bit."""

import contextlib
import functools
import json
import logging
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from datasel import evaluate, metrics, objectives, optim, sharding, train
from datasel.checkpoint import Checkpoints
from datasel.data import sampler
from datasel.data.store import Store
from datasel.models.mistral import Mistral

STEPS, BATCH = 12, 8


class Killed(BaseException):
  """Stands for a kill: nobody catches it."""


class Watched:
  """The run's iterator of batches, with something done to batch number n (from 0)."""

  def __init__(self, batches, act):
    self._batches, self._act, self._n = batches, act, 0
    self.get_state = batches.get_state

  def set_state(self, state):
    self._batches.set_state(state)
    self._n = state['position'] // BATCH

  def __next__(self):
    batch = next(self._batches)
    self._n += 1
    return self._act(self._n - 1, batch)


def at(n, action):
  """Calls `action` before batch n is handed over."""

  def act(number, batch):
    if number == n:
      action()
    return batch

  return act


def kill():
  raise Killed


class Bigrams:
  """The smallest language model: a table of logits."""

  def __init__(self, vocab_size):
    self._vocab_size = vocab_size

  def init(self, key):
    return {'table': jax.random.normal(key, (self._vocab_size, self._vocab_size))}

  def logical_axes(self):
    return {'table': ('vocab', 'embed')}

  def token_nll(self, params, batch):
    logits_BxLxV = jax.nn.log_softmax(params['table'][batch['tokens_BxL']])
    return -jnp.take_along_axis(logits_BxLxV, batch['targets_BxL'][..., None], -1)[..., 0]


class Setting:
  """A tiny model and the real store, sampler, writer, checkpoints and evaluation."""

  def __init__(self, store, model):
    self.store, self.model = store, model
    self.program = functools.cache(self._program)

  def _program(self, devices):
    mesh = sharding.make_mesh(devices, devices=jax.devices()[:devices])
    model = self.model
    tx = optim.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0)
    program = train.program(model.init, model.logical_axes(), objective=objectives.language_model(model.token_nll),
                            tx=tx, mesh=mesh)
    return program, evaluate.evaluator(model.token_nll, self.store, mesh, batch_size=BATCH, max_sequences=4)

  def fit(self, directory, *, act=lambda n, batch: batch, devices=1, steps=STEPS, checkpoint_every=4, **others):
    program, evaluator = self.program(devices)
    batches = sampler.batches(sampler.Sampler(self.store, 'train', [0.25, 0.75], BATCH, seed=3, block=64))
    names = lambda batch: ', '.join(f'{self.store.domains[m]}/{n}'
                                    for m, n in zip(batch['domain_B'], batch['example_B']))
    with (contextlib.closing(batches), metrics.Writer(directory) as writer,
          Checkpoints(directory / 'checkpoints', keep=2) as checkpoints):
      return train.fit(
        program, Watched(batches, act), key=jax.random.key(7), stage='main', total_steps=steps, checkpoints=checkpoints,
        writer=writer, log_every=1, checkpoint_every=checkpoint_every, tokens_per_step=BATCH * self.store.length,
        flops_per_step=1.0, peak_flops=1.0, progress=metrics.Progress(float(steps)), name_examples=names,
        evaluate=evaluator, eval_every=3, **others)

  def outcome(self, directory, devices=1):
    """(leaves of the last checkpoint and its data state, metrics without times)."""
    with Checkpoints(directory / 'checkpoints', keep=2) as checkpoints:
      step, state, data = checkpoints.restore(self.program(devices)[0].abstract_state)
    return step, [np.asarray(x) for x in jax.tree.leaves(state)], data, small_run.timeless(directory)


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  store = Store(small_run.make_store(tmp_path_factory.mktemp('setting')))
  model = Mistral(vocab_size=store.vocab_size, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32)
  return Setting(store, model)


@pytest.fixture(scope='module')
def bigrams(setting):
  """The same with a model that compiles at once."""
  return Setting(setting.store, Bigrams(setting.store.vocab_size))


@pytest.fixture(scope='module')
def left_alone(setting, tmp_path_factory):
  """The outcome of a run that nothing disturbed."""
  directory = tmp_path_factory.mktemp('left_alone')
  setting.fit(directory)
  return setting.outcome(directory)


def assert_same(got, wanted):
  assert got[0] == wanted[0] == STEPS
  for a, b in zip(got[1], wanted[1], strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
  assert got[2:] == wanted[2:]


def test_the_outcome_is_not_trivial(left_alone):
  _, leaves, data, lines = left_alone
  assert data['position'] == STEPS * BATCH
  assert [line['step'] for line in lines if line['kind'] == 'eval'] == [0, 3, 6, 9, 12]
  losses = [line['loss'] for line in lines if line['kind'] == 'train']
  assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize('cuts', [[0], [2], [4], [5, 6, 11]])
def test_a_killed_run_resumes_to_the_same_bits(setting, left_alone, tmp_path, cuts):
  for n in cuts:
    with pytest.raises(Killed):
      setting.fit(tmp_path, act=at(n, kill))
  setting.fit(tmp_path)
  assert_same(setting.outcome(tmp_path), left_alone)


def test_so_does_a_run_on_several_devices(bigrams, tmp_path):
  bigrams.fit(tmp_path / 'left_alone', devices=4)
  with pytest.raises(Killed):
    bigrams.fit(tmp_path / 'killed', devices=4, act=at(6, kill))
  bigrams.fit(tmp_path / 'killed', devices=4)
  assert_same(*(bigrams.outcome(tmp_path / name, devices=4) for name in ('killed', 'left_alone')))


def test_a_finished_stage_is_not_trained_again(setting, left_alone, tmp_path):
  setting.fit(tmp_path)
  setting.fit(tmp_path, act=at(0, kill))
  assert_same(setting.outcome(tmp_path), left_alone)


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_falls_in(setting, left_alone, tmp_path, signum):
  before = signal.getsignal(signum)
  with pytest.raises(train.Interrupted, match='main: stopped after step 6 of 12'):
    setting.fit(tmp_path, act=at(5, lambda: os.kill(os.getpid(), signum)))
  assert signal.getsignal(signum) is before
  assert setting.outcome(tmp_path)[0] == 6
  setting.fit(tmp_path)
  assert_same(setting.outcome(tmp_path), left_alone)


def test_a_signal_in_the_last_save_still_stops_the_run(setting, left_alone, tmp_path):
  described = []

  def describe(step, values):
    described.append(values)
    if len(described) == STEPS:  # in the last iteration of the loop, after it asked for signals
      os.kill(os.getpid(), signal.SIGTERM)
    return values

  with pytest.raises(train.Interrupted, match='main: done, all of it saved'):
    setting.fit(tmp_path, describe=describe)
  assert_same(setting.outcome(tmp_path), left_alone)


def test_a_second_interrupt_ends_at_once_but_not_a_second_sigterm(setting, tmp_path):
  twice = lambda signum: lambda: [os.kill(os.getpid(), signum) for _ in range(2)]
  with pytest.raises(train.Interrupted):
    setting.fit(tmp_path, act=at(5, twice(signal.SIGTERM)))
  with pytest.raises(KeyboardInterrupt):
    setting.fit(tmp_path, act=at(7, twice(signal.SIGINT)))
  assert setting.outcome(tmp_path)[0] == 6


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_examples(setting, left_alone, tmp_path):
  poisoned = {}

  def poison(n, batch):
    if n != 8:
      return batch
    poisoned.update(batch)
    return batch | {'loss_mask_BxL': batch['loss_mask_BxL'] * np.float32(np.nan)}

  with pytest.raises(FloatingPointError, match='main: step 9 gave loss nan') as caught:
    setting.fit(tmp_path, act=poison, checkpoint_every=2)
  for domain, record in zip(poisoned['domain_B'], poisoned['example_B']):
    assert f'{setting.store.domains[domain]}/{record}' in str(caught.value)
  steps = sorted(int(p.name) for p in (tmp_path / 'checkpoints' / 'steps').iterdir())
  assert steps == [6, 8]
  assert max(line['step'] for line in metrics.read(tmp_path)) == 8
  setting.fit(tmp_path)
  assert_same(setting.outcome(tmp_path), left_alone)


def test_the_batch_before_a_checkpoint_is_checked_before_it_is_saved(setting, tmp_path):
  poison = lambda n, batch: batch | {'loss_mask_BxL': batch['loss_mask_BxL'] * np.float32(np.nan if n == 7 else 1)}
  with pytest.raises(FloatingPointError, match='step 8 '):
    setting.fit(tmp_path, act=poison, checkpoint_every=4)
  assert [p.name for p in (tmp_path / 'checkpoints' / 'steps').iterdir()] == ['4']


@pytest.mark.parametrize('steps', [2, 7, 12])
def test_a_profile_is_left_also_by_a_short_stage(setting, tmp_path, steps):
  setting.fit(tmp_path, steps=steps, profile_steps=2, profile_directory=tmp_path / 'profile')
  assert list((tmp_path / 'profile' / 'main').rglob('*.xplane.pb'))
  setting.fit(tmp_path, steps=steps, profile_steps=2, profile_directory=tmp_path / 'again')  # nothing left to trace
  assert not (tmp_path / 'again').exists()


def test_a_kill_while_profiling_does_not_block_the_next_profile(setting, tmp_path):
  with pytest.raises(Killed):
    setting.fit(tmp_path, act=at(6, kill), profile_steps=3, profile_directory=tmp_path / 'first')
  setting.fit(tmp_path, profile_steps=3, profile_directory=tmp_path / 'second')
  assert list((tmp_path / 'second').rglob('*.xplane.pb'))


def test_the_loop_runs_without_jit(bigrams, tmp_path):
  bigrams.fit(tmp_path / 'with', steps=2)
  with jax.disable_jit():
    bigrams.fit(tmp_path / 'without', steps=2)
  jitted, plain = (metrics.read(tmp_path / name, kind='train') for name in ('with', 'without'))
  assert len(jitted) == len(plain) == 2
  for a, b in zip(jitted, plain):
    np.testing.assert_allclose(b['loss'], a['loss'], rtol=1e-5)


def test_a_run_without_a_whole_checkpoint_begins_again_and_says_so(setting, left_alone, tmp_path, caplog):
  setting.fit(tmp_path)
  for path in pathlib.Path(tmp_path / 'checkpoints' / 'digests').iterdir():
    path.write_text(json.dumps({'files': {'params/gone': 'ab'}, 'arrays': {}}))
  with caplog.at_level(logging.WARNING):
    setting.fit(tmp_path)
  assert 'none of its 2 checkpoints was whole' in caplog.text
  assert_same(setting.outcome(tmp_path), left_alone)
