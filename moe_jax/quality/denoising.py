"""The held-out denoising loss by noise time, and bits per dimension.

The loss is the primary figure: cheap, of little variance, and made of the same noise
and times for every model. What an image is given depends on the seed and on its row
number among the held-out images alone, so batches of any size, on any mesh, add up to
the same.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.diffusion import losses
from moe_jax.diffusion.processes.base import Process
from moe_jax.diffusion.processes.variance_preserving import VariancePreservingProcess
from moe_jax.tree import struct

Array = jax.Array
Denoiser = Callable[[Array, Array], Array]

BINS = 10


@struct
class LossSums:
    """Sums over images, by bins of noise time; bin 0 is next to data. Add them up.

    Attributes:
      loss: (bins,), of the mean squared error of what the process predicts.
      square: (bins,), of its square.
      weight: (bins,), of the images' weights.
    """

    loss: Array
    square: Array
    weight: Array


@struct
class BitSums:
    """Sums over images, in bits per dimension. Add them up.

    Attributes:
      total: (), of the variational bound.
      prior: (), its part that no model changes.
      bins: (bins,), its other terms, those of a bin of noise time together.
      weight: (), of the images' weights.
    """

    total: Array
    prior: Array
    bins: Array
    weight: Array


def loss_sums(
    process: Process,
    denoise: Denoiser,
    batch: Mapping[str, Array],
    row_b: Array,
    *,
    draws: int = BINS,
    bins: int = BINS,
    seed: int = 0,
) -> LossSums:
    """The denoising loss of a batch, by noise time; `draws` evaluations.

    An image gets `draws` times that stand evenly in (0, 1), all shifted by one random
    number of its own: with as many draws as bins it is once in each. The noise is fresh
    for each of them.

    Args:
      process: of the noise.
      denoise: `(x (B, H, W, C), time (B,)) -> prediction (B, H, W, C_out)`, which
        knows the batch's labels.
      batch: "images" (B, H, W, C) and "weights" (B,); padding has weight 0.
      row_b: int32 (B,), the images' numbers among all that are held out, the same
        however these are cut into batches.
      draws: times an image.
      bins: of equal width.
      seed: of times and noise.
    """
    x0, weight_b = batch["images"], batch["weights"]
    keys = row_keys(seed, row_b)
    shift_b = jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32))(keys)

    def draw(number: Array) -> tuple[Array, Array, Array]:
        place_b = shift_b + number  # in [0, draws)
        edge = 2.0**-20  # Some processes divide by 0 at 0 and at 1.
        time = process.from_noise_time(jnp.clip(place_b / draws, edge, 1 - edge))
        eps = losses.noise_of_images(keys, number, x0)
        x = process.add_noise(x0, eps, time)
        loss_b = losses.mse(denoise(x, time), process.target(x0, eps, time))
        bin_b = jnp.minimum((place_b * (bins / draws)).astype(jnp.int32), bins - 1)
        weight = jax.nn.one_hot(bin_b, bins, axis=0) * weight_b  # (bins, B)
        # A weight of 0 also hides what is not finite. A TPU would round a product.
        add = lambda b: jnp.sum(jnp.where(weight > 0, weight * b, 0), axis=-1)
        return add(loss_b), add(loss_b**2), weight.sum(axis=-1)

    found = jax.lax.map(draw, jnp.arange(draws))
    loss, square, weight = (part.sum(axis=0) for part in found)
    return LossSums(loss=loss, square=square, weight=weight)


def row_keys(seed: int, row_b: Array) -> Array:
    """Keys (B,) of rows, by a generator whose draws no batch and no mesh changes."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_b)


def bit_sums(
    process: VariancePreservingProcess,
    denoise: Denoiser,
    batch: Mapping[str, Array],
    row_b: Array,
    *,
    num_images: int,
    bins: int = BINS,
    seed: int = 0,
) -> BitSums:
    """The variational bound of a batch of pixels, T evaluations of the network.

    Args:
      process: DDPM's.
      denoise: see `loss_sums`.
      batch: "images" in [-1, 1] of 255 levels, no latents; "weights".
      row_b: see `loss_sums`.
      num_images: rows from this number on do not count, and a batch without others
        need not be asked for.
      bins: of equal width.
      seed: of the noise.
    """
    keys = row_keys(seed, row_b)
    found = losses.bits_per_dimension(process, denoise, batch["images"], keys)
    weight_b = jnp.where(row_b < num_images, batch["weights"], 0)
    add = lambda value: jnp.sum(jnp.where(weight_b > 0, weight_b * value, 0), axis=-1)
    steps = process.options.steps
    terms = jnp.zeros(bins).at[np.arange(steps) * bins // steps].add(add(found.terms))
    return BitSums(
        total=add(found.total),
        prior=add(found.prior),
        bins=terms,
        weight=jnp.sum(weight_b),
    )


def total(parts: Iterable[LossSums | BitSums]) -> LossSums | BitSums | None:
    """The sum of all parts, on the host in float64; None where there are none."""
    found = None
    for part in parts:
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(part))
        found = part if found is None else jax.tree.map(np.add, found, part)
    return found


def loss_figures(sums: LossSums) -> dict[str, float]:
    """The loss by name.

    Returns:
      `denoising_loss`, the mean over the bins, each counting as much; its standard
      error `denoising_error`, as if draws were independent; and
      `denoising_loss/0.0-0.1` and so on by bin. Bins without draws are left out.
    """
    loss, square, weight = (
        np.asarray(a, np.float64) for a in (sums.loss, sums.square, sums.weight)
    )
    there = weight > 0
    if not there.any():
        return {}
    mean = loss[there] / weight[there]
    variance = np.maximum(square[there] / weight[there] - mean**2, 0) / weight[there]
    count = len(weight)
    names = [
        f"denoising_loss/{i / count:.3g}-{(i + 1) / count:.3g}" for i in range(count)
    ]
    names = [name for name, kept in zip(names, there, strict=True) if kept]
    return {
        "denoising_loss": float(mean.mean()),
        "denoising_error": float(np.sqrt(variance.sum()) / len(mean)),
    } | dict(zip(names, map(float, mean), strict=True))


def bit_figures(sums: BitSums) -> dict[str, float]:
    """`bits_per_dimension`, its part `bits_per_dimension/prior`, and those of bins."""
    weight = float(sums.weight)
    if not weight:
        return {}
    bins = np.asarray(sums.bins, np.float64) / weight
    return {
        "bits_per_dimension": float(sums.total) / weight,
        "bits_per_dimension/prior": float(sums.prior) / weight,
    } | {
        f"bits_per_dimension/{i / len(bins):.3g}-{(i + 1) / len(bins):.3g}": float(b)
        for i, b in enumerate(bins)
    }
