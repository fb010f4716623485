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


_SLICE = 100_000  # Device ids of a slice begin at a multiple, the first at one.


@dataclasses.dataclass(frozen=True)
class Network:
    """The mesh as the program numbers its devices.

    Attributes:
      sizes: mesh axes in order.
      slice_of: slice of each device, in the order of the mesh.
      chip: bandwidths.
      ids: JAX's number of each device; transfers between slices name these.
    """

    sizes: dict[str, int]
    slice_of: tuple[int, ...]
    chip: Chip
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, mesh: Any, chip: Chip) -> "Network":
        flat = mesh.devices.flatten()
        slices = tuple(getattr(d, "slice_index", 0) or 0 for d in flat)
        return cls(dict(mesh.shape), slices, chip, tuple(d.id for d in flat))

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
    if kind == "ragged-all-to-all":  # Operands: rows to send, then the buffer.
        sent = min(shape.nbytes for shape in inputs[:2])
    hops = max(1.0, n / 4) if kind.endswith("all-to-all") else 1.0
    payload, wire = _volume(kind, sent, n)
    return Collective(kind, network.axes(group), payload, wire, wire * hops / link)


def _volume(kind: str, sent: float, n: int) -> tuple[float, float]:
    """(payload, bytes on the wire) of a device that puts in `sent`, among n."""
    if kind == "collective-permute":
        return sent, sent
    if kind == "all-gather":
        return sent * n, sent * (n - 1)
    times = 2 if kind == "all-reduce" else 1
    return sent, times * sent * (n - 1) / n


def between_slices(
    network: Network, comp: Computation, send: Instruction
) -> Collective | None:
    """The collective that a `send` stands for; None where it is for the host alone.

    XLA:TPU writes what goes between slices as send and recv of the runtime Megascale.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    target = re.search(r'_xla_megascale_target="?([^"]*?)"?,_xla', send.attributes)
    if kind is None or target is None:
        return None
    kind = kind[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
    # Either "{1,2}x{0:3}", device i of both slices, or devices {{..},{..}}.
    first = [int(n) for n in re.findall(r"\d+", target[1].split("}")[0])]
    if "}x{" in target[1]:
        own = network.ids[0] % _SLICE
        group = [
            place
            for place, device in enumerate(network.ids)
            if device % _SLICE == own and device // _SLICE in first
        ]
    else:
        group = [network.ids.index(device) for device in first]
    sent = comp.operands(send)[0].shapes[0].nbytes
    payload, wire = _volume(kind, sent, len(group))
    seconds = wire / network.chip.dcn_bandwidth
    return Collective(kind, network.axes(group), payload, wire, seconds)


def reduce_scatter(fusion: Instruction, reduce: Instruction) -> bool:
    """Whether XLA:TPU's fusion(all-reduce + slice) leaves each device its part."""
    n = len(first_group(reduce.attributes))
    whole, part = reduce.shapes[0].size, fusion.shapes[0].size
    return n > 1 and part * n <= 1.1 * whole
