"""The config of images: `config.data=ImageDataConfig(...)`."""

from moe_jax import config as config_lib
from moe_jax.data.images.sources.latents import Latents


@config_lib.node
class ImageDataConfig(config_lib.BaseDataConfig):
    """Where images come from and what becomes of them.

    Attributes:
      source: which images, or latents of images.
      image_size: height and width. An image of another size is cut to a square around
        its middle and scaled (bicubic). 0: as they are, all of one size.
      channels: 1 makes all images grey (ITU-R 601 luma), 3 repeats grey ones. 0: as
        they are, all of one kind.
      labelled: whether images have classes, of which there must be two; if not, all
        are of class 0.
      flip: mirror half of the training images, left to right.
      crop_padding: shift training images by up to this many pixels, up or down and left
        or right; pixels of the border are repeated behind it.
    """

    kind = "images"
    source_base = config_lib.ImageSourceConfig
    room = "moe_jax.data.images.sources"
    source: config_lib.ImageSourceConfig | None = None
    image_size: int = 0
    channels: int = 0
    labelled: bool = True
    flip: bool = False
    crop_padding: int = 0

    def problems(self, path, root):
        yield from config_lib.BaseDataConfig.problems(self, path, root)
        for name in ("image_size", "crop_padding"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        if self.image_size and self.crop_padding >= self.image_size:
            yield (
                f"{path}.crop_padding={self.crop_padding}: must be less than "
                f"{path}.image_size={self.image_size}"
            )
        if self.channels not in (0, 1, 3):
            yield f"{path}.channels={self.channels}: must be 0 (as they are), 1 or 3"
        if isinstance(self.source, Latents):
            for name in ("image_size", "channels", "flip", "crop_padding"):
                if getattr(self, name):
                    yield (
                        f"{path}.{name}={getattr(self, name)}: a latent cannot be "
                        "changed as an image can; leave it out, and make the latents "
                        "of changed images"
                    )
