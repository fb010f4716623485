"""Flat files of images, made once for a source and a form.

A folder (`prepared`) holds for each split the joined images and their classes.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents, npy, prepared
from moe_jax.data.images import pixels
from moe_jax.data.images.examples import Example, Images
from moe_jax.data.prepared import DamagedError
from moe_jax.errors import UserError

FORMAT_VERSION = 1
_DTYPES = ("uint8", "float16", "float32")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One split.

    Attributes:
      images: (N, H, W, C), uint8, or float16 or float32 for latents.
      labels: int32 (N,).
    """

    images: np.ndarray
    labels: np.ndarray


def open_or_build(
    folder: Path, source: Images, data: config_lib.BaseDataConfig
) -> tuple[dict[str, Any], dict[str, ImageFile]]:
    """The manifest and the splits; reads the source where they are not there yet.

    Args:
      folder: of all prepared images.
      source: the examples.
      data: an `ImageDataConfig`.

    Raises:
      UserError: no images, images that differ or cannot be read, a full disk, or a
        folder that cannot be written.
    """
    key = {
        "format_version": FORMAT_VERSION,
        "source": source.identity,
        "image_size": data.image_size,
        "channels": data.channels,
        "labelled": data.labelled,
        "validation_fraction": data.validation_fraction,
    }
    return prepared.open_or_build(
        folder, key, read, lambda path: _write(path, key, source, data)
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, ImageFile]]:
    """Opens a prepared folder; reads the manifest and the sizes of the files.

    Raises:
      FileNotFoundError: there is no such folder.
      DamagedError: it is not what its manifest says.
    """
    if not path.is_dir():
        raise FileNotFoundError(path)
    with prepared.damage():
        manifest = prepared.read_manifest(path, FORMAT_VERSION)
        if manifest["dtype"] not in _DTYPES:
            raise DamagedError(f"dtype {manifest['dtype']!r}")
        splits = {name: _open_split(path, manifest, name) for name in documents.SPLITS}
    return manifest, splits


def _open_split(path: Path, manifest: dict[str, Any], name: str) -> ImageFile:
    split = manifest["splits"][name]
    files = {k: prepared.checked(path, entry) for k, entry in split["files"].items()}
    shape = (split["images"], *manifest["shape"])
    if not split["images"]:  # an empty file cannot be mapped
        images = np.zeros(shape, manifest["dtype"])
    else:
        images = np.memmap(files["images"], manifest["dtype"], mode="r", shape=shape)
    if images.nbytes != split["files"]["images"]["size_bytes"]:
        raise DamagedError(f"{files['images'].name} has another number of images")
    labels = npy.mapped(files["labels"])
    if labels.dtype != np.int32 or labels.shape != shape[:1]:
        raise DamagedError(f"{files['labels'].name} has another shape")
    return ImageFile(images, labels)


def _write(folder: Path, key: dict[str, Any], source: Images, data: Any) -> None:
    _log.info("writing images into %s", folder.parent)
    writer = _Writer(source, data)
    splits = {name: writer.write(folder, name) for name in documents.SPLITS}
    if not splits["train"]["images"]:
        raise UserError(
            f"data.source={data.source}: there is no image to train on; none is there "
            "or all are held out (data.validation_fraction="
            f"{data.validation_fraction})"
        )
    for what, count in sorted(writer.notes.items()):
        _log.warning("data.source: %s: %d images", what, count)
    manifest = key | {
        "dtype": writer.dtype.name,
        "shape": list(writer.shape),
        "classes": list(source.classes),
        "conversions": dict(writer.notes),
        "splits": splits,
    }
    prepared.write_manifest(folder, manifest)


class _Writer:
    """Writes splits of images that must all be of one form, that of the first."""

    def __init__(self, source: Images, data: Any):
        self._source, self._data = source, data
        self._first, self.shape, self.dtype = "", (), np.dtype(np.uint8)
        self.notes = collections.Counter()

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """Writes one split and returns its entry of the manifest."""
        labels = []
        with prepared.Hashed(folder / f"{name}.images") as file:
            examples = self._source.read(name)
            for example, image, label, notes in _loaded(
                self._load, examples, self._data.workers
            ):
                self._check(example, image, label)
                self.notes.update(notes)
                file.write(image.data)
                labels.append(label)
        array = np.array(labels, np.int32)
        return {
            "images": len(labels),
            "files": {
                "images": file.entry(),
                "labels": prepared.write_array(folder / f"{name}.labels.npy", array),
            },
        }

    def _load(self, example: Example) -> tuple[str, np.ndarray, int, set[str]]:
        image, label = example.load()
        image, notes = self._source.convert(image, example.name, self._data)
        return example.name, image, label, notes

    def _check(self, name: str, image: np.ndarray, label: int) -> None:
        if not self._first:
            self._first, self.shape, self.dtype = name, image.shape, image.dtype
        if image.shape != self.shape:
            what, mend = pixels.difference(image.shape, self.shape)
            of_first, _ = pixels.difference(self.shape, image.shape)
            raise UserError(
                f"data.source: image {name!r} {what}, and {self._first!r} {of_first}; "
                f"{mend}"
            )
        if not 0 <= label < len(self._source.classes):
            raise UserError(
                f"data.source: image {name!r} is of class {label}, and there are "
                f"{len(self._source.classes)} classes; mend its label"
            )


def _loaded(
    load: Callable[[Example], Any], examples: Iterable[Example], workers: int
) -> Iterator[Any]:
    """`load` of every example in order, in several threads."""
    workers = workers or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = collections.deque()
        try:
            for example in examples:
                pending.append(pool.submit(load, example))
                if len(pending) > 8 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
