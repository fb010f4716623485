"""The train step: pure functions; `make_step` jits them with donated state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import Config
from moe_jax.models.base import Model
from moe_jax.moe import health
from moe_jax.moe.routing import TRAIN, Mode, MoEAux, Override
from moe_jax.nn import module
from moe_jax.objectives import OBJECTIVES
from moe_jax.parallel import batches, rules
from moe_jax.train import optimizers, turns
from moe_jax.train.state import TrainState
from moe_jax.tree import struct

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct
class Gradients:
    """What one batch says, before anything is changed by it.

    Attributes:
      loss: () float, mean of what training minimises, plus the losses of the model:
        what is differentiated.
      reported: () float, mean of what people read; see `objectives.base.Loss`.
      weight: () float, scored tokens or images.
      grads: like the trainable parameters.
      observations: for the router state, summed over micro-batches.
      aux: MoEAux over L; losses are means over micro-batches, weighted by their
        tokens, and counts are sums.
      losses: of the model's own, weighted like those of `aux`.
    """

    loss: jax.Array
    reported: jax.Array
    weight: jax.Array
    grads: Any
    observations: Any
    aux: MoEAux | None
    losses: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


def aux_loss(aux: MoEAux | None) -> jax.Array | float:
    """The MoE losses of all layers and kinds, summed."""
    if aux is None:
        return 0.0
    return sum((jnp.sum(v) for v in aux.losses.values()), 0.0)


def micro_batches(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...), each spread over all shards.

    Micro-batch i takes the rows i, i + count, ...: no row changes its device.
    """

    def cut(x):
        x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return rules.constrain(x, None, *batches.axes(x.ndim - 1))

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
    where micro-batches hold different numbers of tokens. The MoE losses of a
    micro-batch are weighted by its share of the tokens, for the same reason: only
    those with the statistics of a micro-batch depend on what that is.

    Args:
      config: steps, accumulation, objective, seed.
      model: the code.
      state: not changed.
      batch: arrays (B, ...) over all devices.
      mode: with `capture`, `aux.routing` is kept (one micro-batch only).
      override: imposed on the routers.
    """
    count = config.train.accumulation
    weight = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    # Of the weights' type: a quotient of integers is in float32 always.
    tokens = jnp.maximum(_tokens(batch), 1).astype(weight.dtype)
    look, one = _passes(config, model, state, mode, override, weight, tokens)
    if count == 1:
        sums = one(state.router_state, batch, 0)
    else:
        micros, router_state = micro_batches(batch, count), state.router_state
        if model.needs_step_load:
            router_state = _with_step_load(model, look, router_state, micros, count)
        step = lambda m, i: one(router_state, m, i)
        sums = _sum_over(step, micros, count, _add_results)
    loss, reported, losses, grads, observations, aux = sums
    return Gradients(
        loss=loss,
        reported=reported / weight,
        weight=weight,
        grads=grads,
        observations=observations,
        aux=aux,
        losses=losses,
    )


def _passes(config, model, state, mode, override, weight, tokens):
    """What is done with a micro-batch.

    Args:
      config: the config.
      model: the code.
      state: of the step.
      mode: of the model.
      override: of the routers.
      weight: () float, scored tokens or images of the step.
      tokens: () float, routed tokens or images of the step.

    Returns:
      `(router_state, micro-batch, its index) -> Loss`, and of the same arguments its
      part of loss, reported loss, model's losses, gradients, observations and aux of
      the step.
    """
    params, frozen = state.params, state.frozen
    if config.train.gather_once:
        with jax.named_scope("gathered_once"):
            params, frozen = (module.gathered(p, model) for p in (params, frozen))
    forward = _forward(config, model, state, frozen, mode, override)

    def total(params, router_state, micro, index):
        found = forward(params, router_state, micro, index)
        share = 1.0 if config.train.accumulation == 1 else _tokens(micro) / tokens
        aux = _weighted(found.aux, share)
        losses = {name: share * value for name, value in found.losses.items()}
        value = found.sum / weight + aux_loss(aux) + sum(losses.values())
        return value, (found.reported, losses, found.observations, aux)

    gradient = _with_gradient(model, state.params, params, total)

    def one(*given):
        (value, (reported, losses, *more)), grads = gradient(*given)
        return value, reported, losses, grads, *more

    return functools.partial(forward, params), one


def _with_step_load(model, forward, router_state, micros, count):
    """The router state with what a first pass over all micro-batches observes."""
    observed = lambda m, i: forward(router_state, m, i).observations
    seen = _sum_over(observed, micros, count, _add)
    return model.with_step_load(router_state, seen)


def _with_gradient(model, params, values, total):
    """`(*given) -> (value and aux of total(params, *given), gradient)`.

    The gradient is made in the slots of the weights.

    Args:
      model: the code.
      params: the parameters.
      values: the same, where they were gathered before.
      total: the function.
    """
    slots = module.slots(params, model.rounded, model.dtype)

    def of_slots(slots, *given):
        return total(module.slotted(values, slots), *given)

    def run(*given):
        found, grads = jax.value_and_grad(of_slots, has_aux=True)(slots, *given)
        # Sums over micro-batches, and the optimizer, need the digits of the weights.
        return found, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return run


def _forward(config, model, state, frozen, mode, override):
    """`(params, router_state, micro-batch, its index) -> Loss` at this step."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    average = None
    if config.objective.uses_average:
        average = optimizers.merge(state.ema, frozen)

    def forward(params, router_state, micro, index):
        return OBJECTIVES[type(config.objective)](
            config.objective,
            model,
            optimizers.merge(params, frozen),
            router_state,
            micro,
            key=jax.random.fold_in(key, index),
            mode=mode,
            override=override,
            average=average,
        )

    return forward


