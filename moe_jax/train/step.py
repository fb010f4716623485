"""The train step: pure functions; `make_step` jits them with donated state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import Config
from moe_jax.models.base import Model
from moe_jax.moe import health
from moe_jax.moe.routing import TRAIN, Mode, MoEAux, Override
from moe_jax.objectives import OBJECTIVES
from moe_jax.parallel import rules
from moe_jax.train import optimizers
from moe_jax.train.state import TrainState
from moe_jax.tree import struct

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct
class Gradients:
    """What one batch says, before anything is changed by it.

    Attributes:
      loss: () float, nats per token plus the MoE losses: what is differentiated.
      nll: () float, mean negative log-likelihood in nats per token.
      weight: () float, scored tokens.
      grads: like the trainable parameters.
      observations: for the router state, summed over micro-batches.
      aux: MoEAux over L; losses are means, counts sums over micro-batches.
    """

    loss: jax.Array
    nll: jax.Array
    weight: jax.Array
    grads: Any
    observations: Any
    aux: MoEAux | None


def aux_loss(aux: MoEAux | None) -> jax.Array | float:
    """The MoE losses of all layers and kinds, summed."""
    if aux is None:
        return 0.0
    return sum((jnp.sum(v) for v in aux.losses.values()), 0.0)


def micro_batches(batch: Batch, count: int) -> Batch:
    """(B, S) -> (count, B / count, S), each spread over all shards.

    Micro-batch i takes the rows i, i + count, ...: no row changes its device.
    """

    def cut(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return rules.constrain(x, None, "batch", "sequence")

    return jax.tree.map(cut, batch)


def compute_gradients(
    config: Config,
    model: Model,
    state: TrainState,
    batch: Batch,
    *,
    mode: Mode = TRAIN,
    override: Override | None = None,
) -> Gradients:
    """Gradients of one optimizer step's batch, over its micro-batches.

    The token losses of all micro-batches are summed and divided by the number of
    scored tokens of the whole batch, so accumulation does not change the gradient
    where micro-batches hold different numbers of tokens. Balance losses have the
    statistics of their micro-batch and are averaged.

    Args:
      config: steps, accumulation, objective, seed.
      model: the code.
      state: not changed.
      batch: (B, S) arrays over all devices.
      mode: with `capture`, `aux.routing` is kept (one micro-batch only).
      override: imposed on the routers.
    """
    count = config.train.accumulation
    weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def total(params, micro, micro_key):
        found = OBJECTIVES[type(config.objective)](
            config.objective,
            model,
            optimizers.merge(params, state.frozen),
            state.router_state,
            micro,
            key=micro_key,
            mode=mode,
            override=override,
        )
        value = found.sum / weight + aux_loss(found.aux) / count
        return value, found

    gradient = jax.value_and_grad(total, has_aux=True)

    def one(carry, item):
        micro, index = item
        (value, found), grads = gradient(
            state.params, micro, jax.random.fold_in(key, index)
        )
        new = (value, found.nll, grads, found.observations, found.aux)
        return new if carry is None else _add(carry, new), None

    if count == 1:
        sums, _ = one(None, (batch, 0))
    else:
        micros = micro_batches(batch, count)
        shapes = jax.eval_shape(lambda m: one(None, (m, 0))[0], _first(micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        sums, _ = jax.lax.scan(one, zeros, (micros, jnp.arange(count)))
    loss, nll, grads, observations, aux = sums
    return Gradients(
        loss=loss,
        nll=nll / weight,
        weight=weight,
        grads=grads,
        observations=observations,
        aux=_mean_losses(aux, count),
    )


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def _add(total: Any, new: Any) -> Any:
    """Sums of two micro-batches' results; of rounds and fill the larger."""
    summed = jax.tree.map(jnp.add, total, new)
    *rest, aux = summed
    if aux is None:
        return summed
    a, b = total[-1].stats, new[-1].stats
    stats = dataclasses.replace(
        aux.stats,
        rounds=jnp.maximum(a.rounds, b.rounds),
        peak_fill=jnp.maximum(a.peak_fill, b.peak_fill),
        capacity=b.capacity,
    )
    return (*rest, dataclasses.replace(aux, stats=stats))


def _mean_losses(aux: MoEAux | None, count: int) -> MoEAux | None:
    """Of the summed aux of `count` micro-batches: means of what is a mean."""
    if aux is None or count == 1:
        return aux
    mean = lambda x: x / count if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dataclasses.replace(
        aux,
        losses=jax.tree.map(mean, aux.losses),
        health=jax.tree.map(mean, aux.health),
    )


def apply_gradients(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    found: Gradients,
) -> tuple[TrainState, jax.Array]:
    """The next state, and the global norm of the gradient before clipping.

    A step whose loss or gradient is not finite changes nothing but `step`.
    """
    norm = optax.tree.norm(found.grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(found.loss)
    updates, opt_state = optimizer.update(
        found.grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = config.train.ema_decay
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)
    new = TrainState(
        step=state.step,
        params=params,
        frozen=state.frozen,
        opt_state=opt_state,
        router_state=model.update_router_state(state.router_state, found.observations),
        ema=ema,
    )
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    return TrainState(
        step=state.step + 1,
        params=kept.params,
        frozen=state.frozen,
        opt_state=kept.opt_state,
        router_state=kept.router_state,
        ema=kept.ema,
    ), norm


def step_metrics(found: Gradients, norm: jax.Array, rate: jax.Array) -> Metrics:
    """What a step reports; arrays (L, E) and scalars."""
    metrics = {
        "loss": found.nll,
        "total_loss": found.loss,
        "tokens": found.weight,
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": ~(jnp.isfinite(norm) & jnp.isfinite(found.loss)),
    }
    if found.aux is not None:
        counts_le = found.aux.health["counts"]
        stats = found.aux.stats
        metrics |= {name: jnp.sum(v) for name, v in found.aux.losses.items()}
        metrics |= {
            "expert_counts": counts_le,
            "load_max_over_mean": health.max_over_mean(counts_le),
            "dead_experts": health.dead_experts(counts_le),
            "router_entropy": jnp.mean(found.aux.health["entropy"]),
            "dropped": jnp.sum(stats.dropped),
            "dispatch_rounds": jnp.max(stats.rounds),
        }
    return metrics


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the state that goes in is donated."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        found = compute_gradients(config, model, state, batch)
        with jax.named_scope("optimizer"):
            new, norm = apply_gradients(config, model, optimizer, state, found)
        rate = config.optimizer.learning_rate * schedule(state.step)
        return new, step_metrics(found, norm, rate)

    # Without explicit output shardings the moments come back replicated.
    # Metrics are replicated, so that every host can read them.
    places = (shardings, shardings.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=places)
