"""Run by pmp_test.py in a process of its own: the solver over eight devices against autodiff on one, in float64."""

import json

import jax
import numpy as np
import optax
import pmp_test
from jax.sharding import NamedSharding, PartitionSpec

from datasel import sharding
from datasel.methods.pds import pmp


def main():
  args = pmp_test.problem(T=16, B=8, D=16, hidden=8)
  want = np.asarray(pmp_test.unrolled(pmp_test.per_example_loss, *args, tx=optax.sgd(0.05), stride=3))
  outcome = {}
  for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2)]:
    mesh = sharding.make_mesh(*shape)
    place = lambda *spec, mesh=mesh: NamedSharding(mesh, PartitionSpec(*spec))
    params = jax.device_put(args[0], {'in': place('fsdp', 'tensor'), 'b': place('tensor'), 'out': place('tensor')})
    train = jax.device_put(args[1], place(None, ('data', 'fsdp')))
    got = pmp.solve(pmp_test.per_example_loss, params, train, *args[2:], learning_rate=0.05, score_stride=3)
    outcome['x'.join(map(str, shape))] = float(np.abs(got - want).max() / np.abs(want).max())
  print(json.dumps(outcome | {'spread': len(train['x'].sharding.device_set)}))


if __name__ == '__main__':
  main()
