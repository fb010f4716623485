"""The Frechet distance of features (FD), with its floor and its uncertainty.

It is the Wasserstein distance, squared, of normal distributions with the features'
means and covariances (Dowson and Landau 1982); Heusel et al. 2017 took features of
Inception and called it FID. Ours are of another network: this is never an FID, and
compares only where classifier, reference and N are the same.
"""

import dataclasses

import numpy as np

from moe_jax.errors import UserError

# Images for each feature, below which a covariance says little.
FEWEST_PER_FEATURE = 10


@dataclasses.dataclass(frozen=True)
class Moments:
    """Attributes: mean float64 (F,); covariance float64 (F, F), by count - 1."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Frechet:
    """A Frechet distance and what to hold it against.

    Attributes:
      distance: of the samples from the reference.
      low: lower end of its 95 % interval.
      high: upper end.
      floor: the distance of as many held-out real images from the same reference: what
        perfect samples would have.
      floor_low: lower end of its interval.
      floor_high: upper end.
      count: N, the samples and the held-out images that were compared.
      reference_count: images in the reference.
    """

    distance: float
    low: float
    high: float
    floor: float
    floor_low: float
    floor_high: float
    count: int
    reference_count: int

    def __str__(self) -> str:
        return (
            f"FD {self.distance:.3f} (95 % {self.low:.3f} to {self.high:.3f}); floor "
            f"{self.floor:.3f} ({self.floor_low:.3f} to {self.floor_high:.3f}) of as "
            f"many real images; N={self.count} against {self.reference_count}"
        )


def moments(x_nf: np.ndarray, weight_n: np.ndarray | None = None) -> Moments:
    """Mean and covariance of features (N, F); `weight_n`: how often a row counts."""
    x_nf = np.asarray(x_nf, np.float64)
    weight_n = np.ones(len(x_nf)) if weight_n is None else np.asarray(weight_n, float)
    count = weight_n.sum()
    mean = weight_n @ x_nf / count
    centred = x_nf - mean
    return Moments(mean, (centred * weight_n[:, None]).T @ centred / (count - 1))


def distance(a: Moments, b: Moments) -> np.ndarray:
    """`|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, at least 0.

    The trace of the root is that of `(R S_a R)^(1/2)` with R the root of S_b: both
    roots are of symmetric matrices, so singular covariances do no harm.

    Args:
      a: moments; with an axis in front of both, of many.
      b: moments.

    Returns:
      () or (B,).
    """
    values, vectors = np.linalg.eigh(b.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ a.covariance @ root)
    trace_root = np.sqrt(np.maximum(product, 0)).sum(-1)
    trace = np.trace(a.covariance, axis1=-2, axis2=-1) + np.trace(b.covariance)
    return np.maximum(((a.mean - b.mean) ** 2).sum(-1) + trace - 2 * trace_root, 0)


def interval(
    x_nf: np.ndarray, reference: Moments, seed: int = 0, resamples: int = 200
) -> tuple[float, float]:
    """The 95 % interval of the distance of features from a reference, at this N.

    Rows are drawn again with replacement. That adds to a distance about as much bias
    as N samples have already: the interval is the spread of the resampled distances
    about their own mean, put around the distance. It is of the expected distance at
    this N, bias included, as the floor has it. The reference is taken as it is. Next
    to the floor it is wider than it need be.
    """
    rng, count = np.random.default_rng(seed), len(x_nf)
    times_bn = [
        np.bincount(rng.integers(count, size=count), minlength=count)
        for _ in range(resamples)
    ]
    found = [moments(x_nf, times_n) for times_n in times_bn]
    drawn = distance(
        Moments(
            np.stack([one.mean for one in found]),
            np.stack([one.covariance for one in found]),
        ),
        reference,
    )
    here = float(distance(moments(x_nf), reference))
    low, high = np.quantile(drawn, [0.025, 0.975]) - drawn.mean()
    return max(0.0, here + float(low)), here + float(high)


def compare(
    samples_nf: np.ndarray,
    held_out_mf: np.ndarray,
    reference_rf: np.ndarray,
    seed: int = 0,
    resamples: int = 200,
) -> Frechet:
    """The distance of samples from the reference, and that of held-out real images.

    The distance falls with N, so both are of N rows, where N is the smaller number of
    the two; of the larger, rows are drawn by the seed.

    Args:
      samples_nf: features of samples.
      held_out_mf: of real images that are not in the reference.
      reference_rf: of real images, as a rule those of training.
      seed: of what is drawn.
      resamples: of the bootstrap.

    Raises:
      UserError: fewer than ten rows a feature, or features that are not finite.
    """
    _check(samples_nf, held_out_mf, reference_rf)
    count = min(len(samples_nf), len(held_out_mf))
    reference, rng = moments(reference_rf), np.random.default_rng(seed)
    found = []
    for x in (samples_nf, held_out_mf):
        part = x[rng.permutation(len(x))[:count]]
        ends = interval(part, reference, seed, resamples)
        found.extend([float(distance(moments(part), reference)), *ends])
    return Frechet(*found, count=count, reference_count=len(reference_rf))


def _check(samples_nf, held_out_mf, reference_rf) -> None:
    fewest = FEWEST_PER_FEATURE * samples_nf.shape[1]
    for what, x, mend in (
        ("samples", samples_nf, "make more samples"),
        ("held-out images", held_out_mf, "hold out more"),
        ("reference images", reference_rf, "take more"),
    ):
        if len(x) < fewest:
            raise UserError(
                f"Frechet distance of {len(x)} {what} in {x.shape[1]} features: needs "
                f"at least {fewest}, {FEWEST_PER_FEATURE} a feature; {mend}, or take a "
                "classifier of fewer features"
            )
        if not np.isfinite(x).all():
            raise UserError(
                f"Frechet distance: features of the {what} are not finite; the images "
                "have NaN or infinite pixels"
            )
