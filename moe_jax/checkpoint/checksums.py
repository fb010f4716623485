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
with its global positions, and only two words a shard travel. For the same reason an
array may be summed in parts, one for each position of a dimension (each expert), and
the parts add up to the checksum of the whole: they cost nothing.

Cost: each array is read once, with about 45 integer operations a word, in one fused
loop without temporaries of array size.
"""

import functools
import itertools
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
    """Returns 16 hexadecimal digits for each leaf; as `in_parts`."""
    return {name: total(parts) for name, parts in in_parts(leaves, {}).items()}


def in_parts(
    leaves: Mapping[str, jax.Array], dimensions: Mapping[str, int]
) -> dict[str, list[str]]:
    """The checksums of the parts of each leaf, whose `total` is that of the leaf.

    Waits for the arrays. In a program of several processes all of them must call it
    together.

    Args:
      leaves: arrays of any shape and sharding, of any real dtype.
      dimensions: of leaves that have a part for each position of a dimension; others
        are one part.

    Returns:
      16 hexadecimal digits a part, by name of the leaf.

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
        dims = tuple(dimensions.get(name) for name in names)
        if isinstance(place, Mesh):
            specs = tuple(array.sharding.spec for array in arrays)
            sums = _sharded_sums(place, specs, dims)(arrays)
        else:
            sums = _whole_sums(arrays, dims)
        pending[place, apart] = np.asarray(sums) if apart else sums
    found = {}
    for group, names in groups.items():
        rows = iter(np.asarray(pending[group]).tolist())
        for name in names:
            dim = dimensions.get(name)
            count = 1 if dim is None else leaves[name].shape[dim]
            taken = itertools.islice(rows, count)
            found[name] = [f"{high:08x}{low:08x}" for low, high in taken]
    return {name: found[name] for name in leaves}


def total(parts: Sequence[str]) -> str:
    """The checksum of an array from those of its parts."""
    words = [(int(part[:8], 16), int(part[8:], 16)) for part in parts]
    high, low = (sum(column) % _INDEX_RANGE for column in zip(*words, strict=True))
    return f"{high:08x}{low:08x}"


def _place(leaf: jax.Array) -> Mesh | Sharding:
    sharding = leaf.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else sharding


@functools.partial(jax.jit, static_argnums=1)
def _whole_sums(leaves: list[jax.Array], dims: tuple[int | None, ...]) -> jax.Array:
    leaves = host.fetched(leaves)
    found = [
        block_sums(leaf, (0,) * leaf.ndim, leaf.shape, dim)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    return jnp.concatenate(found)


@functools.lru_cache(maxsize=16)
def _sharded_sums(mesh: Mesh, specs: tuple[P, ...], dims: tuple[int | None, ...]):
    """The program for leaves on a mesh; its result is replicated.

    Written out per shard: left to the compiler, the fused reduction of `block_sums`
    gathers every array on every device first.
    """

    def shard_sums(x: jax.Array, spec: P, dim: int | None) -> jax.Array:
        names = [() if a is None else a for a in spec] + [()] * (x.ndim - len(spec))
        names = [n if isinstance(n, tuple) else (n,) for n in names]
        shards = [math.prod(mesh.shape[a] for a in n) for n in names]
        shape = [size * n for size, n in zip(x.shape, shards, strict=True)]
        starts = [
            jax.lax.axis_index(n).astype(jnp.uint32) * jnp.uint32(size) if n else 0
            for n, size in zip(names, x.shape, strict=True)
        ]
        used = sum(names, ())
        sums = block_sums(x, starts, shape, dim)
        if dim is not None and names[dim]:  # Each shard has the sums of its parts.
            rows = jnp.arange(shape[dim], dtype=jnp.uint32) - starts[dim]
            here = rows < x.shape[dim]  # Below 0 it wraps around.
            rows = jnp.where(here, rows, 0)
            sums = jnp.where(here[:, None], sums[rows], jnp.uint32(0))
        return jax.lax.psum(sums, used) if used else sums

    def all_sums(leaves: list[jax.Array]) -> jax.Array:
        given = zip(leaves, specs, dims, strict=True)
        return jnp.concatenate([shard_sums(x, spec, dim) for x, spec, dim in given])

    sums = jax.shard_map(all_sums, mesh=mesh, in_specs=(list(specs),), out_specs=P())
    return jax.jit(lambda leaves: sums(host.fetched(leaves)))


def block_sums(
    x: jax.Array, starts: Sequence, shape: Sequence[int], dim: int | None = None
) -> jax.Array:
    """The two sums of a block of an array, uint32, of each of its parts.

    Args:
      x: the block.
      starts: position of its first element in the array, one number a dimension.
      shape: of the whole array.
      dim: the dimension whose positions are the parts; None: there is one.

    Returns:
      (parts in the block, 2).
    """
    hashes = _words(x)
    if hashes.ndim > x.ndim:
        starts, shape = (*starts, 0), (*shape, hashes.shape[-1])
    for index in _indices(hashes.shape, starts, shape):
        hashes = _finalize(hashes ^ _finalize(index))
    if not hashes.ndim:
        hashes = _finalize(hashes)
    # One reduction with two results: two of them would keep the hashes in memory.
    sums = jax.lax.reduce(
        (hashes, _finalize(hashes + jnp.uint32(0x9E3779B9))),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        [axis for axis in range(hashes.ndim) if axis != dim],
    )
    return jnp.stack(sums, axis=-1).reshape(-1, 2)


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
