"""DoReMi end to end on a small store: its artefacts agree, its switches do what they say, its warnings are earned."""

import json
import math
import shutil
import types

import jax
import numpy as np
import pytest
import small_store

from datasel import build, checks, metrics, sharding, workdir
from datasel import config as config_lib
from datasel.data import mixture
from datasel.methods.doremi import run as doremi

TINY = {'vocab_size': 400, 'n_layers': 1, 'd_model': 16, 'n_heads': 2, 'n_kv_heads': 1, 'head_dim': 8, 'd_ff': 16}
EPOCHS = {'email': 1.0, 'json': 2.0, 'pydocs': 0.5}


@pytest.fixture(scope='module', autouse=True)
def one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'mesh', lambda section: sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  return small_store.make(tmp_path_factory.mktemp('store'))


def make_config(**changes):
  config = config_lib.base('doremi')
  config.doremi = config_lib.doremi()
  config.update_from_flattened_dict({
    'data.store': 'given by hand', 'data.length': 32, 'data.block': 4096, 'tracking.tensorboard': False,
    'optimizer.peak_lr': 1e-2,
    'train.steps': 4, 'train.batch_size': 8, 'train.log_every': 1, 'train.checkpoint_every': 3, 'train.eval_every': 2,
    'train.eval_sequences': 4, 'doremi.steps': 4, 'doremi.batch_size': 8, 'doremi.train_main': False}
    | {f'{part}.{key}': value for part in ('model', 'doremi.model') for key, value in TINY.items()})
  config.doremi.baseline_epochs = EPOCHS
  config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
  config_lib.check(config.lock())
  return config


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  """finished(name) -> (folder, summary) of one of the runs below, each run once."""
  root = tmp_path_factory.mktemp('runs')
  settings = {
    'tokens': {'doremi__seeds': 2, 'doremi__train_main': True},
    'uniform': {'doremi__baseline': 'uniform', 'doremi__rounds': 3, 'doremi__tolerance': 10.0},
    'examples': {'doremi__baseline': 'examples', 'doremi__rounds': 2, 'doremi__tolerance': 0.0,
                 'doremi__proxy_sampling': 'reference', 'doremi__loss_reduction': 'token_mean',
                 'doremi__missing_domain': 'keep', 'doremi__average_includes_initial': True},
    'pile': {'doremi__baseline': 'pile', 'doremi__microbatches': 2},
    'file': {'doremi__baseline': str(root / 'tokens/mixture.json'),
             'doremi__init_from': str(root / 'tokens/reference/checkpoints')},
  }
  done = {}

  def get(name):
    if name == 'file':
      get('tokens')
    if name not in done:
      (root / name).mkdir()
      done[name] = root / name, doremi.run(make_config(**settings[name]), root / name, store)
    return done[name]

  return get


def close(weights, other):
  return weights.keys() == other.keys() and all(abs(weights[name] - other[name]) < 1e-9 for name in weights)


def test_artefacts_agree(finished, store):
  folder, summary = finished('tokens')
  tuned = mixture.load(folder / 'mixture.json')
  proxies = [workdir.read_json(folder / f'proxy-{s}/weights.json') for s in range(2)]
  mean = {name: (proxies[0]['average'][name] + proxies[1]['average'][name]) / 2 for name in store.domains}
  assert math.fsum(tuned.weights.values()) == pytest.approx(1, abs=1e-12)
  np.testing.assert_allclose([tuned.weights[name] for name in store.domains], [mean[name] for name in store.domains],
                             rtol=1e-6)
  assert proxies[0] != proxies[1]
  assert mixture.load(folder / 'domain_weights.json').weights == pytest.approx(tuned.weights, abs=1e-12)
  assert summary == workdir.read_json(folder / 'summary.json')
  assert summary['tuned'] == tuned.weights and summary['baseline'] == mixture.load(folder / 'baseline.json').weights
  assert summary['rounds'][0]['seeds'] == [proxy['average'] for proxy in proxies] == tuned.provenance['seeds']
  assert tuned.provenance['store'] == store.digest and tuned.provenance['tokenizer'] == store.tokenizer
  assert (folder / 'report.html').exists()
  assert set(summary['cost_flops']) == {'reference', 'reference_nll', 'proxy-0', 'proxy-1', 'main-baseline',
                                        'main-tuned'}
  trained = {line['stage'] for line in metrics.read(folder)}
  assert trained == summary['cost_flops'].keys() - {'reference_nll'}


@pytest.mark.parametrize(('name', 'stage', 'initial'), [('tokens', 'proxy-1', False),
                                                        ('examples', 'round-2/proxy-0', True)])
