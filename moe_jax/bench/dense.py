"""A layer's useful work, and the rate of a dense matmul to hold it against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.bench.layer import Layer


def layer_flops(layer: Layer) -> float:
    """Of the experts on the rows that tokens choose, forward and backward.

    Three matrices, each forward, for the rows' gradient and for its own.
    """
    rows = layer.tokens * layer.top_k
    return 3 * 3 * 2 * rows * layer.d_model * layer.d_ff


def matmul(layer: Layer) -> tuple[Callable[[], jax.Array], float]:
    """All rows that tokens choose by one expert's matrix, on one device.

    Returns:
      The call, compiled, and its FLOPs.
    """
    rows = layer.tokens * layer.top_k
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, layer.d_model), jnp.dtype(layer.dtype))
    w = jax.random.normal(keys[1], (layer.d_model, layer.d_ff), x.dtype)
    run = jax.jit(jnp.matmul).lower(x, w).compile()
    return lambda: run(x, w), 2 * rows * layer.d_model * layer.d_ff
