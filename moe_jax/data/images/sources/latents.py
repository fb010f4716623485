"""Latents that an encoder made of images beforehand, in arrays."""

import functools
import math
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.data import documents
from moe_jax.data.images import examples
from moe_jax.data.images.sources import files, idx
from moe_jax.errors import UserError


@config_lib.node
class Latents(config_lib.ImageSourceConfig):
    """Latents (N, H, W, C) of float16 or float32; the model sees (z - shift) * scale.

    An npz file holds `images` and `labels`; an npy file holds the latents, and `labels`
    names another one. An npy file is read in parts, so it may be larger than memory.

    Attributes:
      images: an npz or npy file.
      labels: an npy file of whole numbers from 0, beside an npy file of latents.
      validation_images: latents held out; "" holds out `data.validation_fraction` of
        the others, chosen by a hash of their index.
      validation_labels: their labels.
      channels_first: the arrays are (N, C, H, W).
      scale: so that the latents have a standard deviation near 1; the encoder of Stable
        Diffusion 1 has 0.18215.
      shift: taken off first.
    """

    images: str = ""
    labels: str = ""
    validation_images: str = ""
    validation_labels: str = ""
    channels_first: bool = False
    scale: float = 1.0
    shift: float = 0.0

    def problems(self, path, root):
        if not self.images:
            yield f"{path}.images='': must name an npz or npy file"
        finite = abs(self.scale) < math.inf and abs(self.shift) < math.inf
        if not self.scale or not finite:
            yield (
                f"{path}.scale={self.scale}, shift={self.shift}: must be finite, and "
                "scale not 0"
            )
        if not self.images.endswith(".npz"):
            yield from idx.label_problems(self, path, root)
        yield from documents.own_split_problems(
            path, "validation_images", self.validation_images, root
        )


def load(source: Latents, data: config_lib.BaseDataConfig) -> examples.Images:
    """Opens the files.

    Raises:
      UserError: one cannot be read, or they do not fit.
    """
    identity: dict[str, Any] = {
        "kind": "latents",
        "channels_first": source.channels_first,
    }
    parts = {}
    for split, prefix in (("train", ""), ("validation", "validation_")):
        field = f"{prefix}images"
        if not (path := getattr(source, field)):
            continue
        images, labels = _open(source, prefix, data.labelled)
        if images.ndim != 4 or images.dtype not in (np.float16, np.float32):
            raise UserError(
                f"data.source.{field}={path!r}: holds {images.dtype} {images.shape}; "
                "latents are float16 or float32, (N, H, W, C), or (N, C, H, W) with "
                "channels_first"
            )
        if source.channels_first:
            images = images.transpose(0, 2, 3, 1)
        parts[split] = images, labels
        for name in (field, f"{prefix}labels"):
            if named := getattr(source, name):
                identity[name] = files.digest(named, name)
    values = functools.partial(_values, source.shift, source.scale)
    where = f"data.source.images={source.images!r}"
    return examples.of_arrays(
        identity, parts, data, where, convert=_convert, values=values
    )


def _open(
    source: Latents, prefix: str, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    field = f"{prefix}images"
    path, labels = getattr(source, field), getattr(source, f"{prefix}labels")
    if path.endswith(".npz"):
        if labels:
            raise UserError(
                f"data.source.{prefix}labels={labels!r}: is not used, since the npz "
                "file of the latents holds their labels; leave it out"
            )
        names = ["images", "labels"] if labelled else ["images"]
        images, given = [*files.arrays(path, field, names), None][:2]
        return images, given
    images = files.array(path, field)
    return images, files.array(labels, f"{prefix}labels") if labels else None


def _convert(
    latent: np.ndarray, name: str, data: config_lib.BaseDataConfig
) -> tuple[np.ndarray, set[str]]:
    del data
    if not np.isfinite(latent).all():
        raise UserError(
            f"data.source: latent {name!r} holds values that are not finite; mend it"
        )
    return np.ascontiguousarray(latent), set()


def _values(shift: float, scale: float, latents: np.ndarray) -> np.ndarray:
    return (latents.astype(np.float32) - np.float32(shift)) * np.float32(scale)
