"""A scan over blocks whose backward pass makes again what was not kept."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def scan_blocks(
    body: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    policies: Sequence[Callable[..., Any] | None],
    carry: PyTree,
    layers: PyTree,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` over layers, each under the policy whose turn it is.

    With several policies a turn of the loop takes as many layers, one after another:
    the stacked arrays are seen as (L / n, n, ...), so that none is cut in two.

    Args:
      body: `(carry, layer) -> (carry, outputs)`.
      policies: of `jax.checkpoint`, taken in turn; None keeps everything. Their number
        divides that of the layers.
      carry: what goes from layer to layer.
      layers: pytree of (L, ...).

    Returns:
      The last carry, and outputs stacked to (L, ...).
    """
    bodies = [under(policy, body) for policy in policies]
    if len(bodies) == 1:
        return jax.lax.scan(bodies[0], carry, layers)

    def turn(carry, layers):
        found = []
        for i, one in enumerate(bodies):
            carry, out = one(carry, jax.tree.map(lambda a, i=i: a[i], layers))
            found.append(out)
        return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    cut = lambda a: a.reshape(-1, len(bodies), *a.shape[1:])
    carry, found = jax.lax.scan(turn, carry, jax.tree.map(cut, layers))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)


def under(policy: Callable[..., Any] | None, body: Callable) -> Callable:
    """The function, whose derivative computes again what the policy does not keep."""
    if policy is None:
        return body
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
