"""What a run does with one kind of data; text and images have a file each."""

from moe_jax.config import Config
from moe_jax.train.kinds import images, text
from moe_jax.train.kinds.base import Kind

# By `config.data.kind`.
KINDS = {"text": text.KIND, "images": images.KIND}


def kind_of(config: Config) -> Kind:
    """The kind of the config's data."""
    return KINDS[config.data.kind]
