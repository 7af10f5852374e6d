"""For tests of whole runs, whose cost is compilation: programs compiled once for all runs of a test file."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_in(folder: pathlib.Path) -> Iterator[None]:
  """Inside, every compiled program is kept in `folder` and read from there; then the settings are put back."""
  settings = {'jax_compilation_cache_dir': str(folder), 'jax_persistent_cache_min_compile_time_secs': 0.0}
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    _set(settings)
    yield
  finally:
    _set(before)


def _set(settings: dict) -> None:
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
