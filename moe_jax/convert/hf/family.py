"""What a family of Hugging Face models is here."""

import dataclasses
from collections.abc import Callable
from typing import Any

from moe_jax.convert.hf import table
from moe_jax.convert.hf.fields import Fields
from moe_jax.convert.hf.table import Weight
from moe_jax.models.decoder_config import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family: its config both ways, and where its weights are.

    Attributes:
      model_type: its name in a config.json.
      architecture: the class of `transformers` that loads it.
      decoder: config.json to a decoder; raises UserError for what it cannot express.
      fields: a decoder to a config.json. What it leaves out of the decoder is noticed
        by going the way back, so it need not look.
      block: rows of a block.
      outer: rows of what stands outside the blocks.
      ahead: rows of a module that predicts further tokens, besides those of its block.
      float32: names of tensors that are never rounded.
    """

    model_type: str
    architecture: str
    decoder: Callable[[Fields], Decoder]
    fields: Callable[[Decoder], dict[str, Any]]
    block: tuple[Weight, ...]
    outer: tuple[Weight, ...] = table.OUTER
    ahead: tuple[Weight, ...] = ()
    float32: tuple[str, ...] = ()
