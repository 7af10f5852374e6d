"""Attention: ours, the alternatives, and the device's ceilings, in one run.

For each shape and each of forward, gradient and Hessian-vector product: milliseconds, the ratio to ours, and the share
of the measured matrix-product ceiling that the least possible work on visible pairs makes of that time.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from datasel.attention import attention, cudnn, splash
from datasel.attention.shapes import CASES, Case
from datasel.bench import timing

# Products of (visible pairs) x Dh that each needs at least where no L x L matrix is kept: the forward pass 2, the
# backward pass 5, the forward's tangent 5, the backward's tangent 12.
_PRODUCTS = {'forward': 2, 'gradient': 2 + 5, 'hessian_product': 2 + 5 + 12}


_COMPLETE = ('auto', 'pallas', 'blockwise', 'reference')  # ours, that must run whatever is asked


def run(*, cases: str = 'causal,grouped,packed,window,long', dtype: str = '', size: str = '', repeats: int = 5,
        kinds: str = 'forward,gradient,hessian_product') -> dict[str, Any]:
  """Median seconds of every contender; `dtype` and `size` default to bfloat16 and full, on a CPU float32 and medium."""
  on_cpu = jax.default_backend() == 'cpu'
  dtype, size = dtype or ('float32' if on_cpu else 'bfloat16'), size or ('medium' if on_cpu else 'full')
  for asked, known in ((cases, CASES), (kinds, _PRODUCTS), (dtype, ('float32', 'bfloat16')),
                       (size, ('small', 'medium', 'full'))):
    if unknown := sorted(set(asked.split(',')) - set(known)):
      raise ValueError(f'unknown {", ".join(unknown)}; known: {", ".join(known)}')
  product, flops, copy, moved = timing.limits(dtype)
  ceiling = timing.take_turns({'product': product, 'copy': copy}, repeats=repeats)
  result = {'device': f'{jax.devices()[0].device_kind}, jax {jax.__version__}', 'dtype': dtype, 'size': size,
            'product_flops': flops / statistics.median(ceiling['product']),
            'copy_bytes': moved / statistics.median(ceiling['copy']), 'rows': []}
  for name in cases.split(','):
    case = CASES[name]
    operands = case.inputs(dtype, size)
    for kind in kinds.split(','):
      contenders, absent = {}, {}
      for contender, make in _contenders(case, size, dtype, kind).items():
        try:
          run_it = make(kind, operands)
          run_it(1)
          contenders[contender] = run_it
        except Exception as e:  # another library may refuse a shape, a derivative or this device in its own way
          if contender in _COMPLETE:
            raise
          absent[contender] = (str(e).strip().splitlines() or [type(e).__name__])[0][:100]
      taken = timing.take_turns(contenders, repeats=repeats)
      work = _PRODUCTS[kind] * 2.0 * case.pairs(size) * operands[0].shape[2] * case.head_dim
      result['rows'].append({
        'case': name, 'shape': case.shape(size), 'kind': kind, 'flops': work, 'absent': absent,
        'seconds': {c: statistics.median(s) for c, s in taken.items()},
        'ratio_to_ours': {c: timing.ratio(taken, c, 'auto') for c in taken}})
  return result


def table(result: dict[str, Any]) -> str:
  """Times, as ratios to ours, and the share of the ceiling."""
  lines = [f'{result["device"]}, {result["dtype"]}, {result["size"]} shapes; measured ceilings: matrix product '
           f'{result["product_flops"] / 1e12:.2f} TFLOP/s, copy {result["copy_bytes"] / 1e9:.0f} GB/s']
  for row in result['rows']:
    lines.append(f'{row["case"]}, {row["kind"]}; B, L, H, K, Dh = {tuple(row["shape"])}')
    for name, seconds in row['seconds'].items():
      share = row['flops'] / seconds / result['product_flops']
      lines.append(f'  {name:30s} {1e3 * seconds:10.2f} ms {row["ratio_to_ours"][name]:7.2f} x auto'
                   f'{100 * share:7.1f}% of the product ceiling')
    lines += [f'  {name:30s} not: {why}' for name, why in row['absent'].items()]
  return '\n'.join(lines)


def _contenders(case: Case, size: str, dtype: str, kind: str) -> dict[str, Callable]:
  """By name: (kind, operands) -> a contender of `timing.take_turns`."""
  backend = jax.default_backend()
  mask = case.mask(size)
  ours = {'cpu': ('auto', 'reference'), 'gpu': ('auto', 'pallas', 'cudnn', 'blockwise', 'reference'),
          'tpu': ('auto', 'pallas', 'splash', 'blockwise', 'reference')}[backend]
  of = lambda f: functools.partial(_jax_contender, f)
  contenders = {name: of(functools.partial(attention, mask=mask, implementation=name)) for name in ours}
  if backend == 'gpu':
    contenders["jax's Pallas kernel"] = of(functools.partial(_jax_gpu_kernel, mask))
    if mask.segment_BxL is None and mask.anchors is None:
      contenders['jax.nn with cuDNN'] = of(cudnn.attend(mask.causal, mask.window, False))
  if backend == 'tpu':
    contenders["jax's Pallas kernel"] = of(functools.partial(_jax_tpu_kernel, mask))
    if mask.anchors is None:
      contenders["jax's splash"] = of(splash.attend(mask.causal, mask.window, mask.segment_BxL, False, False))
  if kind != 'hessian_product':
    contenders['PyTorch SDPA'] = functools.partial(_torch_contender, _sdpa, mask, dtype)
    if backend == 'gpu':  # its CPU kernels have no gradient
      contenders['PyTorch FlexAttention'] = functools.partial(_torch_contender, _flex, mask, dtype)
  return contenders


def _jax_contender(f: Callable, kind: str, operands: tuple) -> Callable[[int], Any]:
  gradient = jax.grad(lambda *qkv: f(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
  functions = {'forward': f, 'gradient': gradient,
               'hessian_product': lambda *qkv: jax.jvp(gradient, qkv, qkv)[1]}
  return timing.repeated(jax.jit(functions[kind]), *operands)


def _jax_gpu_kernel(mask, q, k, v):
  from jax.experimental.pallas.ops.gpu import attention as kernel
  if mask.window is not None or mask.anchors is not None:
    raise ValueError('no window and no anchor mask')
  repeat = q.shape[2] // k.shape[2]
  return kernel.mha(q, jnp.repeat(k, repeat, 2), jnp.repeat(v, repeat, 2), mask.segment_BxL, q.shape[-1]**-0.5,
                    mask.causal)


def _jax_tpu_kernel(mask, q, k, v):
  from jax.experimental.pallas.ops.tpu import flash_attention as kernel
  if mask.window is not None or mask.anchors is not None:
    raise ValueError('no window and no anchor mask')
  by_head = lambda x: jnp.repeat(x, q.shape[2] // x.shape[2], 2).transpose(0, 2, 1, 3)
  ids = None if mask.segment_BxL is None else kernel.SegmentIds(mask.segment_BxL, mask.segment_BxL)
  return kernel.flash_attention(by_head(q), by_head(k), by_head(v), segment_ids=ids, causal=mask.causal,
                                sm_scale=q.shape[-1]**-0.5).transpose(0, 2, 1, 3)


def _torch_contender(f: Callable, mask: Any, dtype: str, kind: str, operands: tuple) -> Callable[[int], Any]:
  import numpy as np
  import torch
  device = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
  q, k, v = (torch.tensor(np.asarray(x, np.float32)).to(device, getattr(torch, dtype)).transpose(1, 2).requires_grad_()
             for x in operands)
  attend = f(torch, mask, q, k)
  wait = torch.cuda.synchronize if device == 'cuda' else lambda: None

  def run(times: int) -> None:
    for _ in range(times):
      with torch.set_grad_enabled(kind == 'gradient'):
        out = attend(q, k, v)
      if kind == 'gradient':
        torch.autograd.grad(out.float().sum(), (q, k, v))
    wait()

  return run


def _sdpa(torch, mask, q, k):
  """Plain causal where that is all; everything else as a dense mask."""
  grouped = {'enable_gqa': True} if k.shape[1] != q.shape[1] else {}
  if mask.window is None and mask.segment_BxL is None and mask.anchors is None:
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=mask.causal, **grouped)
  import numpy as np
  dense = torch.tensor(np.asarray(mask.dense(q.shape[2]))[:, None]).to(q.device)
  return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, **grouped)


def _flex(torch, mask, q, k):
  import numpy as np
  from torch.nn.attention import flex_attention
  on_device = lambda x: None if x is None else torch.tensor(np.asarray(x)).to(q.device)
  segment = on_device(mask.segment_BxL)
  anchors = None if mask.anchors is None else type(mask.anchors.segments)(*map(on_device, mask.anchors.segments))

  def seen(b, h, i, j):
    if anchors is not None:  # with nothing protected
      own = (j <= i) & (anchors.segment_BxL[b, i] == anchors.segment_BxL[b, j])
      at = anchors.index_BxL[b, j]
      return own | anchors.kept_BxL[b, j] & (anchors.first_BxL[b, i] <= at) & (at < anchors.stop_BxL[b, i])
    visible = j <= i if mask.causal else j == j
    if mask.window is not None:
      visible = visible & (i - j < mask.window) & (j - i < mask.window)
    if segment is not None:
      visible = visible & (segment[b, i] == segment[b, j])
    return visible

  by_row = segment is not None or anchors is not None
  blocks = flex_attention.create_block_mask(seen, q.shape[0] if by_row else None, None, q.shape[2], q.shape[2],
                                            device=q.device.type)
  compiled = torch.compile(flex_attention.flex_attention)
  return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True)
