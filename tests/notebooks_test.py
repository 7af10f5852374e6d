"""What the notebooks show runs, in a fresh process, from any folder, and installs nothing where datasel is."""

import json
import pathlib
import subprocess
import sys

import pytest

from datasel.data.demo_archives import cache_folder

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
# The cells are plain Python, so they need no Jupyter.  A traceback names the cell.
RUNNER = '''
import json, sys
names = {'__name__': '__main__'}
with open(sys.argv[1], encoding='utf-8') as f:
  cells = json.load(f)['cells']
for number, cell in enumerate(cells, 1):
  if cell['cell_type'] == 'code':
    exec(compile(''.join(cell['source']), f'{sys.argv[1]}, cell {number}', 'exec'), names)
exec(sys.argv[2], names)
'''
# What must come out, as Python that can fail.
OUTCOME = {
  'anchors': '''
assert len(plt.get_fignums()) == 3 and all(0 < x < 1e-5 for x in difference.values()) and same
assert change[:first + 1].max() < 1e-5 and change[first + 1:].mean() > 0.05
assert all(sees.sum() < 4656 for sees in (*masks.values(), *switched.values())) and prefix.live < prefix.length // 4
''',
  'finished_run': '''
assert len(plt.get_fignums()) == 3 and tuned != baseline and same and all(map(bool, jax.tree.leaves(same)))
assert comparison == summary['comparison'] and set(comparison['domains_won']) == {d for d in change if change[d] < 0}
assert np.allclose(-np.log(probability[np.arange(len(targets)), targets])[counted], nll[counted], atol=1e-3)
assert evaluated['tuned'][-1]['uniform_nll'] < evaluated['tuned'][0]['uniform_nll'] - 1
''',
  'pmp_by_hand': '''
assert len(plt.get_fignums()) == 2 and np.allclose(solver, by_hand, rtol=1e-10, atol=1e-12)
assert np.allclose(automatic, by_hand, rtol=1e-10, atol=1e-12) and np.allclose(retrained, by_hand, rtol=1e-6, atol=1e-8)
assert np.corrcoef(by_hand, twice)[0, 1] < -0.99 and lowest < min(at_random) < target(uniform) < highest
''',
  'prox_page': '''
assert [outcome.kind for outcome in result.outcomes].count('applied') == 13 and result.errors == 1 and len(parts) == 3
assert '[raw]' in text and '[raw]' not in result.text and executor.words(result.text) == 246
assert all(differences.values()) and sum(rows['c4']) < sum(rows['by hand']) and len(plt.get_fignums()) == 1
''',
  'regmix_law': '''
assert judged['gp']['spearman'] > 0.985 > 0.93 > judged['linear']['spearman'] and best_M[web] == max(best_M) > 0.5
assert curve[-1]['mse'] < curve[0]['mse'] and abs(best_M.sum() - 1) < 1e-9 and spread.max() > 0.02
''',
  'smollm2': '''
assert len(before) == 10 and all(shuffled[name] > before[name] + 0.1 for name in before)  # bits per byte
assert change[TRAINED] < -0.05 and min(change, key=change.get) == TRAINED
assert answer_before and answer_after != answer_before
''',
  'tour': 'assert len(plt.get_fignums()) == 2 and tuned["noise"] < baseline["noise"] and len(tuned) == 3',
  'your_own_model': 'assert metrics["loss"] < 3.5 and change * influence[n] < 0',
}


DEMO_DATA = {'prox_page', 'smollm2'}


@pytest.mark.parametrize('notebook', [
  pytest.param(path, marks=[pytest.mark.needs_demo_data] if path.stem in DEMO_DATA else [], id=path.stem)
  for path in NOTEBOOKS])
def test_every_cell_runs(notebook, tmp_path):
  environment = {'PATH': '/nowhere', 'PYTHONPATH': str(ROOT), 'HOME': str(tmp_path), 'TMPDIR': str(tmp_path),
                 'MPLBACKEND': 'agg', 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
  if notebook.stem in DEMO_DATA:  # what was fetched once is not fetched again
    environment['DATASEL_CACHE'] = str(cache_folder())
  else:  # models so small that compilation is their cost
    environment['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
  done = subprocess.run([sys.executable, '-W', 'error', '-c', RUNNER, str(notebook), OUTCOME[notebook.stem]],
                        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(notebook):
  content = json.loads(notebook.read_text(encoding='utf-8'))
  assert (content['nbformat'], content['nbformat_minor']) == (4, 5)
  assert len({cell['id'] for cell in content['cells']}) == len(content['cells'])
  for cell in content['cells']:
    assert cell['cell_type'] == 'markdown' or (cell['outputs'], cell['execution_count']) == ([], None)
  assert f'/blob/main/notebooks/{notebook.name}' in ''.join(content['cells'][0]['source'])  # the badge is its own
