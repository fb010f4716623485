"""The load-balance loss `E * sum_e f_e P_e` in its scopes.

f_e is the load of expert e as counted, P_e its mean probability; the gradient flows
through P only (Fedus et al. 2021, eq. 4-6). A scope is the set of tokens over which
both are taken: a row, a micro-batch, a whole optimizer step, or all layers together.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from moe_jax.moe.balance.options import Balance
from moe_jax.moe.routing import Array, MoEAux, Observation, Routing, counts_per_expert
from moe_jax.tree import struct


@struct
class Load:
    """Sums over the tokens of a scope; leading axes are scopes (rows, layers).

    Attributes:
      counts_e: (..., E) int32, the choices that f counts.
      probs_e: (..., E) float, summed probabilities.
      tokens: (...) int32.
    """

    counts_e: Array
    probs_e: Array
    tokens: Array


def _first(routing: Routing) -> Routing:
    """The same routing as if each token had its most probable expert only."""
    best_t = jnp.argmax(routing.probs_te, axis=-1).astype(jnp.int32)
    return dataclasses.replace(
        routing, expert_tk=best_t[:, None], valid_tk=routing.valid_t[:, None]
    )


def _valid_probs(routing: Routing) -> Array:
    # Not a matmul: that would round float32 to bfloat16 on a TPU.
    return jnp.where(routing.valid_t[:, None], routing.probs_te, 0)


def counted(options: Balance, routing: Routing) -> Array:
    """What f counts over all tokens, (E,) int32."""
    return counts_per_expert(
        _first(routing) if options.load_share == "first" else routing
    )


def of_batch(options: Balance, routing: Routing) -> Load:
    """Sums over all tokens at hand."""
    return Load(
        counts_e=counted(options, routing),
        probs_e=jnp.sum(_valid_probs(routing), axis=0),
        tokens=jnp.sum(routing.valid_t, dtype=jnp.int32),
    )


def of_rows(options: Balance, routing: Routing, batch_shape: tuple[int, int]) -> Load:
    """Sums over each row of the batch, with a leading B."""
    chosen = _first(routing) if options.load_share == "first" else routing
    rows = lambda a: a.reshape(*batch_shape, *a.shape[1:])
    expert_bsk, valid_bsk = rows(chosen.expert_tk), rows(chosen.valid_tk)
    experts = jnp.arange(routing.num_experts, dtype=jnp.int32)
    hit_bske = (expert_bsk[..., None] == experts) & valid_bsk[..., None]
    return Load(
        counts_e=jnp.sum(hit_bske, axis=(1, 2), dtype=jnp.int32),
        probs_e=jnp.sum(rows(_valid_probs(routing)), axis=1),
        tokens=jnp.sum(rows(routing.valid_t), axis=1, dtype=jnp.int32),
    )


def in_groups(load: Load, groups: int) -> Load:
    """Sums over groups of neighbouring experts, which take the experts' place."""
    fold = lambda x: jnp.sum(x.reshape(*x.shape[:-1], groups, -1), axis=-1)
    return dataclasses.replace(
        load, counts_e=fold(load.counts_e), probs_e=fold(load.probs_e)
    )


def loss(options: Balance, load: Load, counts: Load | None = None) -> Array:
    """`E * sum_e f_e P_e`, (...): 1 for a uniform load (K with "tokens").

    Args:
      options: say what f is.
      load: gives P, and f where `counts` is None.
      counts: another scope to take f from.
    """
    counts = load if counts is None else counts
    dtype = load.probs_e.dtype
    per = lambda x, n: x.astype(dtype) / jnp.maximum(n, 1).astype(dtype)[..., None]
    whole = jnp.sum(counts.counts_e, axis=-1)
    f_e = per(
        counts.counts_e, counts.tokens if options.load_share == "tokens" else whole
    )
    mean_e = per(load.probs_e, load.tokens)
    return load.probs_e.shape[-1] * jnp.sum(f_e * mean_e, axis=-1)


def sequence_loss(
    options: Balance, routing: Routing, batch_shape: tuple[int, int]
) -> Array:
    """Mean over rows of the loss within a row, weighted by their tokens, ().

    DeepSeek's code takes the plain mean: the same where rows are full.
    """
    load = of_rows(options, routing, batch_shape)
    loss_b = loss(options, load)
    tokens_b = load.tokens.astype(loss_b.dtype)
    return jnp.sum(loss_b * tokens_b) / jnp.maximum(jnp.sum(tokens_b), 1)


def with_step_load(
    options: Balance, state: Mapping[str, Array], observation: Observation
) -> dict[str, Array]:
    """The router state with the load of the whole optimizer step.

    The losses of a micro-batch take f from there (`global_weight`): it is a constant
    of the gradient, so the gradients of the micro-batches add up to that of the step.

    Args:
      options: the config.
      state: of one layer, or stacked on leading axes; it is not stored like this.
      observation: of the same layers, summed over the step's micro-batches.
    """
    if not options.global_weight:
        return dict(state)
    return {
        **state,
        "step_load": observation.sums["load"],
        "step_tokens": observation.sums["tokens"],
    }


def global_loss(
    options: Balance, routing: Routing, router_state: Mapping[str, Array]
) -> Array:
    """The loss with f of the whole step where it is known, ()."""
    load = of_batch(options, routing)
    if "step_load" not in router_state:
        return loss(options, load)
    step = Load(
        counts_e=router_state["step_load"],
        probs_e=load.probs_e,
        tokens=router_state["step_tokens"],
    )
    return loss(options, load, counts=step)


def pooled(options: Balance, aux: MoEAux) -> MoEAux:
    """Adds the loss over the tokens of all layers, `pooled_balance_loss` ().

    Hugging Face's `load_balancing_loss_func`, which joins the logits of all layers;
    its value is that of `load_share="tokens"`.

    Args:
      options: the config.
      aux: stacked on (L,); its statistics are used up.
    """
    if not options.pooled_weight:
        return aux
    layers = Load(**aux.statistics)
    load = Load(
        counts_e=jnp.sum(layers.counts_e, axis=0),
        probs_e=jnp.sum(layers.probs_e, axis=0),
        tokens=jnp.sum(layers.tokens),
    )
    value = options.pooled_weight * loss(options, load)
    losses = {**aux.losses, "pooled_balance_loss": value}
    return dataclasses.replace(aux, losses=losses, statistics={})


def statistics(options: Balance, routing: Routing) -> dict[str, Array]:
    """What `pooled` needs of a layer."""
    if not options.pooled_weight:
        return {}
    load = of_batch(options, routing)
    return {f.name: getattr(load, f.name) for f in dataclasses.fields(load)}
