"""All figures at once, of samples whose worth is known."""

import json

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.quality import samples


class Mean:
    """Two features, the means of the halves of an image; its class is the larger."""

    def features(self, images):
        return images.mean((2, 3))

    def accuracy(self, images, labels):
        return float(np.mean(self.features(images).argmax(1) == labels))


@pytest.fixture
def real():
    """`real(count, seed)`: images of two classes, and their labels."""

    def make(count, seed):
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % 2
        images = rng.normal(size=(count, 2, 3, 1))
        images[np.arange(count), labels] += 4
        return images, labels

    return make


def test_real_images_are_at_the_floor_and_copies_are_seen(real):
    train, held_out = real(2000, 0)[0], real(200, 1)
    new, labels = real(200, 2)
    good = samples.judge(Mean(), new, labels, train, *held_out)
    assert good.frechet.distance < good.frechet.floor_high + 0.1
    assert abs(good.kid.distance - good.kid_floor.distance) < 5 * good.kid.error
    assert good.accuracy > 0.95 and good.held_out_accuracy > 0.95
    assert good.copies.share < 0.15 and good.precision > 0.8 and good.recall > 0.8
    bad = samples.judge(Mean(), train[:200] * 0.5, labels, train, *held_out)
    assert bad.frechet.low > good.frechet.floor_high
    copied = samples.judge(Mean(), train[:200], None, train, *held_out)
    assert copied.copies.share == 1 and copied.accuracy is None
    assert copied.frechet.floor == good.frechet.floor


def test_figures_and_text(real):
    train, held_out = real(200, 0)[0], real(50, 1)
    new, labels = real(60, 2)
    found = samples.judge(Mean(), new, labels, train, *held_out)
    figures = found.figures()
    assert figures["fd"] == found.frechet.distance and figures["fd_count"] == 50
    assert figures["accuracy"] == found.accuracy
    json.dumps(figures)
    text = str(found)
    assert "FID" not in text and "floor" in text and "classified as asked" in text
    unlabelled = samples.judge(Mean(), new, None, train, *held_out)
    assert "accuracy" not in unlabelled.figures()
    assert "classified" not in str(unlabelled)


def test_too_few_samples(real):
    train, held_out = real(200, 0)[0], real(50, 1)
    with pytest.raises(UserError, match="19 samples in 2 features: needs at least 20"):
        samples.judge(Mean(), real(19, 2)[0], None, train, *held_out)
