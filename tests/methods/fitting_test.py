"""Laws of fitting the scorer: it learns what can be learned, takes its best epoch, and survives being killed."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_run
import small_store

from datasel import build, metrics, sharding
from datasel import config as config_lib
from datasel.methods.pds import fitting
from datasel.methods.pds.scorer import Scorer, targets
from datasel.models.mistral import Mistral

MODEL = Mistral(vocab_size=400, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, remat='none')
LONG = {'epochs': 9, 'patience': 2}
# Moments at which a process is killed: a file is about to get its name for the n-th time, or a line is written.
MOMENTS = {
  'the first epoch is scored, its predictions not yet kept': ('file', r'held_out\.npz$', 1),
  'an epoch is over, but not yet listed': ('file', r'epochs\.json$', 2),
  'an epoch is listed, its metrics not yet written': ('line', 'held_out 6', 1),
  'a checkpoint within an epoch is there, but not proven': ('file', r'digests/8\.json$', 1),
  'all is done but to say so': ('file', r'stage\.json$', 2),
}


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


def fit(directory, store, rows, gamma_N, *, whole_mesh=False, backbone=None, checkpoint_every=1000, **changed):
  """`fitting.fit` in a run of its own, on one device or, with whole_mesh, on four."""
  config = config_lib.base('pds')
  config.data.block, config.tracking.tensorboard = 4096, False
  config.train.log_every, config.train.checkpoint_every = 1, checkpoint_every
  config.mesh.fsdp = 2
  optimizer = config.optimizer.to_dict() | {'peak_lr': 1e-2, 'end_lr': 0.0}
  config.pds = {'scorer': {'epochs': 2, 'patience': 2, 'batch_size': 32, 'microbatches': 1, 'held_out': 64,
                           'loss': 'mse', 'optimizer': optimizer}}
  config.update_from_flattened_dict({f'pds.scorer.{key}': value for key, value in changed.items()})
  read = lambda domain_B, record_B: store.read('train', domain_B, record_B)
  with build.begin(config, directory, store, 1e9) as run:
    if not whole_mesh:
      run = dataclasses.replace(run, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    return fitting.fit(run, config.pds.scorer, Scorer(MODEL), backbone, rows, targets(gamma_N), read)


def records(store, most):
  """(domain_N, record_N) of every domain's first records."""
  sizes = np.minimum(store.sizes('train'), most)
  return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(n) for n in sizes])


def first_records(store):
  """250 of three domains."""
  return tuple(values[:250] for values in records(store, 85))


def planted(store, rows):
  """Of each record, a linear function of how often the commonest tokens are in it."""
  tokens = store.read('train', *rows)['tokens_BxL']
  weight = np.zeros(400)
  weight[np.argsort(-np.bincount(tokens.ravel(), minlength=400))[:8]] = np.random.default_rng(0).normal(size=8)
  return 1e-3 * weight[tokens].mean(1) + 7


def trained():
  """A backbone unlike fresh ones."""
  return jax.tree.map(lambda x: 10 * x, jax.jit(MODEL.init)(jax.random.key(1)))


def not_asked():
  raise AssertionError('the backbone is read when a fit begins')


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def saved_params(directory, step):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(directory / 'scorer/checkpoints/steps' / str(step) / 'params')


def test_a_linear_function_of_token_frequencies_is_learned(store, tmp_path):
  rows = records(store, 500)
  fitted = fit(tmp_path, store, rows, planted(store, rows), **LONG)
  assert fitted.held_out['spearman'] > 0.9
  assert len(fitted.held_out['true']) == 64


def test_ranks_are_learned_on_any_mesh_in_microbatches(store, tmp_path):
  rows, more = records(store, 300), {'loss': 'rank', 'microbatches': 2, 'epochs': 4, 'optimizer.peak_lr': 2e-2}
  fitted = fit(tmp_path, store, rows, planted(store, rows), whole_mesh=True, **more)
  assert fitted.held_out['spearman'] > 0.6


