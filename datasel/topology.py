"""`python -m datasel.topology --config=FILE --topology=NAME [--config.KEY=VALUE ...]`: does a run fit devices not here?

Compiles the programs of the config's stages ahead of time for a TPU slice (`v5e:16x16`; needs the extra `tpu`) or for
GPUs (`h200:8`; needs the extra `cuda`) on any machine, and prints what each needs and costs.  No token store is needed.
Exit status: 0 it fits, 1 it does not, 2 there is no answer: bad input, or a program that does not compile at all.
--output=FILE.json keeps the answer.
"""

import dataclasses
import datetime
import logging
import os
import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from datasel import command_line, workdir

# jax is imported by the functions that need it, after main() has told it to look for no devices.

_ASSUMED_DOMAINS = 16
_WEIGHTS = (('doremi', 'baseline'), ('pretrain', 'mixture'))  # where a config names domain weights
_GIB = 2**30


class PlannedTokenizer:
  """In place of its tokenizer: each character is a token, and behind them all may be an anchor."""

  digest, bos_id, eos_id = '', None, None

  def __init__(self, vocab_size: int, anchored: bool):
    from datasel.data.anchors import Rule
    self.vocab_size = vocab_size + anchored
    self.anchor_id = vocab_size if anchored else None
    self.anchors = Rule((vocab_size,)) if anchored else None

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array([ord(c) % self.vocab_size for c in text], np.int32) for text in texts]


@dataclasses.dataclass(frozen=True)
class PlannedStore:
  """In place of a token store that is elsewhere, or not made yet: what the stages of a run ask of one to be planned."""

  domains: tuple[str, ...]
  length: int
  path: str = 'the planned store'
  digest: str = ''
  tokenizer: dict = dataclasses.field(default_factory=lambda: {'name': 'planned', 'digest': ''})
  encoder: Callable[[], PlannedTokenizer] | None = None

  def sizes(self, split: str) -> np.ndarray:
    """int64 [M]: sequences of each domain, as many as any run reads."""
    del split
    return np.full(len(self.domains), 10**9)

  def counts(self, split: str) -> dict[str, dict[str, int]]:
    return {name: {'tokens': int(size) * self.length} for name, size in zip(self.domains, self.sizes(split))}


def main(argv: list[str]) -> int:
  """The command line; returns the exit status."""
  # The devices of this machine are not asked for: they may be busy, and libtpu would complain where there are none.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # XLA's own complaints about what does not fit
  logging.basicConfig(level=logging.INFO, format='%(asctime)s  %(message)s', datefmt='%H:%M:%S', stream=sys.stderr,
                      force=True)
  for noisy in ('jax', 'absl'):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  try:
    options = command_line.load(argv, _define, needs_data=False)
    if not options.topology:
      from datasel import absent
      raise ValueError(f'--topology is missing; want one such as {absent.NAMES}')
    if options.output:
      _check_output(pathlib.Path(options.output))
    answer = examine(options.config, options.topology, domains=options.domains)
    print(table(answer))
    if options.output:
      workdir.write_json(options.output, answer)
  except (ValueError, OSError, ImportError, flags.Error) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  except Exception as e:  # not 1, which would say that the run does not fit
    traceback.print_exc()
    print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
    return 2
  return 0 if answer['fits'] else 1


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string('topology', None, 'Devices to compile for, such as v5e:16x16 or h200:8.', flag_values=values)
  flags.DEFINE_string('output', None, 'JSON file for the answer.', flag_values=values)
  flags.DEFINE_integer('domains', 0, 'Domains of the corpus, where the config does not name them.', flag_values=values,
                       lower_bound=0)


def _check_output(path: pathlib.Path) -> None:
  """Refuses a file that could not be written after minutes of compiling."""
  if path.is_dir():
    raise ValueError(f'--output={path} is a folder; want a file')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
  except OSError as e:
    raise ValueError(f'--output={path} cannot be written ({e.strerror}); choose another') from e


def examine(config: Any, topology: str, *, domains: int = 0) -> dict:
  """The answer as JSON values: `fits`, and a forecast (see forecast.py) of each program that the run's stages are.

  Raises ValueError for a topology that is unknown or that the config's mesh or batch does not divide and for a program
  that does not compile, ImportError where the topology's compiler is not installed.
  """
  import jax
  import jaxlib

  from datasel import absent, build, checks
  from datasel import forecast as forecast_lib
  from datasel import main as main_lib
  chip, devices = absent.devices(topology)
  mesh = build.mesh(config.mesh, devices)
  methods = main_lib.methods()
  if config.method not in methods:
    raise ValueError(f'config.method is {config.method!r}; known: {sorted(methods)}')
  config = _with_weights(config)
  store = _store(config, domains)
  programs: dict[tuple, list] = {}
  for stage in methods[config.method].stages(config, store):
    checks.check_split(stage, config, mesh)  # all of them, before the first is compiled
    programs.setdefault(stage.program_key, []).append(stage)
  answers = []
  for same in programs.values():
    logging.info('compiling %s for %s (may take a minute)', same[0].name, topology)
    answers.append(forecast_lib.forecast(same[0], config, mesh, chip) | {'stages': [stage.name for stage in same]})
  return {
    'topology': topology, 'devices': len(devices), 'mesh': {axis: int(size) for axis, size in mesh.shape.items()},
    'fits': all(answer['fits'] for answer in answers), 'programs': answers, 'jax': jax.__version__,
    'jaxlib': jaxlib.__version__, 'compiler': absent.compiler(chip), 'git': workdir.git_version(),
    'date': datetime.datetime.now(datetime.UTC).date().isoformat()}


