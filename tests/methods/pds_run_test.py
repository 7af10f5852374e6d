"""PDS through the command line on a small store: what it leaves, again and after an interruption, to the bit."""

import hashlib
import json

import compilation
import numpy as np
import pytest
import small_run

from datasel import main, metrics, workdir
from datasel.data import selection
from datasel.data.store import Store
from datasel.methods.pds import gammas

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
    config.pds.quotas = {{'pydocs': 0.3}}
  return config.lock()
'''


@pytest.fixture(scope='module', autouse=True)
def compiled(tmp_path_factory):
  with compilation.kept_in(tmp_path_factory.mktemp('compiled')):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """FOLDER/{store,config.py,run}: a finished run."""
  folder = tmp_path_factory.mktemp('pds')
  store = small_run.make_store(folder)
  (folder / 'config.py').write_text(CONFIG.format(store=str(store), length=small_run.LENGTH, vocab=small_run.VOCAB))
  assert command(folder, 'run') == 0
  return folder


def command(folder, name):
  return main.main([f'--config={folder / "config.py"}', f'--workdir={folder / name}'])


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


@pytest.mark.parametrize(('key', 'value', 'message'), [
  ('steps', 9, 'must be a multiple of config.train.checkpoint_every 4'), ('stride', 5, 'above config.pds.horizon 4'),
  ('proxies', 65, 'is not a multiple of config.pds.score_batch'), ('ratio', 1.5, 'want a part of 1'),
  ('target', 'nowhere', 'no such file is there'), ('proxies', 1_600_000, 'sequences to train on'),
  ('horizon', 0, 'want at least 1')])
def test_what_cannot_be_run_is_refused_beforehand(folder, tmp_path, capsys, key, value, message):
  arguments = [f'--config={folder / "config.py"}', f'--workdir={tmp_path / "run"}', f'--config.pds.{key}={value}']
  assert main.main(arguments) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run/config.json').exists()
