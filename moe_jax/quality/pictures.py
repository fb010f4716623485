"""Images as pixels of PNG files: grids, and pairs of them."""

import contextlib
import os
import pathlib

import numpy as np
from PIL import Image

from moe_jax.errors import UserError

_BACKGROUND = 255
_SMALLEST_SIDE = 32  # smaller images are shown enlarged


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pixels for people: (N, H, W, C) in [-1, 1] to uint8, rounded; outside, cut off.

    The inverse of `data.images.pixels.values`.

    Raises:
      UserError: latents, or pixels that are not finite.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"a picture of images {images.shape}: must be (N, H, W, C), grey or in "
            "colour (C of 1 or 3); latents are no pixels and need their decoder first"
        )
    finite_n = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite_n.all():
        raise UserError(
            f"a picture of images: {np.sum(~finite_n)} of {len(images)} have pixels "
            f"that are not finite, first image {np.argmin(finite_n)}; the model or the "
            "sampler has diverged"
        )
    return np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(
    images: np.ndarray,
    columns: int = 0,
    padding: int = 2,
    smallest_side: int = _SMALLEST_SIDE,
) -> np.ndarray:
    """Images in rows, from left to right, on white.

    Args:
      images: (N, H, W, C) as `to_uint8` takes them, or its result.
      columns: images in a row; 0: about as many as rows.
      padding: white pixels around images.
      smallest_side: images with a shorter side are enlarged, each pixel to a square.

    Returns:
      uint8 (height, width, C).

    Raises:
      UserError: as `to_uint8`, or no images.
    """
    if images.dtype != np.uint8:
        images = to_uint8(images)
    if not len(images):
        raise UserError("a picture of images: there are none")
    count, height, width, channels = images.shape
    factor = -(-smallest_side // min(height, width)) if smallest_side else 1
    images = enlarged(images, max(1, factor))
    height, width = images.shape[1:3]
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    tall, wide = height + padding, width + padding
    shape = (rows * tall + padding, columns * wide + padding, channels)
    made = np.full(shape, _BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        top, left = padding + i // columns * tall, padding + i % columns * wide
        made[top : top + height, left : left + width] = image
    return made


def pairs(
    images: np.ndarray, others: np.ndarray, columns: int = 4, padding: int = 2
) -> np.ndarray:
    """Each image with its other to the right, such as the nearest training image.

    Args:
      images: (N, H, W, C).
      others: of the same shape.
      columns: pairs in a row.
      padding: see `grid`.
    """
    both = np.stack([to_uint8(images), to_uint8(others)], axis=1)
    return grid(both.reshape(-1, *both.shape[2:]), 2 * columns, padding)


def enlarged(images: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel of (..., H, W, C) becomes a square of `factor` pixels' side."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_png(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Writes uint8 (H, W, 1 or 3) as a PNG file, whole or not at all; makes its folder.

    Raises:
      UserError: the name does not end in .png, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{str(path)!r}: pictures are PNG files; let it end in .png")
    # The modes are L and RGB.
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{str(path)!r}: cannot be written ({error})") from None
