"""`python -m datasel.main --config=configs/METHOD/NAME.py --workdir=DIR [--config.KEY=VALUE ...]`

Runs the config's method in DIR, or finishes it: the same command goes on where an interrupted run stopped.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from datasel import workdir

# jax is imported by the functions that need it: the worker processes that prepare text import this file too.

# What may differ when a run is continued: how it is watched, not what it computes.  A store may have moved; its digest
# says that it is the same.
_MAY_CHANGE = ('profile_steps', 'tracking.', 'data.prefetch', 'data.verify', 'data.store', 'train.keep_checkpoints')
_INTERRUPTED = 128 + 15  # the exit status that schedulers know as SIGTERM


def methods() -> dict[str, Any]:
  """Each has run(config, directory, store) -> summary, and stages(config, store): what it will do, at what cost."""
  from datasel.methods.doremi import run as doremi
  from datasel.methods.pretrain import run as pretrain
  return {'doremi': doremi, 'pretrain': pretrain}


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  logging.basicConfig(level=logging.INFO, format='%(asctime)s  %(message)s', datefmt='%H:%M:%S', stream=sys.stderr,
                      force=True)
  for noisy in ('httpx', 'jax', 'orbax'):
    logging.getLogger(noisy).setLevel(logging.WARNING)
  # Through it orbax logs the stack of a failed save four times before raising it.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  try:
    options = parse(argv)
  except (ValueError, OSError, flags.Error) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  if options.print_config:
    from datasel import config as config_lib
    print(json.dumps(config_lib.flatten(options.config), indent=2))
    return 0
  directory = pathlib.Path(options.workdir).absolute()
  try:
    return launch(options, directory, argv)
  except KeyboardInterrupt:
    logging.warning('interrupted; the same command continues it')
    return _INTERRUPTED
  except Exception as e:
    from datasel.train import Interrupted
    if isinstance(e, Interrupted):
      logging.warning('%s; the same command continues it', e)
      return _INTERRUPTED
    # The message is for whoever started the run; the stack is for whoever mends the code.
    print(f'\nerror: {_message(e)}\n({type(e).__name__}{_keep_traceback(e, directory)})', file=sys.stderr)
    return 1


def parse(argv: list[str]) -> flags.FlagValues:
  """Flags; ValueError for a key that the config does not have, naming the nearest."""
  from datasel import config as config_lib
  is_override = lambda a: a.startswith(('--config.', '-config.'))
  plain = _load_config([a for a in argv if not is_override(a)])
  config_lib.check_overrides(plain.config, argv)
  options = _flags(argv)
  try:
    config_lib.check(options.config)
  except KeyError as e:
    raise ValueError(f'--config: the config has no key {e}; begin it with datasel.config.base') from e
  if not (options.workdir or options.print_config):
    raise ValueError('--workdir is missing: the folder of the run, made if absent')
  return options


def _load_config(argv: list[str]) -> flags.FlagValues:
  """Flags without overrides.  A config file is code: whatever comes out of it is reported with its name."""
  files = [a.split('=', 1)[1].rsplit(':', 1)[0] for a in argv if a.startswith(('--config=', '-config='))]
  if not files:
    raise ValueError('--config is missing: --config=configs/doremi/demo.py, for one')
  file = files[-1]
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config: no file {file} (looked from {pathlib.Path.cwd()})')
  try:
    options = _flags(argv)
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


def _flags(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'Config file, as FILE.py or FILE.py:smoke.', flag_values=values,
                                  sys_argv=argv)
  flags.DEFINE_string('workdir', None, 'Folder of the run, made if absent.', flag_values=values)
  flags.DEFINE_bool('print_config', False, 'Print the resolved config as JSON and stop.', flag_values=values)
  flags.DEFINE_bool('dry_run', False, 'Check paths, digests, shapes, disk and memory, and stop.', flag_values=values)
  rest = values(['datasel.main', *argv])
  if len(rest) > 1:
    raise ValueError(f'arguments {rest[1:]} are not flags; want --config=FILE --workdir=DIR --config.KEY=VALUE')
  return values


def launch(options: flags.FlagValues, directory: pathlib.Path, argv: list[str]) -> int:
  from datasel import config as config_lib
  config = options.config
  method = methods().get(config.method)
  if method is None:
    raise ValueError(f'config.method is {config.method!r}; known: {sorted(methods())}')
  with _only_one(directory):
    import jax
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR may name one for many runs
      # The two main models are one program, and so is a run before and after an interruption.
      jax.config.update('jax_compilation_cache_dir', str(directory / 'compiled'))
    _check_same_config(config_lib.flatten(config), directory)
    store, sources = open_store(config, directory)
    _check(method, config, store, directory, dry_run=options.dry_run)
    if options.dry_run:
      print('dry run: everything checked, nothing trained')
      return 0
    # From here on this is a run: config.json, written last, says so.
    workdir.write_json(directory / 'data.json', _data(store, sources))
    workdir.write_json(directory / 'environment.json', environment(argv))
    workdir.write_json(directory / 'config.json', config_lib.flatten(config))
    try:
      summary = method.run(config, directory, store)
    except Exception:
      if not (directory / 'metrics.jsonl').exists():  # refused before anything was computed: mended, it may begin again
        (directory / 'config.json').unlink()
      raise
  _announce(summary, directory)
  return 0


def open_store(config: Any, directory: pathlib.Path) -> tuple[Any, dict | None]:
  """The run's token store, and the sources of a demo corpus; that is fetched and prepared first.

  A run keeps the store it began with, also where a demo corpus would come out otherwise today.
  """
  from datasel import prepare
  from datasel.data import demo
  from datasel.data.store import Store
  if (directory / 'config.json').exists():
    began_with = workdir.read_json(directory / 'data.json')
    path = pathlib.Path(config.data.store or began_with['store']).absolute()
    if not path.is_dir():
      raise ValueError(f'the token store of this run is no longer in {path}; move it back, or name its new place with '
                       '--config.data.store')
    store = Store(path, verify=config.data.verify)
    if store.digest != began_with['digest']:
      raise ValueError(f'{store.path} (digest {store.digest[:12]}) is not the store that this run began with (digest '
                       f'{began_with["digest"][:12]}); restore it, or take another workdir')
    return store, began_with['sources']
  if config.data.store:
    return Store(pathlib.Path(config.data.store).absolute(), verify=config.data.verify), None
  corpus = demo.fetch(config.data.demo)
  tokenizer = corpus.parent / f'{corpus.name}-bpe{config.model.vocab_size}.json'
  prepare.train_tokenizer(corpus, tokenizer, vocab_size=config.model.vocab_size, max_bytes_per_domain=1_000_000,
                          reuse=True)
  path = corpus.parent / f'{corpus.name}-bpe{config.model.vocab_size}-{config.data.length}'
  store = prepare.prepare(corpus, path, tokenizer, length=config.data.length, holdout=0.05, workers=os.cpu_count() or 1)
  return store, workdir.read_json(corpus / 'sources.json')


def _data(store: Any, sources: dict | None) -> dict:
  """data.json: which store, and what it holds."""
  domains = {name: {split: {k: v for k, v in store.counts(split)[name].items() if k != 'shards'}
                    for split in ('train', 'validation')} for name in store.domains}
  return {'store': str(store.path), 'digest': store.digest, 'tokenizer': store.tokenizer, 'domains': domains,
          'sources': sources}


def _check(method: Any, config: Any, store: Any, directory: pathlib.Path, *, dry_run: bool) -> None:
  """Everything that can be known to fail, before anything is computed."""
  from datasel import build
  stages = method.stages(config, store)
  mesh = build.mesh(config.mesh)
  build.check_store(store, config, {stage.name: stage.model for stage in stages})
  build.check_stages(stages, config, mesh, store, directory)
  if dry_run:
    print(build.dry_run_table(stages, config, mesh))


def environment(argv: list[str]) -> dict:
  """What a run needs to be repeated: the command, versions, devices, and the commit if there is one."""
  import flax
  import jax
  import jaxlib

  from datasel import hardware
  peak, source = hardware.peak_flops_per_device()
  return {
    'command': ['python', '-m', 'datasel.main', *argv], 'python': platform.python_version(), 'jax': jax.__version__,
    'jaxlib': jaxlib.__version__, 'flax': flax.__version__,
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)',
    'peak_flops_per_device': peak, 'peak_flops_source': source, 'git': workdir.git_version(),
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _check_same_config(config: dict, directory: pathlib.Path) -> None:
  """A run goes on only as what it was begun."""
  from datasel import config as config_lib
  recorded = directory / 'config.json'
  if recorded.exists():
    kept = lambda c: {k: v for k, v in json.loads(json.dumps(c)).items() if not k.startswith(_MAY_CHANGE)}
    lines = config_lib.difference(kept(workdir.read_json(recorded)), kept(config))
    if lines:
      raise ValueError(f'{directory} holds a run with another config:\n  ' + '\n  '.join(lines)
                       + '\nrepeat its command to continue it, or choose another --workdir')


@contextlib.contextmanager
def _only_one(directory: pathlib.Path) -> Iterator[None]:
  """Two processes must not write one run."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / '.lock', 'w')
  except OSError as e:
    if e.errno == errno.ENOSPC:
      raise
    raise ValueError(f'--workdir {directory} cannot be written ({e.strerror}); choose another') from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(f'another process is running in {directory}; wait for it, or choose another --workdir') from e
    yield


def _message(e: Exception) -> str:
  if isinstance(e, OSError) and e.errno == errno.ENOSPC:
    return (f'the disk is full ({e}); free some space and repeat the command: it continues from the last checkpoint')
  return str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)


def _keep_traceback(e: Exception, directory: pathlib.Path) -> str:
  path = directory / 'traceback.txt'
  try:
    path.write_text(traceback.format_exc())
  except OSError:  # no such folder, or a full disk
    if isinstance(e, (ValueError, OSError)):  # the message says all
      return ''
    traceback.print_exc()
    return '; the traceback is above'
  return f'; the traceback is in {path}'


def _announce(summary: dict, directory: pathlib.Path) -> None:
  """The last lines of a run: its outcome, and where to look."""
  if 'tuned' in summary:
    print('\ntuned domain weights (baseline)')
    for name, weight in sorted(summary['tuned'].items(), key=lambda item: -item[1]):
      print(f'  {name:24s} {weight:.4f}  ({summary["baseline"][name]:.4f})')
  print(f'\nweights: {directory / "mixture.json"}\nreport:  {directory / "report.html"}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
