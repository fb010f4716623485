"""The Frechet distance against closed forms, and its interval against simulation."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.quality import frechet
from moe_jax.quality.frechet import Moments


def rotation(width, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def test_of_commuting_covariances():
    # Where both have the same axes the roots are those of the variances.
    turn = rotation(5, 0)
    a, b = np.array([4.0, 1, 9, 0, 2]), np.array([1.0, 1, 16, 4, 0])
    mean = np.array([1.0, 0, -2, 0, 0])
    found = frechet.distance(
        Moments(mean, turn @ np.diag(a) @ turn.T),
        Moments(np.zeros(5), turn @ np.diag(b) @ turn.T),
    )
    # 5 + (2-1)^2 + 0 + (3-4)^2 + (0-2)^2 + (sqrt 2)^2
    np.testing.assert_allclose(found, 5 + 1 + 0 + 1 + 4 + 2, rtol=1e-6)


def test_of_two_by_two_that_do_not_commute():
    # tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)) for two by two.
    a, b = np.array([[2.0, 0.5], [0.5, 1]]), np.array([[1.0, -0.6], [-0.6, 3]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    want = np.trace(a) + np.trace(b) - 2 * root
    zero = np.zeros(2)
    for first, second in ((a, b), (b, a)):
        found = frechet.distance(Moments(zero, first), Moments(zero, second))
        np.testing.assert_allclose(found, want, rtol=1e-10)


def test_of_one_and_the_same_is_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 40)) * 100  # singular
    found = frechet.distance(frechet.moments(x), frechet.moments(x))
    assert 0 <= found < 1e-3 * np.trace(frechet.moments(x).covariance)


def test_moments():
    x = np.random.default_rng(2).normal(size=(30, 3)).astype(np.float32)
    found = frechet.moments(x)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), atol=1e-6)
    times = np.arange(30) % 3
    weighed, repeated = frechet.moments(x, times), frechet.moments(x.repeat(times, 0))
    np.testing.assert_allclose(weighed.mean, repeated.mean, atol=1e-12)
    np.testing.assert_allclose(weighed.covariance, repeated.covariance, atol=1e-12)


def test_many_at_once():
    rng = np.random.default_rng(3)
    all_of = [frechet.moments(rng.normal(size=(20, 4))) for _ in range(3)]
    other = frechet.moments(rng.normal(size=(20, 4)) * 2)
    stacked = Moments(
        np.stack([m.mean for m in all_of]), np.stack([m.covariance for m in all_of])
    )
    one_by_one = [frechet.distance(m, other) for m in all_of]
    np.testing.assert_allclose(frechet.distance(stacked, other), one_by_one)


@pytest.mark.parametrize(("width", "scale", "shift"), [(3, 1.5, 0.2), (12, 1.0, 0.0)])
def test_interval_holds_the_expected_distance(width, scale, shift):
    rng = np.random.default_rng(4)
    reference = Moments(np.zeros(width), np.eye(width))
    sets = [rng.normal(size=(120, width)) * scale + shift for _ in range(120)]
    distances = [float(frechet.distance(frechet.moments(x), reference)) for x in sets]
    # Bias included: 120 rows are farther away than all would be.
    truth = width * (shift**2 + (scale - 1) ** 2)
    assert np.mean(distances) > truth + 0.02
    ends = [frechet.interval(x, reference, i, 100) for i, x in enumerate(sets)]
    inside = [low <= np.mean(distances) <= high for low, high in ends]
    assert np.mean(inside) > 0.88
    # At the floor it is wider than it need be, and nowhere much narrower.
    ratio = np.mean(np.diff(ends)) / (2 * 1.96 * np.std(distances))
    assert 0.85 < ratio < (1.3 if shift else 2.5)
    again = frechet.interval(sets[0], reference, 5)
    assert frechet.interval(sets[0], reference, 5) == again


def test_compare_takes_equal_numbers():
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(4000, 4))
    same, held_out = rng.normal(size=(1000, 4)), rng.normal(size=(300, 4))
    found = frechet.compare(same, held_out, reference, resamples=50)
    assert (found.count, found.reference_count) == (300, 4000)
    assert found.low <= found.distance <= found.high
    # Samples of the same distribution lie at the floor, and not below it for their
    # number: all 1000 would.
    assert found.distance < 3 * found.floor and found.floor < 3 * found.distance
    moved = frechet.compare(same + 0.5, held_out, reference, resamples=50)
    assert moved.low > found.floor_high and abs(moved.distance - 1) < 0.4
    assert moved.floor == found.floor
    assert "FD" in str(found) and "FID" not in str(found) and "N=300" in str(found)


def test_rows_are_drawn_from_all():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(1000, 2))
    by_class = x + 3 * np.sign(np.arange(1000) - 500)[:, None]  # sorted
    found = frechet.compare(by_class, by_class[::5], by_class, resamples=10)
    assert found.distance < 0.5


@pytest.mark.parametrize("short", range(3))
def test_too_few(short):
    parts = [np.zeros((79 if i == short else 80, 8)) for i in range(3)]
    what = ("79 samples", "79 held-out images", "79 reference images")[short]
    with pytest.raises(UserError, match=f"{what} in 8 features: needs at least 80"):
        frechet.compare(*parts)


def test_not_finite():
    x = np.zeros((20, 2))
    with pytest.raises(UserError, match="of the samples are not finite"):
        frechet.compare(np.full((20, 2), np.nan), x, x)
