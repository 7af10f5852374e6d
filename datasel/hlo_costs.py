"""What one run of a compiled program costs one device: FLOPs, main-memory traffic, collectives, kernels; by its text.

Loops count as often as they run.  FLOPs are those of matrix products and convolutions (2 for each multiply-add) and
what a kernel's author declared (`pl.CostEstimate`); what is done element by element is left out.  Traffic is what each
instruction that is not fused reads and writes, as if no cache held anything between two of them; slices count as what
they slice.  Every branch of a conditional counts.
"""

import dataclasses
import json
import math
import re

import numpy as np

from datasel.hlo import Array, Computation, Instruction, Module

_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
                'collective-broadcast')
# Move nothing themselves, or are counted where their computation or their `-start` is.
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'optimization-barrier', 'async-start')
_IOTA = r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
_SLICES = ('dynamic-slice', 'slice', 'gather')
_KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'triton_kernel_call', 'mosaic_gpu', '__cudnn$fmha')


@dataclasses.dataclass
class Collective:
  """All collectives of one kind inside, or outside, of loops."""

  kind: str
  in_loops: bool
  count: int = 0  # runs
  bytes: float = 0.0  # that a device puts in
  sent_bytes: float = 0.0  # that leave a device, when the group passes them round a ring
  network_bytes: float = 0.0  # of sent_bytes: those of groups whose devices are on several hosts


@dataclasses.dataclass
class Kernel:
  """All runs of a hand-written kernel of one name."""

  name: str
  count: int = 0
  flops: float | None = 0.0  # None: it declares none


@dataclasses.dataclass
class Costs:
  host_of: tuple[int, ...] = ()  # the host of each device of the program; empty: all are on one
  flops: float = 0.0
  traffic_bytes: float = 0.0
  collectives: dict[tuple[str, bool], Collective] = dataclasses.field(default_factory=dict)
  kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
  unknown_loops: list[str] = dataclasses.field(default_factory=list)  # whose body was counted once

  @property
  def sent_bytes(self) -> float:
    return sum(c.sent_bytes for c in self.collectives.values())

  @property
  def network_bytes(self) -> float:
    return sum(c.network_bytes for c in self.collectives.values())


def count(module: Module, host_of: tuple[int, ...] = ()) -> Costs:
  """Adds up over the whole program."""
  costs = Costs(host_of)
  _count(module, module.entry, 1, False, costs)
  return costs


def _count(module: Module, computation: Computation, times: int, in_loop: bool, costs: Costs) -> None:
  """A computation whose instructions run one after another, `times` times."""
  seen: set[str] = set()  # the TPU compiler writes an asynchronous collective into every fusion that it overlaps with
  for instruction in computation.instructions.values():
    costs.traffic_bytes += times * _traffic(module, computation, instruction)
    if instruction.op == 'while':
      trips = module.trips(computation, instruction)
      if trips is None:
        costs.unknown_loops.append(instruction.name)
      body = module.computations[instruction.called['body'][0]]
      _count(module, body, times * (1 if trips is None else trips), True, costs)
    elif instruction.op in ('call', 'conditional', 'async-start'):
      for names in instruction.called.values():
        for name in names:
          _count(module, module.computations[name], times, in_loop, costs)
    else:
      _arithmetic(module, computation, instruction, times, in_loop, costs, seen)


def _arithmetic(module: Module, computation: Computation, instruction: Instruction, times: int, in_loop: bool,
                costs: Costs, seen: set[str]) -> None:
  """FLOPs, collectives and kernels of one instruction, or of all that is fused into it."""
  kind = instruction.op.removesuffix('-start')
  if kind == 'fusion':
    inner = module.computations[instruction.called['calls'][0]]
    for fused in inner.instructions.values():
      _arithmetic(module, inner, fused, times, in_loop, costs, seen)
  elif kind == 'dot':
    costs.flops += times * _dot_flops(computation, instruction)
  elif kind == 'convolution':
    costs.flops += times * _convolution_flops(computation, instruction)
  elif kind == 'custom-call':
    _custom_call(computation, instruction, times, costs)
  elif kind in _COLLECTIVES:
    channel = re.search(r'channel_id=(\d+)', instruction.attributes)
    if channel is None or channel[1] not in seen:
      _collective(module, computation, instruction, kind, times, in_loop, costs)
    seen |= {channel[1]} if channel else set()


def _operands(computation: Computation, instruction: Instruction) -> list[Array]:
  return [array for name in instruction.operands for array in computation.instructions[name].outputs]


