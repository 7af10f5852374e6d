"""Flash attention as four JAX primitives, each with its own rules of differentiation and batching.

  forward   (q, k, v) -> o, lse               its jvp is `tangent`
  tangent   linear in (q', k', v')            its transpose is `backward`
  backward  (q, k, v, o, lse, do) -> dq, ...  its jvp is `backward_tangent`
  backward_tangent                            the end: third derivatives are refused

So grad, jvp and jvp(grad) are all flash, at O(L) memory.  `custom_vjp` and `custom_jvp` cannot say this: partial
evaluation inside `scan`, `jit` and `remat` drops their rules, and the outer derivative meets a raw kernel.

What computes a primitive is decided when it is lowered, by the platform that it is lowered for: the same traced program
compiles for a CPU, a GPU or a TPU that this process does not have.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from datasel.attention import blockwise, cudnn, pallas_gpu, pallas_tpu, slots, splash, tiles
from datasel.attention.masks import Anchors
from datasel.attention.visible import Marks, Visible

# Whatever `jax.checkpoint` policies save under this name, the backward pass does not compute again.
SAVED = 'attention'


@dataclasses.dataclass(frozen=True)
class Layout:
  """How kernels that XLA cannot split are spread: batch rows and heads over mesh axes."""

  mesh: Mesh
  batch: Any
  heads: Any

  def spec(self, name: str) -> PartitionSpec:
    if name == 'segment':
      return PartitionSpec(self.batch, None)
    if name in slots.OPERANDS:
      return PartitionSpec(self.batch, None, None)
    if name in tiles.VECTORS:
      return PartitionSpec(self.batch, self.heads, None)
    return PartitionSpec(self.batch, None, self.heads, None)


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static of one attention."""

  causal: bool
  window: int | None
  implementation: str
  layout: Layout | None


Operands = dict[str, jax.Array]


def _delta(do_BxLxHxDh: jax.Array, o_BxLxHxDh: jax.Array) -> jax.Array:
  """B x H x L: sum over the head of do . o."""
  return jnp.einsum('blhd,blhd->bhl', do_BxLxHxDh.astype(jnp.float32), o_BxLxHxDh.astype(jnp.float32),
                    precision='highest')


def _forward(run: Callable, x: Operands) -> list[jax.Array]:
  return run(tiles.FORWARD, x)


def _tangent(run: Callable, x: Operands) -> list[jax.Array]:
  return run(tiles.TANGENT, x)


def _backward(run: Callable, x: Operands) -> list[jax.Array]:
  x = x | {'delta': _delta(x['do'], x['o'])}
  return run(tiles.BACKWARD_QUERIES, x) + run(tiles.BACKWARD_KEYS, x)


def _backward_tangent(run: Callable, x: Operands) -> list[jax.Array]:
  x = x | {'delta': _delta(x['do'], x['o']), 'delta_t': _delta(x['do_t'], x['o']) + _delta(x['do'], x['o_t'])}
  return run(tiles.BACKWARD_TANGENT_QUERIES, x) + run(tiles.BACKWARD_TANGENT_KEYS, x)


@dataclasses.dataclass(frozen=True)
class Map:
  """A primitive's operands and results by name; every result looks like one of the operands ('lse': a vector)."""

  name: str
  operands: tuple[str, ...]  # the arrays of a mask follow where it has some: `_MASKS`
  results: tuple[tuple[str, str], ...]
  compute: Callable[[Callable, Operands], list[jax.Array]]


_QKV, _QKV_T = ('q', 'k', 'v'), ('q_t', 'k_t', 'v_t')
_KEYS = ('k', 'v', 'k_t', 'v_t')
_GRADIENTS = (('dq', 'q'), ('dk', 'k'), ('dv', 'v'))
FORWARD = Map('flash_forward', _QKV, (('o', 'q'), ('lse', 'lse')), _forward)
TANGENT = Map('flash_tangent', (*_QKV, 'o', 'lse', *_QKV_T), (('o_t', 'q'), ('lse_t', 'lse')), _tangent)
BACKWARD = Map('flash_backward', (*_QKV, 'o', 'lse', 'do'), _GRADIENTS, _backward)
BACKWARD_TANGENT = Map('flash_backward_tangent', (*BACKWARD.operands, *_QKV_T, 'o_t', 'lse_t', 'do_t'), _GRADIENTS,
                       _backward_tangent)


