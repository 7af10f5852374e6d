"""`python -m datasel.main --config=configs/METHOD/NAME.py --workdir=DIR [--config.KEY=VALUE ...]`

Runs the config's method in DIR, or finishes it: the same command goes on where an interrupted run stopped.

With --distributed the same command, on every process of a pod or of several hosts, makes one run in a DIR they share.

Exit status: 0 done, 143 interrupted (the same command continues it), 2 refused (and would be again), 1 anything else.
"""

import contextlib
import datetime
import errno
import faulthandler
import fcntl
import json
import logging
import os
import pathlib
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from typing import Any

from absl import flags

from datasel import command_line, workdir

# jax is imported by the functions that need it: the worker processes that prepare text import this file too.

# What may differ when a run is continued: how it is watched, and on which devices it is computed (the same examples in
# the same order, sums in another one).  A store or a selection may have moved; the digest says that it is the same.
_MAY_CHANGE = ('profile_steps', 'tracking.', 'data.prefetch', 'data.verify', 'data.store', 'data.selection',
               'train.keep_checkpoints', 'mesh.', 'sharding.', 'train.microbatches', 'doremi.microbatches',
               'pds.train_microbatches', 'pds.microbatches', 'pds.score_batch', 'pds.scorer.microbatches',
               'prox.microbatches', 'prox.document.microbatches', 'prox.chunk.microbatches',
               'anllm.question_batch')
_SHARED_SECONDS = 30  # until a file of one host is seen by another on any shared disk
_REFUSED = 2
_INTERRUPTED = 128 + 15  # the exit status that schedulers know as SIGTERM


class Refused(Exception):
  """Bad input, found before anything was recorded; its cause says what."""


def methods() -> dict[str, Any]:
  """Each has run(config, directory, store) -> summary, and stages(config, store): what it will do, at what cost."""
  from datasel.methods.anllm import run as anllm
  from datasel.methods.doremi import run as doremi
  from datasel.methods.pds import run as pds
  from datasel.methods.pretrain import run as pretrain
  from datasel.methods.prox import run as prox
  from datasel.methods.regmix import run as regmix
  return {'anllm': anllm, 'doremi': doremi, 'pds': pds, 'pretrain': pretrain, 'prox': prox, 'regmix': regmix}


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  command_line.log_to_stderr('%(asctime)s  %(message)s')
  try:
    options = command_line.parse(argv)
  except (ValueError, OSError, flags.Error) as e:
    print(f'error: {e}', file=sys.stderr)
    return _REFUSED
  if options.print_config:
    from datasel import config as config_lib
    print(json.dumps(config_lib.flatten(options.config), indent=2))
    return 0
  if not options.distributed:
    return _run(options, argv)
  from datasel import processes
  try:
    processes.join()
  except (ValueError, RuntimeError) as e:
    print(f'error: {e}', file=sys.stderr)
    return _REFUSED if isinstance(e, ValueError) else 1  # a host that is late may be there the next time
  if not processes.lead():
    command_line.log_to_stderr(f'%(asctime)s  process {processes.index()}: %(message)s', logging.WARNING)
  status = _run(options, argv)
  processes.leave()
  return status


def _run(options: flags.FlagValues, argv: list[str]) -> int:
  """Launches; returns the exit status, with a message where it is an error."""
  directory = pathlib.Path(options.workdir).absolute()
  try:
    return launch(options, directory, argv)
  except KeyboardInterrupt:
    logging.warning('interrupted; the same command continues it')
    return _INTERRUPTED
  except Exception as e:
    from datasel.processes import PeerFailed
    from datasel.train import Interrupted
    status = _REFUSED if isinstance(e, Refused) else 1
    e = e.__cause__ if isinstance(e, Refused) else e
    if isinstance(e, PeerFailed):  # it says all there is to say
      print(f'\nerror: {e}', file=sys.stderr)
      return status
    if isinstance(e, Interrupted):
      logging.warning('%s; the same command continues it', e)
      return _INTERRUPTED
    # The message is for whoever started the run; the stack is for whoever mends the code.
    print(f'\nerror: {_message(e)}\n({type(e).__name__}{_keep_traceback(e, directory)})', file=sys.stderr)
    return status


