"""The kernel distance of features (KID): a squared MMD without bias at any N.

`MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)` over pairs of different rows,
k(x, y) = (x . y / F + 1)^3 (Binkowski et al. 2018, 1801.01401; there of Inception).
Between samples of one distribution it is 0 on average, and so can be negative.
"""

import dataclasses

import numpy as np

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel distance.

    Attributes:
      distance: the mean over subsets.
      error: its standard error, from the spread of the subsets.
      count: N, rows of each side that were compared.
      subsets: how many disjoint ones.
    """

    distance: float
    error: float
    count: int
    subsets: int

    def __str__(self) -> str:
        return f"KID {self.distance:.4f} +- {self.error:.4f} (N={self.count})"


def squared_mmd(x_nf: np.ndarray, y_mf: np.ndarray) -> float:
    """The unbiased estimate from features (N, F) and (M, F), of two rows or more."""
    n, m = len(x_nf), len(y_mf)
    within_x, within_y = _kernel(x_nf, x_nf), _kernel(y_mf, y_mf)
    return float(
        (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
        + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
        - 2 * _kernel(x_nf, y_mf).mean()
    )


def _kernel(x_nf: np.ndarray, y_mf: np.ndarray) -> np.ndarray:
    x_nf, y_mf = np.asarray(x_nf, np.float64), np.asarray(y_mf, np.float64)
    return (x_nf @ y_mf.T / x_nf.shape[1] + 1) ** 3


def compare(
    samples_nf: np.ndarray, real_mf: np.ndarray, seed: int = 0, subsets: int = 10
) -> Kernel:
    """The kernel distance of samples from real images.

    As many rows of both are drawn and split into disjoint subsets, whose estimates are
    independent: their mean has no bias, and their spread gives its error.

    Args:
      samples_nf: features of samples.
      real_mf: of real images.
      seed: of the order; rows may be sorted by class.
      subsets: how many.

    Raises:
      UserError: too few rows for subsets of two, or fewer than two subsets.
    """
    size = min(len(samples_nf), len(real_mf)) // max(subsets, 1)
    if size < 2 or subsets < 2:
        raise UserError(
            f"kernel distance of {len(samples_nf)} samples from {len(real_mf)} images "
            f"in {subsets} subsets: needs two subsets of two rows or more of each; "
            "make more samples or take fewer subsets"
        )
    rng = np.random.default_rng(seed)
    x, y = (
        part[rng.permutation(len(part))[: size * subsets]].reshape(subsets, size, -1)
        for part in (np.asarray(samples_nf), np.asarray(real_mf))
    )
    found = [squared_mmd(x[s], y[s]) for s in range(subsets)]
    error = np.std(found, ddof=1) / np.sqrt(subsets)
    return Kernel(float(np.mean(found)), float(error), size * subsets, subsets)
