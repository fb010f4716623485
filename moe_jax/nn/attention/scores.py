"""Attention by the formula: all scores at once. The reference for the others."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn.attention.common import (
    ATTENDED,
    PLAIN,
    Scoring,
    Segments,
    masked_out,
    score_dtype,
)


@config.node
class Scores(config.AttentionConfig):
    """Softmax over an array of all scores, (B, H, S, S).

    The fastest for short rows. Its memory grows with the square of their length.
    """


def attend(
    options: Scores,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """See `ATTENTIONS`."""
    mask = segments.mask(scoring)
    return checkpoint_name(masked(q, k, v, mask, scoring), ATTENDED)


def masked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Attention with any mask, as decoding with a cache needs it.

    Args:
      q: (B, S, H, Dh), scaled; H a multiple of Hkv.
      k: (B, M, Hkv, Dh).
      v: (B, M, Hkv, Dv).
      mask: (B, S, M) bool; a row without any True gives a uniform mean.
      scoring: its cap and its sinks; the mask has the window.

    Returns:
      (B, S, H, Dv) in the type of q.
    """
    batch, length, heads, width = q.shape
    groups, dtype = k.shape[2], score_dtype(q)
    q = q.reshape(batch, length, groups, heads // groups, width)
    logits = jnp.einsum("bsgrh,bmgh->bgrsm", q, k, preferred_element_type=dtype)
    if scoring.softcap:
        logits = scoring.softcap * jnp.tanh(logits / scoring.softcap)
    logits = jnp.where(mask[:, None, None], logits, masked_out(dtype))
    weights = _softmax(logits, scoring.sinks).astype(v.dtype)
    mixed = jnp.einsum("bgrsm,bmgh->bsgrh", weights, v)
    return mixed.reshape(batch, length, heads, v.shape[-1])


def _softmax(logits: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Over the last axis of (B, Hkv, H / Hkv, S, M), where sinks take their part."""
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sinks = sinks.astype(logits.dtype).reshape(*logits.shape[1:3], 1, 1)
    last = jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))
    with_sinks = jnp.concatenate([logits, last], axis=-1)
    return jax.nn.softmax(with_sinks, axis=-1)[..., :-1]
