"""A small classifier of the data at hand, whose features are where samples are judged.

It is trained on the training images in seconds, and is the same for the same images,
labels, seed and kind of device. Distances in its features compare only where the
classifier is the same; they are no FID.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import optax
from flax import nnx

from moe_jax.errors import UserError

# Few enough that a covariance can be known from some hundred images.
MOST_FEATURES = 64
_BATCH_SIZE, _FORWARD_SIZE = 128, 512
_EPOCHS = 6
_FEWEST_STEPS, _MOST_STEPS = 400, 4000
_LEARNING_RATE = 3e-3
# Labels of 0.9 and not of 1: features stay small, and what is wrong with images shows
# in them above the noise.
_SMOOTHING = 0.1
_WIDTHS = (16, 32, 64)  # of the convolutions; all later ones are as wide as the last
_LARGEST_SIDE = 7  # the image is halved down to it, at least twice
_PRECISION = jax.lax.Precision.HIGHEST  # TPUs would round the factors of products


class _Network(nnx.Module):
    """Convolutions of stride 2, a layer of features, and a layer of logits."""

    def __init__(self, shape: tuple[int, ...], width: int, classes: int, rngs):
        height, wide, channels = shape
        self.convolutions = nnx.List([])
        while len(self.convolutions) < 2 or max(height, wide) > _LARGEST_SIDE:
            out = _WIDTHS[min(len(self.convolutions), len(_WIDTHS) - 1)]
            self.convolutions.append(
                nnx.Conv(
                    channels, out, (3, 3), strides=2, precision=_PRECISION, rngs=rngs
                )
            )
            height, wide, channels = -(-height // 2), -(-wide // 2), out
        linear = functools.partial(nnx.Linear, precision=_PRECISION, rngs=rngs)
        self.features = linear(height * wide * channels, width)
        self.logits = linear(width, classes)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, C) -> features (B, F), logits (B, classes)."""
        for convolution in self.convolutions:
            x = jax.nn.gelu(convolution(x))
        features = jax.nn.gelu(self.features(x.reshape(len(x), -1)))
        return features, self.logits(features)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier; takes and gives numpy arrays, on one device.

    Attributes:
      num_classes: how many it tells apart.
      num_features: F.
      params: weights.
      graph: code of the network.
      mean: of the training images by channel, (C,).
      std: their standard deviation, (C,).
    """

    num_classes: int
    num_features: int
    params: nnx.State
    graph: nnx.GraphDef
    mean: np.ndarray
    std: np.ndarray

    def features(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) -> float32 (N, F)."""
        return self._run(images)[0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, C) -> float32 (N, classes)."""
        return self._run(images)[1]

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share of images that it takes for what their labels (N,) say."""
        return float(np.mean(self.logits(images).argmax(-1) == np.asarray(labels)))

    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = np.zeros((len(images), self.num_features), np.float32)
        logits = np.zeros((len(images), self.num_classes), np.float32)
        for begin in range(0, len(images), _FORWARD_SIZE):
            part = images[begin : begin + _FORWARD_SIZE]
            # One shape, one compilation.
            full = np.zeros((_FORWARD_SIZE, *part.shape[1:]), np.float32)
            full[: len(part)] = _standard(part, self.mean, self.std)
            with _one_device():
                made = _forward(self.graph, self.params, full)
            rows = slice(begin, begin + len(part))
            features[rows], logits[rows] = (np.asarray(a)[: len(part)] for a in made)
        return features, logits


def num_features(held_out: int) -> int:
    """How many features leave ten held-out images for each, as `frechet` wants."""
    return max(1, min(MOST_FEATURES, held_out // 10))


def train(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int = 0,
    num_features: int = MOST_FEATURES,
) -> Classifier:
    """Trains a classifier: 6 epochs, but 400 steps at least and 4000 at most.

    Args:
      images: (N, H, W, C) of any scale, pixels or latents.
      labels: (N,) in [0, num_classes).
      num_classes: two or more.
      seed: of weights and order.
      num_features: F, the width of the layer before the last.

    Raises:
      UserError: there are no two classes or no images.
    """
    images, labels = np.asarray(images), np.asarray(labels, np.int32)
    if num_classes < 2 or not len(images):
        raise UserError(
            f"a classifier of {num_classes} classes from {len(images)} images: samples "
            "are judged by one that tells classes apart; give images of two classes or "
            "more (data.labelled=True)"
        )
    mean = images.mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    std = images.std((0, 1, 2), dtype=np.float64).astype(np.float32)
    std = np.where(std > 0, std, 1).astype(np.float32)
    steps = -(-_EPOCHS * len(images) // _BATCH_SIZE)
    steps = min(max(steps, _FEWEST_STEPS), _MOST_STEPS)
    batches = (
        (_standard(images[rows], mean, std), labels[rows])
        for rows in _order(len(images), steps, seed)
    )
    with _one_device():
        shape = images.shape[1:]
        network = _Network(shape, num_features, num_classes, nnx.Rngs(seed))
        graph, params = _fitted(network, num_classes, batches, steps)
    return Classifier(num_classes, num_features, params, graph, mean, std)


def _fitted(
    network: _Network, num_classes: int, batches: Iterator, steps: int
) -> tuple[nnx.GraphDef, nnx.State]:
    graph, params = nnx.split(network)
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, x, label):
        def loss(params):
            target = optax.smooth_labels(jax.nn.one_hot(label, num_classes), _SMOOTHING)
            logits = nnx.merge(graph, params)(x)[1]
            return optax.softmax_cross_entropy(logits, target).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    moments = optimizer.init(params)
    for x, label in batches:
        params, moments = step(params, moments, x, label)
    return graph, params


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, params: nnx.State, x: jax.Array):
    return nnx.merge(graph, params)(x)


def _order(count: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of each batch: all images in one random order after another."""
    rng = np.random.default_rng(seed)
    left = np.zeros(0, np.int64)
    for _ in range(steps):
        while len(left) < _BATCH_SIZE:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:_BATCH_SIZE]
        left = left[_BATCH_SIZE:]


def _standard(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return (np.asarray(images, np.float32) - mean) / std


def _one_device():
    """A context for one device of this process, also where a mesh of many is set."""
    devices = np.array(jax.local_devices()[:1])
    auto = (jax.sharding.AxisType.Auto,)
    return jax.set_mesh(jax.sharding.Mesh(devices, ("alone",), axis_types=auto))
