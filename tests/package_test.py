"""What an installation is: a light import, no heavy library behind it, and every import declared."""

import ast
import importlib.metadata
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ('tensorflow', 'torch', 'seqio', 'datasets', 'lm_eval', 'apache_beam', 'wandb', 'trackio', 'tensorboard',
         'xprof', 'gguf')


def python(code):
  return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_importing_datasel_is_quick_and_brings_no_jax():
  code = ('import sys, time; began = time.perf_counter(); import datasel; seconds = time.perf_counter() - began\n'
          'print(seconds, sorted({"jax", "numpy", "flax", "grain"} & sys.modules.keys()))')
  outputs = [python(code).stdout.split(maxsplit=1) for _ in range(3)]
  assert min(float(seconds) for seconds, _ in outputs) < 0.3
  assert {loaded.strip() for _, loaded in outputs} == {'[]'}


@pytest.mark.parametrize('modules', [
  ['datasel.main'],  # alone: prepare's worker processes import it, and shall not wait for jax
  ['datasel.data.store', 'datasel.data.sampler', 'datasel.data.demo', 'datasel.prepare'],
  ['datasel.train', 'datasel.methods.doremi.run', 'datasel.methods.pretrain.run'],
])
def test_no_import_reaches_for_a_heavy_library(modules):
  """Also where none is installed: looking for one is an error here."""
  code = f'''
import sys
class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {HEAVY}:
      caller = sys._getframe(1)
      while caller and 'datasel' not in caller.f_globals.get('__name__', ''):
        caller = caller.f_back
      raise AssertionError(f"{{name}} was reached for by {{caller and caller.f_globals['__name__']}}")
sys.meta_path.insert(0, Refuse())
import importlib
for name in {modules}:
  importlib.import_module(name)
print('jax' in sys.modules)
'''
  done = python(code)
  assert done.returncode == 0, done.stderr[-2000:]
  if modules == ['datasel.main']:
    assert done.stdout.strip() == 'False'


@pytest.fixture(scope='module')
def setup_py():
  """The arguments that setup.py gives to setuptools, which needs not be installed here; `packages` are its patterns."""
  given = {}
  setuptools = types.ModuleType('setuptools')
  setuptools.setup, setuptools.find_packages = given.update, lambda *, include: include
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, 'setuptools', setuptools)
    runpy.run_path(str(ROOT / 'setup.py'))
  return given


def normal(name):
  """A distribution's name without its version, as pip compares it."""
  return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', name)[0]).lower()


def third_party():
  """{top-level module: a file that imports it}, of everything that is neither ours nor Python's."""
  found = {}
  for path in sorted((ROOT / 'datasel').rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
               else [node.module] if isinstance(node, ast.ImportFrom) else [])
      found |= {name.split('.')[0]: path for name in names}
  return {name: path for name, path in found.items() if name != 'datasel' and name not in sys.stdlib_module_names}


def test_every_import_is_declared(setup_py):
  requirements = sum(setup_py['extras_require'].values(), setup_py['install_requires'])
  declared = {'jaxlib', *map(normal, requirements)}  # jaxlib: jax's other half, of one version with it
  providers = importlib.metadata.packages_distributions()
  undeclared = {name: str(path.relative_to(ROOT)) for name, path in third_party().items()
                if not {normal(d) for d in providers.get(name, [name])} & declared}
  assert not undeclared


def test_the_core_declares_nothing_heavy(setup_py):
  assert not {normal(r) for r in setup_py['install_requires']} & {normal(name) for name in HEAVY}


def test_every_folder_with_code_is_packaged(setup_py):
  """setuptools finds a folder by its __init__.py, and those above it by theirs."""
  assert setup_py['packages'] == ['datasel', 'datasel.*']
  folders = {path.parent for path in (ROOT / 'datasel').rglob('*.py')}
  assert not [str(folder) for folder in folders if not (folder / '__init__.py').is_file()]


def test_the_marker_of_typed_packages_is_packaged(setup_py):
  assert (ROOT / 'datasel/py.typed').exists() and 'py.typed' in setup_py['package_data']['datasel']


def test_version_is_said_twice_and_alike(setup_py):
  done = python('import datasel; print(datasel.__version__)')
  assert done.stdout.strip() == setup_py['version']
