"""Model families, one a file."""

from moe_jax import config
from moe_jax.models import base, decoder, dit, dit_config

MODELS = {decoder.Decoder: decoder.DecoderModel, dit_config.DiT: dit.DiTModel}


def build(options: config.ModelConfig) -> base.RoutedModel:
    """The model that a config describes."""
    return MODELS[type(options)](options)
