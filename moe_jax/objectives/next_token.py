"""Next-token prediction."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.models.base import Model, TokenInputs
from moe_jax.moe.routing import Mode, MoEAux, Override
from moe_jax.nn import cross_entropy
from moe_jax.tree import struct

Batch = dict[str, jax.Array]


@config.node
class NextToken(config.ObjectiveConfig):
    """Cross-entropy of the next token.

    Attributes:
      logit_z_weight: of the mean squared log-normaliser (PaLM's z-loss); 0: none.
      logit_chunk: tokens of one device whose logits are in memory at once; 0: as many
        as take the bytes of the output matrix's gradient.
    """

    autoregressive = True
    logit_z_weight: float = 0.0
    logit_chunk: int = 0

    def problems(self, path, root):
        if self.logit_chunk < 0:
            yield f"{path}.logit_chunk={self.logit_chunk}: must not be negative"
        if self.logit_z_weight < 0:
            yield f"{path}.logit_z_weight={self.logit_z_weight}: must not be negative"


@struct
class Loss:
    """What an objective returns; sums, so that micro-batches add up exactly.

    Attributes:
      sum: () float, of the tokens' losses in nats (what training minimises, without
        the MoE losses).
      nll: () float, of the tokens' negative log-likelihoods in nats.
      weight: () float, number of scored tokens.
      observations: for the router state.
      aux: MoEAux stacked on the MoE layers, or None.
    """

    sum: jax.Array
    nll: jax.Array
    weight: jax.Array
    observations: dict[str, Any]
    aux: MoEAux | None


def loss(
    options: NextToken,
    model: Model,
    params: Any,
    router_state: Any,
    batch: Batch,
    *,
    key: jax.Array | None,
    mode: Mode,
    override: Override | None = None,
) -> Loss:
    """Sums over the batch's scored tokens.

    Args:
      options: the config.
      model: the code.
      params: nested dict of arrays.
      router_state: of the model.
      batch: tokens, targets, positions, segments (B, S) int32; weights (B, S) float.
      key: for what draws in the model.
      mode: training or evaluation.
      override: imposed on the routers.
    """
    inputs = TokenInputs(
        tokens=batch["tokens"],
        positions=batch["positions"],
        segments=batch["segments"],
    )
    hidden, observations, aux = model.apply(
        params, router_state, inputs, key=key, mode=mode, override=override
    )
    output = model.output(params, hidden)
    how = cross_entropy.Options(
        axes=output.axes, z_weight=options.logit_z_weight, chunk=options.logit_chunk
    )
    weights = batch["weights"]
    with jax.named_scope("logits"):
        total, nll = cross_entropy.summed(
            how, output.hidden, output.matrix, batch["targets"], weights
        )
    return Loss(
        sum=total,
        nll=nll,
        weight=jnp.sum(weights, dtype=nll.dtype),
        observations=observations,
        aux=aux,
    )
