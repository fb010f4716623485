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
  unused        gaps between buffers, and what the compiler counts beyond them

A weight's shape is any that sharding can give it. Where an activation has that shape
too, the class is a guess between the two.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable

import jax

from moe_jax.plan import hlo
from moe_jax.plan.hlo import Module
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
    "unused",
)
_VALUE = re.compile(
    r"value: <\d+ (\S+?)(?:\{([0-9,]*)\})? @(\d+)> "
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
      peak_bytes: all of it.
      classes: bytes by class, in the order of `CLASSES`; they add up to the peak.
      largest: the buffers that are no arguments, the largest first.
    """

    peak_bytes: int
    classes: dict[str, int]
    largest: tuple[Buffer, ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    name: str
    index: str
    nbytes: int
    shape: str
    parameter: int | None


def at_peak(
    module: Module,
    buffers: str,
    live_ranges: str,
    shapes: "WeightShapes",
    peak_bytes: int | None,
) -> Memory:
    """Memory at the moment of the largest need.

    Args:
      module: the scheduled program.
      buffers: text of the compiler's buffer assignment.
      live_ranges: text of its live ranges.
      shapes: of the weights.
      peak_bytes: as the compiler counts; None: what the buffers add up to.
    """
    arguments, temporaries, heap = _values(buffers)
    names = Names(module)
    classes = dict.fromkeys(CLASSES, 0)
    for value in arguments:
        classes[_argument_class(names.parameter(value.parameter))] += value.nbytes
    live = [_buffer(v, names, shapes) for v in _live(temporaries, live_ranges)]
    for buffer in live:
        classes[buffer.kind] += buffer.nbytes
    found = sum(classes.values())
    total = sum(v.nbytes for v in arguments) + heap if peak_bytes is None else 0
    peak = max(found, total) if peak_bytes is None else peak_bytes
    classes["unused"] = peak - found
    largest = sorted(live, key=lambda b: -b.nbytes)
    return Memory(peak, classes, tuple(largest))


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
            _Value(name, index or "", int(nbytes), shape.split("{")[0], None)
            for name, index, page, nbytes, _, shape in _VALUE.findall(block)
            if page == "0"
        ]
        if parameter:
            shape = found[0].shape if found else ""
            arguments.append(_Value("", "", size, shape, int(parameter[1])))
        elif "temp" in head:
            temporaries += found
            heap += size
    return arguments, temporaries, heap


def _live(values: list[_Value], live_ranges: str) -> list[_Value]:
    """The values alive at the moment when they need most together."""
    ranges = {
        (name, index): (int(begin), int(end))
        for name, index, begin, end in _RANGE.findall(live_ranges)
    }
    spans = [
        (v, ranges[v.name, v.index]) for v in values if (v.name, v.index) in ranges
    ]
    changes: dict[int, int] = {}
    for value, (begin, end) in spans:
        changes[begin] = changes.get(begin, 0) + value.nbytes
        changes[end + 1] = changes.get(end + 1, 0) - value.nbytes
    running, moments = 0, sorted(changes)
    sums = {t: (running := running + changes[t]) for t in moments}
    if not sums:
        return []
    peak = max(moments, key=lambda t: sums[t])
    return [value for value, (begin, end) in spans if begin <= peak <= end]


class Names:
    """Name stacks of a module's values; of copies, those of what they copy."""

    def __init__(self, module: Module):
        self._where = {
            instruction.name: comp
            for comp in module.computations.values()
            for instruction in comp.instructions
        }
        entry = module.computations[module.entry]
        self._parameters = {
            i.index: i.op_name for i in entry.instructions if i.opcode == "parameter"
        }

    def parameter(self, index: int) -> str:
        return self._parameters.get(index, "")

    def of(self, name: str) -> str:
        for _ in range(8):
            comp = self._where.get(name)
            if comp is None:
                return ""
            instruction = comp.by_name[name]
            if instruction.op_name or not instruction.operands:
                return instruction.op_name
            if not instruction.opcode.startswith(_COPIES):
                return ""
            name = instruction.operands[0]
        return ""


def _argument_class(op_name: str) -> str:
    if op_name.startswith(("state.params", "state.frozen", "state.ema")):
        return "parameters"
    return "optimizer" if op_name.startswith("state.opt_state") else "other"


def _buffer(value: _Value, names: Names, shapes: "WeightShapes") -> Buffer:
    source = names.of(value.name)
    return Buffer(
        name=value.name,
        index=value.index,
        nbytes=value.nbytes,
        shape=value.shape,
        source=source,
        kind=_temporary_class(source, value.shape, shapes),
    )


def _temporary_class(source: str, shape: str, shapes: "WeightShapes") -> str:
    if source.startswith("state."):  # A copy in another layout.
        return _argument_class(source)
    found = hlo.parse_shapes(shape)
    backward = "transpose" in source or scope(source) == "optimizer"
    if len(found) == 1 and shapes.has(found[0].dims):
        return "gradients" if backward else "weights"
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
