"""Run by processes_test.py as each process of a run: `datasel.main`, with what it reads and saves written down, and a
signal to itself in step N if asked; with --pmp among the flags, the solver of PDS on a small problem instead.

  python processes_driver.py RECORD.jsonl SIGNAL:STEP|- FLAGS...
"""

import hashlib
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from datasel import main, processes, train
from datasel.checkpoint import Checkpoints
from datasel.methods.pds import pmp


def watch(record: pathlib.Path, signum: int, at: int) -> None:
  """Every batch that goes to the devices, and every shard that a checkpoint gets, leaves a line in `record`."""
  put, save, seen = train.Program.put, Checkpoints.save, []

  def write(line):
    with open(record, 'a', encoding='utf-8') as f:
      f.write(json.dumps(line) + '\n')

  def watched_put(program, batch):
    write({'domain': batch['domain_B'].tolist(), 'example': batch['example_B'].tolist()})
    seen.append(batch)
    if len(seen) == at:
      os.kill(os.getpid(), signum)
    return put(program, batch)

  def watched_save(checkpoints, step, state, data_state):
    shards = [(jax.tree_util.keystr(path), [index.indices(n)[:2] for index, n in zip(shard.index, x.shape)],
               hashlib.sha256(bytes(jax.device_get(shard.data).data)).hexdigest())
              for path, x in jax.tree_util.tree_leaves_with_path(state) for shard in x.addressable_shards]
    write({'step': step, 'shards': shards})
    save(checkpoints, step, state, data_state)

  train.Program.put, Checkpoints.save = watched_put, watched_save


def control_problem(devices: list) -> tuple[tuple, dict]:
  """What `pmp.solve` takes: a net of two layers, everything spread over devices, which may be other processes'."""
  rng = np.random.default_rng(0)
  mesh = jax.sharding.Mesh(np.array(devices), ('d',))
  put = lambda x, *spec: jax.make_array_from_callback(
    x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: x[index].astype(np.float32))
  batches = lambda *shape: {name: put(rng.normal(size=size), None, 'd')
                            for name, size in (('x', (*shape, 3)), ('y', shape))}
  params = {'in': put(rng.normal(size=(3, 8)), None, 'd'), 'out': put(rng.normal(size=8), 'd')}
  loss = lambda params, batch: jnp.square(jnp.tanh(batch['x'] @ params['in']) @ params['out'] - batch['y'])
  return (loss, params, batches(9, 4), batches(2, 8), batches(1, 4)), {'learning_rate': 0.1, 'score_stride': 2}


def solve(record: pathlib.Path, workdir: pathlib.Path) -> None:
  """The scores, twice: of a solve with a directory that is left there in its second segment, and of a whole one."""
  processes.join()
  args, options = control_problem(jax.devices())
  traces = []

  def leave(trace):
    traces.append(trace)
    if len(traces) == 3:
      raise StopIteration

  try:
    pmp.solve(*args, **options, directory=workdir, report=leave)
  except StopIteration:
    record.write_text(json.dumps(pmp.solve(*args, **options).tolist()), encoding='utf-8')
  processes.leave()


if __name__ == '__main__':
  if '--pmp' in sys.argv:
    [workdir] = [flag.removeprefix('--workdir=') for flag in sys.argv if flag.startswith('--workdir=')]
    sys.exit(solve(pathlib.Path(sys.argv[1]), pathlib.Path(workdir)))
  processes._LEAVE_SECONDS, main._SHARED_SECONDS = 3, 1  # the waits of a test, not of a pod
  signum, _, at = sys.argv[2].partition(':')
  watch(pathlib.Path(sys.argv[1]), int(signum or 0) if at else 0, int(at or 0))
  sys.exit(main.main(sys.argv[3:]))
