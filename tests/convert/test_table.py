"""The notation of tables of weights."""

import numpy as np
import pytest

from moe_jax.convert.hf import FAMILIES
from moe_jax.convert.hf.table import Weight


def test_heads_are_split_and_turned():
    row = Weight("q", "w_q", "(hk)d->dhk")
    assert row.hub_shape((5, 2, 3)) == (6, 5)
    tensor = np.arange(30).reshape(6, 5)
    leaf = row.to_leaf(tensor, (5, 2, 3))
    assert leaf.shape == (5, 2, 3)
    assert leaf[4, 1, 2] == tensor[1 * 3 + 2, 4] and leaf[0, 1, 0] == tensor[3, 0]


@pytest.mark.parametrize(
    "dims, shape",
    [("(hk)d->dhk", (5, 2, 3)), ("d(hk)->hkd", (2, 3, 5)), ("(hk)->hk", (2, 3)),
     ("fd->df", (4, 3)), ("edf->edf", (2, 3, 4)), ("gd->dg", (7, 1))],
)  # fmt: skip
def test_back_is_the_reverse(dims, shape):
    row = Weight("x", "y", dims)
    leaf = np.random.default_rng(0).standard_normal(shape)
    tensor = np.empty(row.hub_shape(shape))
    row.put_into(tensor, leaf)
    np.testing.assert_array_equal(row.to_leaf(tensor, shape), leaf)


def test_leaves_in_turn():
    rows = [Weight("x", n, "ef->ef", part=i, parts=2) for i, n in enumerate("gu")]
    tensor = np.empty(rows[0].hub_shape((1, 3)))
    assert tensor.shape == (1, 6)
    for row, leaf in zip(rows, ([[1, 2, 3]], [[7, 8, 9]]), strict=True):
        row.put_into(tensor, np.array(leaf))
    np.testing.assert_array_equal(tensor, [[1, 7, 2, 8, 3, 9]])
    np.testing.assert_array_equal(rows[1].to_leaf(tensor, (1, 3)), [[7, 8, 9]])


def test_reading_makes_no_copy():
    tensor = np.zeros((6, 5))
    for row in (Weight("q", "w", "(hk)d->dhk"), Weight("q", "w", "(hk)d->hkd")):
        shape = (5, 2, 3) if row.dims.endswith("dhk") else (2, 3, 5)
        assert np.shares_memory(row.to_leaf(tensor, shape), tensor)


def test_letters_that_differ_are_a_mistake():
    with pytest.raises(ValueError, match="letters differ"):
        Weight("x", "y", "ab->ac").hub_shape((1, 1))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_rows_of_families_are_well_formed(family):
    for rows in (family.block, family.outer, family.ahead):
        assert len({(row.hub, row.part) for row in rows}) == len(rows)
        assert len({(row.leaf, row.state) for row in rows}) == len(rows)
        for row in rows:
            letters = row.dims.split("->")[1]
            per_expert = row.per_expert and "e" in letters
            row.hub_shape((2,) * (len(letters) - per_expert))
