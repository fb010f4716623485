"""The text of a compiled program as objects: a parser for scheduled HLO.

Grammar of one line: `[ROOT] %name = type opcode(arguments), attributes`. A type is a
shape such as `bf16[8,128]{1,0:T(8,128)S(1)}` (element type, dimensions, order of
dimensions from the fastest, tile, memory space) or a tuple of types.
"""

import dataclasses
import functools
import math
import re

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1.0),
    **dict.fromkeys(("f8e4m3", "f8e4m3fn", "f8e4m3b11fnuz", "f8e5m2"), 1.0),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("s2", "u2"), 0.25),
    "c128": 16.0,
    "token": 0.0,
}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"(ENTRY )?%(\S+) \(.*\{\s*$")
_START = re.compile(r"\s+(ROOT )?%(\S+) = ")
_END = re.compile(r"}(, execution_thread=\S+)?\s*$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_NO_ESTIMATE = 2**62  # The compiler's way to say that it has none.
HBM = 0  # The memory space of a shape whose layout names none.


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: element type, dimensions and layout.

    Attributes:
      dtype: as HLO writes it, "bf16".
      dims: sizes.
      minor_to_major: indices of dims, the fastest first; () where not given.
      tile: sizes of the first tile, slowest first; () where not tiled.
      memory_space: `HBM`, or another (1: VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory_space: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> float:
        """Without padding."""
        return self.size * _BYTES[self.dtype]

    @property
    def padded_bytes(self) -> float:
        """With the tile's padding: what the array takes in memory."""
        if not self.tile or len(self.minor_to_major) != len(self.dims):
            return self.nbytes
        dims = [self.dims[i] for i in self.minor_to_major]
        for i, unit in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // unit) * unit
        return math.prod(dims) * _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: unique in the module.
      opcode: "fusion", "all-gather-start".
      shapes: of the result; the leaves where it is a tuple.
      operands: names.
      arguments: the text between the parentheses.
      attributes: the text behind them.
      is_root: its value is its computation's.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    def reference(self, key: str) -> str | None:
        """The computation (or other word) that attribute `key` names."""
        match = re.search(rf"\b{key}=%?([^\s,{{}}]+)", self.attributes)
        return match[1] if match else None

    @functools.cached_property
    def op_name(self) -> str:
        """JAX's name stack of the operation this came from; "" if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    @functools.cached_property
    def index(self) -> int:
        """Of a get-tuple-element, or the number of a parameter."""
        if self.opcode == "parameter":
            return int(self.arguments)
        return int(self.reference("index") or 0)

    @functools.cached_property
    def matmul_cycles(self) -> int | None:
        """The compiler's estimate, where its model is one of matrix products.

        Its estimates of all else are several times the time that memory takes.
        """
        if "COST_MODEL_TYPE_CLASSIC" not in self.attributes:
            return None
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match and int(match[1]) < _NO_ESTIMATE else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who reads a value, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions:
            for place, operand in enumerate(instruction.operands):
                found.setdefault(operand, []).append((instruction, place))
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[n] for n in instruction.operands if n in self.by_name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: the computations by name."""

    computations: dict[str, Computation]
    entry: str


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All array shapes in a text, in order."""
    return tuple(
        _shape(dtype, dims, layout)
        for dtype, dims, layout in _SHAPE.findall(text)
        if dtype in _BYTES
    )


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    numbers = lambda text: tuple(int(n) for n in text.split(",") if n.strip().isdigit())
    space = re.search(r"S\((\d+)\)", layout)
    tile = re.search(r"T\(([0-9,]+)\)", layout)
    return Shape(
        dtype=dtype,
        dims=numbers(dims),
        minor_to_major=numbers(layout.split(":")[0]),
        tile=numbers(tile[1]) if tile else (),
        memory_space=int(space[1]) if space else HBM,
    )


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.split("\n"):
        head = _HEAD.match(line)
        if head:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif name and _END.match(line):
            found = tuple(i for i in map(_instruction, lines) if i is not None)
            computations[name] = Computation(name, found)
            name = ""
        elif name and _START.match(line):
            lines.append(line)
        elif name and lines:  # An attribute may hold line breaks.
            lines[-1] += " " + line
    if not entry:
        raise ValueError("the text holds no ENTRY computation: it is not HLO")
    return Module(computations, entry)


def _closing(text: str, start: int) -> int:
    """Index behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    start = _START.match(line)
    begin = start.end()
    end = _closing(line, begin) if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    open_bracket = opcode.end() - 1
    close = _closing(line, open_bracket)
    arguments = line[open_bracket + 1 : close - 1]
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        shapes=parse_shapes(line[begin:end]),
        operands=tuple(re.findall(r"%([^\s,()]+)", arguments)),
        arguments=arguments,
        attributes=line[close:],
        is_root=bool(start[1]),
    )
