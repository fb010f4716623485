"""Pairings of noise and images, held to SciPy's assignment."""

import diffusion_oracles as slow
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from moe_jax import config
from moe_jax.diffusion import pairing

KEY = jax.random.key(7)
SHAPE = (24, 3, 3, 2)
IMAGES = slow.images(SHAPE)
ONES = jnp.ones(24)


def noise_of(options, weights=ONES, images=IMAGES):
    return np.asarray(pairing.pair(options, KEY, jnp.asarray(images), weights))


def flat(array):
    return np.asarray(array, np.float64).reshape(len(array), -1)


PLAIN = noise_of(pairing.Independent())
PERMUTING = [
    (pairing.Immiscible(), "euclidean"),
    (pairing.OptimalTransport(), "sqeuclidean"),
]


def test_independent_noise_is_normal():
    assert PLAIN.shape == SHAPE and PLAIN.dtype == np.float32
    assert abs(PLAIN.mean()) < 0.2 and abs(PLAIN.std() - 1) < 0.2


@pytest.mark.parametrize(("options", "metric"), PERMUTING)
def test_assignments_are_the_cheapest_permutation(options, metric):
    found = noise_of(options)
    cost = cdist(flat(IMAGES), flat(PLAIN), metric)
    rows, columns = linear_sum_assignment(cost)
    np.testing.assert_array_equal(found[rows], PLAIN[columns])
    of_found = np.diagonal(cdist(flat(IMAGES), flat(found), metric)).sum()
    assert of_found < 0.99 * np.trace(cost)
    assert sorted(found.ravel()) == sorted(PLAIN.ravel())


def test_the_two_costs_choose_differently():
    images = 3 * IMAGES
    assert np.any(
        noise_of(PERMUTING[0][0], images=images)
        != noise_of(PERMUTING[1][0], images=images)
    )


def test_transport_of_numbers_keeps_their_order():
    images = slow.images((24, 1, 1, 1), seed=3)
    found = noise_of(pairing.OptimalTransport(), ONES, images)
    np.testing.assert_array_equal(np.argsort(found.ravel()), np.argsort(images.ravel()))


@pytest.mark.parametrize(("options", "metric"), PERMUTING)
def test_padding_takes_what_is_left(options, metric):
    weights = ONES.at[jnp.array([0, 5, 23])].set(0.0)
    real = np.flatnonzero(np.asarray(weights))
    found = noise_of(options, weights)
    cost = cdist(flat(IMAGES)[real], flat(PLAIN), metric)
    rows, columns = linear_sum_assignment(cost)
    np.testing.assert_array_equal(found[real[rows]], PLAIN[columns])


def test_nearest_of_k_takes_the_nearest():
    found = noise_of(pairing.Nearest(candidates=4))
    drawn = np.asarray(jax.random.normal(KEY, (4, *SHAPE)))
    for i, image in enumerate(IMAGES):
        distances = [((image - drawn[k, i]) ** 2).sum() for k in range(4)]
        np.testing.assert_array_equal(found[i], drawn[np.argmin(distances), i])
    assert len({np.argmin(((IMAGES - d) ** 2).sum((1, 2, 3))) for d in drawn}) > 1


@pytest.mark.parametrize("options", [pairing.Immiscible(), pairing.Nearest()])
def test_the_mesh_does_not_matter(axes_mesh, options):
    sharding = NamedSharding(axes_mesh(data=8), PartitionSpec("data"))
    images = jax.device_put(IMAGES, sharding)
    call = jax.jit(lambda x, w: pairing.pair(options, KEY, x, w))
    np.testing.assert_array_equal(call(images, ONES), noise_of(options))


def test_one_candidate_is_refused():
    (problem,) = pairing.Nearest(candidates=1).problems("p", config.Config())
    assert problem.startswith("p.candidates=1: must be at least 2")