def _tokens(batch: Batch) -> jax.Array:
    """Tokens, or images, that are routed, () int32."""
    counted = batch["segments"] if "segments" in batch else batch["weights"]
    return jnp.sum(counted > 0, dtype=jnp.int32)


def _sum_over(one, micros: Batch, count: int, add) -> Any:
    """`one(micro-batch, index)` summed over the micro-batches by `add`."""
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(lambda m: one(m, 0), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    body = lambda sums, item: (add(sums, one(*item)), None)
    return jax.lax.scan(body, zeros, (micros, jnp.arange(count)))[0]


def _add(total: Any, new: Any) -> Any:
    return jax.tree.map(jnp.add, total, new)


def _add_results(total: Any, new: Any) -> Any:
    """Sums of two micro-batches' results; of rounds and fill the larger."""
    summed = _add(total, new)
    *rest, aux = summed
    if aux is None:
        return summed
    a, b = total[-1].stats, new[-1].stats
    stats = dataclasses.replace(
        aux.stats,
        rounds=jnp.maximum(a.rounds, b.rounds),
        peak_fill=jnp.maximum(a.peak_fill, b.peak_fill),
        capacity=b.capacity,
        mean_fill=b.mean_fill,
    )
    return (*rest, dataclasses.replace(aux, stats=stats))


def _weighted(aux: MoEAux | None, share: jax.Array | float) -> MoEAux | None:
    """Means over a micro-batch times its share of the step's tokens; counts stay."""
    if aux is None:
        return None
    scale = lambda x: x * share if jnp.issubdtype(x.dtype, jnp.floating) else x
    return dataclasses.replace(
        aux,
        losses=jax.tree.map(scale, aux.losses),
        health=jax.tree.map(scale, aux.health),
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
    guard = lambda new, old: jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, old
    )
    if optimizers.in_turns(config):
        clip = optimizers.clip(config.optimizer)
        grads, _ = clip.update(found.grads, clip.init(state.params))
        on_host = config.train.offload_optimizer
        params, opt_state = turns.update(
            optimizer, grads, state, finite, on_host=on_host
        )
    else:
        updates, opt_state = optimizer.update(
            found.grads, state.opt_state, state.params, step=state.step
        )
        params = guard(optax.apply_updates(state.params, updates), state.params)
        opt_state = guard(opt_state, state.opt_state)
    ema = state.ema
    if ema is not None:
        decay = config.train.ema_decay
        mean = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)
        ema = guard(mean, ema)
    router_state = model.update_router_state(state.router_state, found.observations)
    return TrainState(
        step=state.step + 1,
        params=params,
        frozen=state.frozen,
        opt_state=opt_state,
        router_state=guard(router_state, state.router_state),
        ema=ema,
    ), norm


def step_metrics(
    model: Model, found: Gradients, norm: jax.Array, rate: jax.Array, router_state: Any
) -> Metrics:
    """What a step reports; arrays (L, E) and scalars."""
    metrics = {
        "loss": found.reported,
        "total_loss": found.loss,
        "scored": found.weight,
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": ~(jnp.isfinite(norm) & jnp.isfinite(found.loss)),
    }
    metrics |= found.losses
    if found.aux is not None:
        metrics |= {name: jnp.sum(v) for name, v in found.aux.losses.items()}
        metrics |= health.of_step(found.aux, router_state, model.expert_axes)
    return metrics


def make_step(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    shardings: TrainState,
    compiler_options: dict[str, str],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the state that goes in is donated."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        found = compute_gradients(config, model, state, batch)
        with jax.named_scope("optimizer"):
            new, norm = apply_gradients(config, model, optimizer, state, found)
        rate = config.optimizer.learning_rate * schedule(state.step)
        return new, step_metrics(model, found, norm, rate, new.router_state)

    # Without explicit output shardings the moments come back replicated.
    # Metrics are replicated, so that every host can read them.
    places = (shardings, shardings.step)
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=places,
        compiler_options=compiler_options,
    )
