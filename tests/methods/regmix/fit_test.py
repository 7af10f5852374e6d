"""Laws of `python -m datasel.methods.regmix.fit`: files in, files out, and one line for what it refuses."""

import csv
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from datasel.data import mixture
from datasel.methods.regmix import fit, regression, tables

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'regmix'
PILE_CC = 'metric/the_pile_pile_cc_val_loss'
DOMAINS = ('web', 'code', 'math', 'news')
T_M = np.array([-0.5, 0.4, 0.3, -0.2])  # of the planted law of 'a'; 'b' wants code


@pytest.fixture
def swarm(tmp_path):
  """48 mixtures of four domains and the losses of two planted log-linear laws, without noise."""
  weights_NxM = np.random.default_rng(0).dirichlet(np.ones(4), 48)
  index_N = [f'run-{n}' for n in range(48)]
  losses_NxC = np.stack([2 + np.exp(weights_NxM @ T_M), 1 + np.exp(weights_NxM @ -T_M)], -1)
  tables.write(tmp_path / 'mixtures.csv', tables.Table(DOMAINS, index_N, weights_NxM))
  # In another order: rows belong together by their index.
  tables.write(tmp_path / 'losses.csv', tables.Table(('a', 'b'), index_N[::-1], losses_NxC[::-1]))
  return tmp_path


def run(swarm, *arguments):
  return fit.main(['--mixtures', str(swarm / 'mixtures.csv'), '--losses', str(swarm / 'losses.csv'),
                   '--model', 'loglinear', *map(str, arguments)])


def rows_of(path):
  with open(path, newline='') as f:
    return list(csv.DictReader(f))


def test_the_authors_files_from_the_command_line(tmp_path):
  whole = tables.read_mixtures(GOLDEN / 'train_mixture_1m.csv')
  order = np.random.default_rng(0).permutation(17)
  asked = tables.Table(tuple(np.array(whole.columns)[order]), whole.index_N[5:9], whole.values_NxC[5:9][:, order])
  tables.write(tmp_path / 'C.csv', asked)
  done = subprocess.run(
    [sys.executable, '-m', 'datasel.methods.regmix.fit', '--mixtures', GOLDEN / 'train_mixture_1m.csv',
     '--losses', GOLDEN / 'train_pile_loss_1m.csv', '--target', PILE_CC, '--model', 'loglinear',
     '--predict', tmp_path / 'C.csv', '--output', tmp_path / 'P.csv', '--propose', tmp_path / 'mixture.yaml',
     '--max_usage', '4'], capture_output=True, text=True, check=False, cwd=pathlib.Path(__file__).parents[3])
  assert done.returncode == 0, done.stderr
  assert '512 mixtures of 17 domains' in done.stdout and 'model loglinear: asked for by name' in done.stdout
  assert re.search('warning: at their caps: .*the_pile_pile_cc', done.stdout)
  want = regression.fit(tables.normalised(whole.values_NxC),
                        tables.read(GOLDEN / 'train_pile_loss_1m.csv').column(PILE_CC), 'loglinear')
  mean_4, error_4 = want.predict(tables.normalised(whole.values_NxC[5:9]))
  got = rows_of(tmp_path / 'P.csv')
  assert list(got[0]) == ['index', 'prediction', 'standard_error']
  assert [row['index'] for row in got] == ['6', '7', '8', '9']
  np.testing.assert_allclose([float(row['prediction']) for row in got], mean_4, rtol=1e-9)
  np.testing.assert_allclose([float(row['standard_error']) for row in got], error_4, rtol=1e-9)
  written = yaml.safe_load((tmp_path / 'mixture.yaml').read_text())
  assert list(written['train']) == list(whole.columns)
  caps_M = np.minimum(4 * tables.normalised(whole.values_NxC).mean(0), 1)
  assert (np.array(list(written['train'].values())) <= caps_M * (1 + 1e-12)).all()
  assert abs(sum(written['train'].values()) - 1) < 1e-12


