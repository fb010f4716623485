"""Checksums of arrays that do not depend on how they are sharded.

Orbax does not notice a flipped bit in the array data, so every leaf is stored with a
checksum. It is two uint32 sums over the words of the array. With `k(i)` a hash of the
global position i and `f` the finalizer of MurmurHash3 (A. Appleby, public domain),

    h_i = f(w_i ^ k(i)),    low = sum h_i,    high = sum f(h_i + c)    (mod 2**32).

A flipped bit always changes it: the flip changes exactly one word w_i; xor with a
constant and `f` are bijections of uint32, so h_i changes; no other summand does, so
`low` differs by h_i' - h_i, which is not 0 modulo 2**32. The same holds for any
change within one word. Two unequal words that change places give two other hashes
(`k` is injective below 2**32 elements); that both sums stay the same nevertheless has
a chance of about 2**-64, as for any other damage. A plain sum of words times odd
weights would not do: two numbers that differ in sign only could change places.

Sums that wrap around do not depend on order, so every shard is summed where it lies,
with its global positions, and only two words a shard travel.

Cost: each array is read once, with about 45 integer operations a word, in one fused
loop without temporaries of array size.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from moe_jax.parallel import host

_INDEX_RANGE = 2**32


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each leaf. Waits for the arrays.

    In a program of several processes all of them must call it together.

    Args:
      leaves: arrays of any shape and sharding, of any real dtype.

    Raises:
      ValueError: a complex array.
    """
    # One program for all leaves of one mesh: one compilation, one transfer.
    groups: dict[tuple[object, str], list[str]] = {}
    for name, leaf in leaves.items():
        # Those of the host one by one: together they may not fit on the devices.
        apart = name if host.is_there(leaf) else ""
        groups.setdefault((_place(leaf), apart), []).append(name)
    pending = {}
    for (place, apart), names in groups.items():
        arrays = [leaves[name] for name in names]
        if isinstance(place, Mesh):
            specs = tuple(array.sharding.spec for array in arrays)
            sums = _sharded_sums(place, specs)(arrays)
        else:
            sums = _whole_sums(arrays)
        pending[place, apart] = np.asarray(sums) if apart else sums
    found = {}
    for group, names in groups.items():
        for name, (low, high) in zip(names, np.asarray(pending[group]), strict=True):
            found[name] = f"{high:08x}{low:08x}"
    return {name: found[name] for name in leaves}


def _place(leaf: jax.Array) -> Mesh | Sharding:
    sharding = leaf.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else sharding


@jax.jit
def _whole_sums(leaves: list[jax.Array]) -> jax.Array:
    leaves = host.fetched(leaves)
    return jnp.stack([_sums(leaf, (0,) * leaf.ndim, leaf.shape) for leaf in leaves])


@functools.lru_cache(maxsize=16)
def _sharded_sums(mesh: Mesh, specs: tuple[P, ...]):
    """The program for leaves on a mesh; its result is replicated.

    Written out per shard: left to the compiler, the fused reduction of `_sums` gathers
    every array on every device first.
    """

    def shard_sums(x: jax.Array, spec: P) -> jax.Array:
        names = [() if a is None else a for a in spec] + [()] * (x.ndim - len(spec))
        names = [n if isinstance(n, tuple) else (n,) for n in names]
        shards = [math.prod(mesh.shape[a] for a in n) for n in names]
        shape = [size * n for size, n in zip(x.shape, shards, strict=True)]
        starts = [
            jax.lax.axis_index(n).astype(jnp.uint32) * jnp.uint32(size) if n else 0
            for n, size in zip(names, x.shape, strict=True)
        ]
        used = sum(names, ())
        sums = _sums(x, starts, shape)
        return jax.lax.psum(sums, used) if used else sums

    def all_sums(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack(
            [shard_sums(x, spec) for x, spec in zip(leaves, specs, strict=True)]
        )

    sums = jax.shard_map(all_sums, mesh=mesh, in_specs=(list(specs),), out_specs=P())
    return jax.jit(lambda leaves: sums(host.fetched(leaves)))


def _sums(x: jax.Array, starts: Sequence, shape: Sequence[int]) -> jax.Array:
    """The two sums, shape (2,), uint32, of a block of an array.

    Args:
      x: the block.
      starts: position of its first element in the array, one number a dimension.
      shape: of the whole array.
    """
    hashes = _words(x)
    if hashes.ndim > x.ndim:
        starts, shape = (*starts, 0), (*shape, hashes.shape[-1])
    for index in _indices(hashes.shape, starts, shape):
        hashes = _finalize(hashes ^ _finalize(index))
    if not hashes.ndim:
        hashes = _finalize(hashes)
    # One reduction with two results: two of them would keep the hashes in memory.
    return jnp.stack(
        jax.lax.reduce(
            (hashes, _finalize(hashes + jnp.uint32(0x9E3779B9))),
            (jnp.uint32(0), jnp.uint32(0)),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            range(hashes.ndim),
        )
    )


def _words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32; 64-bit types get a last dimension of 2."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"complex arrays have no checksum: {x.dtype}{list(x.shape)}")
    kind = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    bits = min(kind(x.dtype).bits, 32)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    return words.astype(jnp.uint32)


def _indices(
    block: Sequence[int], starts: Sequence, shape: Sequence[int]
) -> Iterator[jax.Array]:
    """Yields row-major positions, each within a group of neighbouring dimensions.

    A group has at most 2**32 positions, so that its index does not wrap around;
    nearly all arrays have one group.
    """
    last = len(shape)
    while last > 0:
        first = last - 1
        while first > 0 and math.prod(shape[first - 1 : last]) <= _INDEX_RANGE:
            first -= 1
        index = jnp.uint32(0)
        for dim in range(first, last):
            along = [1] * len(shape)
            along[dim] = block[dim]
            position = jax.lax.broadcasted_iota(jnp.uint32, along, dim) + starts[dim]
            # A stride of 2**32 only occurs where the dimension has one position.
            stride = math.prod(shape[dim + 1 : last]) % _INDEX_RANGE
            index = index + position * jnp.uint32(stride)
        yield index
        last = first


def _finalize(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection of uint32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
