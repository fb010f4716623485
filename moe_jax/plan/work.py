"""FLOPs and HBM bytes of one instruction.

A product counts 2 FLOPs a multiplication of real data: taps of a convolution that
fall on padding are not counted (XLA:TPU writes batched products as convolutions). An
instruction moves what it reads and writes in HBM, padding of tiles included; of a
slice only what is taken, of an update in place only what is new.
"""

import functools
import math
import re

import numpy as np

from moe_jax.plan.hlo import HBM, Computation, Instruction, Module

_SLICES = ("dynamic-slice", "slice", "gather")


class Meter:
    """Measures the instructions of one module; what a fusion moves is kept."""

    def __init__(self, module: Module):
        self.module = module
        self._fusions: dict[str, tuple[dict[int, float], float | None]] = {}

    def flops(self, comp: Computation, instruction: Instruction) -> float:
        """Of matrix products; elementwise work counts as none."""
        if instruction.opcode == "dot":
            return _dot_flops(comp, instruction)
        if instruction.opcode == "convolution":
            return _convolution_flops(comp, instruction)
        if instruction.opcode == "fusion":
            inside = self.module.computations[instruction.reference("calls")]
            return sum(self.flops(inside, i) for i in inside.instructions)
        return 0.0

    def hbm_bytes(self, comp: Computation, instruction: Instruction) -> float:
        """Bytes an instruction reads from and writes to HBM."""
        opcode = instruction.opcode
        reads: dict[int, float] = {}
        out = _hbm_size(instruction)
        if opcode == "fusion":
            reads, written = self._fusion(instruction.reference("calls"))
            out = out if written is None else min(out, written)
        elif opcode == "dynamic-update-slice":
            out = min(out, _size(comp.by_name[instruction.operands[1]]))
        total = out
        for place, name in enumerate(instruction.operands):
            operand = comp.by_name.get(name)
            if operand is None or len(operand.shapes) != 1 or not _hbm_size(operand):
                continue
            if opcode in _SLICES and place == 0:
                total += _size(instruction)
            elif opcode != "dynamic-update-slice" or place:
                total += min(reads.get(place, math.inf), _size(operand))
        return total

    def _fusion(self, name: str) -> tuple[dict[int, float], float | None]:
        """Bytes read of each parameter; bytes written, None: all of the result."""
        if name not in self._fusions:
            comp = self.module.computations[name]
            reads = {
                p.index: self._read_of(comp, p)
                for p in comp.instructions
                if p.opcode == "parameter"
            }
            self._fusions[name] = reads, _written(comp)
        return self._fusions[name]

    def _read_of(self, comp: Computation, parameter: Instruction) -> float:
        full, total = _size(parameter), 0.0
        users = comp.users.get(parameter.name, [])
        for user, place in users:
            while user.opcode == "bitcast" and len(comp.users.get(user.name, [])) == 1:
                user, place = comp.users[user.name][0]
            if user.opcode in _SLICES and place == 0:
                total += _size(user)
            elif user.opcode == "fusion":
                reads, _ = self._fusion(user.reference("calls"))
                total += reads.get(place, full)
            elif user.opcode != "dynamic-update-slice" or place:
                return full
        return min(full, total) if users else full


def _dot_flops(comp: Computation, dot: Instruction) -> float:
    lhs = comp.operands(dot)[0].shapes[0]
    dims = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", dot.attributes)
    contracted = [lhs.dims[int(d)] for d in dims[1].split(",") if d]
    return 2.0 * dot.shapes[0].size * math.prod(contracted)


def _convolution_flops(comp: Computation, conv: Instruction) -> float:
    lhs, rhs = (operand.shapes[0] for operand in comp.operands(conv))
    lhs_labels, rhs_labels, out_labels = re.search(
        r"dim_labels=([^_]+)_([^-]+)->([^\s,]+)", conv.attributes
    ).groups()
    out = conv.shapes[0]
    products = float(out.size * rhs.dims[rhs_labels.index("i")])
    window = _window(conv.attributes)
    for i, (size, stride, pad, lhs_dilate, rhs_dilate) in enumerate(window):
        inputs = lhs.dims[lhs_labels.index(str(i))]
        outputs = out.dims[out_labels.index(str(i))]
        real = _real_taps(inputs, outputs, size, stride, pad, lhs_dilate, rhs_dilate)
        products *= real / outputs
    return 2.0 * products


def _window(attributes: str) -> list[tuple[int, int, int, int, int]]:
    """(size, stride, low padding, lhs and rhs dilation) of each spatial dimension."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", text[1])) if text else {}
    if not fields:
        return []
    sizes = [int(n) for n in fields["size"].split("x")]
    ones = "x".join("1" for _ in sizes)
    numbers = lambda key: [int(n) for n in fields.get(key, ones).split("x")]
    pads = fields.get("pad", "x".join("0_0" for _ in sizes)).split("x")
    low = [int(pad.split("_")[0]) for pad in pads]
    dilations = (numbers("lhs_dilate"), numbers("rhs_dilate"))
    return list(zip(sizes, numbers("stride"), low, *dilations, strict=True))


@functools.lru_cache(maxsize=4096)
def _real_taps(inputs, outputs, size, stride, pad, lhs_dilate, rhs_dilate) -> int:
    """Pairs (output, tap) that read an element, not padding or dilation's holes."""
    count = 0
    starts = np.arange(outputs) * stride - pad
    last = (inputs - 1) * lhs_dilate
    for tap in range(size):
        place = starts + tap * rhs_dilate
        real = (place >= 0) & (place <= last) & (place % lhs_dilate == 0)
        count += int(np.count_nonzero(real))
    return count


def _size(instruction: Instruction) -> float:
    return sum(shape.padded_bytes for shape in instruction.shapes)


def _hbm_size(instruction: Instruction) -> float:
    return sum(s.padded_bytes for s in instruction.shapes if s.memory_space == HBM)


def _written(comp: Computation) -> float | None:
    root = comp.root
    while root.opcode == "bitcast":
        root = comp.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _size(comp.by_name[root.operands[1]])
    if root.opcode != "tuple":
        return None
    total = 0.0
    for leaf in comp.operands(root):
        if leaf.opcode == "dynamic-update-slice":
            total += _size(comp.by_name[leaf.operands[1]])
        else:
            total += _hbm_size(leaf)
    return total
