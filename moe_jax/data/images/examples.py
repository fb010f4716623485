"""What a source of images gives: examples by split, and their classes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.images import pixels
from moe_jax.errors import UserError


class Example(NamedTuple):
    """One image.

    Attributes:
      name: for messages.
      load: gives the image as `Images.convert` takes it, and its class. May be called
        in any thread.
    """

    name: str
    load: Callable[[], tuple[Any, int]]


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a source.

    Attributes:
      identity: JSON-ready; sources with equal identities give equal images.
      classes: their names; an example's class is an index of these.
      read: for a split's name, a fresh iterator of examples in a fixed order.
      convert: `(image, name, data) -> (array (H, W, C), names of conversions)`; what is
        stored.
      values: of stored arrays (b, H, W, C), what a model sees, float32.
    """

    identity: dict[str, Any]
    classes: tuple[str, ...]
    read: Callable[[str], Iterable[Example]]
    convert: Callable[[Any, str, Any], tuple[np.ndarray, set[str]]] = pixels.convert
    values: Callable[[np.ndarray], np.ndarray] = pixels.values


def of_arrays(
    identity: dict[str, Any],
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]],
    data: config_lib.BaseDataConfig,
    where: str,
    **fields: Any,
) -> Images:
    """Images that lie in arrays.

    Args:
      identity: see `Images`.
      parts: by split images (N, ...) and labels (N,) from 0, or None for labels that
        are not read. Without a validation split a share of "train" is held out, chosen
        by a hash of the index.
      data: the whole config of the data.
      where: names the source in messages.
      **fields: others of `Images`.

    Raises:
      UserError: labels and images do not fit, or there are no two classes.
    """
    if data.labelled:
        for split, (images, labels) in parts.items():
            _check_labels(images, labels, f"{where}, {split}")
        classes = _class_names([labels for _, labels in parts.values()], where)
    else:
        parts = {
            k: (images, np.zeros(len(images), int)) for k, (images, _) in parts.items()
        }
        classes = ("image",)

    def read(split: str) -> Iterator[Example]:
        name = split if len(parts) > 1 else "train"
        images, labels = parts[name]
        chosen = np.ones(len(images), bool)
        if len(parts) == 1:
            numbers = map(str, range(len(images)))
            held_out = documents.held_out(numbers, data.validation_fraction)
            chosen = held_out == (split == "validation")
        for i in np.flatnonzero(chosen).tolist():
            load = functools.partial(_at, images, labels, i)
            yield Example(f"{name}/{i}", load)

    return Images(identity, classes, read, **fields)


def _at(images: np.ndarray, labels: np.ndarray, i: int) -> tuple[np.ndarray, int]:
    return images[i], int(labels[i])


def _check_labels(images: np.ndarray, labels: np.ndarray | None, where: str) -> None:
    if labels is None:
        raise UserError(f"{where}: no labels are named; {NO_CLASSES}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}; they must be whole "
            "numbers from 0, one an image"
        )
    if len(labels) != len(images):
        raise UserError(
            f"{where}: {len(images)} images and {len(labels)} labels; each image must "
            "have one"
        )
    if len(labels) and labels.min() < 0:
        raise UserError(f"{where}: label {labels.min()}; classes are numbered from 0")


def _class_names(labels: list[np.ndarray], where: str) -> tuple[str, ...]:
    joined = np.concatenate([part.astype(np.int64) for part in labels])
    found = np.unique(joined)
    if len(found) == 1:
        raise one_class_error(where, str(found[0]))
    if len(found) and found[-1] >= len(joined):
        raise UserError(
            f"{where}: label {found[-1]} among {len(joined)} images; number the "
            "classes from 0, without wide gaps"
        )
    return tuple(map(str, range(int(found[-1]) + 1 if len(found) else 0)))


NO_CLASSES = "--config.data.labelled=False trains without classes"


def one_class_error(where: str, name: str) -> UserError:
    """What to say where all images are of one class."""
    return UserError(
        f"{where}: all images are of class {name!r}; there is nothing to tell apart. "
        f"Add a class; {NO_CLASSES}"
    )
