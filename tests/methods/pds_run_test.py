"""PDS through the command line on a small store: what it leaves, again and after an interruption, to the bit."""

import hashlib
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import small_run

from datasel import build, main, metrics, objectives, row_values, sharding, workdir
from datasel import config as config_lib
from datasel.data import selection
from datasel.data.selection import Selected, Selection
from datasel.data.store import Store
from datasel.methods.pds import gammas
from datasel.methods.pds import run as pds_run
from datasel.methods.pds import selection as pds_selection

pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

CONFIG = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('pds')
  config.pds = config_lib.pds()
  config = config_lib.finish(config, 'smoke').copy_and_resolve_references()
  with config.unlocked():
    config.data.demo, config.data.store = '', {store!r}
    config.data.length = {length}
    for model in (config.model, config.pds.model):
      model.vocab_size, model.n_layers, model.d_model, model.d_ff = {vocab}, 1, 16, 32
    config.train.steps, config.train.eval_sequences = 4, 4
    config.pds.steps, config.pds.checkpoints = 8, 2
    config.pds.temperature = 0.05
    config.pds.quotas = 'pydocs=0.3'
  return config.lock()
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('pds')
  store = small_run.make_store(folder)
  (folder / 'config.py').write_text(CONFIG.format(store=str(store), length=small_run.LENGTH, vocab=small_run.VOCAB))
  assert command(folder, 'run') == 0
  return folder


def command(folder, name, *arguments):
  return main.main([f'--config={folder / "config.py"}', f'--workdir={folder / name}', *arguments])


def contents(folder, name):
  """Of the files that must be the same whenever the run is repeated."""
  digest = lambda file: hashlib.sha256((folder / name / file).read_bytes()).hexdigest()
  return {file: digest(file) for file in ('pmp/gammas.npz', 'scores/score.npy', 'random.npz', 'selection.npz')}


def test_the_selection_is_what_the_config_asks_for(folder):
  store, kept = Store(folder / 'store'), selection.load(folder / 'run/selection.npz')
  sizes = dict(zip(store.domains, store.sizes('train').tolist()))
  assert {name: len(records) for name, records in kept.records.items()} == {
    'pydocs': round(0.3 * sizes['pydocs']), 'code': round(0.4 * sizes['code'])}
  at_random = selection.load(folder / 'run/random.npz')
  assert sum(map(len, at_random.records.values())) == sum(map(len, kept.records.values()))
  assert kept.provenance['store'] == store.digest and kept.provenance['temperature'] == 0.05


def test_the_summary_is_that_of_the_files(folder):
  summary, run = workdir.read_json(folder / 'run/summary.json'), folder / 'run'
  kept = selection.load(run / 'selection.npz').records
  assert {name: counts['selected'] for name, counts in summary['kept'].items()} == {
    name: len(records) for name, records in kept.items()}
  for name in ('all', 'random', 'selected'):
    assert summary['target']['loss'][name] == metrics.read(run, f'main-{name}', 'eval')[-1]['target_nll']
  scores = np.load(run / 'scores/score.npy')
  assert summary['extremes']['highest'][0]['score'] == scores.max()
  assert summary['extremes']['lowest'][0]['score'] == scores.min()
  assert np.isfinite(scores).all() and len(scores) == Store(folder / 'store').sizes('train').sum()


def test_a_finished_run_is_left_as_it_is(folder):
  before = contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()
  assert command(folder, 'run') == 0
  assert (contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()) == before


def test_interrupted_in_the_solver_it_ends_with_the_same_bits(folder, monkeypatch):
  keep, calls = gammas._keep_trace, []

  def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == 5:  # in the second checkpoint
      raise KeyboardInterrupt
    keep(*arguments)

  monkeypatch.setattr(gammas, '_keep_trace', interrupted)
  assert command(folder, 'killed') == 143 and not (folder / 'killed/pmp/manifest.json').exists()
  assert command(folder, 'killed') == 0
  assert contents(folder, 'killed') == contents(folder, 'run')
  assert small_run.timeless(folder / 'killed') == small_run.timeless(folder / 'run')
  traces = [json.loads((folder / name / 'pmp/checkpoint-8/trace.json').read_text()) for name in ('run', 'killed')]
  assert traces[0] == traces[1] and list(traces[0]) == ['1', '2', '3', '4']


def test_damaged_scores_are_refused(folder, capsys):
  path = folder / 'run/pmp/gammas.npz'
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  try:
    assert command(folder, 'run') == 1 and 'gammas.npz is damaged; delete' in capsys.readouterr().err
  finally:
    path.write_bytes(whole)


