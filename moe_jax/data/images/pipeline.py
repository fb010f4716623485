"""From a config of images to batches."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from moe_jax.data import documents, order
from moe_jax.data.images import array_file, augment, sources
from moe_jax.data.images.config import ImageDataConfig
from moe_jax.data.images.examples import Images
from moe_jax.data.order import Batch

# Sources are often sorted by class; a part of the evaluation should see them all.
_EVAL_SEED = 0


def prepare(data: ImageDataConfig) -> "ImageData":
    """Makes the files of the images, or opens those that are there.

    Any number of processes may call this at once, on one host or on several that share
    `data.folder`.

    Raises:
      UserError: no images, one class, images that differ or cannot be read, no space.
    """
    source = sources.load(data)
    folder = Path(data.folder).expanduser() / "images"
    manifest, files = array_file.open_or_build(folder, source, data)
    return ImageData(source, manifest, files, data)


class ImageData:
    """Images, or latents of them, as batches.

    A batch has `images`, float32 (b, H, W, C), pixels in [-1, 1], and `labels` int32
    and `weights` float32, (b,), with b the part of the batch of this process. Padding
    is zeros of weight 0.

    Attributes:
      manifest: what the files hold, JSON-ready.
      content_hash: of all images and their classes.
      image_shape: (H, W, C).
      classes: their names.
      num_classes: how many there are; 1 where images are not labelled.
    """

    def __init__(
        self,
        source: Images,
        manifest: dict[str, Any],
        files: dict[str, array_file.ImageFile],
        data: ImageDataConfig,
    ):
        self.manifest = manifest
        self.content_hash = _content_hash(manifest)
        self.image_shape = tuple(manifest["shape"])
        self.classes = tuple(manifest["classes"])
        self.num_classes = len(self.classes)
        self._values = source.values
        self._files = files
        self._flip, self._padding = data.flip, data.crop_padding

    def describe(self) -> str:
        """How much there is, as a line for people."""
        train, held_out = (self.num_rows(split) for split in documents.SPLITS)
        size = " x ".join(str(n) for n in self.image_shape)
        classes = f"{self.num_classes} classes" if self.num_classes > 1 else "one class"
        return (
            f"images: {size}, {classes}; {train:,} to train on, {held_out:,} held out"
        )

    def num_rows(self, split: str) -> int:
        """Images of the split."""
        return len(self._files[split].labels)

    def source_rows(self, split: str) -> list[tuple[str, int]]:
        """Name and number of images of the source, in a list."""
        return [("images", self.num_rows(split))]

    def row(self, split: str, number: int) -> Batch:
        """Image `number` of the split, without the axis b; past the last, padding."""
        return {name: value[0] for name, value in self.rows(split, [number]).items()}

    def rows(self, split: str, numbers: Sequence[int]) -> Batch:
        """The same of several images, as they are: neither mirrored nor shifted."""
        stored, labels, weights = self._stored(split, numbers)
        images = self._values(stored)
        images[weights == 0] = 0
        return {"images": images, "labels": labels, "weights": weights}

    def identify(self, numbers: Sequence[int]) -> dict[str, list]:
        """What training images are, for a ledger: their numbers in `row`, from 0."""
        return {"row": list(numbers)}

    def _stored(self, split, numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        file, numbers = self._files[split], np.asarray(numbers, np.int64)
        there = numbers < len(file.labels)
        stored = np.zeros((len(numbers), *self.image_shape), file.images.dtype)
        labels = np.zeros(len(numbers), np.int32)
        stored[there] = file.images[numbers[there]]
        labels[there] = file.labels[numbers[there]]
        return stored, labels, there.astype(np.float32)

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rows: tuple[int, int] | None = None,
        prefetch: int = 4,
        numbered: bool = False,
    ) -> Iterator[Batch]:
        """Batches of training images; the arguments are those of `order`.

        Mirroring and shifting depend on the seed and the place in the stream alone.
        """

        def read(numbers: list[int], place: int) -> Batch:
            stored, labels, weights = self._stored("train", numbers)
            stored = augment.augment(stored, seed, place, self._flip, self._padding)
            return {
                "images": self._values(stored),
                "labels": labels,
                "weights": weights,
            }

        return order.train_batches(
            read,
            order.Stream([self.num_rows("train")], [1], seed),
            batch_size=batch_size,
            start_step=start_step,
            num_steps=num_steps,
            rows=rows,
            prefetch=prefetch,
            numbered=numbered,
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        max_batches: int = 0,
        rows: tuple[int, int] | None = None,
    ) -> Iterator[Batch]:
        """Held-out images in one mixed order, always the same; see `order`."""
        count = self.num_rows("validation")
        if not count:
            return iter(())
        mixed = grain.MapDataset.range(count).seed(_EVAL_SEED).shuffle()

        def read(numbers: range) -> Batch:
            return self.rows(
                "validation", [mixed[i] if i < count else i for i in numbers]
            )

        return order.eval_batches(
            read, count, batch_size=batch_size, max_batches=max_batches, rows=rows
        )


def _content_hash(manifest: dict[str, Any]) -> str:
    form = [manifest[name] for name in ("dtype", "shape", "classes")]
    digest = hashlib.sha256(json.dumps(form).encode())
    for split in documents.SPLITS:
        for entry in manifest["splits"][split]["files"].values():
            digest.update(bytes.fromhex(entry["sha256"]))
    return digest.hexdigest()