def launch(options: flags.FlagValues, directory: pathlib.Path, argv: list[str]) -> int:
  """Checks everything that can be checked, then runs or finishes the run.  Raises Refused for what no repetition of the
  command would mend."""
  import jax

  from datasel import config as config_lib
  from datasel import processes
  config = options.config
  flat = config_lib.flatten(config)
  with contextlib.ExitStack() as lock:
    with _refusing():
      method = methods().get(config.method)
      if method is None:
        raise ValueError(f'config.method is {config.method!r}; known: {sorted(methods())}')
      token = processes.from_lead('taking the workdir', lambda: lock.enter_context(_only_one(directory)))
      processes.together('looking for the workdir', lambda: _check_shared(directory, token))
      processes.agree('config', flat)
      if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR may name one for many runs
        # The two main models are one program, and so is a run before and after an interruption.
        jax.config.update('jax_compilation_cache_dir', str(directory / 'compiled'))
      processes.from_lead('reading the config of the run', lambda: _check_same_config(method, flat, directory))
      store, found = open_store(config, directory)
      table = processes.together('checking the run', lambda: _check(method, config, store, directory, options.dry_run))
    if options.dry_run:
      if processes.lead():
        print(f'{table}\ndry run: everything checked, nothing trained')
      return 0
    processes.from_lead('recording the run', lambda: _record(flat, directory, argv, store, found))
    try:
      summary = method.run(config, directory, store)
    except Exception:
      # Refused before anything was computed: mended, it may begin again.
      if processes.lead() and not (directory / 'metrics.jsonl').exists():
        (directory / 'config.json').unlink()
      raise
  if processes.lead():
    _announce(summary, directory)
  return 0


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
  from datasel import processes
  try:
    yield
  except (ValueError, processes.PeerRefused) as e:
    raise Refused(str(e)) from e


def open_store(config: Any, directory: pathlib.Path) -> tuple[Any, dict]:
  """The run's token store, seen through its selection where it has one, and how it was found; a demo corpus is fetched
  and prepared first, by one process."""
  from datasel import processes
  from datasel.data.selection import Selected, load
  from datasel.data.store import Store
  found = processes.from_lead('preparing the token store', lambda: {
      **_find_store(config, directory), 'selection': _find_selection(config, directory)})

  def opened() -> Store | Selected:
    path = pathlib.Path(found['store'])
    if not processes.lead() and not path.is_dir():
      raise ValueError(f'the token store {path} is not on this host: choose a disk that all hosts share '
                       '(DATASEL_CACHE for a demo corpus, --config.data.store for your own)')
    # One process proves what all of them read; what is damaged in a host's own copy is found when it is read.
    store = Store(path, verify=found['verify'] if processes.lead() else 'size')
    return Selected(store, load(found['selection'])) if found['selection'] else store

  store = processes.together('opening the token store', opened)
  processes.agree('token store', {'digest': store.digest})
  return store, found


def _find_selection(config: Any, directory: pathlib.Path) -> str:
  """The file of the run's selection, '' for none.  A run keeps the selection it began with."""
  from datasel.data.selection import load
  path, began_with = config.data.selection, None
  if (directory / 'config.json').exists():
    began_with = workdir.read_json(directory / 'data.json').get('selection')
    path = path or (began_with['file'] if began_with else '')
    if path and (began_with is None or load(path).digest != began_with['digest']):
      raise ValueError(f'{path} is not the selection that this run began with '
                       f'({began_with["file"] if began_with else "none"}); restore it, or take another workdir')
  return str(pathlib.Path(path).absolute()) if path else ''


