"""What is read off compiled programs equals what their operations are known to cost, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datasel import hlo, hlo_costs

shape = jax.ShapeDtypeStruct


def text_of(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def costs_of(function, *arguments):
  return hlo_costs.count(hlo.parse(text_of(function, *arguments)))


def product_in_loops(x, w):
  """3 x 5 products of (7 x 11) and (11 x 11), and one outside."""
  inner = lambda x, _: (jnp.tanh(x @ w), None)
  outer = lambda x, _: (jax.lax.scan(inner, x, length=5)[0], None)
  return jax.lax.scan(outer, x, length=3)[0] @ w


def test_products_in_loops_count_as_often_as_they_run():
  costs = costs_of(product_in_loops, shape((7, 11), 'float32'), shape((11, 11), 'float32'))
  assert costs.flops == (3 * 5 + 1) * 2 * 7 * 11 * 11 and not costs.unknown_loops


@pytest.mark.parametrize('equation, left, right, expected', [
  ('bij,bjk->bik', (3, 4, 5), (3, 5, 6), 2 * 3 * 4 * 5 * 6),
  ('abij,jbk->abik', (2, 3, 4, 5), (5, 3, 6), 2 * 2 * 3 * 4 * 5 * 6),
])
def test_batched_products(equation, left, right, expected):
  costs = costs_of(lambda a, b: jnp.einsum(equation, a, b), shape(left, 'float32'), shape(right, 'float32'))
  assert costs.flops == expected


@pytest.mark.parametrize('options', [
  {}, {'window_strides': (2, 3)}, {'padding': ((1, 2), (3, 0))}, {'lhs_dilation': (2, 1), 'padding': ((2, 2), (0, 0))},
  {'rhs_dilation': (1, 2)}, {'feature_group_count': 2},
])
def test_a_convolution_counts_what_is_multiplied(options):
  """A convolution of ones with ones adds up to the number of its products; those with padding are none."""
  groups = options.get('feature_group_count', 1)
  left, right = np.ones((2, 9, 8, 4), np.float32), np.ones((3, 2, 4 // groups, 6), np.float32)
  options = {'window_strides': (1, 1), 'padding': ((0, 0), (0, 0)), **options}
  run = lambda a, b: jax.lax.conv_general_dilated(a, b, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **options)
  assert costs_of(run, left, right).flops == 2 * float(run(left, right).sum())


def test_trip_counts_are_the_same_when_the_compiler_does_not_write_them_down():
  text = text_of(product_in_loops, shape((7, 11), 'float32'), shape((11, 11), 'float32'))
  silent = text.replace('known_trip_count', 'nothing')
  assert silent != text and hlo_costs.count(hlo.parse(silent)) == hlo_costs.count(hlo.parse(text))


@pytest.mark.parametrize('first, last, step', [(0, 6, 1), (3, 17, 2), (5, 5, 1)])
def test_trip_counts_follow_start_bound_and_step(first, last, step):
  w = jnp.ones((11, 11))
  loop = lambda x: jax.lax.while_loop(lambda s: s[0] < last, lambda s: (s[0] + step, s[1] @ w), (first, x))[1]
  text = text_of(loop, shape((7, 11), 'float32')).replace('known_trip_count', 'nothing')
  costs = hlo_costs.count(hlo.parse(text))
  assert costs.flops == len(range(first, last, step)) * 2 * 7 * 11 * 11 and not costs.unknown_loops


def test_a_loop_of_unknown_length_is_named():
  loop = lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)
  costs = costs_of(loop, shape((8, 8), 'float32'))
  assert len(costs.unknown_loops) == 1 and costs.flops == 2 * 8**3


COLLECTIVES = {  # on 8 x 32 of each device; what leaves a device of four for each byte that it puts in
  'all-reduce': (lambda x: jax.lax.psum(x, 'i'), 2 * 3 / 4),
  'all-gather': (lambda x: jax.lax.all_gather(x, 'i').sum(0), 3),
  'reduce-scatter': (lambda x: jnp.tile(jax.lax.psum_scatter(x, 'i', tiled=True), (4, 1)), 3 / 4),
  'all-to-all': (lambda x: jax.lax.all_to_all(x, 'i', 0, 1, tiled=True).reshape(x.shape), 3 / 4),
  'collective-permute': (lambda x: jax.lax.ppermute(x, 'i', [(0, 1), (1, 2), (2, 3), (3, 0)]), 1),
}


@pytest.mark.parametrize('kind', COLLECTIVES)
@pytest.mark.parametrize('times', [None, 6])
def test_collectives_count_with_their_bytes(kind, times):
  """1 KiB for each of four devices; alone, and in a loop."""
  run, sent = COLLECTIVES[kind]
  mesh = jax.make_mesh((4,), ('i',), axis_types=(AxisType.Auto,))
  body = run if times is None else lambda x: jax.lax.scan(lambda x, _: (run(jnp.tanh(x)), None), x, length=times)[0]
  whole = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec('i'), out_specs=PartitionSpec('i'), check_vma=False)
  costs = costs_of(whole, shape((32, 32), 'float32', sharding=NamedSharding(mesh, PartitionSpec('i'))))
  [found] = costs.collectives.values()
  assert (found.kind, found.in_loops, found.count) == (kind, times is not None, times or 1)
  assert found.bytes == 1024 * (times or 1)
  assert found.sent_bytes == costs.sent_bytes == sent * found.bytes


def test_a_loop_over_layers_reads_each_layer_once():
  """Not all of the stack in every iteration, which would be the square of it."""
  def traffic(n):
    layers = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x) * w, None), x, w)[0]
    return costs_of(layers, shape((1000,), 'float32'), shape((n, 1000), 'float32')).traffic_bytes
  stack = 4 * 1000
  assert stack * 32 <= traffic(64) - traffic(32) <= 5 * stack * 32


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY computation'):
    hlo.parse('module @jit_f {}')


# Forms that other backends write.
MODULE = '''HloModule jit_f, is_scheduled=true, num_partitions=16

%fused_start (p: f32[4,8]) -> (f32[4,8], f32[16,8]) {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %ag = f32[16,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  ROOT %cc = (f32[4,8]{1,0}, f32[16,8]{1,0}) custom-call(%ag), custom_call_target="AsyncCollectiveStart"
}

%fused_done (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %ag = f32[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

ENTRY %main (a: f32[4,8]) -> f32[16,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %s = (f32[4,8]{1,0}, /*index=1*/f32[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%fused_start
  %r = f32[4,8]{1,0} all-reduce(%a), channel_id=9, replica_groups=mesh['x'=8,'y'=2] {'x'}, to_apply=%add
  %q = f32[4,8]{1,0:S(1)} all-reduce(%r), channel_id=10, replica_groups={{0,1},{2,3}}, to_apply=%add
  %flash.1 = f32[4,8]{1,0} custom-call(%q), custom_call_target="tpu_custom_call", ESTIMATE
  %flash.2 = f32[4,8]{1,0} custom-call(%flash.1), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %d = f32[16,8]{1,0} fusion(%flash.2), kind=kCustom, calls=%fused_done
}
'''.replace('ESTIMATE', 'backend_config={"custom_call_config":{"body":"TUx(","cost_estimate":{"flops":"12345",'
            '"transcendentals":"9","bytes_accessed":"678"}}}')


def test_an_asynchronous_collective_counts_once():
  found = hlo_costs.count(hlo.parse(MODULE)).collectives['all-gather', False]
  assert (found.count, found.bytes, found.sent_bytes) == (1, 128, 3 * 128)


def test_groups_in_every_notation():
  found = hlo_costs.count(hlo.parse(MODULE)).collectives['all-reduce', False]
  assert found.count == 2 and found.sent_bytes == 2 * 128 * 7 / 8 + 2 * 128 * 1 / 2


def test_a_kernel_counts_what_it_declares_and_is_named_when_it_declares_nothing():
  costs = hlo_costs.count(hlo.parse(MODULE))
  assert costs.flops == 12345
  [kernel] = costs.kernels.values()
  assert (kernel.name, kernel.count, kernel.flops) == ('flash', 2, None)
  one = hlo_costs.count(hlo.parse(MODULE.replace('backend_config={}', 'backend_config={"cost_estimate":{"flops":5}}')))
  assert one.kernels['flash'].flops == 12350 == one.flops


def test_attributes_may_go_on_over_several_lines():
  """As those of kernels with metadata do; one of these lines begins with a brace, and strings hold others."""
  several = MODULE.replace('backend_config={}', """frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, }"
}}, metadata={op_name="jit(f)/{"}, backend_config={}""")
  assert several.count('\n') == MODULE.count('\n') + 2
  assert hlo_costs.count(hlo.parse(several)) == hlo_costs.count(hlo.parse(MODULE))
  assert hlo.parse(several).entry.root.name == 'd'


def test_a_computation_without_a_root_or_an_end_is_refused():
  with pytest.raises(ValueError, match='computation fused_done has no ROOT'):
    hlo.parse(MODULE.replace('ROOT %ag', '%ag'))
  with pytest.raises(ValueError, match='computation main has no end'):
    hlo.parse(MODULE.rstrip('}\n'))


GROUPS = {
  '{{0,1},{2,3}}': [[0, 1], [2, 3]], '{}': [[0, 1, 2, 3, 4, 5, 6, 7]],
  '[2,4]<=[8]': [[0, 1, 2, 3], [4, 5, 6, 7]], '[4,2]<=[2,4]T(1,0)': [[0, 4], [1, 5], [2, 6], [3, 7]],
  "mesh['x'=4,'y'=2] {'x'}": [[0, 2, 4, 6], [1, 3, 5, 7]], "mesh['x'=4,'y'=2] {'y'}": [[0, 1], [2, 3], [4, 5], [6, 7]],
  "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}": [[0, 1, 2, 3], [4, 5, 6, 7]],
  "mesh['x'=4,'y'=2], device_ids=(0,2,1,3,4,6,5,7) {'y'}": [[0, 2], [1, 3], [4, 6], [5, 7]],
  "mesh['x'=8] {'x':(2)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
}


@pytest.mark.parametrize(('text', 'groups'), GROUPS.items())
def test_who_takes_part_and_what_crosses_hosts(text, groups):
  """8 devices on two hosts: what the groups send goes over the network if one of them has devices of both."""
  module = hlo.parse(f"""HloModule f, num_partitions=8

ENTRY %main (a: f32[4,8]) -> f32[4,8] {{
  %a = f32[4,8] parameter(0)
  ROOT %r = f32[4,8] all-reduce(%a), channel_id=1, replica_groups={text}, to_apply=%add
}}
""")
  assert sorted(hlo_costs._groups(module.entry.root, 8)) == groups
  n = len(groups[0])
  costs = hlo_costs.count(module, host_of=(0, 0, 0, 0, 1, 1, 1, 1))
  assert costs.sent_bytes == 2 * 128 * (n - 1) / n
  assert costs.network_bytes == (costs.sent_bytes if any(min(g) < 4 <= max(g) for g in groups) else 0)
  assert hlo_costs.count(module).network_bytes == 0


def test_what_stays_on_the_chip_is_no_traffic():
  away = hlo_costs.count(hlo.parse(MODULE)).traffic_bytes
  assert hlo_costs.count(hlo.parse(MODULE.replace('S(1)', ''))).traffic_bytes > away
