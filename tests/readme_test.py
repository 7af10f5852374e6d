"""What the README tells a newcomer to type works."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')


def test_step_functions_in_another_project():
  [code] = re.findall(r'```python\n(.*?)```', README, re.S)
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = jax.random.randint(keys[0], (6, 9), 0, 100)
  batch = {'tokens_BxL': tokens[:, :-1], 'targets_BxL': tokens[:, 1:], 'loss_mask_BxL': jnp.ones((6, 8)),
           'domain_B': jnp.array([0, 1, 2, 0, 1, 2]), 'reference_nll_BxL': jnp.zeros((6, 8)).at[1::3].set(9.0)}
  params = {'embed': jax.random.normal(keys[1], (100, 8)), 'head': jax.random.normal(keys[2], (8, 100))}
  names = {'params': params, 'batch': batch}
  exec(compile(code, 'README.md', 'exec'), names)
  alpha_M = np.asarray(names['metrics']['alpha_M'])
  assert alpha_M[1] < 0.1 < min(alpha_M[0], alpha_M[2])  # the reference is far worse on domain 1: nothing to gain there
  assert int(names['state'].step) == 1


def test_short_enough_and_names_only_what_exists():
  assert len(README.splitlines()) < 150
  root = pathlib.Path(__file__).parents[1]
  paths = re.findall(r'`((?:datasel|configs|tests|launch|docs)/[\w./]+)`|\((docs/[\w.]+)\)', README)
  missing = [path for pair in paths for path in pair if path and not (root / path).exists()]
  assert not missing, missing
  commands = re.findall(r'configs/\w+/\w+\.py', README)
  assert all((root / path).is_file() for path in commands)
