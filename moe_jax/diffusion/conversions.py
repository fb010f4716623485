"""What a network may predict of x = alpha x0 + sigma eps, and how to get the rest.

| kind | prediction |
|---|---|
| "x0" | the data |
| "epsilon" | the noise |
| "v" | alpha eps - sigma x0 (Salimans & Ho 2022) |
| "flow" | eps - x0, the velocity of the straight path with noise at time 1 |
| "flow_to_data" | x0 - eps, the same with data at time 1 |
| "score" | -eps / sigma, the gradient of log p(x) |

The formulas hold for any alpha and sigma that broadcast against x. Where alpha is 0
(noise alone), "epsilon" and "score" say nothing of x0; where sigma is 0, "x0" says
nothing of eps: the division by zero is left to be seen.
"""

import jax

Array = jax.Array
KINDS = ("x0", "epsilon", "v", "flow", "flow_to_data", "score")


def target(kind: str, x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What a perfect network would predict, in the shape of x0."""
    if kind == "x0":
        return x0
    if kind == "epsilon":
        return eps
    if kind == "v":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    if kind == "flow_to_data":
        return x0 - eps
    if kind == "score":
        return -eps / sigma
    raise ValueError(f"kind {kind!r}: must be one of {KINDS}")


def split(
    kind: str, prediction: Array, x: Array, alpha: Array, sigma: Array
) -> tuple[Array, Array]:
    """x0 and eps as a prediction at x has them; alpha x0 + sigma eps = x."""
    if kind == "x0":
        return prediction, (x - alpha * prediction) / sigma
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if kind == "score":
        return split("epsilon", -sigma * prediction, x, alpha, sigma)
    if kind == "v":
        norm = alpha**2 + sigma**2
        return (
            (alpha * x - sigma * prediction) / norm,
            (sigma * x + alpha * prediction) / norm,
        )
    if kind == "flow":
        norm = alpha + sigma
        return (x - sigma * prediction) / norm, (x + alpha * prediction) / norm
    if kind == "flow_to_data":
        return split("flow", -prediction, x, alpha, sigma)
    raise ValueError(f"kind {kind!r}: must be one of {KINDS}")


def convert(
    old: str, new: str, prediction: Array, x: Array, alpha: Array, sigma: Array
) -> Array:
    """A prediction of one kind as that of another."""
    x0, eps = split(old, prediction, x, alpha, sigma)
    return target(new, x0, eps, alpha, sigma)


def weight_from_x0(kind: str, weight: Array, alpha: Array, sigma: Array) -> Array:
    """The weight of a squared error of `kind` that equals `weight` on that of x0.

    At a given x, an error d of x0 is one of -alpha / sigma d of eps, -d / sigma of the
    velocity and so on; the weights differ by the square.
    """
    if kind == "x0":
        return weight
    if kind == "epsilon":
        return weight * (sigma / alpha) ** 2
    if kind == "v":
        return weight * (sigma / (alpha**2 + sigma**2)) ** 2
    if kind in ("flow", "flow_to_data"):
        return weight * (sigma / (alpha + sigma)) ** 2
    if kind == "score":
        return weight * (sigma**2 / alpha) ** 2
    raise ValueError(f"kind {kind!r}: must be one of {KINDS}")