def test_the_epoch_of_the_highest_correlation_is_taken_and_patience_ends(store, tmp_path):
  rows = records(store, 500)
  fitted = fit(tmp_path, store, rows, np.random.default_rng(3).normal(size=len(rows[0])), **LONG)
  epochs = json.loads((tmp_path / 'scorer/epochs.json').read_text())
  seen = [epoch['spearman'] for epoch in epochs]
  best = seen.index(max(seen))
  assert best + 1 + LONG['patience'] == len(seen) < LONG['epochs'], 'noise is not learned for so long'
  same(fitted.params, saved_params(tmp_path, epochs[best]['step']))
  kept = np.load(tmp_path / 'scorer/held_out.npz')
  assert fitted.held_out['spearman'] == max(seen)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  scored = fitted.score(fitted.params, sharding.put(mesh, fitted.read(kept['domain'][:32], kept['record'][:32])))
  np.testing.assert_array_equal(scored, kept['predicted'][:32])
  assert [line['spearman'] for line in metrics.read(tmp_path, 'scorer', 'held_out')] == seen


@pytest.fixture(scope='module')
def uninterrupted(store, tmp_path_factory):
  """(rows, scores, folder, what was fitted, {moment: what was on disk then}): 2 epochs of 6 steps from `trained()`."""
  folder, rows = tmp_path_factory.mktemp('uninterrupted'), first_records(store)
  gamma_N, seen, snapshots = np.random.default_rng(4).normal(size=250), {}, {}

  def watch(kind, what):
    for moment, (of_kind, pattern, times) in MOMENTS.items():
      if kind == of_kind and re.search(pattern, what):
        seen[moment] = seen.get(moment, 0) + 1
        if seen[moment] == times:
          snapshots[moment] = folder / f'killed-{len(snapshots)}'
          shutil.copytree(folder / 'run', snapshots[moment])

  replace, write = os.replace, metrics.Writer.write
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'replace', lambda source, target: (watch('file', str(target)), replace(source, target)))
    patch.setattr(metrics.Writer, 'write', lambda self, stage, kind, step, values: (
      watch('line', f'{kind} {step}'), write(self, stage, kind, step, values)))
    fitted = fit(folder / 'run', store, rows, gamma_N, held_out=60, checkpoint_every=4, backbone=trained)
  return rows, gamma_N, folder / 'run', fitted, snapshots


@pytest.mark.parametrize('moment', MOMENTS)
def test_a_killed_fit_ends_with_the_same_bits(store, uninterrupted, moment):
  rows, gamma_N, folder, fitted, snapshots = uninterrupted
  killed = snapshots[moment]
  assert not json.loads((killed / 'scorer/stage.json').read_text())['finished']
  resumed = fit(killed, store, rows, gamma_N, held_out=60, checkpoint_every=4, backbone=not_asked)
  same(resumed.params, fitted.params)
  assert resumed.digest == fitted.digest
  assert small_run.timeless(killed) == small_run.timeless(folder)
  for name in ('held_out.npz', 'epochs.json', 'stage.json'):
    assert (killed / 'scorer' / name).read_bytes() == (folder / 'scorer' / name).read_bytes()


def test_a_finished_fit_is_read_and_not_repeated(store, uninterrupted):
  rows, gamma_N, folder, fitted, _ = uninterrupted
  before = {path: path.stat().st_mtime_ns for path in (folder / 'scorer/checkpoints').rglob('*') if path.is_file()}
  again = fit(folder, store, rows, gamma_N, held_out=60, backbone=not_asked)
  same(again.params, fitted.params)
  assert again.digest == fitted.digest and again.held_out == fitted.held_out
  assert {path: path.stat().st_mtime_ns for path in before} == before


LOST = {'the list of epochs': ('epochs.json', None), 'the predictions': ('held_out.npz', None),
        'half of the predictions': ('held_out.npz', lambda whole: whole[:200]),
        'one bit of the predictions': ('held_out.npz', lambda whole: whole[:-400] + bytes([whole[-400] ^ 1])
                                       + whole[-399:])}


