"""The flags of a run: --config=FILE.py[:ARG], --config.KEY=VALUE, --workdir=DIR, and a few switches."""

import logging
import pathlib
import re
import sys
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_flags


def log_to_stderr(format: str, level: int = logging.INFO) -> None:
  """Our own messages from `level` up, and of the libraries' only those that matter."""
  logging.basicConfig(level=level, format=format, datefmt='%H:%M:%S', stream=sys.stderr, force=True)
  for noisy in ('httpx', 'jax', 'orbax'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  # Through it orbax logs the stack of a failed save four times before raising it.
  logging.getLogger('absl').setLevel(logging.CRITICAL)


def parse(argv: list[str]) -> flags.FlagValues:
  """The flags of datasel.main, checked as `load` does."""
  options = load(argv, _define_run)
  if not (options.workdir or options.print_config):
    raise ValueError('--workdir is missing: the folder of the run, made if absent')
  return options


def load(argv: list[str], define: Callable[[flags.FlagValues], None], *, needs_data: bool = True) -> flags.FlagValues:
  """--config, its overrides and the flags that `define` adds; ValueError for a key that the config does not have,
  naming the nearest, and for values that no run can use."""
  from datasel import config as config_lib
  argv = _with_equals(argv)
  is_override = lambda a: a.startswith(('--config.', '-config.'))
  plain = _load_config([a for a in argv if not is_override(a)], define)
  config_lib.check_overrides(plain.config, argv)
  options = _flags(argv, define)
  try:
    config_lib.check(options.config, needs_data=needs_data)
  except KeyError as e:
    raise ValueError(f'--config: the config has no key {e}; begin it with datasel.config.base') from e
  return options


def _with_equals(argv: list[str]) -> list[str]:
  """`--config FILE` and `--config.KEY VALUE` as one argument each, with `=`: what is read below."""
  joined: list[str] = []
  for argument in argv:
    # A flag begins with a letter; -1 is a value.
    if joined and re.fullmatch(r'--?config(\.[\w.\-]+)?', joined[-1]) and not re.match(r'--?[A-Za-z]', argument):
      joined[-1] += f'={argument}'
    else:
      joined.append(argument)
  return joined


def _load_config(argv: list[str], define: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
  """Flags without overrides.  A config file is code: whatever comes out of it is reported with its name."""
  files = [a.split('=', 1)[1].rsplit(':', 1)[0] for a in argv if a.startswith(('--config=', '-config='))]
  if not files:
    raise ValueError('--config is missing: --config=configs/doremi/demo.py, for one')
  file = files[-1]
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config: no file {file} (looked from {pathlib.Path.cwd()})')
  try:
    options = _flags(argv, define)
  except flags.IllegalFlagValueError as e:  # holds the stack of a ValueError; its last line says what is wrong
    raise ValueError(f'--config={file}: {str(e).strip().splitlines()[-1]}') from e
  except (flags.Error, ValueError):
    raise
  except Exception as e:
    raise ValueError(f'--config={file}: {type(e).__name__}: {e}') from e
  if not isinstance(options.config, ml_collections.ConfigDict):
    raise ValueError(f'--config={file}: get_config() gave {type(options.config).__name__}; want a ConfigDict made with '
                     'datasel.config.base')
  return options


def _define_run(values: flags.FlagValues) -> None:
  flags.DEFINE_string('workdir', None, 'Folder of the run, made if absent.', flag_values=values)
  flags.DEFINE_bool('print_config', False, 'Print the resolved config as JSON and stop.', flag_values=values)
  flags.DEFINE_bool('dry_run', False, 'Check paths, digests, shapes, disk and memory, and stop.', flag_values=values)
  flags.DEFINE_bool('distributed', False, 'This process is one of several: join the others first.', flag_values=values)


def _flags(argv: list[str], define: Callable[[flags.FlagValues], None]) -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'Config file, as FILE.py or FILE.py:smoke.', flag_values=values,
                                  sys_argv=argv)
  define(values)
  rest = values(['datasel', *argv])
  if len(rest) > 1:
    raise ValueError(f'arguments {rest[1:]} are not flags; want --config=FILE --config.KEY=VALUE and the like')
  return values
