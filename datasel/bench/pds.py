"""The PMP solver of PDS: ours, the same work in PyTorch as the authors' code does it, and the device's ceiling.

One decoder, training, development and proxy set, float32; every contender returns the score of each proxy, and scores
that differ are an error.  The peer, written after the authors' trainer (https://github.com/microsoft/LMOps,
data_selection): loops over a functional model with eager attention, since forward-mode AD has no flash kernel there;
states kept every int(sqrt(T)) steps and computed again in between; the gradient over all of the development set at
every step; Hessian-vector products forward over reverse; scores by a jvp of each example, vmapped.  It takes as many
sequences at a time as their script: 8 to train, 8 proxies, 4 of the development set, 2 in a Hessian-vector product.
What they need for several GPUs, and the last Hessian-vector product, which nothing reads, are left out.

Only the model is small.  Sequences are as long as theirs, and the defaults have the proportions of their run, 100 steps
of 256 with 163,840 proxies at every tenth and 960 sequences of development: 64 scores and 4 gradients of development
for each sequence trained on.

On a CPU the measure is seconds of one core: the processor time of the process, PyTorch being held to one thread, since
what idle ones spin would count.  Ours is not: `taskset -c 0` holds both to one core, and spares ours what two cost each
other.  On other devices it is seconds.  The ceiling is the least number of matrix FLOPs, each
gradient counted as three forward passes, its forward-mode derivative as six more, at the rate of a matrix product
measured in the same run.
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from datasel import workdir
from datasel.bench import timing
from datasel.methods.pds import pmp
from datasel.models import hf
from datasel.models.mistral import Mistral
from datasel.models.presets import PRESETS

_OURS, _PEER = 'datasel', "torch.func, as the authors' code"
_ROWS = {'train': 8, 'proxy': 8, 'dev': 4, 'product': 2}
_OUR_ROWS = {'cpu': 2}  # of development and proxies: what a core's cache holds; 8 elsewhere


def run(*, preset: str = 'smoke', length: int = 1024, steps: int = 4, batch_size: int = 2, proxies: int = 256,
        dev: int = 8, stride: int = 2, learning_rate: float = 0.1, repeats: int = 2,
        peer: bool = True) -> dict[str, Any]:
  """Median seconds of the whole solve.  batch_size, proxies, dev: sequences."""
  if preset not in PRESETS:
    raise ValueError(f'unknown preset {preset!r}; known: {", ".join(PRESETS)}')
  if proxies % _ROWS['proxy'] or dev % _ROWS['proxy']:
    raise ValueError(f'{proxies} proxies and {dev} dev sequences do not divide into batches of {_ROWS["proxy"]}; '
                     'choose multiples of it')
  model = dataclasses.replace(PRESETS[preset], dtype='float32', remat='attention')
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (steps * batch_size + proxies + dev, length + 1))
  sets = np.split(tokens.astype(np.int32), np.cumsum([steps * batch_size, proxies]))
  sets = {name: rows.reshape(-1, size, length + 1) for (name, size), rows in zip(
    {'train': batch_size, 'proxy': _ROWS['proxy'], 'dev': _ROWS['proxy']}.items(), sets)}
  params = jax.jit(model.init)(jax.random.key(0))
  contenders = {_OURS: _ours(model, params, sets, stride, learning_rate)}
  absent = {}
  if peer:
    try:
      contenders[_PEER] = _torch_func(*_functional(model, params, length), sets, stride, learning_rate)
    except ImportError as e:
      absent[_PEER] = str(e)
  scores = [solve() for solve in contenders.values()]  # and compiles
  agreement = _agreement(*scores) if len(scores) > 1 else None
  product, flops, _, _ = timing.limits(model.dtype)
  contenders['matrix product'] = lambda: product(10)
  contenders['matrix product']()
  taken = _take_turns(contenders, repeats)
  kind = 'core_seconds' if jax.default_backend() == 'cpu' else 'seconds'
  seconds = {name: {key: statistics.median(taken[key][name]) for key in taken} for name in contenders}
  ceiling = 10 * flops / seconds.pop('matrix product')[kind]
  work = _flops(model, length, steps, batch_size, proxies, dev, stride)
  return {
    'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'preset': preset, 'n_params': model.n_params,
    'length': length, 'steps': steps, 'batch_size': batch_size, 'proxies': proxies, 'dev': dev, 'stride': stride,
    'flops': work, 'product_flops': ceiling, 'measure': kind, 'agreement': agreement, 'absent': absent,
    'rows': {name: s | {'of_limit': work / s[kind] / ceiling, 'ratio_to_ours': timing.ratio(taken[kind], name, _OURS)}
             for name, s in seconds.items()}}


def table(result: dict[str, Any]) -> str:
  r, cores = result, result['measure'] == 'core_seconds'
  lines = [f'{r["device"]}: {r["preset"]}, {r["n_params"]:,} parameters, float32; {r["steps"]} steps of '
           f'{r["batch_size"]} x {r["length"]}, {r["proxies"]} proxies every {r["stride"]} steps, {r["dev"]} dev '
           'sequences every step',
           f'{r["flops"] / 1e12:.3f} TFLOP at least; measured product {r["product_flops"] / 1e12:.3f} TFLOP/s'
           + ' of one core' * cores,
           *(f'scores of the two: rank correlation {a["spearman"]:.6f}, at most {a["difference"]:.1e} of their spread '
             'apart' for a in [r['agreement']] if a),
           f'{"":34s}{"seconds":>10s}' + f'{"core-seconds":>14s}' * cores + f'{"of limit":>10s}{"time, x ours":>14s}']
  lines += [f'{name:34s}{row["seconds"]:10.2f}' + f'{row["core_seconds"]:14.2f}' * cores
            + f'{100 * row["of_limit"]:9.1f}%{row["ratio_to_ours"]:14.2f}' for name, row in r['rows'].items()]
  return '\n'.join([*lines, *(f'{name}: not here ({why})' for name, why in r['absent'].items())])


def _ours(model: Mistral, params: dict, sets: dict[str, np.ndarray], stride: int,
          learning_rate: float) -> Callable[[], np.ndarray]:
  def per_example_loss(params, batch):
    return model.token_nll(params, batch).mean(-1)

  at_once = _OUR_ROWS.get(jax.default_backend(), _ROWS['proxy'])
  sets = sets | {name: sets[name].reshape(-1, at_once, sets[name].shape[-1]) for name in ('proxy', 'dev')}
  batches = [{'tokens_BxL': sets[name][..., :-1], 'targets_BxL': sets[name][..., 1:]}
             for name in ('train', 'proxy', 'dev')]

  def solve() -> np.ndarray:
    with jax.default_matmul_precision('highest'):  # accelerators would round
      return pmp.solve(per_example_loss, params, *batches, learning_rate=learning_rate, score_stride=stride)

  return solve


def _functional(model: Mistral, params: dict, length: int) -> tuple[Callable, dict]:
  """Our model in PyTorch: ((theta, tokens of B x (L + 1)) -> the loss of each, theta)."""
  import torch
  import transformers
  if jax.default_backend() == 'cpu':
    torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as folder:
    config = hf.to_config(model, max_length=length, bos_id=None, eos_id=None, dtype=model.dtype)
    workdir.write_json(f'{folder}/config.json', config)
    hf.save(folder, model, params, dtype=model.dtype)
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
  module = module.to('cuda' if jax.default_backend() == 'gpu' else 'cpu').eval().requires_grad_(False)

  def losses(theta, tokens):
    logits = torch.func.functional_call(module, theta, (), {'input_ids': tokens[:, :-1], 'use_cache': False}).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction='none')
    return nll.view(len(tokens), -1).mean(-1)

  return losses, dict(module.named_parameters())


def _torch_func(losses: Callable, initial: dict, sets: dict[str, np.ndarray], stride: int,
                learning_rate: float) -> Callable[[], np.ndarray]:
  import torch
  device = next(iter(initial.values())).device
  as_torch = lambda x: torch.tensor(x.astype(np.int64), device=device)
  train, (proxy, dev) = as_torch(sets['train']), (as_torch(np.concatenate(sets[name])) for name in ('proxy', 'dev'))
  plus = lambda a, scale, b: {name: a[name] + scale * b[name] for name in a}

  def gradient(theta, tokens, kind):
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    for part in tokens.split(_ROWS[kind]):
      (losses(theta, part).sum() / len(tokens)).backward()
    return {name: p.grad for name, p in theta.items()}

  def product(theta, direction, tokens):
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    for part in tokens.split(_ROWS['product']):
      mean = lambda p, part=part: losses(p, part).sum() / len(tokens)
      total = plus(total, 1, torch.func.jvp(torch.func.grad(mean), (theta,), (direction,))[1])
    return total

  def contributions(theta, direction):
    one = lambda row: torch.func.jvp(lambda p: losses(p, row[None])[0], (theta,), (direction,))[1]
    return torch.cat([torch.vmap(one)(part) for part in proxy.split(_ROWS['proxy'])])

  def solve() -> np.ndarray:
    steps = len(train)
    interval = math.isqrt(steps)
    theta, starts = initial, []
    for t in range(steps):
      if t % interval == 0:
        starts.append(theta)
      theta = plus(theta, -learning_rate, gradient(theta, train[t], 'train'))
    costate, scores_N = gradient(theta, dev, 'dev'), torch.zeros(len(proxy), device=device)
    for first in range((steps - 1) // interval * interval, -1, -interval):
      states = [starts.pop()]
      for t in range(first, min(first + interval, steps) - 1):
        states.append(plus(states[-1], -learning_rate, gradient(states[-1], train[t], 'train')))
      for t in reversed(range(first, first + len(states))):
        theta = states.pop()
        if t % stride == 0:
          scores_N += learning_rate * contributions(theta, costate)
        if t:
          before = plus(costate, 1, gradient(theta, dev, 'dev'))
          costate = plus(before, -learning_rate, product(theta, costate, train[t]))
    return scores_N.cpu().numpy()

  return solve


def _agreement(ours_N: np.ndarray, theirs_N: np.ndarray) -> dict[str, float]:
  rank = lambda x: x.argsort().argsort()
  found = {'spearman': float(np.corrcoef(rank(ours_N), rank(theirs_N))[0, 1]),
           'difference': float(np.abs(ours_N - theirs_N).max() / theirs_N.std())}
  if not found['difference'] < 1e-3:
    raise ValueError(f'the peer has other scores, {found}: not the same work')
  return found


def _take_turns(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
  """{'seconds': by the clock, 'core_seconds': of all cores together}, each {contender: one for each round}."""
  if repeats < 1:
    raise ValueError(f'repeats is {repeats}, want at least 1')
  clocks = {'seconds': time.perf_counter, 'core_seconds': time.process_time}
  taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in contenders} for kind in clocks}
  for _ in range(repeats):
    for name, solve in contenders.items():
      began = {kind: clock() for kind, clock in clocks.items()}
      solve()
      for kind, clock in clocks.items():
        taken[kind][name].append(clock() - began[kind])
  return taken


def _flops(model: Mistral, length: int, steps: int, batch_size: int, proxies: int, dev: int, stride: int) -> float:
  forward = model.flops_per_token(length) / 3 * length  # of one sequence
  training = 3 * (2 * steps - math.ceil(steps / math.isqrt(steps))) * batch_size  # twice, but for the states kept
  targets = 3 * steps * dev
  products = 9 * (steps - 1) * batch_size
  scores = 3 * math.ceil(steps / stride) * proxies
  return forward * (training + targets + products + scores)
