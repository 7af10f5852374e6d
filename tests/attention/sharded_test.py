"""Flash attention over several devices, and lowered for machines that are not here."""


import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from datasel import absent, sharding
from datasel.attention import Mask, attention
from datasel.attention.shapes import Case

CASE = Case('', 4, 2, 16, (0, 0), (4, 24), documents='sorted')
OWN = ('blockwise', 'pallas_tpu', 'pallas_gpu')
SPEC, ROWS = PartitionSpec(('data', 'fsdp'), None, 'tensor', None), PartitionSpec(('data', 'fsdp'), None)


def derivatives(attend):
  """(q, k, v, segments) -> value, gradients, tangent, Hessian-vector products."""
  def run(q, k, v, segment):
    f = lambda *qkv: attend(*qkv, segment)
    loss = lambda *qkv: jnp.square(f(*qkv)).sum()
    gradients = jax.grad(loss, (0, 1, 2))
    return f(q, k, v), *jax.jvp(f, (q, k, v), (q, k, v)), *jax.jvp(gradients, (q, k, v), (jnp.cos(q), v, k))
  return run


def attend(implementation):
  return lambda q, k, v, segment: attention(q, k, v, Mask(segment_BxL=segment), implementation=implementation)


def expected():
  return jax.jit(derivatives(attend('reference')))(*CASE.inputs(), CASE.mask().segment_BxL)


def assert_close(ours, want):
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize('implementation', OWN)
@pytest.mark.parametrize('sizes', [{'data': 4}, {'fsdp': 2, 'tensor': 2}])
def test_a_mesh_in_use_splits_rows_and_heads_without_communication(sizes, implementation):
  """XLA cannot split a kernel: without the layout it would gather every operand on every device."""
  mesh = sharding.make_mesh(**sizes)
  on = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  operands = [on(x, SPEC) for x in CASE.inputs()] + [on(CASE.mask().segment_BxL, ROWS)]

  def laid_out(*operands):
    with sharding.use(mesh):
      return derivatives(attend(implementation))(*operands)

  program = jax.jit(laid_out).lower(*operands).compile()
  ours = jax.block_until_ready(program(*operands))
  assert_close(ours, expected())
  assert ours[0].sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)
  text = program.as_text()
  assert not any(f' {collective}(' in text for collective in ('all-gather', 'all-to-all', 'collective-permute'))


@pytest.mark.parametrize('check_vma', [False, True])
@pytest.mark.parametrize('implementation', OWN)
def test_inside_shard_map(implementation, check_vma):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  mapped = jax.shard_map(attend(implementation), mesh=mesh, in_specs=(SPEC, SPEC, SPEC, ROWS), out_specs=SPEC,
                         check_vma=check_vma)
  ours = jax.jit(derivatives(mapped))(*CASE.inputs(), CASE.mask().segment_BxL)
  assert_close(jax.block_until_ready(ours), expected())


@pytest.mark.parametrize('implementation', ('blockwise', 'pallas_tpu'))
def test_under_gspmd_alone(implementation):
  """Operands on a mesh of the caller's own, of which attention knows nothing."""
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  place = NamedSharding(mesh, PartitionSpec('x', None, 'y'))
  operands = [jax.device_put(x, place) for x in CASE.inputs()]
  ours = jax.jit(derivatives(attend(implementation)))(*operands, CASE.mask().segment_BxL)
  assert_close(jax.block_until_ready(ours), expected())


@pytest.mark.parametrize('implementation', ('blockwise', 'pallas_tpu'))
def test_on_a_mesh_of_explicit_axes(implementation):
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
  place = NamedSharding(mesh, PartitionSpec('x', None, 'y'))

  def gradients_and_products(q, k, v):
    f = jax.grad(lambda *x: jnp.square(attention(*x, implementation=implementation)).sum(), (0, 1, 2))
    return jax.jvp(f, (q, k, v), (jnp.cos(q), v, k))

  want = jax.jit(gradients_and_products)(*CASE.inputs())
  with jax.set_mesh(mesh):
    ours = jax.jit(gradients_and_products)(*(jax.device_put(x, place) for x in CASE.inputs()))
  assert ours[0][0].sharding.is_equivalent_to(place, 4)
  assert_close(jax.block_until_ready(ours), want)