def _find_store(config: Any, directory: pathlib.Path) -> dict:
  """{store: its path, sources, verify: how}.  A run keeps the store it began with, also where a demo corpus would come
  out otherwise today."""
  from datasel import prepare, pretrained
  from datasel.data import demo
  from datasel.data import tokenizer as tokenizers
  from datasel.data.store import read_manifest
  if (directory / 'config.json').exists():
    began_with = workdir.read_json(directory / 'data.json')
    path = pathlib.Path(config.data.store or began_with['store']).absolute()
    if not path.is_dir():
      raise ValueError(f'the token store of this run is no longer in {path}; move it back, or name its new place with '
                       '--config.data.store')
    digest = read_manifest(path)['digest']
    if digest != began_with['digest']:
      raise ValueError(f'{path} (digest {digest[:12]}) is not the store that this run began with (digest '
                       f'{began_with["digest"][:12]}); restore it, or take another workdir')
    return {'store': str(path), 'sources': began_with['sources'], 'verify': config.data.verify}
  if config.data.store:
    path = pathlib.Path(config.data.store).absolute()
    return {'store': str(path), 'sources': None, 'verify': config.data.verify}
  corpus = demo.fetch(config.data.demo)
  if config.data.tokenizer:
    tokenizer = pretrained.tokenizer_path(config.data.tokenizer)
    name = tokenizers.load(tokenizer).digest[:12]
  else:
    name = f'bpe{config.model.vocab_size}'
    tokenizer = corpus.parent / f'{corpus.name}-{name}.json'
    prepare.train_tokenizer(corpus, tokenizer, vocab_size=config.model.vocab_size, max_bytes_per_domain=1_000_000,
                            reuse=True)
  path = corpus.parent / f'{corpus.name}-{name}-{config.data.length}'
  prepare.prepare(corpus, path, tokenizer, length=config.data.length, holdout=0.05, workers=os.cpu_count() or 1)
  return {'store': str(path), 'sources': workdir.read_json(corpus / 'sources.json'), 'verify': 'size'}


def _record(flat: dict, directory: pathlib.Path, argv: list[str], store: Any, found: dict) -> None:
  """From here on this is a run: config.json, written last, says so."""
  from datasel.data import tokenizer
  tokenizer.copy(store.path, directory / 'tokenizer')  # what the run's models are used with, wherever the store goes
  workdir.write_json(directory / 'data.json', _data(store, found))
  workdir.write_json(directory / 'environment.json', environment(argv))
  workdir.write_json(directory / 'config.json', flat)


def _data(store: Any, found: dict) -> dict:
  """data.json: which store and selection, and what they hold."""
  whole, selection = store.whole, None
  if found['selection']:
    selection = {'file': found['selection'], 'digest': store.selection.digest,
                 'provenance': store.selection.provenance,
                 'of_sequences': dict(zip(whole.domains, whole.sizes('train').tolist()))}
  domains = {name: {split: {k: v for k, v in store.counts(split)[name].items() if k != 'shards'}
                    for split in ('train', 'validation')} for name in store.domains}
  return {'store': str(whole.path), 'digest': whole.digest, 'selection': selection, 'tokenizer': whole.tokenizer,
          'domains': domains, 'sources': found['sources']}


def _check(method: Any, config: Any, store: Any, directory: pathlib.Path, dry_run: bool) -> str:
  """Everything that can be known to fail, before anything is computed; the table of a dry run."""
  from datasel import build, checks
  stages = method.stages(config, store)
  mesh = build.mesh(config.mesh)
  checks.check_store(store, config, {stage.name: stage.model for stage in stages})
  checks.check_stages(stages, config, mesh, store, directory)
  return checks.dry_run_table(stages, config, mesh) if dry_run else ''


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


