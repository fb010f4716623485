"""All figures of samples against real images, in one call."""

import dataclasses

import numpy as np

from moe_jax.quality import frechet, kid, nearest
from moe_jax.quality.classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How samples compare with real images, in the features of a classifier.

    Attributes:
      frechet: with its floor and intervals.
      kid: of the samples from the training images.
      kid_floor: of held-out images from the training images.
      copies: nearest training images, by pixels (or latents).
      precision: share of samples within the real images.
      recall: share of real images within the samples.
      accuracy: share of the samples that the classifier takes for the class they were
        asked for; None without labels.
      held_out_accuracy: of real images: what perfect samples would have.
    """

    frechet: frechet.Frechet
    kid: kid.Kernel
    kid_floor: kid.Kernel
    copies: nearest.Copies
    precision: float
    recall: float
    accuracy: float | None
    held_out_accuracy: float

    def figures(self) -> dict[str, float]:
        """Numbers by name, for metrics."""
        found = {
            "fd": self.frechet.distance,
            "fd_low": self.frechet.low,
            "fd_high": self.frechet.high,
            "fd_floor": self.frechet.floor,
            "fd_count": self.frechet.count,
            "kid": self.kid.distance,
            "kid_error": self.kid.error,
            "kid_floor": self.kid_floor.distance,
            "precision": self.precision,
            "recall": self.recall,
            "copies": self.copies.share,
            "nearest_ratio": self.copies.ratio,
            "held_out_accuracy": self.held_out_accuracy,
        }
        if self.accuracy is not None:
            found["accuracy"] = self.accuracy
        return found

    def __str__(self) -> str:
        real = f"{self.held_out_accuracy:.1%} of held-out images"
        lines = [
            str(self.frechet),
            f"{self.kid}; floor {self.kid_floor.distance:.4f} +- "
            f"{self.kid_floor.error:.4f}",
            f"precision {self.precision:.3f}, recall {self.recall:.3f}",
            str(self.copies),
        ]
        if self.accuracy is not None:
            lines.append(f"classified as asked: {self.accuracy:.1%}; {real}")
        return "\n".join(lines)


def judge(
    classifier: Classifier,
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: np.ndarray,
    held_out: np.ndarray,
    held_out_labels: np.ndarray,
    seed: int = 0,
) -> Judgement:
    """Compares samples with real images.

    Args:
      classifier: of these training images.
      samples: (N, H, W, C).
      labels: (N,), the classes that were asked for, or None.
      train: (R, H, W, C), the reference.
      held_out: (M, H, W, C).
      held_out_labels: (M,).
      seed: of what is drawn.

    Raises:
      UserError: too few images; see `frechet.compare`.
    """
    x_nf, x_rf, x_mf = map(classifier.features, (samples, train, held_out))
    distance = frechet.compare(x_nf, x_mf, x_rf, seed)
    precision, recall = nearest.precision_recall(x_nf, x_rf, seed=seed)
    return Judgement(
        frechet=distance,
        kid=kid.compare(x_nf, x_rf, seed),
        kid_floor=kid.compare(x_mf, x_rf, seed),
        copies=nearest.copies(samples, train, held_out),
        precision=precision,
        recall=recall,
        accuracy=None if labels is None else classifier.accuracy(samples, labels),
        held_out_accuracy=classifier.accuracy(held_out, held_out_labels),
    )
