"""Benchmarks: `python -m datasel.bench NAME [--json FILE]` measures on this machine and prints a table.

A benchmark is a module with `run() -> result` (JSON values) and `table(result) -> text`.
"""

import argparse
import datetime
import logging
import os
import platform
import shlex
import sys

import numpy

from datasel import workdir
from datasel.bench import data, doremi

BENCHMARKS = {'data': data, 'doremi': doremi}


def main(argv: list[str]) -> None:
  """The command line."""
  logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
  parser = argparse.ArgumentParser('datasel.bench', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('name', choices=sorted(BENCHMARKS))
  parser.add_argument('--json', metavar='FILE', help='also write the result, with date, command and machine')
  args = parser.parse_args(argv)
  benchmark = BENCHMARKS[args.name]
  try:
    result = benchmark.run()
  except ImportError as e:
    sys.exit(f'{parser.prog}: {e}')
  machine = {'processor': platform.machine(), 'cores': os.cpu_count(), 'system': platform.platform(terse=True),
             'python': platform.python_version(), 'numpy': numpy.__version__}
  print(', '.join(f'{key} {value}' for key, value in machine.items()))
  print(benchmark.table(result))
  if args.json:
    workdir.write_json(args.json, {'benchmark': args.name, 'command': f'python -m datasel.bench {shlex.join(argv)}',
                                   'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
                                   'machine': machine, **result})


if __name__ == '__main__':
  main(sys.argv[1:])
