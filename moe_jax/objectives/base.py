"""What every objective takes and returns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.moe.routing import MoEAux
from moe_jax.tree import struct

Batch = dict[str, jax.Array]


@struct
class Loss:
    """What an objective returns; sums, so that micro-batches add up exactly.

    What is weighed is a token of text, or an image.

    Attributes:
      sum: () float, of what training minimises, without the losses of the model.
      reported: () float, of what people read: negative log-likelihoods in nats, or
        squared errors.
      weight: () float, number of scored tokens or images.
      observations: for the router state.
      aux: MoEAux stacked on the MoE layers, or None.
      losses: name -> () weighted loss of the model's own, a mean over the batch.
    """

    sum: jax.Array
    reported: jax.Array
    weight: jax.Array
    observations: dict[str, Any]
    aux: MoEAux | None
    losses: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
