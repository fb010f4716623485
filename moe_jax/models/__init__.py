"""Model families, one a file."""

from moe_jax import config
from moe_jax.models import base, decoder

MODELS = {decoder.Decoder: decoder.DecoderModel}


def build(options: config.ModelConfig) -> base.Model:
    """The model that a config describes."""
    return MODELS[type(options)](options)
