"""The house rules that can be read off the source: imports run downward, and nothing dangerous is called."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'datasel').rglob('*.py'))

# A module's floor is that of the longest of these that its name begins with; it may import its own and those below.
FLOORS = {
  'datasel': 0,
  'datasel.batch': 0, 'datasel.autodiff': 0, 'datasel.sharding': 0, 'datasel.metrics': 0, 'datasel.workdir': 0,
  'datasel.hardware': 0, 'datasel.processes': 0, 'datasel.hlo': 0, 'datasel.hlo_costs': 0, 'datasel.absent': 0,
  'datasel.trackers': 0,
  'datasel.models': 1, 'datasel.attention': 1, 'datasel.data': 1, 'datasel.data.beam': 5,
  'datasel.step': 2, 'datasel.objectives': 2, 'datasel.optim': 2,
  'datasel.train': 3, 'datasel.evaluate': 3, 'datasel.generate': 3, 'datasel.checkpoint': 3, 'datasel.report': 3,
  'datasel.decode': 3, 'datasel.row_values': 3,
  'datasel.prepare': 3,  # a command, and what methods make stores with
  'datasel.config': 3, 'datasel.build': 3, 'datasel.pretrained': 3, 'datasel.checks': 3, 'datasel.forecast': 3,
  'datasel.methods': 4,
  'datasel.main': 5, 'datasel.command_line': 5, 'datasel.export': 5, 'datasel.lm_eval': 5,
  'datasel.topology': 5, 'datasel.load': 5, 'datasel.runs': 5, 'datasel.bench': 5,
}
FORBIDDEN_IMPORTS = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'imp'}
FORBIDDEN_CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen'}


def module_name(path):
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): path for path in FILES}


def imports(tree):
  """Every imported module or module.name, wherever in the file the import stands."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def parse(path):
  return ast.parse(path.read_text(encoding='utf-8'))


def named(known, name):
  """The longest of `known` that `name` is, or is inside of."""
  parts = name.split('.')
  return next((prefix for n in range(len(parts), 0, -1) if (prefix := '.'.join(parts[:n])) in known), None)


def floor(module):
  return FLOORS[named(FLOORS, module)]


def method(module):
  parts = module.split('.')
  return parts[2] if parts[:2] == ['datasel', 'methods'] and len(parts) > 2 else None


def our_imports(module):
  return {named(MODULES, name) for name in imports(parse(MODULES[module])) if name.split('.')[0] == 'datasel'}


def external_imports(module):
  return {name.split('.')[0] for name in imports(parse(MODULES[module]))} - {'datasel'}


@pytest.mark.parametrize('module', MODULES)
def test_every_module_has_a_floor(module):
  assert named(FLOORS, module) != 'datasel' or module == 'datasel', 'give it one in FLOORS'


@pytest.mark.parametrize('module', MODULES)
def test_imports_run_downward(module):
  above = {other for other in our_imports(module) if floor(other) > floor(module)}
  assert not above, f'{module} on floor {floor(module)} imports {sorted(above)} from above'


@pytest.mark.parametrize('module', [name for name in MODULES if method(name)])
def test_a_method_imports_no_other_method(module):
  others = {other for other in our_imports(module) if method(other) not in (None, method(module))}
  assert not others, f'{module} imports {sorted(others)}: what two methods share belongs a floor down'


def test_only_models_import_flax():
  """And main, which records its version."""
  users = {module for module in MODULES if 'flax' in external_imports(module)} - {'datasel.main'}
  assert users and all(module.startswith('datasel.models.') for module in users)


def test_data_imports_no_jax():
  users = {module for module in MODULES if module.startswith('datasel.data')
           and external_imports(module) & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}}
  assert not users


@pytest.mark.parametrize('module', MODULES)
def test_nothing_runs_text_as_code(module):
  """No pickle, also none inside an array file; no eval, exec, or shell."""
  tree = parse(MODULES[module])
  assert not external_imports(module) & FORBIDDEN_IMPORTS
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f'line {node.lineno}: {ast.unparse(node)}'
      for keyword in node.keywords:
        assert (keyword.arg not in ('shell', 'allow_pickle')
                or (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)), f'line {node.lineno}'


@pytest.mark.parametrize('path', [path for folder in ('datasel', 'configs', 'tests') for path in
                                  sorted((ROOT / folder).rglob('*.py'))], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_500_lines(path):
  assert len(path.read_text(encoding='utf-8').splitlines()) <= 500


def test_the_rules_see_what_they_forbid():
  tree = ast.parse('def f():\n  import datasel.main\nfrom datasel.data import store\nfrom datasel.step import State\n')
  assert {named(MODULES, name) for name in imports(tree)} == {'datasel.main', 'datasel.data.store', 'datasel.step'}
  assert floor('datasel.data.store') == 1 and floor('datasel.methods.doremi.run') == 4
  assert method('datasel.methods.doremi.run') == 'doremi' and method('datasel.methods') is None