def test_the_proposal_is_the_vertex_of_a_planted_law(swarm, capsys):
  assert run(swarm, '--target', 'a', '--propose', swarm / 'mixture.json') == 0
  found = mixture.load(swarm / 'mixture.json')
  assert found.weights == {'web': 1.0, 'code': 0.0, 'math': 0.0, 'news': 0.0}
  assert found.provenance['method'] == 'regmix' and found.provenance['models'] == {'a': 'loglinear'}
  np.testing.assert_allclose(found.provenance['predicted']['a'], 2 + np.exp(-0.5), rtol=1e-3)
  assert 'far from every mixture trained' in capsys.readouterr().out


def test_caps_are_kept_exactly(swarm):
  (swarm / 'caps.json').write_text(json.dumps({'web': 0.35, 'news': 0.1}))
  assert run(swarm, '--target', 'a', '--propose', swarm / 'mixture.json', '--caps', swarm / 'caps.json') == 0
  np.testing.assert_allclose(list(mixture.load(swarm / 'mixture.json').weights.values()), [0.35, 0, 0.55, 0.1],
                             atol=1e-15)


def test_a_domain_that_the_prior_lacks_stays_out(swarm):
  (swarm / 'prior.json').write_text(json.dumps({'code': 0.5, 'math': 0.25, 'news': 0.25}))
  assert run(swarm, '--target', 'a', '--propose', swarm / 'mixture.json', '--prior', swarm / 'prior.json') == 0
  assert mixture.load(swarm / 'mixture.json').weights == {'web': 0.0, 'code': 0.0, 'math': 0.0, 'news': 1.0}


def test_the_gain_over_a_mixture_is_the_difference_of_its_prediction(swarm, capsys):
  (swarm / 'other.json').write_text(json.dumps({'web': 0.5, 'math': 0.5}))
  assert run(swarm, '--target', 'a', '--propose', swarm / 'm.json', '--compare', swarm / 'other.json') == 0
  gains = json.loads((swarm / 'm.json').read_text())['gain_over']
  assert len(gains) == 3
  np.testing.assert_allclose(gains['other.json']['a']['nats'], np.exp(-0.1) - np.exp(-0.5), rtol=2e-3)
  assert f'other.json: {gains["other.json"]["a"]["nats"]:.4f} +- ' in capsys.readouterr().out


def test_several_targets_have_columns_of_their_own(swarm):
  assert run(swarm, '--target', 'a=3,b', '--predict', swarm / 'mixtures.csv', '--output', swarm / 'P.csv',
             '--propose', swarm / 'm.json', '--search', 'simulate', '--draws', 2000, '--top', 5) == 0
  got = rows_of(swarm / 'P.csv')
  assert list(got[0]) == ['index', 'prediction:a', 'standard_error:a', 'prediction:b', 'standard_error:b']
  losses = tables.read(swarm / 'losses.csv')
  for name in 'ab':
    true = dict(zip(losses.index_N, losses.column(name)))
    np.testing.assert_allclose([float(row[f'prediction:{name}']) for row in got], [true[row['index']] for row in got],
                               atol=1e-3)
  assert json.loads((swarm / 'm.json').read_text())['targets'] == {'a': 3.0, 'b': 1.0}


def test_the_weights_of_targets_decide_between_them(swarm):
  for weights, want in (('a=1,b=0', 'web'), ('a=0,b=1', 'code')):
    assert run(swarm, '--target', weights, '--propose', swarm / 'm.json') == 0
    assert mixture.load(swarm / 'm.json').weights[want] == 1


def test_the_notebooks_search_is_numpys_draws(swarm):
  prior_M = np.array([0.4, 0.3, 0.2, 0.1])
  (swarm / 'prior.json').write_text(json.dumps(dict(zip(DOMAINS, prior_M))))
  assert run(swarm, '--target', 'a', '--propose', swarm / 'm.json', '--prior', swarm / 'prior.json',
             '--search', 'notebook', '--seed', 3) == 0
  drawn_NxM = np.random.RandomState(42).dirichlet(prior_M, 100_000)
  sampled, losses = tables.read(swarm / 'mixtures.csv'), tables.read(swarm / 'losses.csv')
  law = regression.fit(sampled.values_NxC, tables.join(sampled, losses)[1][:, 0], 'loglinear', seed=3)
  want_M = drawn_NxM[np.argsort(law.predict_mean(drawn_NxM))[:128]].mean(0)
  assert list(mixture.load(swarm / 'm.json').weights.values()) == want_M.tolist()