def _with_weights(config: Any) -> Any:
  """The config with uniform weights where it names a mixture file of another machine, and with no model to start
  from: no program depends on them."""
  config = config.copy_and_resolve_references()
  if 'anllm' in config:
    config.anllm.init_from = config.anllm.sets = ''  # no shape depends on them
  for section, key in _WEIGHTS:
    path = pathlib.Path(config[section][key]) if section in config else pathlib.Path()
    if path.is_absolute() and not path.is_file():
      logging.info('config.%s.%s: %s is not on this machine; planning with uniform weights', section, key, path)
      config[section][key] = 'uniform'
  return config


def _store(config: Any, n_domains: int) -> Any:
  """The run's token store where it is on this machine; else a planned one, of the domains that the config names."""
  from datasel.data import mixture as mixture_lib
  from datasel.data.store import Store
  if config.data.store and pathlib.Path(config.data.store).is_dir():
    return Store(pathlib.Path(config.data.store).absolute(), verify='size')
  named: list[str] = []
  for section, weights in _WEIGHTS:
    if section in config:
      named += config[section][f'{weights}_epochs'].keys()
      if not named and pathlib.Path(config[section][weights]).is_file():
        named += mixture_lib.load(config[section][weights]).weights
  if named and n_domains not in (0, len(named)):
    raise ValueError(f'--domains={n_domains}, but the config names {len(named)}: {", ".join(sorted(named))}')
  if not named and not n_domains and 'doremi' in config:
    logging.info('the config names no domains: assuming %d; say --domains=N (a few bytes each)', _ASSUMED_DOMAINS)
  anchored = 'anllm' in config and config.anllm.arms == 'ac'
  return PlannedStore(tuple(sorted(named)) or tuple(f'domain-{i}' for i in range(n_domains or _ASSUMED_DOMAINS)),
                      config.data.length, encoder=lambda: PlannedTokenizer(config.model.vocab_size, anchored))


def table(answer: dict) -> str:
  """The answer for people."""
  mesh = ', '.join(f'{axis} {size}' for axis, size in answer['mesh'].items())
  lines = [f'{answer["topology"]}: {answer["devices"]} devices, mesh {mesh}; jax {answer["jax"]}, {answer["compiler"]}']
  for one in answer['programs']:
    lines += ['', *_program(one)]
  lines += ['', 'every stage fits' if answer['fits'] else 'this run does not fit']
  return '\n'.join(lines)


def _program(one: dict) -> list[str]:
  memory = one['memory']
  used = 'more than there is' if memory['total'] is None else f'{memory["total"] / _GIB:.3g} GiB'
  lines = [f'{", ".join(one["stages"])}: {one["parameters"]:,} parameters, {one["batch_size"]} x {one["length"]} '
           f'tokens in {one["microbatches"]} part(s)',
           f'  {"fits" if one["fits"] else "DOES NOT FIT"}: {used} of {memory["available"] / _GIB:.2f} GiB of a device',
           *(f'    {name:28s} {size / _GIB:8.3g} GiB' for name, size in memory['holds'].items())]
  if not one['fits']:
    lines.append('  ' + '; '.join(text for text in (one['reason'], one['advice']) if text))
  if 'flops' not in one:
    return lines
  flops, seconds = one['flops'], one['seconds']
  note = (f'; kernels without an estimate, counted by the formula: {", ".join(flops["kernels counted by the formula"])}'
          if flops['kernels counted by the formula'] else '')
  lines.append(f'  FLOPs: {flops["counted"]:.3e} compiled, {flops["formula"]:.3e} by formula, on each device{note}')
  for c in one['collectives']:
    lines.append(f'  {c["kind"]} {"in loops" if c["in_loops"] else "outside loops"}: {c["count"]:,} of '
                 f'{c["bytes"] / _GIB:.3g} GiB in all; {c["sent_bytes"] / _GIB:.3g} GiB leave each device')
  if one['unknown_loops']:
    lines.append(f'  loops of unknown length, counted once: {", ".join(one["unknown_loops"])}')
  lines.append('  by the roofline: '
               + ', '.join(f'{name} {1e3 * seconds[name]:.3g} ms' for name in ('arithmetic', 'memory', 'interconnect'))
               + f' -> {1e3 * seconds["step"]:.3g} ms, {one["tokens_per_second"]:,.0f} tokens/s, '
               + f'MFU {100 * one["mfu_bound"]:.0f}% (without any overlap {1e3 * seconds["without_overlap"]:.3g} ms)')
  return lines


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
