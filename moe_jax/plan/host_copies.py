"""Copies between a device and the memory of its host, in a compiled program.

The compiler gives arrays of the host the memory space 5, and moves them by copies,
slices and updates in place that begin and end apart (`...-start`, `...-done`).
"""

import re

from moe_jax.plan.hlo import Instruction

HOST = 5  # Memory space of a shape.
TO_HOST, FROM_HOST = "to the host", "from the host"


def copied(start: Instruction) -> tuple[str, int] | None:
    """Direction and bytes of a copy that begins here; None: it is no such copy."""
    arrays = [shape for shape in start.shapes if shape.dims]
    here = [shape for shape in arrays if shape.memory_space != HOST]
    if len(here) in (0, len(arrays)):
        return None
    # A copy names its result first; the others their operands.
    result = arrays[0 if start.opcode == "copy-start" else -1]
    direction = TO_HOST if result.memory_space == HOST else FROM_HOST
    return direction, here[0].padded_bytes


def host_bytes(buffers: str) -> int:
    """Bytes of the host that a program keeps for a device.

    Args:
      buffers: text of the compiler's buffer assignment.
    """
    sizes = re.findall(
        rf"^allocation \d+: size (\d+), color {HOST},", buffers, re.MULTILINE
    )
    return sum(map(int, sizes))
