"""Every config's ':smoke' form runs through the command line to its end: the offline corpus, a few steps, a report."""

import json
import logging
import math
import pathlib

import pytest

from datasel import config as config_lib
from datasel import main, metrics, workdir
from datasel.data import mixture, selection

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'configs').rglob('*.py'))
# Papers' sizes whose smoke forms are one another's but for the learning rate: one of them is run.
SIZES = [file for first, others in (('pds/paper_160m.py', 'pds/paper_*.py'), ('prox/tlm_xs.py', 'prox/tlm_*.py'))
         for file in FILES if file.match(others) and not file.match(first)]
# ml_collections loads config files in Python 3.11's old way.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')


@pytest.fixture(scope='module', autouse=True)
def shared_corpus(tmp_path_factory):
  """One corpus for all runs; logging is put back as it was."""
  root = logging.getLogger()
  handlers, level = root.handlers[:], root.level
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('DATASEL_CACHE', str(tmp_path_factory.mktemp('datasel')))
    yield
  root.handlers[:] = handlers
  root.setLevel(level)


@pytest.mark.parametrize('file', sorted(set(FILES) - set(SIZES)),
                         ids=lambda file: str(file.relative_to(ROOT / 'configs')))
def test_smoke_form_runs_to_its_end(file, tmp_path, capsys):
  assert main.main([f'--config={file}:smoke', f'--workdir={tmp_path}']) == 0, capsys.readouterr().err
  config = workdir.read_json(tmp_path / 'config.json')
  assert (tmp_path / 'report.html').read_text(encoding='utf-8').rstrip().endswith('</html>')
  if config['method'] == 'pds':
    domains = set(selection.load(tmp_path / 'selection.npz').records)
  elif config['method'] == 'prox':
    domains = set(workdir.read_json(tmp_path / 'data.json')['domains'])
  else:
    weights = mixture.load(tmp_path / 'mixture.json').weights
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    domains = set(weights)
  assert len(domains) >= 3
  for stage in {line['stage'] for line in metrics.read(tmp_path, kind='eval')}:
    trained = metrics.read(tmp_path, stage, 'train')
    assert trained[-1]['step'] == config['train.steps' if stage.startswith('main') else f'{config["method"]}.steps']
    held_out = metrics.read(tmp_path, stage, 'eval')
    assert held_out[-1]['uniform_nll'] < held_out[0]['uniform_nll'], f'{stage} has learnt nothing'
    assert set(held_out[-1]['nll']) == domains
  assert 'report.html' in capsys.readouterr().out


@pytest.mark.parametrize('file', SIZES, ids=lambda file: file.stem)
def test_smoke_forms_of_one_papers_sizes_are_one(file, capsys):
  def printed(file):
    assert main.main([f'--config={file}:smoke', '--workdir=unused', '--print_config']) == 0
    return json.loads(capsys.readouterr().out)

  first = file.with_name({'pds': 'paper_160m.py', 'prox': 'tlm_xs.py'}[file.parent.name])
  differ = config_lib.difference(printed(first), printed(file))
  assert {line.split(':')[0] for line in differ} <= {'optimizer.end_lr', 'optimizer.peak_lr'} and differ
