"""What a denoiser is told beside the image: the time, a class or a vector; and how."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import config
from moe_jax.nn import linear, module

# Cosines and sines of the time.
TIME_WIDTH = 256
_STD = 0.02
_IMAGES = ("batch", None)


def timestep_waves(time: jax.Array, width: int = TIME_WIDTH) -> jax.Array:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / (width / 2)) (DiT, section 1).

    Args:
      time: (B,), as the network is to see it.
      width: even.

    Returns:
      (B, width), float32 or wider.
    """
    dtype = module.accumulation_dtype(time.dtype)
    half = width // 2
    speeds = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=dtype))
    angles = time.astype(dtype)[:, None] * speeds
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TwoLayers(nnx.Module):
    """`W_2 silu(W_1 x + b_1) + b_2` of one vector an image."""

    def __init__(self, into: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        both = dict(std=_STD, dtype=dtype, rngs=rngs)
        self.first = linear.Affine(into, (width,), (None, "embed"), **both)
        self.second = linear.Affine(width, (width,), ("embed", None), **both)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, into) -> (B, width)."""
        return self.second(jax.nn.silu(self.first(x, _IMAGES)), _IMAGES)


class TimestepEmbedding(TwoLayers):
    """Two layers on `timestep_waves`."""

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(TIME_WIDTH, width, dtype=dtype, rngs=rngs)

    def __call__(self, time: jax.Array, dtype: str) -> jax.Array:
        """(B,) -> (B, width) of the type `dtype`."""
        return super().__call__(timestep_waves(time).astype(dtype))


class LabelEmbedding(nnx.Module):
    """A vector a class, and where `null` one more for "no class", the last."""

    def __init__(
        self, classes: int, width: int, *, null: bool, dtype: str, rngs: nnx.Rngs
    ):
        shape, axes = (classes + null, width), (None, "embed")
        self.table = module.matrix(rngs, shape, axes, std=_STD, dtype=dtype)

    def __call__(self, label: jax.Array, dtype: str) -> jax.Array:
        """(B,) int32 -> (B, width) of the type `dtype`."""
        return linear.row(self.table, label, dtype)


class VectorEmbedding(TwoLayers):
    """Two layers on a vector, or where `null` on a learned one for "no condition"."""

    def __init__(
        self, into: int, width: int, *, null: bool, dtype: str, rngs: nnx.Rngs
    ):
        super().__init__(into, width, dtype=dtype, rngs=rngs)
        if null:
            self.null = module.param(rngs, (into,), (None,), std=_STD, dtype=dtype)

    def __call__(self, x: jax.Array, none: jax.Array | None, dtype: str) -> jax.Array:
        """(B, into), and (B,) bool where there is no condition -> (B, width)."""
        if none is not None:
            x = jnp.where(none[:, None], self.null[...].astype(x.dtype), x)
        return super().__call__(x.astype(dtype))


def dropped(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Bools of `shape`: which images lose their condition.

    Classifier-free guidance (Ho and Salimans 2022) needs a model that knows both.
    """
    return jax.random.uniform(key, shape, jnp.float32) < rate


@config.node
class Perturbation(config.Node):
    """Noise on the embedded class or vector, in training only.

    Chen et al. 2024 (2405.20494), "conditional embedding perturbation".

    Attributes:
      strength: g; every entry of a D-vector moves by g / sqrt(D): the half width of a
        "uniform", the standard deviation of a "normal" draw. (The paper leaves open
        whether the latter is a variance.) 0: none.
      distribution: "uniform" or "normal".
    """

    strength: float = 0.0
    distribution: str = "uniform"

    def problems(self, path, root):
        if self.strength < 0:
            yield f"{path}.strength={self.strength}: must not be negative"
        if self.distribution not in ("uniform", "normal"):
            yield (
                f"{path}.distribution={self.distribution!r}: must be 'uniform' or "
                "'normal'"
            )


def perturbed(
    options: Perturbation, key: jax.Array | None, condition: jax.Array
) -> jax.Array:
    """The condition (B, D) with noise; as it is where key is None (evaluation)."""
    if key is None or not options.strength:
        return condition
    size = options.strength / math.sqrt(condition.shape[-1])
    shape, dtype = condition.shape, condition.dtype
    if options.distribution == "normal":
        return condition + size * jax.random.normal(key, shape, dtype)
    return condition + jax.random.uniform(key, shape, dtype, -size, size)


class Modulation(nnx.Module):
    """Shifts, scales and gates from the condition: a linear layer that begins at zero.

    Args:
      width: D.
      count: how many of (B, D).
      dtype: of the weights.
      rngs: not drawn from.
    """

    def __init__(self, width: int, count: int, *, dtype: str, rngs: nnx.Rngs):
        self.linear = linear.Affine(
            width,
            (count, width),
            ("embed", None, "mlp"),
            std=None,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        """(B, D) -> `count` of (B, 1, D)."""
        made = self.linear(jax.nn.silu(condition), _IMAGES)
        return list(jnp.split(made, made.shape[1], axis=1))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift` of (B, S, D) and (B, 1, D) (adaLN)."""
    return x * (1 + scale) + shift
