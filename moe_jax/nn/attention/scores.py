"""Attention by the formula: all scores at once. The reference for the others."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import config
from moe_jax.nn.attention.common import ATTENDED, Segments, masked_out, score_dtype


@config.node
class Scores(config.AttentionConfig):
    """Softmax over an array of all scores, (B, H, S, S).

    The fastest for short rows. Its memory grows with the square of their length.
    """


def attend(
    options: Scores, q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments
) -> jax.Array:
    """See `ATTENTIONS`."""
    return checkpoint_name(masked(q, k, v, segments.mask()), ATTENDED)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention with any mask, as decoding with a cache needs it.

    Args:
      q: (B, S, H, Dh), scaled; k, v: (B, M, Hkv, Dh) with H a multiple of Hkv.
      k: keys.
      v: values.
      mask: (B, S, M) bool; a row without any True gives a uniform mean.

    Returns:
      (B, S, H, Dh) in the type of q.
    """
    batch, length, heads, width = q.shape
    groups, dtype = k.shape[2], score_dtype(q)
    q = q.reshape(batch, length, groups, heads // groups, width)
    logits = jnp.einsum("bsgrh,bmgh->bgrsm", q, k, preferred_element_type=dtype)
    logits = jnp.where(mask[:, None, None], logits, masked_out(dtype))
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bgrsm,bmgh->bsgrh", weights, v)
    return mixed.reshape(batch, length, heads, width)