def test_heads_split_otherwise_than_key_heads_are_refused():
  mesh = sharding.make_mesh(tensor=4)
  rules = dict(sharding.RULES) | {'kv_heads': None}
  with sharding.use(mesh, rules), pytest.raises(ValueError, match="'kv_heads' on None.*implementation='blockwise'"):
    attend('pallas')(*CASE.inputs(), None)


def test_rows_that_do_not_divide_are_refused():
  with sharding.use(sharding.make_mesh(data=4)), pytest.raises(ValueError, match="3 rows.*implementation='blockwise'"):
    attend('pallas')(*(x[:3] for x in CASE.inputs()), None)


@pytest.mark.parametrize(('platform', 'mark'), [('tpu', 'tpu_custom_call'), ('cuda', 'triton')])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_kernels_lower_for_a_device_that_is_not_here(platform, mark, dtype):
  """The forward, its tangent, and both parts of the backward's tangent."""
  abstract = [jax.ShapeDtypeStruct((2, 256, heads, 64), dtype) for heads in (4, 2, 2)]
  gradients = jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
  product = jax.jit(lambda *qkv: jax.jvp(gradients, qkv, qkv)[1])
  text = product.trace(*abstract).lower(lowering_platforms=(platform,)).as_text()
  assert text.count(mark) == 4


@pytest.fixture
def v5e():
  """Four TPU chips that are not here; the compiler for them comes with the extra `tpu`, which CI installs."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('needs libtpu (the extra tpu)')
  return absent.devices('v5e:2x2')[1]


def compiled(function, mesh, case, *, use, size='full', spec=SPEC):
  place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  operands = [place(x, spec) for x in jax.eval_shape(lambda: case.inputs('bfloat16', size))]

  def laid_out(*operands):
    with sharding.use(mesh) if use else contextlib.nullcontext():
      return function(*operands)

  return jax.jit(laid_out).trace(*operands).lower(lowering_platforms=('tpu',)).compile()


def product(implementation):
  gradients = jax.grad(lambda *x: attention(*x, implementation=implementation).astype(jnp.float32).sum(), (0, 1, 2))
  return lambda *qkv: jax.jvp(gradients, qkv, qkv)[1]


def test_kernels_compile_for_tpus_and_their_memory_grows_with_the_length(v5e):
  mesh = sharding.make_mesh(data=2, tensor=2, devices=v5e)
  for length in (8192, 32768):
    memory = compiled(product('pallas'), mesh, Case('', 4, 2, 128, (4, length), (0, 0)), use=True).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * memory.argument_size_in_bytes  # no more than a few arrays like q


def test_many_packed_rows_compile_for_tpus(v5e):
  """Each row has its own ranges of tiles, in a TPU's small scalar memory."""
  mesh = sharding.make_mesh(devices=v5e[:1])
  case = Case('', 1, 1, 64, (2048, 256), (0, 0))
  segment = jnp.ones((2048, 256), jnp.int32)
  compiled(lambda q, k, v: attention(q, k, v, Mask(segment_BxL=segment)), mesh, case, use=True)


def test_what_the_compiler_must_split_itself_is_left_to_blockwise_on_tpus(v5e):
  mesh, case = sharding.make_mesh(data=2, tensor=2, devices=v5e), Case('', 4, 2, 128, (4, 1024), (0, 0))
  assert 'tpu_custom_call' not in compiled(product('auto'), mesh, case, use=False).as_text()
  assert 'tpu_custom_call' in compiled(product('auto'), mesh, case, use=True).as_text()
  with pytest.raises(ValueError, match='cannot split over devices'):
    compiled(product('pallas'), mesh, case, use=False)
