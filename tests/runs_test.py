"""Laws of `python -m datasel.runs`: it says what the files of the runs say, and has no run it cannot list."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import small_run

from datasel import main, metrics, runs, workdir

# ml_collections loads a config file by it.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')

TOKENS = 6 * 8 * small_run.LENGTH  # steps, sequences


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """runs/a and runs/deeper/b, finished; they differ by seed, mixture and learning rate."""
  folder = tmp_path_factory.mktemp('made')
  config = small_run.write_config(folder / 'config.py', small_run.make_store(folder))
  different = ['--config.seed=1', '--config.pretrain.mixture=uniform', '--config.optimizer.peak_lr=0.01']
  for name, keys in (('a', []), ('deeper/b', different)):
    assert main.main([f'--config={config}', f'--workdir={folder / "runs" / name}', *keys]) == 0
  return folder


@pytest.fixture
def folder(made, tmp_path):
  """A copy of the two runs, to change."""
  return shutil.copytree(made / 'runs', tmp_path / 'runs')


@pytest.fixture
def call(capsys):
  """call(*arguments) -> (exit status, stdout, stderr)"""

  def call(*arguments):
    try:
      status = runs.main([str(a) for a in arguments])
    except SystemExit as e:
      status = e.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err

  return call


@pytest.fixture
def known(call):
  """known(*arguments) -> {name: run} by --json"""

  def known(*arguments):
    status, out, _ = call(*arguments, '--json')
    assert status == 0
    return {run['name']: run for run in json.loads(out)}

  return known


def table(out):
  """{first cell: the other cells} of the rows below the head, of columns that stand two or more spaces apart."""
  rows = [[cell for cell in line.split('  ') if cell] for line in out.split('\n\n')[0].splitlines()]
  return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def make_stages(directory, stages, method='doremi', state='finished'):
  """A run of several stages by hand: {stage: (last step, steps, {domain: nats/token})}."""
  workdir.write_json(directory / 'config.json', {'method': method, 'data.length': 10})
  for stage, (step, steps, nll) in stages.items():
    workdir.write_json(directory / stage / 'stage.json', {
      'steps': steps, 'batch_size': 2, 'flops': 1e6 * steps, 'tokenizer': 't', 'store': 's',
      'weights': dict.fromkeys(nll, 1 / len(nll))})
    with open(directory / 'metrics.jsonl', 'a') as f:
      for at in (0, step):
        f.write(json.dumps({'stage': stage, 'kind': 'eval', 'step': at, 'nll': nll, 'uniform_nll': 9, 'worst_nll': 9,
                            'bits_per_byte': {d: x / 2 for d, x in nll.items()}}) + '\n')
  if state == 'finished':
    workdir.write_json(directory / 'summary.json', {'cost_flops': {stage: 7e6 for stage in [*stages, 'scores']}})


def test_what_is_said_of_a_run_is_what_its_files_say(folder, known):
  found = known(folder)
  assert list(found) == ['a', 'deeper/b']  # by the time they began
  for name, run in found.items():
    assert run['state'] == 'finished' and run['method'] == 'pretrain' and run['problems'] == []
    [stage], last = run['stages'], metrics.read(folder / name, 'main', 'eval')[-1]
    assert (stage['step'], stage['steps'], stage['tokens']) == (6, 6, TOKENS)
    assert stage['domain_nll'] == last['nll'] and stage['domain_bits_per_byte'] == last['bits_per_byte']
    assert math.isclose(stage['uniform_nll'], last['uniform_nll']) and stage['worst_nll'] == last['worst_nll']
    assert last['nll'][stage['worst_domain']] == last['worst_nll']
    assert math.isclose(stage['bits_per_byte'], sum(last['bits_per_byte'].values()) / 2)
    cost = workdir.read_json(folder / name / 'summary.json')['cost_flops']['main']
    assert run['flops'] == stage['flops'] == cost > 0
    speeds = [line['time/tokens_per_second'] for line in metrics.read(folder / name, 'main', 'train')[1:]]
    assert math.isclose(stage['seconds'] * statistics.median(speeds), TOKENS)
    assert run['weights'] == stage['weights'] == workdir.read_json(folder / name / 'mixture.json')['domains']
    assert run['config'] == workdir.read_json(folder / name / 'config.json')


def test_the_listing_has_the_same_and_fits_a_terminal(folder, call, known):
  status, out, _ = call(folder)
  rows = table(out)
  assert status == 0 and list(rows) == ['run', 'a', 'deeper/b'] and max(map(len, out.splitlines())) <= 120
  for name, run in known(folder).items():
    [stage] = run['stages']
    row = dict(zip(rows['run'], rows[name]))
    assert row['state'] == 'finished' and row['steps'] == '6/6' and row['tokens'] == f'{TOKENS / 1000:.1f}k'
    assert row['nll'] == f'{stage["uniform_nll"]:.3f}' and row['bits/B'] == f'{stage["bits_per_byte"]:.3f}'
    assert row['worst domain'] == f'{stage["worst_domain"]} {stage["worst_nll"]:.3f}'
    assert row['FLOPs'] == f'{run["flops"]:.2e}'


@pytest.mark.parametrize('key,of', [
  ('nll', lambda run, stage: stage['uniform_nll']), ('bits', lambda run, stage: stage['bits_per_byte']),
  ('worst', lambda run, stage: stage['worst_nll']), ('tokens', lambda run, stage: stage['tokens']),
  ('flops', lambda run, stage: run['flops']), ('name', lambda run, stage: run['name'])])
def test_runs_are_sorted_by_what_is_asked_and_the_unknown_comes_last(folder, known, key, of):
  make_stages(folder / 'c', {'reference': (4, 4, {'x': 0.1}), 'main-tuned': (5, 9, {'x': 6.1, 'y': 6.3})})
  workdir.write_json(folder / '0-nothing-yet/config.json', {'method': 'pretrain'})
  found = list(known(folder, f'--sort={key}').values())
  last = lambda run: run['stages'][-1] if run['stages'] else dict.fromkeys(
    ('uniform_nll', 'bits_per_byte', 'worst_nll', 'tokens'))
  values = [of(run, last(run)) for run in found]
  there = [value for value in values if value is not None]
  assert len(values) == 4 and there == sorted(there)
  assert values == there if key == 'name' else values[len(there):] == [None] and found[-1]['name'] == '0-nothing-yet'


def test_domains_stand_side_by_side_with_the_lowest_marked(folder, call, known):
  both = known(folder)
  status, out, _ = call(folder, '--domains')
  rows = table(out)
  assert status == 0 and rows['domain'] == ['a', 'deeper/b'] and 'nats/token' in out and 'not the same' not in out
  for domain in ('code', 'pydocs'):
    losses = [run['stages'][0]['domain_nll'][domain] for run in both.values()]
    assert rows[domain] == [f'{x:.3f}' + ('*' if x == min(losses) else '') for x in losses]
  assert rows['mean'] == [f'{run["stages"][0]["uniform_nll"]:.3f}' for run in both.values()]


def test_losses_over_other_tokenizers_or_stores_are_not_compared_unsaid(folder, call):
  made = workdir.read_json(folder / 'a/main/stage.json')
  workdir.write_json(folder / 'a/main/stage.json', made | {'tokenizer': 'another', 'store': 'another'})
  out = call(folder, '--domains')[1]
  bits = metrics.read(folder / 'a', 'main', 'eval')[-1]['bits_per_byte']['code']
  assert table(out)['code'][0].rstrip('*') == f'{bits:.3f}'
  assert 'bits/byte, as the tokenizers differ' in out and 'not the same token store' in out


def test_weights_and_differing_keys_stand_side_by_side(folder, call):
  rows = table(call(folder, '--weights')[1])
  for domain in ('code', 'pydocs'):
    assert rows[domain] == [f'{workdir.read_json(folder / name / "mixture.json")["domains"][domain]:.4f}'
                            for name in ('a', 'deeper/b')]
  assert table(call(folder, '--config')[1]) == {
    'key': ['a', 'deeper/b'], 'optimizer.peak_lr': ['0.001', '0.01'],
    'pretrain.mixture': ['"tokens"', '"uniform"'], 'seed': ['0', '1']}


def test_stages_are_rows_of_their_run_or_chosen(tmp_path, call, known):
  losses = {'x': 2.0, 'y': 3.0}
  make_stages(tmp_path / 'd', {name: (4, 8, losses) for name in ('reference', 'main-baseline', 'main-tuned')})
  rows = table(call(tmp_path)[1])
  assert list(rows) == ['run', 'd', 'reference', 'main-baseline', 'main-tuned']
  assert rows['d'] == ['doremi', 'finished', '-', '2.80e+07', '-']  # 'scores' included, which leaves no metrics
  assert rows['reference'] == ['4/8', '80', '2.500', '1.250', 'y 3.000', '4.00e+06', '-', '-']
  assert list(table(call(tmp_path, '--stage=main-tuned')[1])) == ['run', 'd main-tuned']
  assert [s['name'] for s in known(tmp_path, '--stage=main*')['d']['stages']] == ['main-baseline', 'main-tuned']
  assert table(call(tmp_path, '--domains')[1])['domain'] == ['d main-baseline', 'd main-tuned']
  status, _, error = call(tmp_path, '--stage=proxy-0')
  assert status == 2 and 'proxy-0' in error and 'main-baseline' in error


def test_columns_that_would_not_fit_are_numbered_and_told(tmp_path, call):
  for n in range(12):
    make_stages(tmp_path / f'a-run-of-some-name-{n:02}', {'main': (4, 8, {'x': 2.0 + n})})
  out = call(tmp_path, '--domains')[1]
  assert max(map(len, out.splitlines())) <= 120 and table(out)['x'][:2] == ['2.000*', '3.000']
  assert '[12] a-run-of-some-name-11' in out


def test_a_run_is_seen_running_then_killed_then_where_it_stopped(made, tmp_path, known):
  directory = tmp_path / 'run'
  process = subprocess.Popen(
    [sys.executable, '-m', 'datasel.main', f'--config={made / "config.py"}', f'--workdir={directory}',
     '--config.train.steps=1000000', '--config.train.eval_every=0', '--config.tracking.tensorboard=false'],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stderr=subprocess.DEVNULL)
  try:
    while process.poll() is None and not metrics.read(directory, 'main', 'train'):
      time.sleep(0.1)
    assert known(directory)['run']['state'] == 'running'
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  run, step = known(directory)['run'], metrics.read(directory)[-1]['step']
  assert run['state'] == 'stopped' and run['problems'] == []
  [stage] = run['stages']
  assert (stage['step'], stage['steps'], stage['tokens']) == (step, 1000000, step * 8 * small_run.LENGTH)
  assert math.isclose(stage['flops'] / step, workdir.read_json(directory / 'main/stage.json')['flops'] / 1000000)


def test_an_error_is_told_until_the_run_goes_on(folder, call, known):
  (folder / 'a/summary.json').unlink()
  (folder / 'a/traceback.txt').write_text('Traceback\n  File "x"\nFloatingPointError: main: step 5 gave loss nan\n')
  assert known(folder)['a']['state'] == 'failed'
  status, out, _ = call(folder)
  assert status == 0 and 'a: FloatingPointError: main: step 5 gave loss nan' in out
  os.utime(folder / 'a/metrics.jsonl', (time.time() + 60,) * 2)
  assert known(folder)['a']['state'] == 'stopped'
  with open(folder / 'a/.lock', 'a') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert known(folder)['a']['state'] == 'running'


@pytest.mark.parametrize('file', ['config.json', 'environment.json', 'summary.json', 'mixture.json', 'main/stage.json',
                                  'metrics.jsonl'])
def test_a_run_whose_file_is_damaged_is_listed_with_what_is_wrong(folder, call, known, file):
  path = folder / 'a' / file
  whole = path.read_bytes()
  junk = {'half': whole[:len(whole) // 2].rstrip() + b'\n', 'bytes': b'\xff\xfe\n', 'list': b'[1]\n', 'null': b'null\n',
          'words': b'{"stage": "main", "kind": "eval", "step": 1, "nll": 3, "domains": 4, "cost_flops": 5, '
                   b'"started": 6}\n'}
  for what, content in junk.items():
    path.write_bytes(content)
    for view in ('--domains', '--weights', '--config', '--stage=main'):
      assert call(folder, view)[0] == 0, (what, view)
    status, out, _ = call(folder)
    rows = table(out)
    assert status == 0 and set(rows) >= {'a', 'deeper/b'}, what
    if what != 'words':
      assert known(folder)['a']['state'] == 'damaged' and f'a: {path}' in out, what
  path.unlink()
  assert call(folder)[0] == 0


@pytest.mark.parametrize('stage', ['../../etc', '/etc', '', 'a//b', '.hidden', 'a/../../b'])
def test_a_stage_outside_the_run_is_damage(folder, call, stage):
  (folder / 'a/metrics.jsonl').write_text(json.dumps({'stage': stage, 'kind': 'eval', 'step': 1}) + '\n')
  assert 'line 1 is no record' in call(folder)[1]


@pytest.mark.parametrize('values,told', [
  ('"step": "9", "nll": {"a": 1}, "bits_per_byte": {"a": 1}', ', line 1 is no record: want .* a whole step'),
  ('"step": 9, "nll": {}, "bits_per_byte": {}', ': the last evaluation of main has no losses')])
def test_an_evaluation_of_nothing_is_damage(folder, call, known, values, told):
  path = folder / 'a/metrics.jsonl'
  path.write_text(f'{{"stage": "main", "kind": "eval", {values}}}\n')
  assert known(folder)['a']['state'] == 'damaged'
  assert re.search(f'a: {re.escape(str(path))}{told}', call(folder)[1])


def test_a_folder_without_runs_is_bad_input(tmp_path, call, folder):
  for path, told in ((tmp_path / 'nowhere', 'is not a folder'), (tmp_path / 'empty', 'has no run in it')):
    (tmp_path / 'empty').mkdir(exist_ok=True)
    workdir.write_json(tmp_path / 'empty/model/config.json', {'architectures': ['LlamaForCausalLM']})
    status, out, error = call(folder, path)
    assert status == 2 and not out and f'{path} {told}' in error
  assert call(folder, '--sort=colour')[0] == 2


def test_a_run_named_twice_is_listed_once_and_names_tell_runs_apart(folder, known):
  shutil.copytree(folder / 'a', folder / 'deeper/a')
  assert set(known(folder, folder / 'a', folder / 'deeper')) == {'a', 'deeper/a', 'deeper/b'}
  assert set(known(folder / 'deeper/b')) == {'b'}
