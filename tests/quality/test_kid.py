"""The kernel distance against loops over pairs."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.quality import kid


def slow(x, y):
    k = lambda a, b: (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3
    mean = lambda values: sum(values) / len(values)
    within = lambda z: mean(
        [k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    )
    return within(x) + within(y) - 2 * mean([k(a, b) for a in x for b in y])


def test_against_loops():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1
    np.testing.assert_allclose(kid.squared_mmd(x, y), slow(x.tolist(), y.tolist()))


def test_no_bias_where_the_distributions_are_one():
    rng = np.random.default_rng(1)
    found = [kid.squared_mmd(*rng.normal(size=(2, 20, 4))) for _ in range(1500)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3.5 * error
    assert min(found) < 0


def test_error_is_that_of_repeated_measurements():
    rng = np.random.default_rng(2)
    found = [
        kid.compare(rng.normal(size=(200, 3)) + 0.5, rng.normal(size=(300, 3)), i)
        for i in range(200)
    ]
    spread = np.std([one.distance for one in found])
    error = np.sqrt(np.mean([one.error**2 for one in found]))
    assert 0.85 < error / spread < 1.15
    assert found[0].count == 200 and found[0].subsets == 10


def test_subsets_are_disjoint_and_drawn_from_all():
    x = np.arange(40.0)[:, None] / 40
    found = kid.compare(x, x, seed=1, subsets=4)
    assert found.count == 40
    order = np.random.default_rng(1)
    a, b = (x[order.permutation(40)].reshape(4, 10, 1) for _ in range(2))
    want = [slow(p.tolist(), q.tolist()) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(found.distance, np.mean(want))
    np.testing.assert_allclose(found.error, np.std(want, ddof=1) / 2)


@pytest.mark.parametrize(("count", "subsets"), [(19, 10), (100, 1), (100, 0)])
def test_too_few(count, subsets):
    with pytest.raises(UserError, match="needs two subsets of two rows"):
        kid.compare(np.zeros((count, 2)), np.zeros((500, 2)), subsets=subsets)
