"""Nearest neighbours: does the model copy its training images, and reach them all?"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from moe_jax.errors import UserError

_CHUNK = 512  # rows whose distances from all others are in memory at once


@dataclasses.dataclass(frozen=True)
class Copies:
    """How near samples lie to training images, beside how near held-out images lie.

    Attributes:
      distance: (N,), of each sample from its nearest training image, Euclidean.
      index: int64 (N,), which one that is.
      held_out_distance: (M,), the same of held-out images.
      share: of samples that lie nearer than 95 % of the held-out images do. New images
        would give 0.05 on average; a model that copies gives 1.
      ratio: median distance of the samples over that of the held-out images.
    """

    distance: np.ndarray
    index: np.ndarray
    held_out_distance: np.ndarray
    share: float
    ratio: float

    def __str__(self) -> str:
        return (
            f"nearest training image: median distance {np.median(self.distance):.3f}, "
            f"{self.ratio:.2f} times that of held-out images; {self.share:.1%} of the "
            "samples nearer than 95 % of those are (5 % if nothing is copied)"
        )


def nearest(x_nd: np.ndarray, others_md: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's nearest row of others: Euclidean distance (N,) and index (N,).

    Axes behind the first are joined. The index is found in float32, the distance of the
    pair is then taken in float64: an exact copy has distance 0.

    Raises:
      UserError: there are no others.
    """
    x_nd, others_md = _flat(x_nd), _flat(others_md)
    if not len(others_md):
        raise UserError("nearest neighbours: there is nothing to compare with")
    index = np.zeros(len(x_nd), np.int64)
    for rows, squared in _squared_distances(x_nd, others_md):
        index[rows] = squared.argmin(axis=1)
    difference = x_nd.astype(np.float64) - others_md[index]
    return np.sqrt((difference**2).sum(axis=1)), index


def copies(samples: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Copies:
    """Whether samples lie nearer to training images than new real images do.

    Args:
      samples: (N, ...), pixels or features.
      train: (R, ...).
      held_out: (M, ...).

    Raises:
      UserError: one of them is empty.
    """
    if not len(samples) or not len(held_out):
        raise UserError(
            f"copies of training images: {len(samples)} samples and {len(held_out)} "
            "held-out images; needs both"
        )
    distance, index = nearest(samples, train)
    of_held_out, _ = nearest(held_out, train)
    return Copies(
        distance=distance,
        index=index,
        held_out_distance=of_held_out,
        share=float(np.mean(distance < np.quantile(of_held_out, 0.05))),
        ratio=float(np.median(distance) / max(np.median(of_held_out), 1e-12)),
    )


def precision_recall(
    samples_nf: np.ndarray, real_mf: np.ndarray, k: int = 3, seed: int = 0
) -> tuple[float, float]:
    """Precision and recall of samples (Kynkaanniemi et al. 2019, 1904.06991).

    Precision is the share of samples that lie within the distance of some real image
    from its k-th neighbour among the real ones; recall the same the other way round.
    Both depend on the number of rows: as many of each are drawn.

    Raises:
      UserError: no more than k rows.
    """
    count = min(len(samples_nf), len(real_mf))
    if count <= k:
        raise UserError(
            f"precision and recall of {len(samples_nf)} samples and {len(real_mf)} "
            f"images: needs more than k={k} of each"
        )
    rng = np.random.default_rng(seed)
    x, y = (
        _flat(part)[rng.permutation(len(part))[:count]].astype(np.float64)
        for part in (samples_nf, real_mf)
    )
    return _covered(x, y, k), _covered(y, x, k)


def _covered(x_nf: np.ndarray, by_nf: np.ndarray, k: int) -> float:
    """The share of x within the k-th neighbour's distance of some row of `by`."""
    reach = np.zeros(len(by_nf))
    for rows, squared in _squared_distances(by_nf, by_nf):
        # The nearest is the row itself.
        reach[rows] = np.partition(squared, k, axis=1)[:, k]
    inside = [(d <= reach).any(axis=1) for _, d in _squared_distances(x_nf, by_nf)]
    return float(np.concatenate(inside).mean())


def _flat(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _squared_distances(
    x_nd: np.ndarray, others_md: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of x, some at a time, and their squared distances from all others."""
    squares_m = (others_md**2).sum(axis=1)
    for begin in range(0, len(x_nd), _CHUNK):
        rows = slice(begin, min(begin + _CHUNK, len(x_nd)))
        part = x_nd[rows]
        product = part @ others_md.T
        product *= -2
        product += (part**2).sum(axis=1)[:, None]
        product += squares_m
        yield rows, product
