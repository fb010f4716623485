"""Flips and shifts of training images, each a function of seed and place alone.

The place of an example in the stream of training examples (step times batch size plus
row) counts a Philox generator, so that no process needs to know what others drew.
"""

import numpy as np

_STREAM = 0x696D61676573  # keeps these draws apart from others of the same seed


def draws(seed: int, place: int, count: int) -> np.ndarray:
    """Random uint64 (count, 4) for the examples at `place` and behind it."""
    # Each count of the generator gives four numbers.
    generator = np.random.Philox(key=[seed, _STREAM], counter=place)
    return generator.random_raw(4 * count).reshape(count, 4)


def augment(
    images: np.ndarray, seed: int, place: int, flip: bool, padding: int
) -> np.ndarray:
    """Mirrors and shifts some of the images.

    Args:
      images: (b, H, W, C).
      seed: of the run.
      place: of the first image in the stream of training examples.
      flip: mirror left to right with probability one half.
      padding: shift by up to this many pixels, evenly in both directions; pixels of the
        border are repeated behind it.
    """
    if not flip and not padding:
        return images
    count, height, width, _ = images.shape
    draw_b4 = draws(seed, place, count)
    mirrored_b = (draw_b4[:, 2] >> np.uint64(63)).astype(bool) & flip
    # Shifts lie in [-padding, padding].
    shift_b2 = (draw_b4[:, :2] % np.uint64(2 * padding + 1)).astype(np.int64) - padding
    row_bh = np.clip(np.arange(height) + shift_b2[:, :1], 0, height - 1)
    column_bw = np.clip(np.arange(width) + shift_b2[:, 1:], 0, width - 1)
    made = np.empty_like(images)
    for b in range(count):  # the rows of one image lie near each other
        image = images[b, :, ::-1] if mirrored_b[b] else images[b]
        made[b] = image[row_bh[b]][:, column_bw[b]] if padding else image
    return made