@pytest.fixture
def with_proxy(folder, tmp_path):
  """FOLDER as `folder`, with a run whose solver has begun and none of what comes after it."""
  shutil.copytree(folder / 'run', tmp_path / 'run', ignore=shutil.ignore_patterns('scorer', 'scores', 'main-*'))
  shutil.copy(folder / 'config.py', tmp_path)
  (tmp_path / 'run/pmp/manifest.json').unlink()
  return tmp_path


@pytest.mark.parametrize(('damage', 'message'), [
  (lambda path: path.write_bytes(path.read_bytes()[:60]), 'damaged'), (lambda path: path.unlink(), 'missing')])
def test_damaged_scores_of_one_checkpoint_are_refused(with_proxy, capsys, damage, message):
  damage(with_proxy / 'run/pmp/checkpoint-8/gamma.npy')
  assert command(with_proxy, 'run') == 1
  assert f'checkpoint-8/gamma.npy is {message}; delete' in capsys.readouterr().err


def test_a_solver_that_diverges_says_what_to_lower(with_proxy, capsys, monkeypatch):
  """And a run takes another rate once the solver's folder is gone; its inner steps draw as the proxy's training did."""
  rate, drawn, sampler = '--config.pds.learning_rate=1e9', [], gammas.sampler_lib.Sampler
  assert command(with_proxy, 'run', rate) == 2 and 'pds.learning_rate: 0.008 -> 1000000000.0' in capsys.readouterr().err
  shutil.rmtree(with_proxy / 'run/pmp')
  monkeypatch.setattr(gammas.sampler_lib, 'Sampler', lambda store, split, weights_M, *rest, **more: (
    drawn.append(weights_M.tolist()), sampler(store, split, weights_M, *rest, **more))[1])
  assert command(with_proxy, 'run', rate) == 1
  said = capsys.readouterr().err
  assert 'the training diverges' in said and 'FloatingPointError' in said
  assert f'delete {with_proxy / "run/pmp"} and lower config.pds.learning_rate, which is 1000000000.0\n' in said
  of_proxy, of_inner_steps = drawn
  assert of_proxy == of_inner_steps


def test_a_stage_is_trained_with_an_optimizer_of_its_own(folder):
  """Adam's first step is of the rate's size."""
  config, store = config_lib.base('pds'), Store(folder / 'store')
  section = config_lib.optimizer()
  section.peak_lr, section.warmup_fraction, section.weight_decay, section.eps = 0.02, 0.0, 0.0, 1e-12
  model = config_lib.to_model(config_lib.model('smoke'))
  stage = build.Stage('proxy', model, objectives.language_model(model.token_nll), 10, 4, 1, small_run.LENGTH,
                      optimizer=section)
  program = build.stage_program(stage, config, sharding.make_mesh(devices=jax.devices()[:1]))
  state = program.init(jax.random.key(0))
  before = jax.device_get(state.params)
  batch = program.put(store.read('train', np.zeros(4, int), np.arange(4)))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(program.step(state, batch)[0].params), before)
  assert max(jax.tree.leaves(moved)) == pytest.approx(0.02, rel=1e-3)


def test_the_proxy_and_the_main_models_have_rates_of_their_own(folder):
  recorded = workdir.read_json(folder / 'run/config.json')
  for stage, section, steps in (('proxy', 'pds.optimizer', 8), ('main-all', 'optimizer', 4)):
    optimizer = ml_collections.ConfigDict({key.removeprefix(f'{section}.'): value for key, value in recorded.items()
                                           if key.startswith(f'{section}.')})
    rate = build.learning_rate(optimizer, steps)
    lines = metrics.read(folder / 'run', stage, 'train')
    assert lines and [line['learning_rate'] for line in lines] == [
      pytest.approx(float(rate(line['step'] - 1)), rel=1e-5) for line in lines]


@pytest.mark.parametrize(('there', 'may', 'may_not'), [
  ('proxy', ('pds.learning_rate', 'pds.scorer.cut', 'pds.ratio', 'model.d_ff'), ('pds.steps', 'seed')),
  ('pmp', ('pds.scorer.loss', 'pds.quotas'), ('pds.target', 'pds.steps')),
  ('scorer', ('optimizer.peak_lr', 'pds.temperature'), ('pds.scorer.epochs', 'pds.horizon')),
  ('main-all', ('pds.ratio',), ('train.steps', 'pds.scorer.cut')),
  ('main-random', ('pds.score_batch', 'pds.scorer.microbatches'), ('pds.ratio', 'model.d_ff', 'pds.learning_rate'))])