def _numbers(pattern: str, text: str) -> list[int]:
  found = re.search(pattern, text)
  return [int(n) for n in found[1].split(',') if n] if found else []


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
  left = computation.instructions[instruction.operands[0]].outputs[0]
  contracted = _numbers(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)
  return 2.0 * instruction.outputs[0].size * math.prod(left.dims[d] for d in contracted)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
  """TPUs write every product of matrices as a convolution, whose padding and holes take no arithmetic."""
  left, right = (computation.instructions[name].outputs[0] for name in instruction.operands)
  out = instruction.outputs[0]
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  window = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  window = dict(field.split('=') for field in window[1].split()) if window else {}
  spatial = sorted(c for c in labels[3] if c.isdigit())
  per_axis = lambda key, default: window[key].split('x') if key in window else [default] * len(spatial)
  pairs = 1
  for axis, stride, pad, left_dilation, right_dilation in zip(
      spatial, per_axis('stride', '1'), per_axis('pad', '0_0'), per_axis('lhs_dilate', '1'),
      per_axis('rhs_dilate', '1')):
    n_in, n_window, n_out = (array.dims[names.index(axis)] for array, names in
                             ((left, labels[1]), (right, labels[2]), (out, labels[3])))
    at = (np.arange(n_out)[:, None] * int(stride) + np.arange(n_window)[None] * int(right_dilation)
          - int(pad.split('_')[0]))
    pairs *= int(((at >= 0) & (at <= (n_in - 1) * int(left_dilation)) & (at % int(left_dilation) == 0)).sum())
  return (2.0 * pairs * out.dims[labels[3].index('b')] * out.dims[labels[3].index('f')]
          * right.dims[labels[2].index('i')])


def _custom_call(computation: Computation, instruction: Instruction, times: int, costs: Costs) -> None:
  target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)[1]
  if target.startswith(('__cublas$', '__triton_gemm')):
    left = computation.instructions[instruction.operands[0]].outputs[0]
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    contracted = [int(n) for n in re.findall(r'\d+', found[1])]
    costs.flops += times * 2.0 * instruction.outputs[0].size * math.prod(left.dims[d] for d in contracted)
  elif target.startswith(_KERNELS):
    name = re.sub(r'[.\d]+$', '', instruction.name)
    kernel = costs.kernels.setdefault(name, Kernel(name))
    declared = _declared(instruction, 'flops')
    kernel.count += times
    kernel.flops = None if declared is None or kernel.flops is None else kernel.flops + times * declared
    costs.flops += times * (declared or 0.0)


def _declared(instruction: Instruction, key: str) -> float | None:
  """A field of the cost estimate that a kernel's author gave to Pallas."""
  found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
  return float(json.loads(found[1]).get(key, 0)) if found else None


def _collective(module: Module, computation: Computation, instruction: Instruction, kind: str, times: int,
                in_loop: bool, costs: Costs) -> None:
  groups = _groups(instruction, module.n_devices)
  n = max(map(len, groups), default=1)
  if n == 1:
    return
  put_in = sum(array.bytes for array in _operands(computation, instruction))
  rounds = {'all-reduce': 2 * (n - 1) / n, 'all-gather': n - 1, 'reduce-scatter': (n - 1) / n,
            'all-to-all': (n - 1) / n, 'ragged-all-to-all': (n - 1) / n}.get(kind, 1)
  total = costs.collectives.setdefault((kind, in_loop), Collective(kind, in_loop))
  total.count += times
  total.bytes += times * put_in
  total.sent_bytes += times * rounds * put_in
  if costs.host_of and any(len({costs.host_of[device] for device in group}) > 1 for group in groups):
    total.network_bytes += times * rounds * put_in


def _groups(instruction: Instruction, n_devices: int) -> list[list[int]]:
  """The devices that take part together: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)` or `mesh['x'=2,'y'=2] {'x'}` in the
  text; of a permutation, each pair of a sender and another receiver."""
  text = instruction.attributes
  lists = lambda found: [[int(d) for d in part.split(',')] for part in found.split('},{')]
  if instruction.op.startswith('collective-permute'):
    pairs = re.search(r'source_target_pairs=\{\{([\d,{}]*)\}\}', text)
    return [pair for pair in lists(pairs[1]) if pair[0] != pair[1]] if pairs else []
  if listed := re.search(r'replica_groups=\{\{([\d,{}]+)\}\}', text):
    return lists(listed[1])
  if folded := re.search(rf'replica_groups={_IOTA}', text):
    return _iota(folded).tolist()
  if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", text):
    return _mesh_groups(*meshed.groups())
  return [list(range(n_devices))]


