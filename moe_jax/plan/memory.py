"""What lies in a device's memory when the step needs most of it, by class.

The compiler writes down which values share its temporary heap (buffer assignment) and
when each of them lives (live ranges); their sum is largest at one moment. A value's
class follows from the name stack of the operation that made it and from its shape:

  parameters    arguments: weights, their average, frozen weights
  optimizer     arguments: moments
  gradients     made by the backward pass or the optimizer, with a weight's shape
  weights       copies of weights in use: gathered, in the type of the computation
  dispatch      rows on their way to the experts and back, and inside the experts
  activations   all else of the model, forward and backward
  other         batch, router state, metrics, constants

A weight's shape is any that sharding can give it. Where an activation has that shape
too, the class is a guess between the two.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable

import jax

from moe_jax.plan import hlo
from moe_jax.plan.hlo import Computation, Instruction, Module
from moe_jax.plan.schedule import scope
from moe_jax.tree import named_leaves

CLASSES = (
    "parameters",
    "optimizer",
    "gradients",
    "weights",
    "dispatch",
    "activations",
    "other",
)
_VALUE = re.compile(
    r"value: <\d+ (\S+?)(?:\{([0-9,]*)\})?(?: \(phi\))? @(\d+)> "
    r"\(size=(\d+),offset=(\d+)\): (.*)"
)
_RANGE = re.compile(r"^    (\S+?)\{([0-9,]*)\}:(\d+)-(\d+)$", re.MULTILINE)
_DISPATCH = ("dispatch", "combine", "experts")
_COPIES = ("copy", "bitcast", "convert", "get-tuple-element", "reshape", "transpose")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in memory at the peak.

    Attributes:
      name: of the instruction.
      index: of the element of its result, "" for the whole.
      nbytes: size.
      shape: as HLO writes it, without layout.
      source: name stack, "" if unknown.
      kind: one of `CLASSES`.
    """

    name: str
    index: str
    nbytes: int
    shape: str
    source: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """The peak of one device.

    Attributes:
      peak_bytes: what is alive then.
      allocated_bytes: what the device must have: arguments and the heap in which all
        temporaries find their place, gaps between them included.
      classes: bytes by class, in the order of `CLASSES`; they add up to the peak.
      largest: the buffers that are no arguments, the largest first.
    """

    peak_bytes: int
    allocated_bytes: int
    classes: dict[str, int]
    largest: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    name: str
    index: str
    nbytes: int
    shape: str
    parameter: int | None
    place: tuple[str, int] = ("", 0)  # Allocation and offset.


def at_peak(
    module: Module,
    buffers: str,
    live_ranges: str,
    shapes: "WeightShapes",
) -> Memory:
    """Memory at the moment of the largest need.

    Args:
      module: the scheduled program.
      buffers: text of the compiler's buffer assignment.
      live_ranges: text of its live ranges.
      shapes: of the weights.
    """
    arguments, temporaries, heap = _values(buffers)
    names = Names(module)
    classes = dict.fromkeys(CLASSES, 0)
    for value in arguments:
        classes[_argument_class(names.parameter(value.parameter))] += value.nbytes
    live = [
        # The values of one place are one buffer; the best known speaks for it.
        max((_buffer(v, names, shapes) for v in same), key=lambda b: bool(b.source))
        for same in _live(temporaries, live_ranges)
    ]
    for buffer in live:
        classes[buffer.kind] += buffer.nbytes
    largest = sorted(live, key=lambda b: -b.nbytes)
    return Memory(
        peak_bytes=sum(classes.values()),
        allocated_bytes=sum(v.nbytes for v in arguments) + heap,
        classes=classes,
        largest=tuple(largest),
    )


def _values(text: str) -> tuple[list[_Value], list[_Value], int]:
    """Arguments, temporary values in HBM, and the size of the heap they share."""
    arguments, temporaries, heap = [], [], 0
    for block in re.split(r"^allocation ", text, flags=re.MULTILINE)[1:]:
        head = block.split("\n", 1)[0]
        size = int(re.search(r"size (\d+)", head)[1])
        parameter = re.search(r"\bparameter (\d+)", head)
        if "color " in head or "thread-local" in head:
            continue  # Another memory, or a scalar function's.
        found = [
            _Value(name, index, int(nbytes), shape.split("{")[0], None, (head, int(at)))
            for name, index, page, nbytes, at, shape in _VALUE.findall(block)
            if page == "0"
        ]
        if parameter:
            shape = found[0].shape if found else ""
            arguments.append(_Value("", "", size, shape, int(parameter[1])))
        elif "temp" in head:
            temporaries += found
            heap += size
    return arguments, temporaries, heap


def _live(values: list[_Value], live_ranges: str) -> list[list[_Value]]:
    """The values alive at the moment of the largest need, those of a place together.

    A loop's state and what goes in and out of it share a place; their ranges overlap.
    """
    ranges = {
        (name, index): (int(begin), int(end))
        for name, index, begin, end in _RANGE.findall(live_ranges)
    }
    spans = [
        (v, ranges[v.name, v.index]) for v in values if (v.name, v.index) in ranges
    ]
    changes: dict[int, list[tuple[_Value, int]]] = {}
    for value, (begin, end) in spans:
        changes.setdefault(begin, []).append((value, 1))
        changes.setdefault(end + 1, []).append((value, -1))
    sizes: dict[tuple[str, int], collections.Counter[int]] = {}
    running, most, peak = 0, -1, 0
    for moment in sorted(changes):
        for value, change in changes[moment]:
            there = sizes.setdefault(value.place, collections.Counter())
            running -= max(there, default=0)
            there[value.nbytes] += change
            there = sizes[value.place] = +there
            running += max(there, default=0)
        if running > most:
            most, peak = running, moment
    found: dict[tuple[str, int], list[_Value]] = {}
    for value, (begin, end) in spans:
        if begin <= peak <= end:
            found.setdefault(value.place, []).append(value)
    return [
        [v for v in same if v.nbytes == max(s.nbytes for s in same)]
        for same in found.values()
    ]


