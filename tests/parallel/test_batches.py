"""Rows of a host become global arrays over the mesh."""

import numpy as np
import pytest

from moe_jax.parallel import batches


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=8),
        dict(data=2, expert=4),
        dict(expert=2, context=2, tensor=2),
        dict(tensor=8),
    ],
)
def test_every_device_holds_its_rows_and_columns(axes_mesh, sizes):
    mesh = axes_mesh(**sizes)
    whole = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    assert batches.rows_of_process(mesh, 8) == (0, 8)
    tokens = batches.put({"tokens": whole}, mesh, 8, 0)["tokens"]
    np.testing.assert_array_equal(tokens, whole)
    split = [sizes.get(a, 1) for a in ("data", "fsdp", "expert")]
    rows, columns = 8 // np.prod(split), 4 // sizes.get("context", 1)
    place = {d: i for i, d in np.ndenumerate(mesh.devices)}
    for shard in tokens.addressable_shards:
        data, fsdp, expert, context, _ = place[shard.device]
        row = ((data * split[1] + fsdp) * split[2] + expert) * rows
        column = context * columns
        np.testing.assert_array_equal(
            shard.data, whole[row : row + rows, column : column + columns]
        )


def test_rows_are_counted_from_the_first_that_was_read(axes_mesh):
    mesh = axes_mesh(data=8)
    whole = np.arange(16, dtype=np.int32).reshape(8, 2)
    read = np.concatenate([np.full((4, 2), -1, np.int32), whole])
    tokens = batches.put({"tokens": read}, mesh, 8, -4)["tokens"]
    np.testing.assert_array_equal(tokens, whole)


def test_the_abstract_batch_is_what_put_makes(axes_mesh):
    mesh = axes_mesh(data=4, context=2)
    rows = {"tokens": ((4,), "int32"), "images": ((2, 2, 3), "float32")}
    rows |= {"labels": ((), "int32")}
    abstract = batches.abstract(mesh, 8, rows)
    assert list(abstract) == list(rows)
    local = {n: np.zeros((8, *shape), dtype) for n, (shape, dtype) in rows.items()}
    for name, made in batches.put(local, mesh, 8, 0).items():
        assert (made.shape, made.dtype) == (abstract[name].shape, abstract[name].dtype)
        assert made.sharding == abstract[name].sharding
    specs = {n: a.sharding.spec for n, a in abstract.items()}
    assert specs["tokens"][1] == "context"
    assert not any(specs["images"][1:]) and specs["labels"][0] == specs["images"][0]
