"""From tokens to a routing: noise, scorer, selector, in the global view."""

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx

from moe_jax import config
from moe_jax.moe.noises.base import Noise
from moe_jax.moe.routing import Array, Mixing, Mode, Override, Routing, Tokens
from moe_jax.moe.selectors import SELECTORS, common

# Two methods that draw from one key would be correlated.
_SCORER, _SELECTOR, _FEATURES, _LOGITS, _CHOICE = range(5)


def route(
    scorer: nnx.Module,
    noise: Noise | None,
    options: config.SelectorConfig,
    tokens: Tokens,
    state: Mapping[str, Array],
    carry: object,
    key: Array | None,
    mode: Mode,
    override: Override | None,
) -> tuple[Routing | Mixing, object]:
    """Scores and selects; returns the routing and the scorer's carry.

    Where a noise replaces the choice, the selector is asked again with that choice as
    a replay: it knows how to weigh it.

    Raises:
      ValueError: noise in training without a key.
    """
    fold = lambda room: None if key is None else jax.random.fold_in(key, room)
    if noise is not None and mode.train and key is None:
        raise ValueError(f"{type(noise).__name__} draws in training: pass a key")
    noise = Noise() if noise is None else noise
    seen = noise.features(tokens, fold(_FEATURES), mode)
    logits, carry = scorer(seen, carry, fold(_SCORER), mode)
    noisy = noise.logits(logits, seen, fold(_LOGITS), mode)
    select = lambda override: SELECTORS[type(options)](
        options,
        logits if noisy is None else noisy[0],
        tokens,
        state,
        mode,
        override,
        fold(_SELECTOR),
    )
    routing = select(override)
    chosen_tk = noise.choice(routing, tokens, override, fold(_CHOICE), mode)
    if chosen_tk is not None:
        replay = dict(expert_tk=chosen_tk, valid_tk=routing.valid_tk)
        given = Override() if override is None else override
        routing = select(dataclasses.replace(given, **replay))
    if noisy is not None:
        routing = dataclasses.replace(
            routing,
            logits_te=common.adjusted(logits, override),
            noisy_te=routing.logits_te,
            noise_std=noisy[1],
        )
    return routing, carry
