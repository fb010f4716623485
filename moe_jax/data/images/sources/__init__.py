"""The sources of images: one file each, chosen by the class of `config.data.source`."""

from moe_jax import config as config_lib
from moe_jax.data.images import examples
from moe_jax.data.images.sources import digits, idx, image_files, latents, tfds_images
from moe_jax.data.images.sources.digits import Digits
from moe_jax.data.images.sources.idx import Idx
from moe_jax.data.images.sources.image_files import ImageFiles
from moe_jax.data.images.sources.latents import Latents
from moe_jax.data.images.sources.tfds_images import TfdsImages

__all__ = [
    "SOURCES",
    "Digits",
    "Idx",
    "ImageFiles",
    "Latents",
    "TfdsImages",
    "load",
]

# Each takes (source config, config of the data).
SOURCES = {
    Digits: digits.load,
    Idx: idx.load,
    ImageFiles: image_files.load,
    TfdsImages: tfds_images.load,
    Latents: latents.load,
}


def load(data: config_lib.BaseDataConfig) -> examples.Images:
    """The images that an `ImageDataConfig` names.

    Raises:
      UserError: they are not there or cannot be read.
    """
    return SOURCES[type(data.source)](data.source, data)
