"""Nearest neighbours, copies, precision and recall."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.quality import nearest


def test_nearest_against_all_pairs():
    rng = np.random.default_rng(0)
    x, others = rng.normal(size=(700, 3, 2)), rng.normal(size=(40, 3, 2))
    pairs = np.sqrt(((x[:, None] - others[None]) ** 2).sum((2, 3)))
    distance, index = nearest.nearest(x, others)
    np.testing.assert_array_equal(index, pairs.argmin(1))
    np.testing.assert_allclose(distance, pairs.min(1))


def test_an_exact_copy_has_distance_zero():
    others = 1000 + np.random.default_rng(1).normal(size=(30, 50)).astype(np.float32)
    distance, index = nearest.nearest(others[[4, 9]], others)
    assert index.tolist() == [4, 9] and distance.tolist() == [0, 0]


def test_copies():
    rng = np.random.default_rng(2)
    train, held_out, new = (rng.normal(size=(400, 2, 2, 1)) for _ in range(3))
    found = nearest.copies(new, train, held_out)
    assert 0.01 < found.share < 0.12 and 0.8 < found.ratio < 1.25
    noise = 0.01 * rng.normal(size=new.shape)
    copied = np.where(np.arange(400)[:, None, None, None] < 200, train + noise, new)
    found = nearest.copies(copied, train, held_out)
    assert 0.5 <= found.share < 0.6
    np.testing.assert_array_equal(found.index[:200], np.arange(200))
    assert found.held_out_distance.shape == (400,)
    assert nearest.copies(train, train, held_out).share == 1


def slow_covered(x, by, k):
    hits = 0
    for a in x:
        for i, b in enumerate(by):
            others = sorted(np.linalg.norm(b - c) for j, c in enumerate(by) if j != i)
            if np.linalg.norm(a - b) <= others[k - 1]:
                hits += 1
                break
    return hits / len(x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_loops(k):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(25, 2)) * 0.4, rng.normal(size=(25, 2))
    want = slow_covered(x, y, k), slow_covered(y, x, k)
    assert want[0] > want[1] + 0.1  # narrow samples: precise, and they miss some
    np.testing.assert_allclose(nearest.precision_recall(x, y, k), want)


def test_precision_and_recall_take_equal_numbers():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=(900, 2))
    order = np.random.default_rng(7)
    x_part, y_part = x[order.permutation(60)], y[order.permutation(900)[:60]]
    want = nearest.precision_recall(x_part, y_part)
    assert nearest.precision_recall(x, y, seed=7) == want


def test_nothing_to_compare():
    some, none = np.zeros((3, 2)), np.zeros((0, 2))
    with pytest.raises(UserError, match="nothing to compare"):
        nearest.nearest(some, none)
    with pytest.raises(UserError, match="0 held-out images; needs both"):
        nearest.copies(some, some, none)
    with pytest.raises(UserError, match="more than k=3"):
        nearest.precision_recall(some, some)