@pytest.mark.parametrize('inside', ['', 'swarm'])
def test_the_folder_of_a_run_is_read(swarm, inside, capsys):
  (swarm / 'work' / inside).mkdir(parents=True)
  for name in ('mixtures.csv', 'losses.csv'):
    (swarm / name).rename(swarm / 'work' / inside / name)
  assert fit.main(['--run', str(swarm / 'work'), '--target', 'b', '--model', 'linear', '--learning_curve']) == 0
  shown = capsys.readouterr().out
  assert 'model linear' in shown and '\n  38 ' in shown  # a fifth of the 48 is held out


def test_lightgbm_stops_on_the_runs_it_is_given(tmp_path):
  whole, losses = tables.read(GOLDEN / 'train_mixture_1m.csv'), tables.read(GOLDEN / 'train_pile_loss_1m.csv')
  arguments = ['--target', PILE_CC, '--model', 'lightgbm', '--predict', str(tmp_path / 'rest.csv'),
               '--output', str(tmp_path / 'P.csv')]
  for name, rows in (('fitted', slice(0, 100)), ('rest', slice(100, 140))):
    tables.write(tmp_path / f'{name}.csv', tables.Table(whole.columns, whole.index_N[rows], whole.values_NxC[rows]))
    tables.write(tmp_path / f'{name}_losses.csv',
                 tables.Table((PILE_CC,), losses.index_N[rows], losses.column(PILE_CC)[rows, None]))
    flags = {'fitted': ('--mixtures', '--losses'), 'rest': ('--stop_on_mixtures', '--stop_on_losses')}[name]
    arguments += [flags[0], str(tmp_path / f'{name}.csv'), flags[1], str(tmp_path / f'{name}_losses.csv')]
  assert fit.main(arguments) == 0
  weights_NxM, losses_N = whole.values_NxC, losses.column(PILE_CC)
  want = regression.fit(weights_NxM[:100], losses_N[:100], 'lightgbm', stop_on=(weights_NxM[100:140],
                                                                                losses_N[100:140]))
  np.testing.assert_allclose([float(row['prediction']) for row in rows_of(tmp_path / 'P.csv')],
                             want.predict_mean(weights_NxM[100:140]), rtol=1e-12)


def test_columns_may_have_any_name_and_other_prefixes(swarm):
  sampled, losses = tables.read(swarm / 'mixtures.csv'), tables.read(swarm / 'losses.csv')
  renamed = lambda table, *names: tables.Table(names, table.index_N, table.values_NxC)
  assert run(swarm, '--target', 'a', '--predict', swarm / 'mixtures.csv', '--output', swarm / 'want.csv') == 0
  tables.write(swarm / 'losses.csv', renamed(losses, 'lr=3e-4, a', 'b'))
  tables.write(swarm / 'asked.csv', renamed(sampled, *(f'valid_{name}' for name in sampled.columns)))
  tables.write(swarm / 'mixtures.csv', renamed(sampled, *(f'train_{name}' for name in sampled.columns)))
  with open(swarm / 'asked.csv', 'a') as f:
    f.write(',,,,\n\n')
  assert run(swarm, '--target', 'lr=3e-4, a', '--predict', swarm / 'asked.csv', '--output', swarm / 'P.csv') == 0
  assert (swarm / 'P.csv').read_bytes() == (swarm / 'want.csv').read_bytes()


def test_domains_are_named_as_regmix_yaml_names_them():
  assert fit.domain_names(('train_a', 'train_b')) == ('a', 'b')
  assert fit.domain_names(('train_a', 'b')) == ('train_a', 'b')


def _replaced(file, old, new):
  def change(swarm):
    text = (swarm / file).read_text()
    assert old in text
    (swarm / file).write_text(text.replace(old, new, 1))
  return change


