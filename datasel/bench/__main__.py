"""Benchmarks: `python -m datasel.bench NAME [--json=FILE] [--OPTION=VALUE ...]` measures here and prints a table.

A benchmark is a module with `run(**options) -> result` (JSON values) and `table(result) -> text`.
"""

import argparse
import datetime
import inspect
import logging
import os
import platform
import shlex
import sys

import numpy

from datasel import workdir
from datasel.bench import anchor_decoding, anchor_training, attention, data, doremi, generate, pds, prox, regmix, step

BENCHMARKS = {'anchor_decoding': anchor_decoding, 'anchor_training': anchor_training, 'attention': attention,
              'data': data, 'doremi': doremi, 'generate': generate, 'pds': pds, 'prox': prox, 'regmix': regmix,
              'step': step}


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  parser = argparse.ArgumentParser('datasel.bench', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  by_name = parser.add_subparsers(dest='name', required=True, metavar='|'.join(sorted(BENCHMARKS)))
  for name, module in BENCHMARKS.items():
    one = by_name.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__,
                             formatter_class=argparse.RawTextHelpFormatter)
    one.add_argument('--json', metavar='FILE', help='also write the result, with date, command and machine')
    for option in inspect.signature(module.run).parameters.values():
      kind = type(option.default)
      form = {'action': argparse.BooleanOptionalAction} if kind is bool else {'type': kind}
      one.add_argument(f'--{option.name}', default=option.default, help=f'default {option.default!r}', **form)
  options = vars(parser.parse_args(argv))
  name, path = options.pop('name'), options.pop('json')
  benchmark = BENCHMARKS[name]
  try:
    result = benchmark.run(**options)
  except (ImportError, ValueError) as e:
    sys.exit(f'{parser.prog}: {e}')
  machine = {'processor': platform.machine(), 'cores': os.cpu_count(), 'system': platform.platform(terse=True),
             'python': platform.python_version(), 'numpy': numpy.__version__}
  print(', '.join(f'{key} {value}' for key, value in machine.items()))
  print(benchmark.table(result))
  if path:
    workdir.write_json(path, {'benchmark': name, 'command': f'python -m datasel.bench {shlex.join(argv)}',
                                   'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
                                   'machine': machine, **result})


if __name__ == '__main__':
  main(sys.argv[1:])
