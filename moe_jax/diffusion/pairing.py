"""Which noise goes with which image.

Each is `(options, key, images, weights) -> eps`: noise (B, H, W, C) in the order of the
images; only noise is moved, so that labels stay with their images. Padding, rows of
weight 0, takes what is left over. B is the whole batch, over all devices: distances and
assignment are computed in the global view, the same on every mesh.

The assignment is exact, by the Hungarian algorithm in JAX (of optax): no callback. Its
time grows as B^3.
"""

import jax
import jax.numpy as jnp
import optax

from moe_jax import config

Array = jax.Array


@config.node
class Independent(config.PairingConfig):
    """Any noise for any image."""


@config.node
class Immiscible(config.PairingConfig):
    """The assignment with the least sum of distances (Li et al. 2024, 2406.12303).

    The batch's noise is permuted, so its distribution is kept. Distances are float32;
    the published code rounds them to float16.
    """


@config.node
class OptimalTransport(config.PairingConfig):
    """The least sum of squared distances: minibatch optimal transport.

    Pooladian et al. 2023 (2304.14772), Tong et al. 2023 (2302.00482).
    """


@config.node
class Nearest(config.PairingConfig):
    """Of k noises drawn for an image the nearest one (Immiscible Diffusion's KNN).

    Needs no exchange between images; noise is then no longer quite normal.

    Attributes:
      candidates: k.
    """

    candidates: int = 4

    def problems(self, path, root):
        if self.candidates < 2:
            yield (
                f"{path}.candidates={self.candidates}: must be at least 2; "
                "Independent() draws one"
            )


def _independent(options, key, images, weights):
    return jax.random.normal(key, images.shape, images.dtype)


def square_distances(images: Array, noise: Array) -> Array:
    """(B, B): of image i and noise j, float32 or wider."""
    x, n = (a.reshape(len(a), -1) for a in (images, noise))
    product = jnp.matmul(x, n.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(n**2, axis=1)[None]
    return jnp.maximum(norms - 2 * product, 0)


def assigned(cost: Array, noise: Array) -> Array:
    """Noise in the order in which the (B, B) cost of (image, noise) is least."""
    image, taken = optax.assignment.hungarian_algorithm(cost)
    return noise[taken[jnp.argsort(image)]]


def _matched(key, images, weights, power):
    noise = jax.random.normal(key, images.shape, images.dtype)
    cost = square_distances(images, noise) ** power
    # Where an image does not count, neither does its distance.
    return assigned(cost * (weights > 0)[:, None], noise)


def _immiscible(options, key, images, weights):
    return _matched(key, images, weights, 0.5)


def _optimal_transport(options, key, images, weights):
    return _matched(key, images, weights, 1)


def _nearest(options, key, images, weights):
    shape = (options.candidates, *images.shape)
    noise = jax.random.normal(key, shape, images.dtype)
    axes = tuple(range(2, len(shape)))
    best = jnp.argmin(jnp.sum((noise - images) ** 2, axis=axes), axis=0)
    return noise[best, jnp.arange(len(images))]


PAIRINGS = {
    Independent: _independent,
    Immiscible: _immiscible,
    OptimalTransport: _optimal_transport,
    Nearest: _nearest,
}


def pair(
    options: config.PairingConfig, key: Array, images: Array, weights: Array
) -> Array:
    """Noise for images (B, H, W, C) with weights (B,), 0 for padding."""
    return PAIRINGS[type(options)](options, key, images, weights)