def _written(file, text):
  return lambda swarm: (swarm / file).write_text(text)


@pytest.mark.parametrize('prepare, arguments, message', [
  (None, ['--target', 'c'], "losses.csv: no column 'c'"),
  (None, ['--target', 'a,a'], "'a'; want every target named, and once"),
  (None, ['--target', 'a=x'], "'a=x'; want NAME or NAME=WEIGHT"),
  (None, ['--target', 'a=-1'], "'a=-1'; want NAME or NAME=WEIGHT"),
  (None, ['--target', 'a', '--run', 'DIR'], 'give --mixtures and --losses, or --run'),
  (None, ['--target', 'a', '--predict', 'DIR/mixtures.csv'], '--predict and --output go together'),
  (None, ['--target', 'a', '--stop_on_losses', 'x.csv'], '--stop_on_mixtures and --stop_on_losses go together'),
  (None, ['--target', 'a', '--stop_on_losses', 'x', '--stop_on_mixtures', 'y'], 'is for --model lightgbm'),
  (None, ['--target', 'a', '--search', 'ascend'], '--search without --propose'),
  (None, ['--target', 'a', '--propose', 'DIR/m.csv'], 'want a file ending in .json, .yaml, .yml'),
  (None, ['--target', 'a', '--propose', 'DIR/m.json', '--search', 'notebook', '--max_usage', '4'], 'knows no caps'),
  (None, ['--target', 'a', '--propose', 'DIR/m.json', '--prior', 'DIR/absent.json'], 'No such file'),
  (None, ['--target', 'a', '--propose', 'DIR/m.json', '--max_usage', '0.5'], 'upper ones to 0.5'),
  (_written('p.json', '{"web": 0.5, "books": 0.5}'), ['--target', 'a', '--propose', 'DIR/m.json', '--prior',
                                                      'DIR/p.json'], 'domains that the mixtures do not have: books'),
  (_written('caps.json', '{"web": 2}'), ['--target', 'a', '--propose', 'DIR/m.json', '--caps', 'DIR/caps.json'],
   'a number from 0 to 1'),
  (None, ['--target', 'a=0'], "'a=0': all weights are 0"),
  (None, ['--target', 'a', '--propose', 'DIR/m.json', '--draws', '50'], '--top 128 of --draws 50'),
  (None, ['--target', 'a', '--seed', '-1'], '--seed is -1; want 0 or more'),
  (_written('C.csv', 'index,web,code,math\n1,0,0.5,0.4\n'), ['--target', 'a', '--predict', 'DIR/C.csv', '--output',
                                                             'DIR/P.csv'], "C.csv: no column 'news'"),
  (_written('C.csv', 'index,web,code,math,news,x\n1,0,0,1,0,0\n'), ['--target', 'a', '--predict', 'DIR/C.csv',
                                                                    '--output', 'DIR/P.csv'], "unknown column 'x'"),
  (_written('C.csv', 'index,web,code,math,news\n1,0,0,1,1\n'), ['--target', 'a', '--predict', 'DIR/C.csv',
                                                                '--output', 'DIR/P.csv'], 'the weights sum to 2'),
  (_replaced('losses.csv', 'run-7,', 'run-77,'), ['--target', 'a'], 'have a mixture but not losses: run-7'),
  (_replaced('mixtures.csv', 'web', '.web'), ['--target', 'a', '--propose', 'DIR/m.json'], "name '.web'"),
  (_replaced('mixtures.csv', 'run-7,', 'run-6,'), ['--target', 'a'], 'run-6'),
])
def test_what_cannot_be_done_is_refused_in_one_line(swarm, capsys, prepare, arguments, message):
  if prepare:
    prepare(swarm)
  before = set(swarm.iterdir())
  assert run(swarm, *(argument.replace('DIR', str(swarm)) for argument in arguments)) == 2
  refused = capsys.readouterr().err
  assert message in refused and refused.count('\n') == 1 and refused.startswith('error: ')
  assert set(swarm.iterdir()) == before
