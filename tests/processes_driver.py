"""Run by processes_test.py as each process of a run: `datasel.main`, with what it reads and saves written down, and a
signal to itself in step N if asked.

  python processes_driver.py RECORD.jsonl SIGNAL:STEP|- FLAGS...
"""

import hashlib
import json
import os
import pathlib
import sys

import jax

from datasel import main, processes, train
from datasel.checkpoint import Checkpoints


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


if __name__ == '__main__':
  processes._LEAVE_SECONDS, main._SHARED_SECONDS = 3, 1  # the waits of a test, not of a pod
  signum, _, at = sys.argv[2].partition(':')
  watch(pathlib.Path(sys.argv[1]), int(signum or 0) if at else 0, int(at or 0))
  sys.exit(main.main(sys.argv[3:]))
