"""What only the kernels of TPUs have: blocks of any size, and a grid of visits."""

import grouped
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmul, grouped_tpu


def test_several_tiles_along_every_dimension(monkeypatch):
    """Blocks of 128 columns, as large matrices have."""
    monkeypatch.setattr(grouped_tpu, "_VMEM_BYTES", 0)
    monkeypatch.setattr(grouped_tpu, "_SUM_TILE", 128)
    sizes = [200, 0, 130, 40]
    x, w, grad = inputs = grouped.drawn(sizes, 384, 256, 384)
    counts = jnp.array(sizes, jnp.int32)
    call = lambda x, w: grouped_matmul.matmul(x, w, counts, "tpu", interpret=True)
    y, pull = jax.vjp(call, x, w)
    grouped.check(sizes, inputs, y, *pull(jnp.asarray(grad)))


@pytest.mark.parametrize(("sizes", "rows"), grouped.CASES, ids=str)
@pytest.mark.parametrize("empty_too", [False, True])
def test_visits_are_the_pairs_of_tile_and_group(sizes, rows, empty_too):
    tile = min(128, rows & -rows)
    found = grouped_tpu.visits(jnp.array(sizes, jnp.int32), rows, tile, empty_too)
    want = []
    for g, held in enumerate(grouped.groups(sizes)):
        tiles = sorted({row // tile for row in range(held.start, held.stop)})
        want += [(g, t) for t in tiles]
        if empty_too and not tiles:
            want.append((g, None))
    count = int(found.count)
    assert count == len(want) <= len(found.group_v)
    for g, t, (want_g, want_t) in zip(found.group_v, found.tile_v, want, strict=False):
        assert g == want_g
        assert t == want_t or want_t is None
    assert np.all(np.asarray(found.tile_v) < rows // tile)