@pytest.mark.parametrize('what', LOST)
def test_what_was_lost_of_a_finished_fit_is_made_again(store, uninterrupted, tmp_path, what):
  """From the states of the epochs' ends, not from the newest."""
  rows, gamma_N, folder, fitted, _ = uninterrupted
  shutil.copytree(folder, tmp_path / 'run')
  (file, damage), scorer = LOST[what], tmp_path / 'run/scorer'
  whole = (scorer / file).read_bytes()
  (scorer / file).unlink()
  if damage:
    (scorer / file).write_bytes(damage(whole))
  again = fit(tmp_path / 'run', store, rows, gamma_N, held_out=60, checkpoint_every=4, backbone=not_asked)
  assert (scorer / file).read_bytes() == whole
  same(again.params, fitted.params)
  assert again.digest == fitted.digest and again.held_out == fitted.held_out


def test_predictions_that_were_edited_are_not_believed(store, uninterrupted, tmp_path):
  rows, gamma_N, folder, fitted, _ = uninterrupted
  shutil.copytree(folder, tmp_path / 'run')
  path = tmp_path / 'run/scorer/held_out.npz'
  with np.load(path) as saved:
    kept = dict(saved)
  np.savez(path, **kept | {'predicted': kept['predicted'] + np.float32(1e-3)})
  assert fit(tmp_path / 'run', store, rows, gamma_N, held_out=60, backbone=not_asked).held_out == fitted.held_out


def test_a_fit_begins_at_the_backbone(uninterrupted):
  _, _, folder, _, _ = uninterrupted
  after = saved_params(folder, 6)['backbone']
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, {k: v for k, v in trained().items() if k != 'head'})
  assert 0.01 < max(jax.tree.leaves(moved)) < 0.1  # Adam, 6 steps of 0.01 at most; the parameters' deviation is 0.2


def test_each_epoch_reads_every_proxy_that_is_not_held_out(store, uninterrupted):
  rows, _, folder, _, _ = uninterrupted
  stage = json.loads((folder / 'scorer/stage.json').read_text())
  assert stage['proxies']['fitted']['records'] == 190 and stage['steps'] == 12  # ceil(190 / 32) = 6
  kept = np.load(folder / 'scorer/held_out.npz')
  held = set(zip(kept['domain'].tolist(), kept['record'].tolist()))
  assert len(held) == 60 and held < set(zip(*(values.tolist() for values in rows)))
  assert len({domain for domain, _ in held}) == 3, 'not the first of them, which are of one domain'


def test_the_fit_of_other_scores_is_refused(store, uninterrupted):
  rows, gamma_N, folder, _, _ = uninterrupted
  with pytest.raises(ValueError, match=r'another scorer or of other proxies \(other: proxies\); delete it'):
    fit(folder, store, rows, gamma_N[::-1], held_out=60)


@pytest.mark.parametrize('changed, message', [
  ({'held_out': 250}, 'held_out is 250; want at least 2, and fewer than the 250 proxies'),
  ({'epochs': 0}, 'epochs is 0; want at least 1'),
  ({'microbatches': 3}, 'microbatches 3 does not divide config.pds.scorer.batch_size 32'),
  ({'loss': 'hinge'}, "unknown loss 'hinge'"),
  ({'optimizer.name': 'adamm'}, r"config.pds.scorer.optimizer: unknown optimizer.name 'adamm'"),
  ({'optimizer.schedule': 'cosin'}, r"config.pds.scorer.optimizer: unknown learning-rate schedule 'cosin'"),
])
def test_what_cannot_be_fitted_is_refused(store, tmp_path, changed, message):
  with pytest.raises(ValueError, match=message):
    fit(tmp_path, store, first_records(store), np.arange(250.0), **changed)
  assert not (tmp_path / 'scorer').exists()