def _check_same_config(method: Any, config: dict, directory: pathlib.Path) -> None:
  """A run goes on only as what it was begun; what its method's READ_FROM says is first read by a stage that has not
  begun may be another."""
  from datasel import config as config_lib
  recorded = directory / 'config.json'
  if recorded.exists():
    may_change = _MAY_CHANGE
    for stage, keys in reversed(getattr(method, 'READ_FROM', {}).items()):
      if any(directory.glob(stage)):
        break
      may_change += keys
    kept = lambda c: {k: v for k, v in json.loads(json.dumps(c)).items() if not k.startswith(may_change)}
    lines = config_lib.difference(kept(workdir.read_json(recorded)), kept(config))
    if lines:
      raise ValueError(f'{directory} holds a run with another config:\n  ' + '\n  '.join(lines)
                       + '\nrepeat its command to continue it, or choose another --workdir')


@contextlib.contextmanager
def _only_one(directory: pathlib.Path) -> Iterator[str]:
  """Two commands must not write one run.  Yields what this one's lock file holds."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / '.lock', 'a+', encoding='utf-8')
  except OSError as e:
    if e.errno == errno.ENOSPC:
      raise
    raise ValueError(f'--workdir {directory} cannot be written ({e.strerror}); choose another') from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      # Not a ValueError: it may just be ending.
      raise RuntimeError(f'another process is running in {directory}; wait for it, or choose another --workdir') from e
    token = uuid.uuid4().hex
    lock.truncate(0)
    print(token, file=lock, flush=True)
    yield token


def _check_shared(directory: pathlib.Path, token: str) -> None:
  """Every process must see the folder that process 0 has locked, and not one of the same name on its own disk."""
  lock, began = directory / '.lock', time.monotonic()
  while not (lock.exists() and lock.read_text(encoding='utf-8').strip() == token):
    if time.monotonic() - began > _SHARED_SECONDS:
      raise ValueError(f'--workdir {directory} is not the same folder on every host: choose one on a disk they share')
    time.sleep(0.5)


def _message(e: Exception) -> str:
  if isinstance(e, OSError) and e.errno == errno.ENOSPC:
    return (f'the disk is full ({e}); free some space and repeat the command: it continues from the last checkpoint')
  return str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)


def _keep_traceback(e: Exception, directory: pathlib.Path) -> str:
  from datasel import processes
  path = directory / ('traceback.txt' if processes.lead() else f'traceback-{processes.index()}.txt')
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
  if 'kept' in summary:
    print('\npart of each domain that is kept')
    for name, n in sorted(summary['kept'].items(), key=lambda item: -item[1]['selected'] / max(item[1]['of'], 1)):
      print(f'  {name:24s} {n["selected"] / max(n["of"], 1):.3f}  ({n["selected"]:,} of {n["of"]:,} sequences)')
  if 'text' in summary:
    print('\npart of the words that is left (held-out loss of a model trained on it)')
    loss = summary.get('target', {}).get('nll', {})
    for name, one in summary['text'].items():
      words = [one['statistics'][when]['words'] for when in ('after', 'before')]
      print(f'  {name:24s} {words[0] / max(words[1], 1):.3f}' + (f'  ({loss[name]:.4f})' if name in loss else ''))
    print(f'  {"raw":24s} 1.000' + (f'  ({loss["raw"]:.4f})' if 'raw' in loss else ''))
  if 'arms' in summary:
    print('\nheld-out bits per byte, and the part of a cache that is saved on real documents')
    for name, one in summary['arms'].items():
      print(f'  {name:24s} {one["uniform_bits_per_byte"]:.4f}  {one["cache_saved"]:.3f}')
  files = {'weights:': 'mixture.json', 'selection:': 'selection.npz', 'report:': 'report.html'}
  there = {what: directory / file for what, file in files.items() if (directory / file).exists()}
  print()
  for what, path in there.items():
    print(f'{what:{max(map(len, there))}s} {path}')


if __name__ == '__main__':
  faulthandler.enable()  # a crash of native code says where it was
  sys.exit(main(sys.argv[1:]))
