"""IDX files, the format of MNIST, compressed with gzip or not."""

import gzip
import io
import math
import zlib
from typing import IO

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.images import examples
from moe_jax.data.images.sources import files
from moe_jax.errors import UserError

_TYPES = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MOST_DIMS = 8
_MOST_UNPACKED = 1032  # Bytes that deflate can make of one.


@config_lib.node
class Idx(config_lib.ImageSourceConfig):
    """Images of bytes in one file, (N, H, W) or (N, H, W, C), and labels in another.

    Attributes:
      images: the file of images.
      labels: the file of labels; "" where `data.labelled` is False.
      validation_images: images held out; "" holds out `data.validation_fraction` of
        the others, chosen by a hash of their index.
      validation_labels: their labels.
    """

    images: str = ""
    labels: str = ""
    validation_images: str = ""
    validation_labels: str = ""

    def problems(self, path, root):
        if not self.images:
            yield f"{path}.images='': must name a file"
        yield from label_problems(self, path, root)
        yield from documents.own_split_problems(
            path, "validation_images", self.validation_images, root
        )


def label_problems(source: config_lib.Node, path: str, root: config_lib.Config):
    """Rules of a source whose labels are in files of their own."""
    labelled = getattr(root.data, "labelled", True)
    pairs = {"images": "labels", "validation_images": "validation_labels"}
    for images, labels in pairs.items():
        there, given = getattr(source, images, ""), getattr(source, labels)
        if there and labelled and not given:
            yield f"{path}.{labels}='': must name a file; {examples.NO_CLASSES}"
        if given and (not labelled or not there):
            why = f"{path}.{images} is ''" if labelled else "data.labelled is False"
            yield f"{path}.{labels}={given!r}: is not used, since {why}; leave it out"


def load(source: Idx, data: config_lib.BaseDataConfig) -> examples.Images:
    """Reads the files.

    Raises:
      UserError: one cannot be read or is no IDX file, or they do not fit.
    """
    identity = {"kind": "idx"}
    parts = {}
    for split, prefix in (("train", ""), ("validation", "validation_")):
        if not getattr(source, f"{prefix}images"):
            continue
        found = {}
        for what in ("images", "labels"):
            field = f"{prefix}{what}"
            if path := getattr(source, field):
                found[what] = read(path, field)
                identity[field] = files.digest(path, field)
        images = found["images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise UserError(
                f"data.source.{prefix}images={getattr(source, f'{prefix}images')!r}: "
                f"holds {images.dtype} {images.shape}, not images of bytes (N, H, W); "
                "is it the file of the labels?"
            )
        parts[split] = images, found.get("labels")
    return examples.of_arrays(identity, parts, data, "data.source=Idx(...)")


def read(path: str, field: str) -> np.ndarray:
    """The array of an IDX file, in the machine's order of bytes.

    Args:
      path: of the file.
      field: of the source, that names it.

    Raises:
      UserError: it cannot be read, is no IDX file, or has another size than it says.
    """
    content, most = files.read(path, field), 0
    opened: IO[bytes] = io.BytesIO(content)
    if content[:2] == b"\x1f\x8b":
        opened, most = gzip.GzipFile(fileobj=opened), _MOST_UNPACKED * len(content)
    try:
        return _array(opened, len(content), max(most, len(content)))
    except (OSError, EOFError, zlib.error) as error:
        raise files.unreadable(path, field, f"damaged gzip: {error}") from None
    except ValueError as error:
        raise files.unreadable(path, field, error) from None


def _array(file: IO[bytes], size: int, most: int) -> np.ndarray:
    """The array of a file of `size` bytes, which holds at most `most`."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
        raise ValueError("no IDX file")
    dtype, dims = _TYPES[head[2]], head[3]
    sizes = file.read(4 * dims)
    shape = np.frombuffer(sizes, ">u4").tolist() if len(sizes) == 4 * dims else [0]
    expected = math.prod(shape) * dtype.itemsize
    if not 0 < expected <= most or not 0 < dims <= _MOST_DIMS:
        raise ValueError(f"IDX file of {size} bytes, its head says {shape}")
    # One byte more than there should be, and not all that a small file unpacks to.
    content = file.read(expected + 1)
    if len(content) != expected:
        raise ValueError(f"IDX file of {size} bytes, its head says {shape}")
    array = np.frombuffer(content, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
