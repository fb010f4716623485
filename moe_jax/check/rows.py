"""Random batches to check with."""

import numpy as np

from moe_jax.config import Config


def random_batch(config: Config, dtype: str) -> dict[str, np.ndarray]:
    """A batch of the config's kind of data, with padding, by its seed.

    Args:
      config: the experiment.
      dtype: of what is not an integer.
    """
    made = {"text": _text, "images": _images}[config.data.kind]
    return made(config, dtype, np.random.default_rng(config.seed))


def _text(config: Config, dtype: str, rng: np.random.Generator):
    """Packed documents of random tokens with padding at the end of some rows."""
    shape = (config.train.batch_size, config.data.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1))
    starts = rng.random(shape) < 3 / shape[1]
    starts[:, 0] = True
    index = np.broadcast_to(np.arange(shape[1]), shape)
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    padding = index >= shape[1] - rng.integers(0, shape[1] // 4 + 1, (shape[0], 1))
    last = np.concatenate([starts[:, 1:], np.ones((shape[0], 1), bool)], axis=1)
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "positions": (index - begin).astype(np.int32),
        "segments": np.where(padding, 0, np.cumsum(starts, axis=1)).astype(np.int32),
        "weights": (~padding & ~last).astype(dtype),
    }


def _images(config: Config, dtype: str, rng: np.random.Generator):
    """Images of noise and their classes; the last row only fills the batch."""
    size, shape = (
        config.train.batch_size,
        config.model.row_shapes(config.data)["images"],
    )
    return {
        "images": np.clip(rng.normal(size=(size, *shape[0])), -1, 1).astype(dtype),
        "labels": rng.integers(0, max(1, config.model.num_classes), size, np.int32),
        "weights": (np.arange(size) < size - 1).astype(dtype),
    }
