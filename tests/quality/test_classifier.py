"""The classifier learns the digits, and is the same every time."""

import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.data.images import pixels, sources
from moe_jax.errors import UserError
from moe_jax.quality import classifier


@pytest.fixture(scope="module")
def digits():
    """Images and labels of 1437 for training, and of 360 held out."""
    with np.load(importlib.resources.files(sources) / "digits.npz") as arrays:
        counts, labels = arrays["images"], arrays["labels"].astype(np.int32)
    images = pixels.values(np.round(counts * (255 / 16)).astype(np.uint8)[..., None])
    order = np.random.default_rng(0).permutation(len(images))
    held_out, train = order[:360], order[360:]
    return images[train], labels[train], images[held_out], labels[held_out]


@pytest.fixture(scope="module")
def trained(digits):
    return classifier.train(*digits[:2], 10, seed=1, num_features=24)


def test_it_knows_held_out_digits(digits, trained):
    *_, images, labels = digits
    assert trained.accuracy(images, labels) > 0.95
    hits = trained.logits(images).argmax(-1) == labels
    assert trained.accuracy(images, labels) == np.mean(hits)
    # Labels by chance would be known by chance.
    assert trained.accuracy(images, np.roll(labels, 1)) < 0.2


def test_on_one_device_also_where_a_mesh_is_set(
    digits, trained, axes_mesh, monkeypatch
):
    want = trained.features(digits[2])
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 1)
    monkeypatch.setattr(classifier, "_MOST_STEPS", 1)
    with jax.set_mesh(axes_mesh(data=4)):
        np.testing.assert_allclose(trained.features(digits[2]), want, atol=1e-5)
        classifier.train(*digits[:2], 10, num_features=8).features(digits[2])


def test_features_do_not_know_the_batch(digits, trained):
    images = np.concatenate([digits[2], digits[2]])  # more than one call takes
    features = trained.features(images)
    assert features.shape == (720, 24) and features.dtype == np.float32
    np.testing.assert_allclose(features[:360], features[360:], atol=1e-5)
    np.testing.assert_allclose(trained.features(images[7:9]), features[7:9], atol=1e-5)
    assert trained.features(images[:0]).shape == (0, 24)
    # The logits are linear in the features.
    joined = np.concatenate([features, np.ones((720, 1), np.float32)], axis=1)
    logits = trained.logits(images)
    fitted = joined @ np.linalg.lstsq(joined, logits, rcond=None)[0]
    np.testing.assert_allclose(fitted, logits, atol=1e-3)


def test_seed_and_images_decide(digits, monkeypatch):
    monkeypatch.setattr(classifier, "_FEWEST_STEPS", 3)
    monkeypatch.setattr(classifier, "_MOST_STEPS", 3)
    images, labels, held_out, _ = digits
    first, other = (
        classifier.train(images, labels, 10, seed, 8).features(held_out)
        for seed in (1, 2)
    )
    # The scale of pixels, or of latents, is taken out.
    scaled = classifier.train(images * 7 + 3, labels, 10, 1, 8)
    np.testing.assert_allclose(scaled.features(held_out * 7 + 3), first, atol=1e-3)
    assert np.abs(first - other).max() > 0.05


@pytest.mark.parametrize(
    ("shape", "joined"),
    [
        ((8, 8, 1), 2 * 2 * 32),
        ((28, 28, 1), 7 * 7 * 32),
        ((5, 16, 3), 2 * 4 * 32),
        ((256, 256, 4), 4 * 4 * 64),
        ((1, 1, 1), 32),
    ],
)
def test_any_size(shape, joined):
    def run():
        network = classifier._Network(shape, 3, 2, nnx.Rngs(0))
        return network.features.kernel[...], network(jnp.zeros((6, *shape)))

    kernel, (features, logits) = jax.eval_shape(run)
    assert kernel.shape == (joined, 3)
    assert features.shape == (6, 3) and logits.shape == (6, 2)


def test_order_takes_every_image_once_an_epoch():
    rows = np.concatenate(list(classifier._order(320, 5, seed=3)))  # two epochs
    assert sorted(rows[:320]) == sorted(rows[320:]) == list(range(320))
    assert (rows[:320] != rows[320:]).any()


def test_width_by_held_out_images():
    assert [classifier.num_features(n) for n in (5, 180, 640, 9999)] == [1, 18, 64, 64]


@pytest.mark.parametrize(("count", "classes"), [(4, 1), (0, 10)])
def test_nothing_to_tell_apart(count, classes):
    with pytest.raises(UserError, match="give images of two classes"):
        classifier.train(np.zeros((count, 4, 4, 1)), np.zeros(count), classes)
