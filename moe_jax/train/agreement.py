"""Whether the copies of replicated state are still the same bits.

What several devices hold, each computes for itself, from sums that all have received.
A device that computes or stores a wrong bit, or a sum that was left out of a
`shard_map`, makes copies that differ, and nothing in JAX looks: a checkpoint is written
from one of them, and the run drifts.

Every `config.train.agree_every` steps each device hashes its own block of each leaf
where it lies (`checkpoint.checksums.block_sums`), and the hashes of blocks that must be
equal are compared. A leaf, or a part of one, that a single device holds has no copy and
cannot be compared.

Cost: each device reads its part of the state once, about 45 integer operations a word,
and sends 8 bytes a leaf; the program is compiled at the first comparison, the step
itself is not changed. Leaves that wait in the memory of the host are fetched one by
one.
"""

import functools
import math
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoint.checksums import block_sums
from moe_jax.errors import RunError
from moe_jax.parallel import host
from moe_jax.tree import named_leaves

_MOST_LINES = 8
_NAME_BYTES = 64


class Agreement:
    """Compares the copies of a run's state.

    Args:
      parts: of the run.
      every: steps between comparisons; 0: never.
    """

    def __init__(self, parts: Any, every: int):
        self._mesh = parts.mesh
        self._every = every
        self._names = [
            name
            for name, leaf in named_leaves(parts.abstract).items()
            if leaf.size and _copies(leaf.sharding) > 1
        ]

    def due(self, step: int) -> bool:
        """Whether to compare after `step`; the same in all processes."""
        return bool(self._every and self._names) and step % self._every == 0

    def check(self, step: int, state: Any) -> None:
        """Compares; waits for the state. All processes call it together.

        Raises:
          RunError: copies differ; it names leaves, hosts and devices.
        """
        leaves = named_leaves(state)
        leaves = {name: leaves[name] for name in self._names}
        # Those of the host one by one: together they may not fit on the devices.
        apart = [name for name in leaves if host.is_there(leaves[name])]
        groups = [[name for name in leaves if name not in apart]]
        groups += [[name] for name in apart]
        found = {}
        for names in filter(None, groups):
            found |= self._differing({name: leaves[name] for name in names})
        if found:
            raise RunError(_message(self._mesh, step, found))

    def _differing(self, leaves: dict[str, jax.Array]) -> dict[str, list[int]]:
        specs = tuple(leaf.sharding.spec for leaf in leaves.values())
        sums = np.asarray(_block_sums(self._mesh, specs)(list(leaves.values())))
        wrong = {
            name: odd_ones(self._mesh, spec, sums[:, i])
            for i, (name, spec) in enumerate(zip(leaves, specs, strict=True))
        }
        return {name: devices for name, devices in wrong.items() if devices}


def _copies(sharding: NamedSharding) -> int:
    used = math.prod(sharding.mesh.shape[a] for a in _axes(sharding.spec))
    return sharding.mesh.size // used


def _axes(spec: P) -> list[str]:
    """The mesh axes that split an array."""
    entries = [() if entry is None else entry for entry in spec]
    return [a for e in entries for a in (e if isinstance(e, tuple) else (e,))]


@functools.lru_cache(maxsize=16)
def _block_sums(mesh: Mesh, specs: tuple[P, ...]):
    """The program: arrays -> (devices, leaves, 2) uint32, replicated.

    Row d is what device d of `mesh.devices.flat` has found in its own blocks.
    """

    def of_device(leaves: list[jax.Array]) -> jax.Array:
        # Positions within the block: equal blocks have equal sums.
        sums = [block_sums(x, (0,) * x.ndim, x.shape) for x in leaves]
        return jnp.concatenate(sums)[None]

    sums = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(list(specs),),
        out_specs=P(mesh.axis_names),
        check_vma=False,
    )
    everywhere = NamedSharding(mesh, P())
    return jax.jit(lambda leaves: sums(host.fetched(leaves)), out_shardings=everywhere)


def odd_ones(mesh: Mesh, spec: P, sums_dw: np.ndarray) -> list[int]:
    """Devices whose block differs from that of most with the same block.

    Args:
      mesh: of the array.
      spec: of the array.
      sums_dw: (devices, 2) uint32, of each device's block.

    Returns:
      Positions in `mesh.devices.flat`; all of a group that has no majority.
    """
    used = _axes(spec)
    order = [mesh.axis_names.index(a) for a in used]
    order += [i for i, a in enumerate(mesh.axis_names) if a not in used]
    blocks = math.prod(mesh.shape[a] for a in used)
    ids = np.arange(mesh.size).reshape(mesh.devices.shape).transpose(order)
    found = []
    for group in ids.reshape(blocks, -1):
        values = [tuple(sums_dw[d]) for d in group]
        common = max(set(values), key=values.count)
        if values.count(common) == len(values):
            continue
        majority = 2 * values.count(common) > len(values)
        found += [
            int(d)
            for d, value in zip(group, values, strict=True)
            if not majority or value != common
        ]
    return sorted(found)


def _message(mesh: Mesh, step: int, found: dict[str, list[int]]) -> str:
    names = _host_names()
    lines = []
    for name, wrong in list(found.items())[:_MOST_LINES]:
        devices = [mesh.devices.flat[d] for d in wrong]
        where = ", ".join(
            f"device {d.id} of {names[d.process_index]} process {d.process_index}"
            for d in devices
        )
        lines.append(f"  {name}: {where}")
    if len(found) > _MOST_LINES:
        lines.append(f"  ... and {len(found) - _MOST_LINES} more leaves")
    return (
        f"step {step}: copies of the state that must be equal differ "
        "(config.train.agree_every). These are unlike most others, or, where no most "
        "are alike, unlike each other:\n" + "\n".join(lines) + "\n"
        "If it is always the same device, it is broken: leave it out. If it is all of "
        "them, a sum over devices is missing in the model. Checkpoints since the last "
        "comparison may hold the damage."
    )


def _host_names() -> list[str]:
    """Of each process."""
    own = socket.gethostname()
    if jax.process_count() == 1:
        return [own]
    text = own.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    return [bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in rows]