class Names:
    """Name stacks of a module's values; of copies, those of what they copy."""

    def __init__(self, module: Module):
        self._module = module
        self._where: dict[str, Computation] = {}
        self._loops: dict[str, Instruction] = {}  # By the name of the body.
        for comp in module.computations.values():
            for instruction in comp.instructions:
                self._where[instruction.name] = comp
                if instruction.opcode == "while":
                    self._loops[instruction.reference("body")] = instruction
                    self._loops[instruction.reference("condition")] = instruction
        entry = module.computations[module.entry]
        self._parameters: dict[int, str] = {}
        named, found = "", (i for i in entry.instructions if i.opcode == "parameter")
        for i in sorted(found, key=lambda i: i.index):
            # XLA gives some the name of the loop that takes them. They are in the order
            # of the state: such a one is of the kind of that before it.
            named = named if i.op_name.startswith("jit(") else i.op_name
            self._parameters[i.index] = named

    def parameter(self, index: int) -> str:
        return self._parameters.get(index, "")

    def of(self, name: str, index: str = "") -> str:
        """The name stack of an instruction, or of element `index` of its result."""
        for _ in range(12):
            comp = self._where.get(name)
            if comp is None:
                return ""
            instruction = comp.by_name[name]
            loop = self._loop_of(comp, instruction)
            if loop is not None and index.isdigit():
                name, index = self._element(loop, int(index)), ""
                continue
            if instruction.op_name or not instruction.operands:
                return instruction.op_name
            if instruction.opcode == "get-tuple-element":
                index = str(instruction.index)
            elif not instruction.opcode.startswith(_COPIES):
                return ""
            name = instruction.operands[0]
        return ""

    def _loop_of(self, comp: Computation, value: Instruction) -> Instruction | None:
        """The loop whose state a value is: the loop itself, or its parameter."""
        if value.opcode == "while":
            return value
        return self._loops.get(comp.name) if value.opcode == "parameter" else None

    def _element(self, loop: Instruction, index: int) -> str:
        """Who makes an element of a loop's state: the body, else who began it."""
        body = self._module.computations[loop.reference("body")]
        made = body.by_name.get(body.root.operands[index])
        unchanged = made is not None and made.opcode == "get-tuple-element"
        if made is not None and not (unchanged and made.index == index):
            return made.name
        outer = self._where[loop.name]
        begun = outer.by_name.get(loop.operands[0])
        if begun is None or begun.opcode != "tuple":
            return ""
        return begun.operands[index]


def _argument_class(op_name: str) -> str:
    if op_name.startswith(("state.params", "state.frozen", "state.ema")):
        return "parameters"
    return "optimizer" if op_name.startswith("state.opt_state") else "other"


def _buffer(value: _Value, names: Names, shapes: "WeightShapes") -> Buffer:
    source = names.of(value.name, value.index)
    return Buffer(
        name=value.name,
        index=value.index,
        nbytes=value.nbytes,
        shape=value.shape,
        source=source,
        kind=_temporary_class(source, value.shape, shapes),
    )


def _temporary_class(source: str, shape: str, shapes: "WeightShapes") -> str:
    if source.startswith("state."):  # A copy, of another type or layout.
        kind = _argument_class(source)
        return "weights" if kind == "parameters" else kind
    found = hlo.parse_shapes(shape)
    if len(found) == 1 and shapes.has(found[0].dims):
        backward = "transpose" in source or scope(source) == "optimizer"
        gathered = source.endswith("all_gather") or "rematted" in source
        return "gradients" if backward and not gathered else "weights"
    if scope(source) in _DISPATCH:
        return "dispatch"
    is_array = len(found) == 1 and bool(found[0].dims)
    if is_array or "jvp" in source or "transpose" in source:
        return "activations"
    return "other"


class WeightShapes:
    """Every shape that a weight may take under the mesh: whole, or split.

    Args:
      params: abstract parameters with shardings.
      stacked: names of parameters begin so where the first dimension counts layers.
      activations: shapes that are never taken for a weight's.
    """

    def __init__(
        self, params, stacked: str, activations: Iterable[tuple[int, ...]] = ()
    ):
        self._never = {_key(dims) for dims in activations}
        self._known: set[tuple[int, ...]] = set()
        for name, leaf in named_leaves(params).items():
            choices = [_splits(leaf, d) for d in range(leaf.ndim)]
            if name.startswith(stacked):
                choices[0] = choices[0] | {1}
            self._known |= {_key(dims) for dims in itertools.product(*choices)}
        # Vectors are too many and too small to tell apart.
        self._known = {dims for dims in self._known if len(dims) > 1}

    def has(self, dims: tuple[int, ...]) -> bool:
        key = _key(dims)
        return key in self._known and key not in self._never


def _key(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))


def _splits(leaf: jax.ShapeDtypeStruct, dim: int) -> set[int]:
    """Sizes of a dimension, gathered over any of the axes that split it."""
    entry = leaf.sharding.spec[dim] if dim < len(leaf.sharding.spec) else None
    axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    sizes = {leaf.shape[dim]}
    for axis in axes:
        count = leaf.sharding.mesh.shape[axis]
        sizes |= {size // count for size in sizes}
    return sizes