# The arrays of a mask, by their number: none, documents, or an anchor mask.
_MASKS = {0: (), 1: ('segment',), len(slots.OPERANDS): slots.OPERANDS}

# What each implementation computes: the platforms that it runs on ('cpu' by interpretation), and its maps.
_EVERY = (FORWARD, TANGENT, BACKWARD, BACKWARD_TANGENT)
_CAN = {
  'blockwise': (('cpu', 'cuda', 'tpu', 'any other'), _EVERY),
  'pallas_gpu': (('cpu', 'cuda'), _EVERY),
  'pallas_tpu': (('cpu', 'tpu'), _EVERY),
  'cudnn': (('cuda',), (FORWARD, BACKWARD)),
  'splash': (('cpu', 'tpu'), (FORWARD, BACKWARD)),
}
IMPLEMENTATIONS = ('auto', 'pallas', *_CAN)


def _resolve(which: Map, call: Call, platform: str, x: Operands) -> str:
  """The implementation that computes one map on one platform; ValueError where it cannot."""
  name = call.implementation
  if name == 'auto':
    if platform == 'cuda':
      fits = cudnn.available() and not cudnn.refusal(call.causal, call.window, x['q'], 'segment' in x, 'of_slots' in x)
      return 'cudnn' if fits and which in _CAN['cudnn'][1] else 'pallas_gpu'
    return 'pallas_tpu' if platform == 'tpu' else 'blockwise'
  if name == 'pallas':
    name = {'cuda': 'pallas_gpu'}.get(platform, 'pallas_tpu')
  platforms, maps = _CAN[name]
  if platform not in platforms:
    raise ValueError(f'attention {name!r} runs on {" and ".join(platforms)}, not on {platform}; use '
                     "implementation='auto' or 'blockwise'")
  if which not in maps:
    raise ValueError(f'attention {name!r} has gradients only, and {which.name} was asked (a forward-mode derivative or '
                     "a Hessian-vector product); use implementation='auto', 'pallas' or 'blockwise'")
  return name


def _compute(*values: jax.Array, which: Map, call: Call, platform: str, whole: bool) -> list[jax.Array]:
  """A map's value, on each device's own rows and heads; not `whole`: the compiler is to split it over devices."""
  names = which.operands + _MASKS[len(values) - len(which.operands)]
  x = dict(zip(names, values))
  name = _resolve(which, call, platform, x)
  if not whole and call.layout is None and platform in _DEVICES and name != 'blockwise':
    if call.implementation != 'auto':
      raise ValueError(f'attention {call.implementation!r} is a kernel, which the compiler cannot split over devices: '
                       'call it inside datasel.sharding.use(mesh) or in a shard_map over all axes of the mesh, or use '
                       "implementation='auto' or 'blockwise'")
    name = 'blockwise'

  def local(*values):
    x = dict(zip(names, values))
    segment_BxL = x.pop('segment', None)
    if name in ('cudnn', 'splash'):
      stock = {'cudnn': cudnn, 'splash': splash}[name]
      compute = stock.forward if which is FORWARD else stock.backward
      return compute(call.causal, call.window, x, segment_BxL, interpret=platform == 'cpu')
    driver = {'blockwise': blockwise, 'pallas_gpu': pallas_gpu, 'pallas_tpu': pallas_tpu}[name].run
    visible = Visible(call.causal, call.window, x['q'].shape[1])
    marks = None if segment_BxL is None else Marks(segment_BxL[:, None], segment_BxL)
    anchors = {name: x.pop(name) for name in slots.OPERANDS if name in x}
    if anchors:
      visible = dataclasses.replace(visible, slots=anchors['of_slots'].shape[2])
      marks = slots.marks(**anchors)
      x |= {name: slots.widen(x[name], anchors['of_slots']) for name in _KEYS if name in x}
    results = which.compute(lambda p, x: driver(p, visible, x, marks, interpret=platform == 'cpu'), x)
    return [slots.fold(y, anchors['of_keys']) if anchors and like in _KEYS else y
            for y, (_, like) in zip(results, which.results)]

  if call.layout is None or name == 'blockwise':  # jax.numpy is split by XLA itself
    return local(*values)
  return jax.shard_map(local, mesh=call.layout.mesh, in_specs=tuple(map(call.layout.spec, names)), check_vma=False,
                       out_specs=[call.layout.spec(like) for _, like in which.results])(*values)


