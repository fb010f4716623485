"""The memory of the host, beside that of a device: what is not needed now waits there.

An array in it is read and written by copies over the host's bus; JAX calls the place
its memory kind.
"""

from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.errors import UserError

KIND = "pinned_host"


def place(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The same sharding in the host's memory."""
    return sharding.with_memory_kind(KIND)


def is_there(array: jax.Array) -> bool:
    """Whether an array lies in the host's memory."""
    return array.sharding.memory_kind == KIND


def fetched(tree: Any) -> Any:
    """The arrays in the device's memory, inside of a compiled function."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), tree)


def sent(tree: Any) -> Any:
    """The arrays in the memory of the host, inside of a compiled function."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Host), tree)


def check(devices: Sequence[jax.Device], option: str) -> None:
    """Raises unless devices can reach the host's memory.

    Raises:
      UserError: they cannot; `option` is what asked for it.
    """
    device = devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise UserError(
            f"{option} keeps arrays in the memory of the host ({KIND!r}), which "
            f"{device.device_kind!r} does not reach: it has {kinds}; leave it out"
        )
