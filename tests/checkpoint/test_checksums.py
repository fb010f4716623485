"""The checksum sees every change and does not see the sharding."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import P
from jax.sharding import AxisType, NamedSharding

from moe_jax.checkpoint import checksums

TYPES = ["float32", "bfloat16", "float64", "float16", "int32", "uint8", "int64", "bool"]
SHAPES = [(), (7,), (3, 1, 5)]


def checksum(x: np.ndarray) -> str:
    with jax.enable_x64(x.dtype.itemsize == 8):
        array = jnp.asarray(x)
        assert array.dtype == x.dtype
        return checksums.checksums({"x": array})["x"]


def random_array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    if dtype.kind == "b":
        data &= 1
    return data.view(dtype).reshape(shape)


def flipped(x: np.ndarray, bit: int) -> np.ndarray:
    data = np.frombuffer(x.tobytes(), np.uint8).copy()
    step = 8 if x.dtype == bool else 1  # A bool has one bit that may be set.
    bit = bit * step % (8 * data.size)
    data[bit // 8] ^= 1 << (bit % 8)
    return data.view(x.dtype).reshape(x.shape)


def missed_swaps(shape=(6, 5)) -> list[tuple[int, int]]:
    """Pairs of unequal elements whose exchange the checksum does not see."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x.flat[3] = -x.flat[4]  # Differs in the sign bit only.
    before, missed = checksum(x), []
    for i in range(x.size):
        for j in range(i):
            y = x.copy()
            y.flat[i], y.flat[j] = x.flat[j], x.flat[i]
            if checksum(y) == before:
                missed.append((i, j))
    return missed


@pytest.fixture
def recompile():
    """For tests that change what is compiled."""
    yield jax.clear_caches
    jax.clear_caches()


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(
    st.sampled_from(TYPES),
    st.sampled_from(SHAPES),
    st.integers(0, 2**32),
    st.integers(0, 2**16),
)
def test_any_flipped_bit_changes_it(dtype, shape, seed, bit):
    x = random_array(dtype, shape, seed)
    assert checksum(flipped(x, bit)) != checksum(x)


def test_the_flip_of_every_bit_is_seen():
    x = random_array("float32", (3, 5), 1)
    before = checksum(x)
    assert all(checksum(flipped(x, b)) != before for b in range(32 * x.size))


def test_swaps_are_seen():
    assert missed_swaps() == []


def test_swap_test_catches_a_checksum_without_positions(monkeypatch, recompile):
    monkeypatch.setattr(checksums, "_indices", lambda *args: [jnp.uint32(0)])
    recompile()
    assert len(missed_swaps((2, 3))) == 15


def test_swap_test_catches_odd_weights(monkeypatch, recompile):
    def weighted(x, starts, shape, dim):
        words = checksums._words(x).ravel()
        sums = jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1))
        return jnp.stack([sums, sums])[None]

    monkeypatch.setattr(checksums, "block_sums", weighted)
    recompile()
    assert missed_swaps((2, 3)) == [(4, 3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool", "int64"])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_sharding_does_not_matter(dtype, axis_type, mesh_of):
    x = random_array(dtype, (8, 4, 8), 2)
    with jax.enable_x64(x.dtype.itemsize == 8):
        found = set()
        for shape in [(1, 1), (8, 1), (2, 4), (4, 2)]:
            mesh = mesh_of(shape, axis_type)
            specs = [P(), P("a"), P("b", None, "a"), P(None, "b"), P(("a", "b"))]
            arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
            named = dict(enumerate(arrays))
            found.update(checksums.checksums(named).values())
        assert found == {checksum(x)}


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_sharded_arrays_are_not_gathered_or_copied(dim, mesh_of):
    mesh = mesh_of((2, 4))
    x = jax.device_put(np.ones((64, 64), np.float32), NamedSharding(mesh, P("b", "a")))
    summed = checksums._sharded_sums(mesh, (x.sharding.spec,), (dim,))
    compiled = summed.lower([x]).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 < x.nbytes


def test_leaves_of_several_places_together(mesh_of):
    x = np.arange(8, dtype=np.int32)
    leaves = {
        "here": jnp.asarray(x),
        "mesh": jax.device_put(x, NamedSharding(mesh_of((2, 4)), P("a"))),
        "empty": jnp.zeros((0, 3)),
        "other": jax.device_put(x, NamedSharding(mesh_of((4, 2)), P("a"))),
    }
    found = checksums.checksums(leaves)
    assert list(found) == list(leaves)
    assert found["here"] == found["mesh"] == found["other"] != found["empty"]


def test_positions_beyond_32_bits():
    shape, block, starts = (3, 2**31, 2), (2, 2, 2), (1, 2**31 - 2, 0)
    inner, outer = checksums._indices(block, starts, shape)
    assert inner.ravel().tolist() == [2**32 - 4, 2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert outer.ravel().tolist() == [1, 2]


def test_complex_is_refused():
    with pytest.raises(ValueError, match="complex"):
        checksums.checksums({"x": jnp.ones(3, jnp.complex64)})