def test_only_settings_of_stages_that_have_not_begun_may_change(folder, tmp_path, there, may, may_not):
  recorded = workdir.read_json(folder / 'run/config.json')
  workdir.write_json(tmp_path / 'config.json', recorded)
  (tmp_path / there).mkdir()
  main._check_same_config(pds_run, recorded | dict.fromkeys(may, 'other'), tmp_path)
  for key in may_not:
    assert key in recorded
    with pytest.raises(ValueError, match=f'{key}: .* -> .other.'):
      main._check_same_config(pds_run, recorded | {key: 'other'}, tmp_path)


def test_what_is_selected_of_a_selection_is_of_the_whole_store(folder, tmp_path):
  store = Store(folder / 'store')
  odd = {name: np.arange(1, n, 2) for name, n in zip(store.domains, store.sizes('train').tolist())}
  view = Selected(store, Selection(odd, {'store': store.digest}))
  config = config_lib.base('pds')
  config.pds, config.tracking.tensorboard = config_lib.pds(), False
  config.pds.temperature = 0.0
  sizes = view.sizes('train').tolist()
  with build.begin(config, tmp_path, view, 1.0) as run:
    scores = row_values.compute(
      tmp_path / 'scores', row_values.Quantity('score', 'score', (), ''),
      lambda params, batch: params * batch['number_B'], np.float32(1), view,
      sharding.make_mesh(devices=jax.devices()[:1]), [range(n) for n in sizes], batch_size=1000, provenance={},
      stage='scores', progress=metrics.Progress(1.0), flops_per_row=1.0,
      read=lambda domain_B, record_B: {'number_B': record_B.astype(np.float32)})
    paths = pds_selection.select(run, scores)
  kept = selection.load(paths['selected'])
  through = Selected(store, kept)  # on the bare store
  assert through.sizes('train').sum() == round(0.4 * sum(sizes))
  cut = max(int(view.sizes('train')[m] - n) for m, n in enumerate(through.sizes('train')))
  assert cut > 0 and kept.provenance['within'] == view.selection.digest
  for name, size in zip(store.domains, sizes):  # scores are numbers in the view: its last ones are kept
    np.testing.assert_array_equal(kept.records[name], odd[name][size - len(kept.records[name]):])
  at_random = selection.load(paths['random'])
  assert Selected(store, at_random).sizes('train').sum() == through.sizes('train').sum()
  assert all(np.isin(numbers, odd[name]).all() for name, numbers in at_random.records.items())


def test_extremes_and_the_deviation_are_those_of_all_scores(monkeypatch):
  monkeypatch.setattr(pds_run, '_CHUNK', 7)
  rng = np.random.default_rng(0)
  values = {name: rng.integers(0, 9, n).astype(np.float32) for name, n in (('a', 40), ('b', 3), ('c', 0))}
  for x in values.values():
    for k in (1, 5, 8):
      assert set(pds_run._largest(x, k)) == set(np.argsort(-x, kind='stable')[:k])
  assert pds_run._std(values) == pytest.approx(np.concatenate(list(values.values())).astype(float).std(), rel=1e-12)


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('steps', 9, 'must be a multiple of config.train.checkpoint_every 4'), ('stride', 5, 'above config.pds.horizon 4'),
  ('proxies', 65, 'is not a multiple of config.pds.score_batch'), ('ratio', 1.5, 'ratio is 1.5; want'),
  ('target', 'nowhere', 'no such file is there'), ('proxies', 1_600_000, 'sequences to train on'),
  ('horizon', 0, 'want at least 1'), ('ratio', 1e-6, 'is less than half a record'),
  ('quotas', 'code=0.5,web=0', "quotas name the domain 'web', which is not there"),
  ('quotas', 'code', 'want DOMAIN=PART'),
  ('quotas', 'code=0,pydocs=1e-6', 'records of pydocs is less than half a record'),
  ('scorer.optimizer.name', 'adamm', "config.pds.scorer.optimizer: unknown optimizer.name 'adamm'"),
  ('scorer.batch_size', 6, 'scorer: a batch of 6 is not a multiple of batch shards')])
def test_what_cannot_be_run_is_refused_beforehand(folder, tmp_path, capsys, key, value, message):
  arguments = [f'--config={folder / "config.py"}', f'--workdir={tmp_path / "run"}', f'--config.pds.{key}={value}']
  assert main.main(arguments) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run/config.json').exists()