def _iota(found: re.Match) -> np.ndarray:
  """`[2,4]<=[4,2]T(1,0)`: the numbers 0 ... 7 as 4 x 2, transposed, as 2 x 4."""
  shape, counted, order = map(_integers, found.groups())
  return np.arange(math.prod(counted)).reshape(counted).transpose(order).reshape(shape)


def _integers(text: str | None) -> list[int] | None:
  return [int(n) for n in text.split(',')] if text else None


def _mesh_groups(axes: str, ids: str, over: str) -> list[list[int]]:
  """Groups over some axes of a mesh, or over parts of axes: `'x':(2)4` are the next 4 after the first 2 of x."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
  devices = np.arange(math.prod(sizes.values()))
  if folded := re.search(r'\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)', ids):  # `device_ids=([2,8]T(1,0))`
    counted, order = map(_integers, folded.groups())
    devices = devices.reshape(counted).transpose(order).ravel()
  elif listed := re.findall(r'\d+', ids):
    devices = np.array(listed, int)
  taken: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
  for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over):
    taken[name].append((int(before or 1), int(size or sizes[name])))
  shape, grouped = [], []  # each axis cut into its parts, and which of them the groups go over
  for name, size in sizes.items():
    end = 1
    for before, part in sorted(taken[name]):
      shape += [before // end, part]
      grouped += [False, True]
      end = before * part
    shape.append(size // end)
    grouped.append(False)
  order = np.argsort(grouped, kind='stable')
  n = math.prod(size for size, one in zip(shape, grouped) if one)
  return devices.reshape(shape).transpose(order).reshape(-1, n).tolist()


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Bytes that one instruction reads from and writes to main memory."""
  op = instruction.op.removesuffix('-start')
  written = sum(_stored(array) for array in instruction.outputs)
  if instruction.op in _FREE or op.endswith('-done'):
    return 0.0
  if op == 'fusion':
    inner = module.computations[instruction.called['calls'][0]]
    return sum(_read_by(module, inner, name) for name in inner.parameters) + _written_by(module, inner, inner.root)
  if op in _SLICES:
    source = computation.instructions[instruction.operands[0]].outputs[0]
    return written + (instruction.outputs[0].bytes if source.space == 0 else 0.0)
  if op in ('dynamic-update-slice', 'scatter'):
    return 2 * _update(computation, instruction)
  if op == 'copy':
    written = _stored(instruction.outputs[0])  # `copy-start` names its source too
  if op == 'custom-call' and (declared := _declared(instruction, 'bytes_accessed')) is not None:
    return declared
  return written + sum(_stored(array) for array in _operands(computation, instruction))


def _stored(array: Array) -> float:
  return array.bytes if array.space == 0 else 0.0


def _update(computation: Computation, instruction: Instruction) -> float:
  """What lies in main memory of the part that an update in place writes."""
  if instruction.outputs[0].space:
    return 0.0
  at = 1 if instruction.op.startswith('dynamic-update-slice') else 2
  return computation.instructions[instruction.operands[at]].outputs[0].bytes


def _read_by(module: Module, computation: Computation, name: str) -> float:
  """Bytes of a fused computation's parameter that it needs: slices of it, or all."""
  whole = sum(_stored(array) for array in computation.instructions[name].outputs)
  total = 0.0
  for user in computation.users[name] if whole else ():
    first = user.operands[0] == name
    if user.op in _SLICES and first:
      total += sum(array.bytes for array in user.outputs)
    elif user.op == 'dynamic-update-slice' and first:
      continue  # written in place
    elif user.op == 'bitcast':
      total += _read_by(module, computation, user.name)
    elif user.op == 'fusion':
      inner = module.computations[user.called['calls'][0]]
      total += sum(_read_by(module, inner, parameter) for parameter, operand in zip(inner.parameters, user.operands)
                   if operand == name)
    else:
      return whole
  return min(whole, total)


def _written_by(module: Module, computation: Computation, result: Instruction) -> float:
  """Bytes that a fused computation writes: all of its result, or the part that it updates in place."""
  if result.op == 'tuple':
    return sum(_written_by(module, computation, computation.instructions[name]) for name in result.operands)
  if result.op == 'dynamic-update-slice':
    return _update(computation, result)
  if result.op == 'bitcast':
    return _written_by(module, computation, computation.instructions[result.operands[0]])
  if result.op == 'fusion':
    inner = module.computations[result.called['calls'][0]]
    return _written_by(module, inner, inner.root)
  return sum(_stored(array) for array in result.outputs)