def test_weights_are_the_mean_over_the_steps(finished, store, name, stage, initial):
  """From metrics.jsonl, which holds every step's weights here: the paper's mean, and the repository's with step 0."""
  folder, _ = finished(name)
  steps = [line['alpha'] for line in metrics.read(folder, stage, 'train')]
  assert len(steps) == 4
  weights = workdir.read_json(folder / stage / 'weights.json')
  for domain in store.domains:
    values = [step[domain] for step in steps] + ([1 / 3] if initial else [])
    assert weights['average'][domain] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert weights['last'][domain] == pytest.approx(steps[-1][domain], rel=1e-5)


def test_the_main_models_differ_by_their_mixture_alone(finished, store):
  folder, summary = finished('tokens')
  first = {name: metrics.read(folder, f'main-{name}', 'eval') for name in ('baseline', 'tuned')}
  assert first['baseline'][0]['nll'] == first['tuned'][0]['nll']  # before the first update
  stages = {name: workdir.read_json(folder / f'main-{name}/stage.json') for name in first}
  assert close(stages['baseline'].pop('weights'), summary['baseline'])
  assert close(stages['tuned'].pop('weights'), summary['tuned'])
  for stage in stages.values():
    del stage['stage'], stage['epochs']
  assert stages['baseline'] == stages['tuned']
  assert summary['comparison']['uniform_nll']['candidate'] == first['tuned'][-1]['uniform_nll']


def test_baseline_of_every_kind(finished, store):
  counts = store.counts('train')
  sizes = dict(zip(store.domains, store.sizes('train').tolist()))
  amounts = {'tokens': {name: counts[name]['tokens'] for name in store.domains}, 'uniform': dict.fromkeys(sizes, 1),
             'examples': sizes, 'pile': {name: sizes[name] * EPOCHS[name] for name in sizes},
             'file': mixture.load(finished('tokens')[0] / 'mixture.json').weights}
  for kind, amount in amounts.items():
    folder, summary = finished(kind)
    want = {name: x / sum(amount.values()) for name, x in amount.items()}
    assert close(summary['baseline'], want), kind
    first = 'round-1/reference' if kind in ('uniform', 'examples') else 'reference'
    assert close(workdir.read_json(folder / first / 'stage.json')['weights'], want), kind


def test_rounds_stop_when_the_weights_stand_still(finished):
  folder, summary = finished('uniform')
  assert len(summary['rounds']) == 1 and summary['rounds'][0]['largest_change'] < 10
  assert not (folder / 'round-2').exists()
  assert set(summary['cost_flops']) == {'round-1/reference', 'round-1/reference_nll', 'round-1/proxy-0'}


def test_rounds_go_on_from_the_last_weights(finished, store):
  folder, summary = finished('examples')
  first, second = summary['rounds']
  assert first['reference'] == summary['baseline']
  assert second['reference'] == first['tuned'] and second['tuned'] == summary['tuned']
  change = max(abs(second['tuned'][name] - second['reference'][name]) for name in store.domains)
  assert second['largest_change'] == pytest.approx(change, rel=1e-6)
  assert close(workdir.read_json(folder / 'round-2/reference/stage.json')['weights'], first['tuned'])
  assert 'round-2/proxy-0' in summary['cost_flops']


def test_proxies_sample_as_they_are_told(finished, store):
  """Uniformly, or by the reference weights of their round."""
  folder, _ = finished('tokens')
  assert close(workdir.read_json(folder / 'proxy-0/stage.json')['weights'], dict.fromkeys(store.domains, 1 / 3))
  folder, summary = finished('examples')
  for r, done in enumerate(summary['rounds']):
    assert close(workdir.read_json(folder / f'round-{r + 1}/proxy-0/stage.json')['weights'], done['reference'])


def test_a_run_starts_from_another_runs_stage(finished):
  before, after = finished('tokens')[0], finished('file')[0]
  trained = metrics.read(before, 'reference', 'eval')[-1]
  started = metrics.read(after, 'reference', 'eval')[0]
  assert started['step'] == 0 and started['nll'] == trained['nll']


def test_a_start_that_does_not_fit_is_refused(finished, store, tmp_path):
  stage = shutil.copytree(finished('tokens')[0] / 'reference', tmp_path / 'reference')
  stages = lambda **changes: doremi.stages(make_config(**changes), store)
  [same, *_] = stages(doremi__init_from=str(stage / 'checkpoints'))
  checks.check_starting_point(same, store)
  [wider, *_] = stages(doremi__init_from=str(stage / 'checkpoints'), doremi__model__d_ff=24)
  with pytest.raises(ValueError, match='model of another shape: d_ff 24'):
    checks.check_starting_point(wider, store)
  [elsewhere, *_] = stages(doremi__init_from=str(stage))
  with pytest.raises(ValueError, match='not the checkpoints/ folder'):
    checks.check_starting_point(elsewhere, store)
  made = workdir.read_json(stage / 'stage.json')
  workdir.write_json(stage / 'stage.json', made | {'tokenizer': 'another'})
  with pytest.raises(ValueError, match='another tokenizer'):
    checks.check_starting_point(same, store)


