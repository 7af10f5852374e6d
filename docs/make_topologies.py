"""Makes docs/topologies.md: which config fits which devices, by compiling it for them.  No such device is needed.

  python docs/make_topologies.py [--only=TEXT] [--again]

Compiles the rows whose compiler is installed here (`pip install -e .[tpu]`, `.[cuda]`) and that docs/topologies.json
does not hold yet, one to two minutes for each program; --only takes the rows whose line contains TEXT, --again makes
them anew.  Can be stopped at any time; the same command goes on.
"""

import argparse
import logging
import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
os.environ['JAX_PLATFORMS'] = 'cpu'

from datasel import command_line, topology, workdir  # noqa: E402

# config, topology, what is overridden beside it.
FSDP = ('mesh.data=1', 'mesh.fsdp=-1')
ROWS = [
  ('pretrain/pds_160m:smoke', 'v5e:2x2', ()),  # tests/topology_test.py makes these two again
  ('pretrain/pds_160m:smoke', 'v5p:2x2x1', ()),
  ('pretrain/pds_160m', 'v5e:4x4', ()),
  ('pretrain/pds_160m', 'v4:2x2x2', ('train.microbatches=4',)),
  ('pretrain/pds_160m', 'h200', ('train.microbatches=16',)),
  ('pretrain/pds_470m', 'v5e:4x4', ('train.microbatches=4',)),
  ('pretrain/pds_470m', 'h200:8', ('train.microbatches=2',)),
  ('pretrain/pds_1b', 'v5p:2x2x4', FSDP),
  ('pretrain/pds_1b', 'h100:16', ('train.microbatches=4',)),
  ('pretrain/pds_1_7b', 'v5e:16x16', FSDP),
  ('pretrain/pds_1_7b', 'v6e:8x8', FSDP),
  ('pretrain/pds_1_7b', 'h200:8', (*FSDP, 'train.microbatches=4')),
  ('doremi/pile_120m', 'v5e:4x4', ('train.microbatches=4', 'doremi.microbatches=4')),
  ('doremi/pile_120m', 'h100:8', ('train.microbatches=4', 'doremi.microbatches=4')),
  ('doremi/glam_rounds', 'v4:2x2x4', ('doremi.microbatches=4',)),
  ('doremi/pile_280m', 'v5p:4x4x8', FSDP),
  ('doremi/pile_280m', 'h200:64', FSDP),
  ('doremi/pile_280m', 'v5e:16x16', FSDP),
  ('anllm/llama2_7b_ep', 'v5p:4x4x2', FSDP),
]
HEADER = '''# What fits where

Compiled ahead of time by `python docs/make_topologies.py`, on a machine without these devices; ask for any other with
`python -m datasel.topology --config=configs/... --topology=NAME`, which also says what takes the memory and which
collectives run.

- **GiB**: what the compiled program needs of one device, of what it can have there (a TPU's memory less the compiler's
  reserve; three quarters of a GPU's, jax's share when nothing else is said).
- **expected**: the longest of arithmetic at the data sheet's peak, memory traffic as compiled, and collectives over all
  links, as if they overlapped perfectly.  It was not measured, and no such device was there.
- **MFU**: FLOPs by the formula (6 for each matrix parameter and token, and attention's) over the peak, at that time.

| config | overrides | devices | stages | GiB | fits | expected | bound by | tokens/s | MFU |
|---|---|---|---|---|---|---|---|---|---|
'''


def main() -> int:
  """Compiles what is missing, and writes both files after each row."""
  logging.basicConfig(level=logging.INFO, format='%(asctime)s  %(message)s', datefmt='%H:%M:%S', stream=sys.stderr)
  for noisy in ('jax', 'absl'):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help='rows whose line contains this')
  parser.add_argument('--again', action='store_true', help='make them anew')
  options = parser.parse_args()
  path = DOCS / 'topologies.json'
  for row in ROWS:
    made = workdir.read_json(path) if path.exists() else {}
    if options.only in key(*row) and (options.again or key(*row) not in made):
      logging.info('%s', key(*row))
      try:
        answer = make(*row)
      except ImportError as e:
        logging.info('left out: %s', e)
        continue
      made = (workdir.read_json(path) if path.exists() else {}) | {key(*row): answer}  # another may have added rows
      made = {key(*row): made[key(*row)] for row in ROWS if key(*row) in made}
      workdir.write_json(path, made)
      write(DOCS / 'topologies.md', made)
  write(DOCS / 'topologies.md', workdir.read_json(path))
  return 0


def key(config: str, name: str, overrides: tuple[str, ...]) -> str:
  """A row's name."""
  return ' '.join((config, name, *overrides))


def make(config: str, name: str, overrides: tuple[str, ...]) -> dict:
  """A row's answer, of datasel.topology."""
  file, _, form = config.partition(':')
  argv = [f'--config={DOCS.parent}/configs/{file}.py:{form}', *(f'--config.{override}' for override in overrides)]
  return topology.examine(command_line.load(argv, lambda flags: None, needs_data=False).config, name)


def write(path: pathlib.Path, made: dict[str, dict]) -> None:
  """The table."""
  with workdir.replacing(path, 'w') as f:
    f.write(HEADER)
    for name, answer in made.items():
      config, _, *overrides = name.split()
      for one in answer['programs']:
        f.write(line(config, overrides, answer, one))
    made_with = sorted({f'jax {answer["jax"]}, {answer["compiler"]}, {answer["date"]}' for answer in made.values()})
    f.write(f'\nMade with {"; ".join(made_with)}.\n')


def line(config: str, overrides: list[str], answer: dict, one: dict) -> str:
  """One program's row of the table."""
  memory = one['memory']
  used = '?' if memory['total'] is None else f'{memory["total"] / 2**30:.2f}'
  cells = [config, ' '.join(overrides), answer['topology'], ', '.join(one['stages']),
           f'{used} of {memory["available"] / 2**30:.2f}', 'yes' if one['fits'] else '**no**']
  if 'seconds' in one:
    milliseconds = 1e3 * one['seconds']['step']
    cells += [f'{milliseconds:.{0 if milliseconds > 10 else 2}f} ms', one['bound_by'],
              f'{one["tokens_per_second"]:,.0f}', f'{100 * one["mfu_bound"]:.0f}%']
  else:
    cells += [one['advice'] or one['reason'], '', '', '']
  return f'| {" | ".join(cells)} |\n'


if __name__ == '__main__':
  sys.exit(main())
