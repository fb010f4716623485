"""From files and arrays of all sorts to uint8 (H, W, C), and what was done for it."""

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from moe_jax.errors import UserError

# Modes of Pillow that are arrays as they are; others are read as one of these.
_PLAIN = ("L", "LA", "RGB", "RGBA")
# A file of a megabyte may say that it holds a hundred times as many.
_MOST_PIXELS = 2**26
_COLOURS = {1: "grey", 3: "in colour"}


def decode(content: bytes, name: str) -> np.ndarray:
    """The pixels of a PNG or JPEG file, turned upright as its EXIF data says.

    Returns:
      uint8 or uint16 (H, W) or (H, W, 2 | 3 | 4): grey, grey with alpha, RGB, RGBA.

    Raises:
      UserError: the file is damaged or of another kind.
    """
    formats = ("PNG", "JPEG")
    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if math.prod(image.size) > _MOST_PIXELS:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
            image.verify()  # the checksums of a PNG, up to its end
        with Image.open(io.BytesIO(content), formats=formats) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.uint16)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {image.mode!r}")
            return np.asarray(image.convert(_plain_mode(image)))
    except Exception as error:  # Pillow raises many classes for damaged files
        raise UserError(
            f"data.source: image {name!r} cannot be read as PNG or JPEG ({error}); "
            "mend it or leave it out"
        ) from None


def _plain_mode(image: Any) -> str:
    if "transparency" in image.info:
        return "LA" if image.mode in ("1", "L") else "RGBA"
    if image.mode in _PLAIN:
        return image.mode
    return {"1": "L", "PA": "RGBA"}.get(image.mode, "RGB")


def convert(image: np.ndarray | bytes, name: str, data: Any) -> tuple[np.ndarray, set]:
    """An image as it is stored.

    Args:
      image: a PNG or JPEG file, or bool, uint8 or uint16 (H, W) or (H, W, 1 to 4).
      name: for messages.
      data: an `ImageDataConfig`: `image_size` and `channels`.

    Returns:
      uint8 (H, W, 1 or 3), and the names of the conversions that lose or invent
      something.

    Raises:
      UserError: it is no image.
    """
    notes = set()
    if isinstance(image, bytes):
        image = decode(image, name)
    if image.ndim == 2:
        image = image[..., None]
    shaped = image.ndim == 3 and image.shape[2] in (1, 2, 3, 4) and image.size
    if not shaped or image.dtype not in (np.uint8, np.uint16, np.bool_):
        raise UserError(
            f"data.source: image {name!r} is {image.dtype} {image.shape}; images are "
            "uint8 (or uint16), (H, W) or (H, W, channels) with 1 to 4 channels"
        )
    if image.dtype == np.uint16:
        notes.add("16 bits cut to 8")
        image = (image >> 8).astype(np.uint8)
    elif image.dtype == np.bool_:
        image = image.astype(np.uint8) * 255
    if image.shape[2] in (2, 4):
        notes.add("alpha laid over white")
        image = _over_white(image)
    if data.channels == 1 and image.shape[2] == 3:
        notes.add("colour made grey")
        image = _grey(image)
    if data.channels == 3 and image.shape[2] == 1:
        notes.add("grey repeated as colour")
        image = np.repeat(image, 3, axis=2)
    size = data.image_size
    if size and image.shape[:2] != (size, size):
        notes.add("cut to a square and scaled")
        image = _square(image, size)
    return np.ascontiguousarray(image), notes


def _over_white(image: np.ndarray) -> np.ndarray:
    """Colours c of opacity a over white: (c a + 255 (255 - a)) / 255, rounded."""
    colour, alpha = image[..., :-1].astype(np.int32), image[..., -1:].astype(np.int32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    """Luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B, rounded."""
    luma = image.astype(np.int32) @ np.array([299, 587, 114])
    return ((luma + 500) // 1000).astype(np.uint8)[..., None]


def _square(image: np.ndarray, size: int) -> np.ndarray:
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    made = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    made = made.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(made).reshape(size, size, image.shape[2])


def difference(shape: tuple[int, ...], first: tuple[int, ...]) -> tuple[str, str]:
    """How an image of another shape differs: what is wrong, and the mend."""
    if shape[2] != first[2]:
        what = f"is {_COLOURS.get(shape[2], f'of {shape[2]} channels')}"
        return what, "set --config.data.channels to 1 or 3"
    size = min(first[:2])
    return (
        f"is {shape[0]} x {shape[1]} (height x width)",
        f"set --config.data.image_size, for example to {size}",
    )


def values(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]."""
    made = images.astype(np.float32)
    made /= np.float32(127.5)
    made -= np.float32(1)
    return made
