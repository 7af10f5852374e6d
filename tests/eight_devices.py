"""Run by sharding_test.py in a process of its own: three steps on each mesh of eight devices, against one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from datasel import objectives, optim, sharding, train
from datasel.models.mistral import Mistral

SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2)]
MODEL = Mistral(vocab_size=64, n_layers=1, d_model=16, n_heads=8, n_kv_heads=8, head_dim=4, d_ff=24, loss_chunk=3)


def batch(seed):
  tokens, targets = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (2, 8, 8), dtype=np.int32)
  mask = (np.arange(8)[None] <= np.arange(8)[:, None]).astype(np.float32)  # ragged
  return {'tokens_BxL': tokens, 'targets_BxL': targets, 'loss_mask_BxL': mask}


def three_steps(mesh):
  tx = optim.adamw(1e-2, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, clip=1.0)
  program = train.program(MODEL.init, MODEL.logical_axes(), objective=objectives.language_model(MODEL.token_nll), tx=tx,
                          mesh=mesh)
  state, losses = program.init(jax.random.key(0)), []
  for seed in range(3):
    state, metrics = program.step(state, program.put(batch(seed)))
    losses.append(float(jax.block_until_ready(metrics)['loss']))
  return losses, state


def main():
  wanted_losses, wanted = three_steps(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
  wanted = jax.device_get(wanted.params)
  outcome = {}
  for shape in SHAPES:
    losses, state = three_steps(sharding.make_mesh(*shape))
    place = jax.tree.map(lambda x: x.sharding, state.params)
    is_adam = lambda part: hasattr(part, 'mu')
    [adam] = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    moments = all(jax.tree.map(lambda x: x.sharding, moment) == place for moment in (adam.mu, adam.nu))
    embed = state.params['embed']['kernel']
    outcome['x'.join(map(str, shape))] = {
      'loss': max(abs(a / b - 1) for a, b in zip(losses, wanted_losses)),
      'params': max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(jax.device_get(state.params)),
                                                                jax.tree.leaves(wanted))),
      'spread': {'embed': embed.size // embed.addressable_shards[0].data.size,
                 'moments': 'as their parameters' if moments else 'elsewhere'}}
  print(json.dumps(outcome))


if __name__ == '__main__':
  main()
