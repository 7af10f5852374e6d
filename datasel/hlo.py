"""Reads the text of a compiled XLA program: its computations, their instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once and leaves out what a kernel does; `hlo_costs` adds up over this.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_BYTES = {'pred': 1, 'token': 0, 'opaque': 0, 's2': 0.25, 'u2': 0.25, 's4': 0.5, 'u4': 0.5, 'f4e2m1fn': 0.5}
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?')
_SPACE = re.compile(r'S\((\d+)\)')
_CALLED = re.compile(r'\b(calls|body|condition|to_apply|called_computations|branch_computations|true_computation|'
                     r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)')
_NAME = re.compile(r'%([\w.\-]+)')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0  # 0: the device's main memory; others are on the chip

  @functools.cached_property
  def size(self) -> int:
    n = 1
    for dim in self.dims:
      n *= dim
    return n

  @property
  def bytes(self) -> float:
    """Without padding."""
    if self.dtype in _BYTES:
      return self.size * _BYTES[self.dtype]
    return self.size * int(re.search(r'\d+', self.dtype)[0]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  op: str
  outputs: tuple[Array, ...]  # several for a tuple, flattened
  operands: tuple[str, ...]
  argument: str  # the text between the parentheses: a parameter's number, a constant's value
  attributes: str  # the text after them
  called: dict[str, tuple[str, ...]]  # {'body': ('name of a computation',), ...}


@dataclasses.dataclass
class Computation:
  name: str
  instructions: dict[str, Instruction]
  root: Instruction | None = None

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        found[operand].append(instruction)
    return found

  @functools.cached_property
  def parameters(self) -> list[str]:
    """Names, in their order."""
    found = [i for i in self.instructions.values() if i.op == 'parameter']
    return [i.name for i in sorted(found, key=lambda i: int(i.argument))]


@dataclasses.dataclass
class Module:
  computations: dict[str, Computation]
  entry: Computation
  n_devices: int  # that the program is partitioned over

  def trips(self, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` of this computation runs its body; None where the text does not tell.

    What the compiler wrote down counts; else a condition `counter < constant` is followed to the counter's first value
    and step.
    """
    known = re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    condition, body = (self.computations[loop.called[part][0]] for part in ('condition', 'body'))
    test = condition.root
    if test.op == 'fusion':
      inner = self.computations[test.called['calls'][0]]
      given, test, scope = dict(zip(inner.parameters, test.operands)), inner.root, inner
    else:
      given, scope = {}, condition
    if test.op != 'compare':
      return None
    sides = [given.get(name, name) for name in test.operands]
    direction = re.search(r'direction=(\w+)', test.attributes)[1]
    find = lambda name: condition.instructions.get(name) or scope.instructions[name]
    index, bound = _element(find(sides[0])), _constant(find(sides[1]))
    if index is None or bound is None or direction not in ('LT', 'LE'):
      return None
    first = _constant(_through_copies(computation, computation.instructions[loop.operands[0]].operands[index])
                      if computation.instructions[loop.operands[0]].op == 'tuple' else None)
    step = _step(self, body, index)
    if first is None or step is None or step < 1:
      return None
    return max(0, -(-(bound + (direction == 'LE') - first) // step))


def parse(text: str) -> Module:
  """The program of `compiled.as_text()`; ValueError for text that is none."""
  computations, entry, current = {}, None, None
  for line in _whole_lines(text):
    if current is None:
      header = _HEADER.match(line)
      if header and line.rstrip().endswith('{'):
        current = Computation(header[2], {})
        computations[current.name] = current
        entry = current if header[1] else entry
    elif line.startswith('}'):
      if current.root is None:
        raise ValueError(f'HLO text: computation {current.name} has no ROOT; want what compiled.as_text() gives')
      current = None
    else:
      begins = _INSTRUCTION.match(line)
      if begins:
        instruction = _instruction(begins[2], re.sub(r'/\*.*?\*/', '', line[begins.end():]))
        current.instructions[instruction.name] = instruction
        current.root = instruction if begins[1] else current.root
  if entry is None or current is not None:
    missing = 'no ENTRY computation' if current is None else f'computation {current.name} has no end'
    raise ValueError(f'this is no HLO text: {missing}; want what compiled.as_text() gives')
  partitions = re.search(r'num_partitions=(\d+)', text[:text.find('\n')])
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _whole_lines(text: str) -> Iterator[str]:
  """Lines, an instruction that goes on over several (a kernel's metadata) joined to one."""
  held, depth = '', 0
  for line in text.splitlines():
    if not depth and not _INSTRUCTION.match(line):
      yield line
      continue
    bare = _STRING.sub('', line)
    depth += bare.count('{') - bare.count('}')
    held += f' {line}'
    if depth <= 0:
      yield held
      held, depth = '', 0


def _instruction(name: str, text: str) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shape, rest = text[:end], text[end:].lstrip()
  opened = rest.index('(')
  closed = _closing(rest, opened)
  argument, attributes = rest[opened + 1:closed], rest[closed + 1:]
  called = {kind: tuple(re.findall(r'[\w.\-]+', names)) for kind, names in _CALLED.findall(attributes)}
  return Instruction(name, rest[:opened], _arrays(shape), tuple(_NAME.findall(argument)), argument, attributes, called)


def _closing(text: str, opened: int) -> int:
  depth = 0
  for i in range(opened, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  raise ValueError(f'parentheses are not closed in: {text[:200]}')


def _arrays(shape: str) -> tuple[Array, ...]:
  found = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    space = _SPACE.search(layout)
    found.append(Array(dtype, tuple(int(d.lstrip('<=')) for d in dims.split(',') if d), int(space[1]) if space else 0))
  return tuple(found)


def _element(instruction: Instruction) -> int | None:
  """The number of the tuple's element that an instruction takes."""
  return int(re.search(r'index=(\d+)', instruction.attributes)[1]) if instruction.op == 'get-tuple-element' else None


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.op != 'constant' or not re.fullmatch(r'-?\d+', instruction.argument):
    return None
  return int(instruction.argument)


def _through_copies(computation: Computation, name: str) -> Instruction:
  instruction = computation.instructions[name]
  while instruction.op in ('copy', 'bitcast', 'copy-start', 'copy-done'):
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _step(module: Module, body: Computation, index: int) -> int | None:
  """What one pass through a loop's body adds to an element of its tuple."""
  if body.root.op != 'tuple':
    return None
  added = _through_copies(body, body.root.operands[index])
  scope, given = body, {}
  if added.op == 'fusion':
    scope = module.computations[added.called['calls'][0]]
    given, added = dict(zip(scope.parameters, added.operands)), scope.root
  if added.op != 'add':
    return None
  steps = []
  for name in added.operands:
    outer = given.get(name)
    steps.append(_constant(_through_copies(body, outer) if outer else _through_copies(scope, name)))
  known = [step for step in steps if step is not None]
  return known[0] if len(known) == 1 else None
