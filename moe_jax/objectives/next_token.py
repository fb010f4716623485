"""Next-token prediction."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config
from moe_jax.models import multi_token
from moe_jax.models.base import Model, Output, TokenInputs
from moe_jax.moe.routing import Mode, Override
from moe_jax.nn import cross_entropy
from moe_jax.objectives.base import Batch, Loss


@config.node
class NextToken(config.ObjectiveConfig):
    """Cross-entropy of the next token.

    Attributes:
      logit_z_weight: of the mean squared log-normaliser (PaLM's z-loss); 0: none.
      logit_chunk: tokens of one device whose logits are in memory at once; 0: as many
        as take the bytes of the output matrix's gradient.
      mtp_weight: of the mean over the model's depths of multi-token prediction
        (`models.multi_token`; DeepSeek-V3 equation 25); 0 where it has none.
    """

    autoregressive = True
    logit_z_weight: float = 0.0
    logit_chunk: int = 0
    mtp_weight: float = 0.0

    def problems(self, path, root):
        if self.mtp_weight < 0:
            yield f"{path}.mtp_weight={self.mtp_weight}: must not be negative"
        depths = getattr(root.model, "mtp", 0)
        if self.mtp_weight and not depths:
            yield (
                f"{path}.mtp_weight={self.mtp_weight} would be ignored: the model "
                "predicts one token; set config.model.mtp, or leave it 0"
            )
        if depths and not self.mtp_weight:
            yield (
                f"config.model.mtp={depths} would not be trained: set "
                f"{path}.mtp_weight, or leave it 0"
            )
        if self.logit_chunk < 0:
            yield f"{path}.logit_chunk={self.logit_chunk}: must not be negative"
        if self.logit_z_weight < 0:
            yield f"{path}.logit_z_weight={self.logit_z_weight}: must not be negative"


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
    average: Any = None,
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
      average: None.
    """
    inputs = TokenInputs(
        tokens=batch["tokens"],
        positions=batch["positions"],
        segments=batch["segments"],
    )
    given = dict(key=key, mode=mode, override=override)
    hidden, observations, aux = model.apply(params, router_state, inputs, **given)
    output, weights = model.output(params, hidden), batch["weights"]
    total, nll = _summed(options, output, batch["targets"], weights)
    if options.mtp_weight and mode.train:
        found = model.ahead(params, router_state, inputs, output.hidden, **given)
        share = options.mtp_weight / model.depths_ahead
        for k, normed in enumerate(found[0], start=1):
            further = multi_token.targets(batch["targets"], weights, inputs, k)
            output = output._replace(hidden=normed)
            total = total + share * _summed(options, output, *further)[0]
        observations = observations | found[1]
        if aux is not None:
            aux = multi_token.joined(aux, found[2])
    return Loss(
        sum=total,
        reported=nll,
        weight=jnp.sum(weights, dtype=nll.dtype),
        observations=observations,
        aux=aux,
    )


def _summed(options: NextToken, output: Output, targets, weights):
    how = cross_entropy.Options(
        axes=output.axes,
        z_weight=options.logit_z_weight,
        softcap=output.softcap,
        chunk=options.logit_chunk,
    )
    with jax.named_scope("logits"):
        return cross_entropy.summed(
            how, output.hidden, output.matrix, targets, weights, output.bias
        )