def _primitive(which: Map) -> Primitive:
  primitive = Primitive(which.name)
  primitive.multiple_results = True

  @primitive.def_abstract_eval
  def abstract(*avals, call):
    like = dict(zip(which.operands, avals))
    B, L, H, _ = like['q'].shape
    # Under `shard_map` a type says over which axes values differ; `flash` makes all operands differ alike.
    mesh = like['q'].sharding.mesh
    of = lambda shape, dtype: like['q'].update(shape, dtype, weak_type=False, sharding=NamedSharding(
      mesh, PartitionSpec(*(None,) * len(shape))))
    return [of((B, H, L), jnp.float32) if name == 'lse' else of(like[name].shape, like[name].dtype)
            for _, name in which.results]

  primitive.def_impl(jax.jit(primitive.bind, static_argnames='call'))
  # cuDNN's lowering, met inside ours, must know the devices.
  dispatch.prim_requires_devices_during_lowering.add(primitive)

  for platform in (None, 'cpu', 'cuda', 'tpu'):
    compute = functools.partial(_compute, which=which, platform=platform or 'any other')
    mlir.register_lowering(primitive, functools.partial(_lower, compute, platform), platform=platform)

  def batch(values, dims, *, call):
    # The new axis goes behind the batch axis, so that rows that lie on one device stay there.
    size = next(x.shape[d] for x, d in zip(values, dims) if isinstance(d, int))
    spread = [jnp.moveaxis(x, d, 1) if isinstance(d, int) else jnp.broadcast_to(x[:, None], _insert(x.shape, size))
              for x, d in zip(values, dims)]
    results = primitive.bind(*[x.reshape(-1, *x.shape[2:]) for x in spread], call=call)
    return [x.reshape(-1, size, *x.shape[1:]) for x in results], [1] * len(results)

  batching.primitive_batchers[primitive] = batch
  return primitive


# Pallas asks which chip it lowers for: this one, where neither the process nor a mesh has any.
_DEVICES = {'cuda': AbstractDevice('NVIDIA H200', 132, 'gpu'), 'tpu': AbstractDevice('TPU v5e', 1, 'tpu')}


def _lower(compute: Callable, platform: str | None, ctx: mlir.LoweringRuleContext, *values, **params):
  # What computes it is each device's own business: its types need not say over which axes they differ.
  plain = lambda avals: [jax.core.ShapedArray(a.shape, a.dtype) for a in avals]
  axes = ctx.module_context.axis_context
  ctx = ctx.replace(avals_in=plain(ctx.avals_in), avals_out=plain(ctx.avals_out))
  # One device, or inside a `shard_map` that leaves no axis to the compiler.
  whole = (set(axes.manual_axes) == set(axes.mesh.axis_names) if hasattr(axes, 'manual_axes')
           else getattr(axes, 'num_devices', 1) == 1)
  lowering = functools.partial(mlir.lower_fun(functools.partial(compute, whole=whole), multiple_results=True), ctx,
                               *values, **params)
  device = _DEVICES.get(platform)
  with contextlib.ExitStack() as stack:
    if platform == 'cuda':  # deprecated, but still the only backend of Pallas that has what these kernels need
      stack.enter_context(warnings.catch_warnings())
      warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprecated')
    if device and not (jax.sharding.get_abstract_mesh().abstract_device
                       or jax.devices()[0].platform == device.platform):
      stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
    return lowering()