def test_weights_too_small_for_the_sampler_are_refused_before_the_run(store):
  with pytest.raises(ValueError, match='smoothing 1e-06.*data.block = 4096'):
    doremi.stages(make_config(doremi__smoothing=1e-6, doremi__train_main=True), store)
  doremi.stages(make_config(doremi__smoothing=0.0), store)  # nothing is sampled by the result


@pytest.mark.parametrize('key', ['proxy_sampling', 'initial_weights'])
def test_unknown_switches_are_refused_before_the_run(store, key):
  with pytest.raises(ValueError, match=f"config.doremi.{key} is 'natural'; want one of .*uniform"):
    doremi.stages(make_config(**{f'doremi__{key}': 'natural'}), store)


@pytest.mark.parametrize('sampling', ['uniform', 'reference'])
def test_initial_weights_are_uniform_or_those_of_the_sampling(store, sampling):
  examples = store.sizes('train') / store.sizes('train').sum()
  for initial in ('uniform', 'sampling'):
    config = make_config(doremi__baseline='examples', doremi__proxy_sampling=sampling, doremi__initial_weights=initial)
    [_, _, proxy] = doremi.stages(config, store)
    want = examples if (sampling, initial) == ('reference', 'sampling') else np.full(3, 1 / 3)
    np.testing.assert_allclose(np.exp(proxy.aux['log_alpha_M']), want, rtol=1e-6)


def untimed(folder):
  return [{key: x for key, x in line.items() if not key.startswith('time/')} for line in metrics.read(folder)]


def test_a_finished_run_is_not_run_again(finished, store):
  folder, summary = finished('pile')
  before = (folder / 'metrics.jsonl').read_text()
  again = doremi.run(make_config(doremi__baseline='pile', doremi__microbatches=2), folder, store)
  assert again == summary and (folder / 'metrics.jsonl').read_text() == before


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(finished, store, tmp_path, monkeypatch):
  """In its reference model before the first checkpoint, between two stages, and in its proxy after a checkpoint."""
  config = make_config(doremi__baseline='pile', doremi__microbatches=2)
  write = metrics.Writer.write

  def run_until(*end):
    def broken(writer, *line):
      if line[:3] == end:
        raise KeyboardInterrupt
      write(writer, *line)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(metrics.Writer, 'write', broken)
      doremi.run(config, tmp_path, store)

  run_until('reference', 'train', 2)
  run_until('proxy-0', 'eval', 0)
  run_until('proxy-0', 'train', 4)
  doremi.run(config, tmp_path, store)
  whole, _ = finished('pile')
  for name in ('mixture.json', 'summary.json', 'proxy-0/weights.json', 'reference_nll/nll.npy'):
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
  assert untimed(tmp_path) == untimed(whole)


DOMAINS = ('code', 'news', 'web')


def warnings(folder, *, tuned=(0.5, 0.3, 0.2), present=((1, 1, 1), (1, 1, 1)), reference=3.0, proxy=4.0, epochs=1.0):
  """The warnings of a run that is hand-made."""
  lines = [{'stage': 'reference', 'kind': 'eval', 'step': 2, 'uniform_nll': reference},
           *({'stage': 'proxy-0', 'kind': 'train', 'step': step, 'present': dict(zip(DOMAINS, values))}
             for step, values in enumerate(present)),
           {'stage': 'proxy-0', 'kind': 'eval', 'step': 2, 'uniform_nll': proxy}]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  workdir.write_json(folder / 'main-tuned/stage.json', {'epochs': {'code': epochs, 'news': 1.0, 'web': 1.0}})
  run = types.SimpleNamespace(config=make_config(), directory=folder, store=types.SimpleNamespace(domains=DOMAINS))
  return doremi.warnings(run, mixture.Mixture(dict(zip(DOMAINS, tuned))))


def test_a_sound_run_warns_of_nothing(tmp_path):
  assert warnings(tmp_path) == []
  assert warnings(tmp_path, tuned=(0.9, 0.05, 0.05), present=((0, 1, 1), (1, 0, 1)), reference=4.0, epochs=4.0) == []


@pytest.mark.parametrize(('change', 'said'), [
  ({'tuned': (0.02, 0.95, 0.03)}, 'nearly one-hot: news has 0.950'),
  ({'present': ((1, 1, 1), (1, 0, 1), (1, 0, 1))}, 'proxy-0: domains absent from many batches: news (67%)'),
  ({'reference': 4.5}, 'the reference (held-out 4.500 nats/token, mean over domains) is worse than the proxy (4.000)'),
  ({'epochs': 7.25}, 'main-tuned: domains read more than 4 times: code (7.2)')])
def test_a_warning_for_each_thing_that_spoils_the_weights(tmp_path, change, said):
  [warning] = warnings(tmp_path, **change)
  assert said in warning
