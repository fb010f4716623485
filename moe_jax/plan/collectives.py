"""Collectives of a compiled program: kind, mesh axes, bytes on the wire, seconds.

The time is that of one line of links along the axis: no ring, one direction, sizes
over bandwidth, without latency. An all-to-all on a line of n also pays for its hops
(n / 4 on average for the busiest link). Between slices the data-centre network's
bandwidth takes the link's place.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.plan.chips import Chip
from moe_jax.plan.hlo import Computation, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Network:
    """The mesh as the program numbers its devices.

    Attributes:
      sizes: mesh axes in order.
      slice_of: slice of each device, in the order of the mesh.
      chip: bandwidths.
    """

    sizes: dict[str, int]
    slice_of: tuple[int, ...]
    chip: Chip

    @classmethod
    def of(cls, mesh: Any, chip: Chip) -> "Network":
        flat = mesh.devices.flatten()
        slices = tuple(getattr(d, "slice_index", 0) or 0 for d in flat)
        return cls(dict(mesh.shape), slices, chip)

    def axes(self, devices: Sequence[int]) -> tuple[str, ...]:
        """Mesh axes along which these devices differ."""
        places = np.unravel_index(list(devices), tuple(self.sizes.values()))
        return tuple(
            axis
            for axis, place in zip(self.sizes, places, strict=True)
            if len(set(place.tolist())) > 1
        )


@dataclasses.dataclass(frozen=True)
class Collective:
    """One execution of a collective on one device.

    Attributes:
      kind: one of `KINDS`.
      axes: mesh axes that it spans.
      payload: bytes of the operation: its input, of an all-gather its result.
      wire: bytes that the device sends.
      seconds: modelled.
    """

    kind: str
    axes: tuple[str, ...]
    payload: float
    wire: float
    seconds: float


def base_kind(opcode: str) -> str | None:
    """The kind of an opcode, "all-gather-start" too; None for all else."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def first_group(attributes: str) -> list[int]:
    """Device numbers of the first group; [] where the text names none."""
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes)
    if listed:
        return [int(n) for n in listed[1].split(",")]
    iota = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes
    )
    if iota:
        shape = [int(n) for n in iota[3].split(",")]
        order = np.arange(math.prod(shape)).reshape(shape)
        if iota[4]:
            order = order.transpose([int(n) for n in iota[4].split(",")])
        return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        chosen = re.findall(r"'([^']+)'", named[2])
        order = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        index = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
        return order[index].reshape(-1).tolist()
    return []


def _pairs(attributes: str) -> list[tuple[int, int]]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    pairs = re.findall(r"(\d+),(\d+)", found[1]) if found else []
    return [(int(a), int(b)) for a, b in pairs]


def measure(
    network: Network, comp: Computation, instruction: Instruction, kind: str
) -> Collective:
    """Bytes and time of a collective, of `kind` as it acts (see `reduce_scatter`)."""
    inputs = [o.shapes[0] for o in comp.operands(instruction) if len(o.shapes) == 1]
    sent = sum(shape.nbytes for shape in inputs)
    link = network.chip.link_bandwidth
    if kind == "collective-permute":
        pairs = _pairs(instruction.attributes)
        payload = inputs[0].nbytes if inputs else 0.0
        axes = {axis for pair in pairs for axis in network.axes(pair)}
        ordered = tuple(axis for axis in network.sizes if axis in axes)
        if any(network.slice_of[a] != network.slice_of[b] for a, b in pairs):
            link = network.chip.dcn_bandwidth
        return Collective(kind, ordered, payload, payload, payload / link)
    group = first_group(instruction.attributes) or list(range(len(network.slice_of)))
    n = len(group)
    if len({network.slice_of[device] for device in group}) > 1:
        link = network.chip.dcn_bandwidth
    payload, hops = sent, 1.0
    if kind == "all-gather":
        wire = sent * (n - 1)
        payload = sent * n
    elif kind == "all-reduce":
        wire = 2 * sent * (n - 1) / n
    else:
        if kind == "ragged-all-to-all":  # Operands: rows to send, then the buffer.
            payload = sent = min(shape.nbytes for shape in inputs[:2])
        wire = sent * (n - 1) / n
        if kind.endswith("all-to-all"):
            hops = max(1.0, n / 4)
    return Collective(kind, network.axes(group), payload, wire, wire * hops / link)


def reduce_scatter(fusion: Instruction, reduce: Instruction) -> bool:
    """Whether XLA:TPU's fusion(all-reduce + slice) leaves each device its part."""
    n = len(first_group(reduce.attributes))
    whole, part = reduce.shapes[0].size, fusion.shapes[0].size
    return n > 1 and part * n <= 1.1 * whole
