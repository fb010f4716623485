"""Text from a decoder: a KV cache, and sampling with temperature, top-k and top-p."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.base import TokenInputs
from moe_jax.models.decoder import DecoderModel
from moe_jax.moe.routing import EVAL
from moe_jax.parallel import rules
from moe_jax.tree import struct


@struct(static=("temperature", "top_k", "top_p"))
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw from the k most likely tokens; 0: from all.
      top_p: draw from the fewest tokens whose probabilities reach p (Holtzman et al.
        2020); 1: from all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits (B, V) with -inf where top-k and top-p forbid a token."""
    if sampling.top_k:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits >= smallest[..., -1:], logits, -jnp.inf)
    if sampling.top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token stays where those before it have not reached p: one always does.
        before = jnp.cumsum(probs, axis=-1) - probs
        keep = jnp.take_along_axis(
            before < sampling.top_p, jnp.argsort(order, axis=-1), axis=-1
        )
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row: (B, V) -> (B,) int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=4)
def _advance(
    model: DecoderModel,
    params,
    router_state,
    tokens,
    cache,
    start,
    key,
    limit,
    sampling,
):
    """Feeds tokens (B, n) at position `start`; draws the token after them (B,)."""
    batch, count = tokens.shape
    positions = start + jnp.arange(count, dtype=jnp.int32)
    inputs = TokenInputs(
        tokens=tokens,
        positions=jnp.broadcast_to(positions, (batch, count)),
        segments=jnp.ones((batch, count), jnp.int32),
    )
    hidden, cache = model.decode(params, router_state, inputs, cache, start, mode=EVAL)
    logits = model.logits(params, hidden[:, -1:])[:, 0]
    logits = jnp.where(jnp.arange(logits.shape[-1]) < limit, logits, -jnp.inf)
    key = jax.random.fold_in(key, start + count)
    # Every process reads all rows.
    return rules.constrain(sample(logits, key, sampling), None), cache


def stream(
    model: DecoderModel,
    params: Any,
    router_state: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    vocab_size: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the tokens of all texts, one position at a time.

    All rows advance together: a row whose prompt is longer than the shortest is fed
    the rest of its prompt token by token.

    Args:
      model: the decoder.
      params: its parameters.
      router_state: of the model.
      prompts: token ids, at least one each.
      max_new_tokens: drawn after the longest prompt.
      sampling: how.
      seed: of the draws.
      vocab_size: ids from here on are never drawn (padding of the matrix); 0: V.

    Yields:
      (B,) int32 for each position from the end of the shortest prompt on.
    """
    lengths = [len(p) for p in prompts]
    if not prompts or min(lengths) < 1:
        raise ValueError("every prompt needs at least one token")
    shortest, longest = min(lengths), max(lengths)
    total = longest + max_new_tokens
    limit = vocab_size or model.options.vocab_size
    key = jax.random.key(seed)
    cache = model.init_cache(len(prompts), total)
    given = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = prompt
    fed, start = given[:, :shortest], 0
    for position in range(shortest, total):
        drawn, cache = _advance(
            model, params, router_state, fed, cache, jnp.int32(start), key, limit,
            sampling,
        )  # fmt: skip
        start = position
        chosen = np.asarray(drawn)
        if position < longest:
            in_prompt = position < np.array(lengths)
            chosen = np.where(in_prompt, given[:, position], chosen)
        yield chosen
        fed = chosen[:, None]


def generate(
    model: DecoderModel,
    params: Any,
    router_state: Any,
    prompts: Sequence[Sequence[int]],
    **options: Any,
) -> list[list[int]]:
    """The texts of `stream` whole: prompt and what follows, one list of ids each."""
    shortest = min(len(p) for p in prompts)
    columns = list(stream(model, params, router_state, prompts, **options))
    return [
        [*prompt[:shortest], *(int(column[row]) for column in columns)]
        for row, prompt in enumerate(prompts)
    ]
