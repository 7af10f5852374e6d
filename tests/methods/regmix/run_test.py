"""RegMix through the command line on a small store: what it leaves, again and after an interruption, to the bit."""

import hashlib

import numpy as np
import pytest
import small_run

from datasel import config as config_lib
from datasel import main, metrics, workdir
from datasel.data import mixture
from datasel.methods.regmix import fit, report, study, tables

pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

CONFIG = '''
from datasel import config as config_lib

def get_config(arg=''):
  config = config_lib.base('regmix')
  config.regmix = config_lib.regmix()
  config = config_lib.finish(config, 'smoke').copy_and_resolve_references()
  with config.unlocked():
    config.data.demo, config.data.store = '', {store!r}
    config.data.length = {length}
    for model in (config.model, config.regmix.model):
      model.vocab_size, model.n_layers, model.d_model, model.d_ff = {vocab}, 1, 16, 32
    config.train.steps, config.train.eval_sequences = 4, 4
    config.regmix.steps = 4
    config.regmix.max_usage, config.regmix.grid = 1.6, 1e-3
    config.regmix.rounds, config.regmix.added = 2, 3
  return config.lock()
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('regmix')
  store = small_run.make_store(folder)
  (folder / 'config.py').write_text(CONFIG.format(store=str(store), length=small_run.LENGTH, vocab=small_run.VOCAB))
  assert command(folder, 'run') == 0
  return folder


def command(folder, name):
  return main.main([f'--config={folder / "config.py"}', f'--workdir={folder / name}'])


def contents(folder, name):
  """Of the files that must be the same whenever the run is repeated."""
  digest = lambda file: hashlib.sha256((folder / name / file).read_bytes()).hexdigest()
  return {file: digest(file) for file in ('mixtures.csv', 'losses.csv', 'regression.json', 'mixture.yaml')}


def test_two_swarms_are_one_table(folder):
  sampled, losses = (tables.read(folder / 'run' / name) for name in ('mixtures.csv', 'losses.csv'))
  assert sampled.index_N == losses.index_N == tuple(map(str, range(1, 16)))
  assert len(np.unique(sampled.values_NxC, axis=0)) == 15
  for swarm, rows in (('swarm', slice(0, 12)), ('swarm-2', slice(12, 15))):
    of_round = tables.read(folder / 'run' / swarm / 'losses.csv')
    np.testing.assert_array_equal(of_round.select(losses.columns).values_NxC, losses.values_NxC[rows])


def test_the_proposal_is_within_its_caps_and_predicted_best(folder):
  run, found = folder / 'run', workdir.read_json(folder / 'run/regression.json')
  weights, prior = mixture.load(run / 'mixture.json').weights, found['proposal']['compared']['prior']['weights']
  assert all(weights[d] <= 1.6 * prior[d] + 1e-12 for d in weights)
  [capped] = found['proposal']['at_caps']
  assert weights[capped] == pytest.approx(1.6 * prior[capped])
  sampled = tables.read(run / 'mixtures.csv').values_NxC
  assert (sampled <= 1.6 * np.array([prior[d] for d in found['domains']]) + 1e-12).all()
  assert found['proposal']['value'] <= found['proposal']['compared']['best proxy']['value']
  assert mixture.load(run / 'mixture.yaml').weights == pytest.approx(weights)
  assert any(f'at their caps: {capped}' in warning for warning in study.warnings(found))


def test_held_out_proxies_are_the_last_and_not_fitted(folder):
  """The same predictions come from the others alone, by the command line."""
  run = folder / 'run'
  sampled, losses = tables.read(run / 'mixtures.csv'), tables.read(run / 'losses.csv')
  first = lambda table, rows: tables.Table(table.columns, table.index_N[rows], table.values_NxC[rows])
  for name, table, rows in (('a', sampled, slice(0, 11)), ('b', losses, slice(0, 11)), ('c', sampled, slice(11, 15))):
    tables.write(folder / f'{name}.csv', first(table, rows))
  target = workdir.read_json(run / 'regression.json')['targets']['code']
  seed = str(workdir.read_json(run / 'regression.json')['seed'])
  assert fit.main(['--mixtures', str(folder / 'a.csv'), '--losses', str(folder / 'b.csv'), '--target', 'code',
                   '--model', target['model'], '--seed', seed, '--predict', str(folder / 'c.csv'),
                   '--output', str(folder / 'p.csv')]) == 0
  np.testing.assert_allclose(tables.read(folder / 'p.csv').column('prediction'), target['held_out']['predicted'],
                             rtol=1e-9)
  assert target['held_out']['true'] == losses.column('code')[11:].tolist()


def test_the_summary_is_that_of_the_main_models(folder):
  summary = workdir.read_json(folder / 'run/summary.json')
  assert list(summary['target']) == ['proposal', 'prior', 'single']
  for name, loss in summary['target'].items():
    assert loss == metrics.read(folder / 'run', f'main-{name}', 'eval')[-1]['nll']['code']
  assert summary['beaten'] == [name for name in ('prior', 'single')
                               if summary['target']['proposal'] < summary['target'][name]]


def test_several_targets_have_a_front_that_is_drawn(folder):
  sampled, losses = (tables.read(folder / 'run' / name) for name in ('mixtures.csv', 'losses.csv'))
  prior_M = sampled.values_NxC.mean(0)
  wish = study.Wish(sampled.columns, {'code': 1.0, 'pydocs': 2.0}, prior_M, np.ones(2), {'prior': prior_M}, 1e-5)
  found = study.study(sampled, losses, wish, config_lib.regmix(), 0)
  values_FxK = np.array(found['front']['values'])
  below_FxF = (values_FxK[:, None] <= values_FxK[None]).all(-1) & (values_FxK[:, None] < values_FxK[None]).any(-1)
  assert len(values_FxK) > 2 and not below_FxF.any()
  assert 'Pareto front: code and pydocs' in report._certainty(found, list(sampled.columns))


def test_a_finished_run_is_left_as_it_is(folder):
  before = contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()
  assert command(folder, 'run') == 0
  assert (contents(folder, 'run'), (folder / 'run/metrics.jsonl').read_bytes()) == before


def test_interrupted_before_its_second_swarm_it_ends_with_the_same_bits(folder, monkeypatch):
  write = tables.write

  def interrupted(path, table):
    if path.parent.name == 'swarm-2':
      raise KeyboardInterrupt
    write(path, table)

  with monkeypatch.context() as patch:
    patch.setattr(tables, 'write', interrupted)
    assert command(folder, 'killed') == 143 and not (folder / 'killed/mixtures.csv').exists()
  assert command(folder, 'killed') == 0
  assert contents(folder, 'killed') == contents(folder, 'run')
  assert small_run.timeless(folder / 'killed') == small_run.timeless(folder / 'run')


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('target', 'wiki', 'has no domain wiki; it has code, pydocs'), ('regressor', 'forest', 'want one of auto'),
  ('held_out', 9, 'leave 3 to fit on; 2 domains want at least 4'), ('design', 'grid', 'want one of paper'),
  ('held_out', 2, 'want 0, or at least 3'), ('target', 'code=0', 'all weights are 0'),
  ('regressor', 'lightgbm', '8 runs of 2 domains, want at least 64'), ('top', 2001, 'above config.regmix.draws 2000'),
  ('optimizer.schedule', 'steep', "unknown learning-rate schedule 'steep'"), ('temperature', 0.0, 'temperature is 0'),
  ('baselines', 'prior,prior', 'two of one name'), ('baselines', 'prior,x.json', 'nor a mixture file'),
  ('grid', 1e-6, 'is less than one of config.data.block'), ('added', 0, 'want config.regmix.added of at least 1'),
  ('max_usage', 0.5, 'no mixture is between them'), ('steps', 0, 'want at least 1')])
def test_what_cannot_be_run_is_refused_beforehand(folder, tmp_path, capsys, key, value, message):
  arguments = [f'--config={folder / "config.py"}', f'--workdir={tmp_path / "run"}', f'--config.regmix.{key}={value}']
  assert main.main(arguments) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run/config.json').exists()