def _insert(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
  return (shape[0], size, *shape[1:])


forward_p, tangent_p, backward_p, backward_tangent_p = map(_primitive, _EVERY)


def _dense(value: jax.Array, tangent: Any) -> jax.Array:
  return jnp.zeros(value.shape, value.dtype) if isinstance(tangent, ad.Zero) else tangent


def _forward_jvp(values: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call):
  o, lse = forward_p.bind(*values, call=call)
  # Named here, where the tangent map reads them: remat can then keep both and skip the forward pass.
  o, lse = checkpoint_name(o, SAVED), checkpoint_name(lse, SAVED)
  if all(isinstance(t, ad.Zero) for t in tangents[:3]):
    return [o, lse], [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in (o, lse)]
  linear = map(_dense, values[:3], tangents[:3])
  return [o, lse], tangent_p.bind(*values[:3], o, lse, *linear, *values[3:], call=call)


def _tangent_transpose(cotangents: Sequence[Any], q, k, v, o, lse, *linear_and_mask, call: Call):
  linear, mask = linear_and_mask[:3], linear_and_mask[3:]
  do, dlse = cotangents
  if not isinstance(dlse, ad.Zero):
    raise NotImplementedError('attention has no gradient of its log-sum; only its output is differentiable')
  if isinstance(do, ad.Zero):
    gradients = [ad.Zero(x.aval.to_ct_aval()) if ad.is_undefined_primal(x) else None for x in linear]
  else:
    gradients = backward_p.bind(q, k, v, o, lse, do, *mask, call=call)
  wanted = [g if ad.is_undefined_primal(x) else None for g, x in zip(gradients, linear)]
  return [None] * 5 + wanted + [None] * len(mask)


def _backward_jvp(values: Sequence[jax.Array], tangents: Sequence[Any], *, call: Call):
  gradients = backward_p.bind(*values, call=call)
  if all(isinstance(t, ad.Zero) for t in tangents[:6]):
    return gradients, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in gradients]
  q_t, k_t, v_t, o_t, lse_t, do_t = map(_dense, values[:6], tangents[:6])
  return gradients, backward_tangent_p.bind(*values[:6], q_t, k_t, v_t, o_t, lse_t, do_t, *values[6:], call=call)


def _refuse(what: str) -> Callable:
  def rule(*args, **kwargs):
    raise NotImplementedError(f'{what} through flash attention is not supported (gradients, forward mode, and forward '
                              "over reverse are); use implementation='reference'")
  return rule


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_jvps[tangent_p] = _refuse('forward over forward, or reverse over forward,')
ad.primitive_jvps[backward_tangent_p] = _refuse('a third derivative')
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _refuse('reverse over reverse')
ad.primitive_transposes[backward_tangent_p] = _refuse('reverse over reverse')


def flash(q_BxLxHxDh: jax.Array, k_BxLxKxDh: jax.Array, v_BxLxKxDh: jax.Array, segment_BxL: jax.Array | None,
          anchors: Anchors | None, call: Call) -> jax.Array:
  """Attention's output, B x L x H x Dh."""
  operands = jax.tree.map(jnp.asarray, (q_BxLxHxDh, k_BxLxKxDh, v_BxLxKxDh, segment_BxL, anchors))
  if AxisType.Explicit in jax.typeof(q_BxLxHxDh).sharding.mesh.axis_types:
    # Types carry shardings there; inside, shardings are the compiler's business again.
    alike = jax.typeof(q_BxLxHxDh).sharding
    return jax.sharding.auto_axes(functools.partial(_bind, call), out_sharding=alike)(*operands)
  return _bind(call, *operands)


def _bind(call: Call, q: jax.Array, k: jax.Array, v: jax.Array, segment_BxL: jax.Array | None,
          anchors: Anchors | None) -> jax.Array:
  mask = () if segment_BxL is None else (segment_BxL,)
  operands = (q, k, v, *(mask if anchors is None else slots.operands(anchors)))
  varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in operands))
  alike = [jax.lax.pcast(x, tuple(varying - jax.typeof(x).manual_axis_type.varying), to='varying') for x in operands]
  return forward_p.bind(*alike, call=call)[0]
