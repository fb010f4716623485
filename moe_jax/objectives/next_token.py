"""Next-token prediction."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.models.base import Model, TokenInputs
from moe_jax.moe.routing import Mode, MoEAux, Override
from moe_jax.tree import struct

Batch = dict[str, jax.Array]


@config.node
class NextToken(config.ObjectiveConfig):
    """Cross-entropy of the next token.

    Attributes:
      logit_z_weight: of the mean squared log-normaliser (PaLM's z-loss); 0: none.
    """

    autoregressive = True
    logit_z_weight: float = 0.0

    def problems(self, path, root):
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


def token_nll(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of the targets (B, S), and the log-normaliser (B, S)."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normaliser - chosen, normaliser


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
    logits = model.logits(params, hidden)
    with jax.named_scope("logits"):
        nll, normaliser = token_nll(logits, batch["targets"])
    weights = batch["weights"].astype(nll.dtype)
    nll_sum = total = jnp.sum(nll * weights)
    if options.logit_z_weight:
        squares = jnp.sum(jnp.square(normaliser) * weights)
        total = total + options.logit_z_weight * squares
    return Loss(
        sum=total,
        nll=nll_sum,
        weight=jnp.sum(weights),
        observations=observations,
        aux=aux,
    )
